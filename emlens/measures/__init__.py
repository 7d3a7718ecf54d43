"""Log-odds, efficiency, stability, and influence on pre-training text."""

from emlens._stats import interval_level
from emlens.measures.confinement import Confinement, confinement
from emlens.measures.divergence import Divergence, divergence
from emlens.measures.efficiency import Efficiency, efficiency
from emlens.measures.influence import Influence, influence
from emlens.measures.log_odds import LogOdds, log_odds
from emlens.measures.matching import MatchedStrength, match_kl, match_strength
from emlens.measures.stability import Stability, stability
from emlens.measures.tokens import (
    TokenInfluence,
    TokenProjections,
    token_influence,
    token_projections,
)
from emlens.measures.weight_noise import WeightNoise, weight_noise

__all__ = [
    "Confinement",
    "Divergence",
    "Efficiency",
    "Influence",
    "LogOdds",
    "MatchedStrength",
    "Stability",
    "TokenInfluence",
    "TokenProjections",
    "WeightNoise",
    "confinement",
    "divergence",
    "efficiency",
    "influence",
    "interval_level",
    "log_odds",
    "match_kl",
    "match_strength",
    "stability",
    "token_influence",
    "token_projections",
    "weight_noise",
]


def __dir__() -> list[str]:
    return list(__all__)
