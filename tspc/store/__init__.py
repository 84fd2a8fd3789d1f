"""What lies on disk: whole files, run directories, records."""
