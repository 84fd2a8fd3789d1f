"""From settings to a plan, from a plan to a small network, from a network to a file."""
