"""Any network, run in pieces."""
