"""Log-odds, efficiency, stability, and influence on pre-training text."""

from emlens.measures.efficiency import Efficiency, efficiency
from emlens.measures.exact import Influence
from emlens.measures.influence import influence
from emlens.measures.log_odds import LogOdds, log_odds
from emlens.measures.monitor import Monitor, MonitorScores
from emlens.measures.monitor_transfer import TransferAuroc, transfer_auroc
from emlens.measures.profile import InfluenceProfile
from emlens.measures.profile_results import ProfileScores, Spectrum, TopDirections
from emlens.measures.roc import Roc
from emlens.measures.scan import InfluenceScan, scan
from emlens.measures.screen import Screen, screen
from emlens.measures.stability import Stability, perturbed, stability
from emlens.measures.tokens import (
    TokenInfluence,
    TokenProjections,
    token_influence,
    token_projections,
)
from emlens.measures.weight_noise import WeightNoise, weight_noise

__all__ = [
    "Efficiency",
    "Influence",
    "InfluenceProfile",
    "InfluenceScan",
    "LogOdds",
    "Monitor",
    "MonitorScores",
    "ProfileScores",
    "Roc",
    "Screen",
    "Spectrum",
    "Stability",
    "TopDirections",
    "TransferAuroc",
    "TokenInfluence",
    "TokenProjections",
    "WeightNoise",
    "efficiency",
    "influence",
    "log_odds",
    "perturbed",
    "scan",
    "screen",
    "stability",
    "transfer_auroc",
    "token_influence",
    "token_projections",
    "weight_noise",
]
