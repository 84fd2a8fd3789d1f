"""Training and evaluation of any network."""

from tspc.training.confidence import Drop
from tspc.training.evaluation import Accuracy, accuracy, evaluate, judged, measure
from tspc.training.held_out import HeldOut
from tspc.training.loop import Batches, Hardware, Labelled, LossOf, Step, Watchers, fit
from tspc.training.metrics import AGREEMENT, METRICS, TOP1, Again, Metric, Score, drop, losses, metric_of, name_problem
from tspc.training.placement import Trial, place, tried
from tspc.training.progress import Progress
from tspc.training.recipe import OPTIMIZERS, SCHEDULES, Recipe
from tspc.training.tasks import Task, relative_error

__all__ = [
    "AGREEMENT",
    "Accuracy",
    "Again",
    "Batches",
    "Drop",
    "Hardware",
    "HeldOut",
    "Labelled",
    "LossOf",
    "METRICS",
    "Metric",
    "OPTIMIZERS",
    "Progress",
    "Recipe",
    "SCHEDULES",
    "Score",
    "Step",
    "TOP1",
    "Task",
    "Trial",
    "Watchers",
    "accuracy",
    "drop",
    "evaluate",
    "fit",
    "judged",
    "losses",
    "measure",
    "metric_of",
    "name_problem",
    "place",
    "relative_error",
    "tried",
]
