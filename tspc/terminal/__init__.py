"""The output that the user sees during a run."""
