"""The names of the goals, by kind. Imports nothing heavy, because the command checks goals before it starts PyTorch."""

SIZES = ("rate", "target_error", "size")
"""Goals that say how small the network becomes."""
TIMES = ("latency", "speedup")
"""Goals that say how fast it becomes."""
DROP = "max_drop"
"""The goal that says how much it may lose."""
GOALS = (*SIZES, DROP, *TIMES)
KINDS = (SIZES, (DROP,), TIMES)
"""A plan has one goal, or two of different kinds."""
