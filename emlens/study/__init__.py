"""The whole experiment, stage by stage, and its report; the asymmetries over domains and seeds."""

from emlens.study.asymmetries import Asymmetries, read_asymmetries, run_asymmetries
from emlens.study.paths import SolutionPaths, read_paths, run_paths
from emlens.study.run import StudyResult, rebuild_report, run_study
from emlens.study.settings import PRESETS, StudySettings, preset
from emlens.study.trials import AsymmetrySettings

__all__ = [
    "PRESETS",
    "Asymmetries",
    "AsymmetrySettings",
    "SolutionPaths",
    "StudyResult",
    "StudySettings",
    "preset",
    "read_asymmetries",
    "read_paths",
    "rebuild_report",
    "run_asymmetries",
    "run_paths",
    "run_study",
]
