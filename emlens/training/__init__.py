"""One objective, one loop: vectors and adapters, sweeps, organisms, and the path they take."""

from emlens.training import presets
from emlens.training.adapter import random_adapter, train_adapter
from emlens.training.drift import Drift, continue_training, drift
from emlens.training.options import AdapterOptions, SolutionOptions, VectorOptions, WeightOptions
from emlens.training.organism import Organism
from emlens.training.paths.path import TrainingPath
from emlens.training.paths.read import read_path
from emlens.training.paths.trajectory import Trajectory, trajectory
from emlens.training.presets import mixed
from emlens.training.run import TrainingRun, TrainingStopped
from emlens.training.settings import (
    AdapterSettings,
    AnchorPenalty,
    KLPenalty,
    NormPenalty,
    ProjectionPenalty,
    VectorSettings,
    WeightSettings,
    paper_kl_weight,
)
from emlens.training.sweep import KLSweep, auto_kl, sweep_kl
from emlens.training.vector import train_vector
from emlens.training.weights import train_weights

__all__ = [
    "AdapterOptions",
    "AdapterSettings",
    "AnchorPenalty",
    "Drift",
    "KLPenalty",
    "KLSweep",
    "NormPenalty",
    "Organism",
    "ProjectionPenalty",
    "SolutionOptions",
    "TrainingPath",
    "TrainingRun",
    "TrainingStopped",
    "Trajectory",
    "VectorOptions",
    "VectorSettings",
    "WeightOptions",
    "WeightSettings",
    "auto_kl",
    "continue_training",
    "drift",
    "mixed",
    "paper_kl_weight",
    "presets",
    "random_adapter",
    "read_path",
    "sweep_kl",
    "train_adapter",
    "train_vector",
    "train_weights",
    "trajectory",
]


def __dir__() -> list[str]:
    return list(__all__)
