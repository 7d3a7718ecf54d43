"""One interface to a hooked model, and what is measured on its hidden states."""

from emlens.hooked.altered import (
    adapter_norms,
    noisy_adapter,
    noisy_weights,
    scaled_adapter,
    scaled_layers,
)
from emlens.hooked.edit import Edit, Formula, Where, deepest_prefix, where_mask
from emlens.hooked.generation import Answer, Sampling, answer
from emlens.hooked.load import ENGINES, load, wrap
from emlens.hooked.losses import (
    BaseLogProbs,
    Targets,
    kl_sum,
    loss_sum,
    response_losses,
    token_kl,
    token_losses,
    token_scores,
)
from emlens.hooked.model import HookedModel, Resume
from emlens.hooked.recompute import gradient_checkpointing
from emlens.hooked.sites import SITES, Layers, Site, SiteName, check_layers, check_site, hook_name
from emlens.hooked.sweep import Condition, Conditions, sweep_hidden, under
from emlens.hooked.visit import Pool

__all__ = [
    "ENGINES",
    "SITES",
    "Answer",
    "BaseLogProbs",
    "Condition",
    "Conditions",
    "Edit",
    "Formula",
    "HookedModel",
    "Layers",
    "Pool",
    "Resume",
    "Sampling",
    "Site",
    "SiteName",
    "Targets",
    "Where",
    "adapter_norms",
    "answer",
    "check_layers",
    "check_site",
    "deepest_prefix",
    "gradient_checkpointing",
    "hook_name",
    "kl_sum",
    "load",
    "loss_sum",
    "noisy_adapter",
    "noisy_weights",
    "response_losses",
    "scaled_adapter",
    "scaled_layers",
    "sweep_hidden",
    "token_kl",
    "token_losses",
    "token_scores",
    "under",
    "where_mask",
    "wrap",
]
