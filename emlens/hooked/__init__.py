"""One interface to a hooked model, and what is measured on its hidden states."""

from emlens.hooked.condition import (
    BASE,
    Acting,
    Altered,
    Condition,
    ConditionLike,
    Conditions,
    condition_of,
    conditions_of,
)
from emlens.hooked.edit import Edit, Formula, Where, deepest_prefix, where_mask
from emlens.hooked.finite import NonFiniteError, check_finite
from emlens.hooked.generation import Answer, Sampling, answer
from emlens.hooked.head import Head
from emlens.hooked.hook_plan import Pool
from emlens.hooked.identity import digest_of, identities
from emlens.hooked.load import ENGINES, load, wrap
from emlens.hooked.lora_scaling import Noisy, Scaled, adapter_norms, noisy_weights
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
from emlens.hooked.options import BatchOptions, CorpusOptions, ReadOptions, SamplingOptions
from emlens.hooked.recompute import gradient_checkpointing
from emlens.hooked.sites import (
    SITES,
    Layers,
    Site,
    SiteName,
    check_layers,
    check_site,
    hook_name,
    named_layers,
)
from emlens.hooked.sweep import sweep

__all__ = [
    "BASE",
    "ENGINES",
    "SITES",
    "Acting",
    "Altered",
    "Answer",
    "BaseLogProbs",
    "BatchOptions",
    "Condition",
    "ConditionLike",
    "Conditions",
    "CorpusOptions",
    "Edit",
    "Formula",
    "Head",
    "HookedModel",
    "Layers",
    "Noisy",
    "NonFiniteError",
    "Pool",
    "ReadOptions",
    "Resume",
    "Sampling",
    "SamplingOptions",
    "Scaled",
    "Site",
    "SiteName",
    "Targets",
    "Where",
    "adapter_norms",
    "answer",
    "check_finite",
    "check_layers",
    "named_layers",
    "check_site",
    "condition_of",
    "conditions_of",
    "deepest_prefix",
    "digest_of",
    "gradient_checkpointing",
    "identities",
    "hook_name",
    "kl_sum",
    "load",
    "loss_sum",
    "noisy_weights",
    "response_losses",
    "sweep",
    "token_kl",
    "token_losses",
    "token_scores",
    "where_mask",
    "wrap",
]
