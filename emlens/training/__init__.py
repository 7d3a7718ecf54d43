"""One objective, one loop: vectors trained in place, and the path they take."""

from emlens.training.run import Step, TrainingRun, TrainingStopped
from emlens.training.settings import KLPenalty, VectorSettings, paper_kl_weight
from emlens.training.vector import train_vector

__all__ = [
    "KLPenalty",
    "Step",
    "TrainingRun",
    "TrainingStopped",
    "VectorSettings",
    "paper_kl_weight",
    "train_vector",
]
