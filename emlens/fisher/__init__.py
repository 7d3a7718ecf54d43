"""The influence of any direction at any layer on a text, from one pass over it."""

from emlens.fisher.profile import InfluenceProfile
from emlens.fisher.results import ProfileScores, Spectrum, TopDirections
from emlens.fisher.scan import InfluenceScan, scan

__all__ = [
    "InfluenceProfile",
    "InfluenceScan",
    "ProfileScores",
    "Spectrum",
    "TopDirections",
    "scan",
]


def __dir__() -> list[str]:
    return list(__all__)
