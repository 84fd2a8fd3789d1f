"""Everything on disk: whole files, run directories, records."""
