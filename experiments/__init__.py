"""The authors' own runs, behind `docs/findings.md`; they are not part of the installed package."""

from experiments.asymmetries import Asymmetries, read_asymmetries, run_asymmetries
from experiments.paths import SolutionPaths, read_paths, run_paths
from experiments.trials import AsymmetrySettings

__all__ = [
    "Asymmetries",
    "AsymmetrySettings",
    "SolutionPaths",
    "read_asymmetries",
    "read_paths",
    "run_asymmetries",
    "run_paths",
]
