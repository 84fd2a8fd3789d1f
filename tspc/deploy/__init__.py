"""Export to files that run without tspc, folding for inference, and the cost of a forward pass."""

from tspc.deploy.cost import Cost, cost
from tspc.deploy.exporting import ENDINGS, FORMATS, INT8, Exported, Exporter, check_formats, export
from tspc.deploy.programs import Inputs
from tspc.deploy.timing import RUNTIMES, Comparison, Timing, compare

__all__ = [
    "ENDINGS",
    "FORMATS",
    "INT8",
    "RUNTIMES",
    "Comparison",
    "Cost",
    "Exported",
    "Exporter",
    "Inputs",
    "Timing",
    "check_formats",
    "compare",
    "cost",
    "export",
]
