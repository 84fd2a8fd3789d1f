"""Training and evaluation of any network."""

from tspc.training.evaluation import Accuracy, accuracy, evaluate
from tspc.training.loop import Batches, Hardware, Labelled, LossOf, Step, Watchers, fit
from tspc.training.placement import Trial, place, tried
from tspc.training.progress import Progress
from tspc.training.recipe import OPTIMIZERS, SCHEDULES, Recipe

__all__ = [
    "OPTIMIZERS",
    "SCHEDULES",
    "Accuracy",
    "Batches",
    "Hardware",
    "Labelled",
    "LossOf",
    "Progress",
    "Recipe",
    "Step",
    "Trial",
    "Watchers",
    "accuracy",
    "evaluate",
    "fit",
    "place",
    "tried",
]
