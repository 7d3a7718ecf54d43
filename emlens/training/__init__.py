"""One objective, one loop: vectors and adapters, and the path that they take."""

from emlens.training.adapter import train_adapter
from emlens.training.run import Step, TrainingRun, TrainingStopped
from emlens.training.settings import (
    AdapterSettings,
    KLPenalty,
    NormPenalty,
    ProjectionPenalty,
    VectorSettings,
    paper_kl_weight,
)
from emlens.training.vector import train_vector

__all__ = [
    "AdapterSettings",
    "KLPenalty",
    "NormPenalty",
    "ProjectionPenalty",
    "Step",
    "TrainingRun",
    "TrainingStopped",
    "VectorSettings",
    "paper_kl_weight",
    "train_adapter",
    "train_vector",
]
