"""Export to files that run without tspc, folding for inference, and the cost of a forward pass."""

from tspc.deploy.calls import RUNTIMES, USUAL
from tspc.deploy.cost import Cost, cost
from tspc.deploy.exporting import ENDINGS, FORMATS, INT8, Exported, Exporter, check_formats, export
from tspc.deploy.graphs import Graphs
from tspc.deploy.programs import Inputs
from tspc.deploy.timing import Comparison, Timing, check_runtimes, compare, families

__all__ = [
    "ENDINGS",
    "FORMATS",
    "INT8",
    "RUNTIMES",
    "USUAL",
    "Comparison",
    "Cost",
    "Exported",
    "Exporter",
    "Graphs",
    "Inputs",
    "Timing",
    "check_formats",
    "check_runtimes",
    "compare",
    "cost",
    "export",
    "families",
]
