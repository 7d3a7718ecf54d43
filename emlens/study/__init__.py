"""The whole experiment, stage by stage, and its report."""

from emlens.study.run import StudyResult, run_study
from emlens.study.settings import StudySettings, preset

__all__ = [
    "StudyResult",
    "StudySettings",
    "preset",
    "run_study",
]


def __dir__() -> list[str]:
    return list(__all__)
