"""The stages of a run, each an ordinary function on networks."""
