"""One interface to a hooked model, and what is measured on its hidden states."""

from emlens.hooked.condition import BASE, Condition
from emlens.hooked.delta_patching import patched_deltas
from emlens.hooked.edit import Edit
from emlens.hooked.finite import NonFiniteError
from emlens.hooked.generation import Answer, Sampling, answer
from emlens.hooked.load import load, wrap
from emlens.hooked.lora_scaling import Noisy, Scaled, adapter_norms
from emlens.hooked.losses import (
    BaseLogProbs,
    kl_sum,
    loss_sum,
    response_losses,
    token_kl,
    token_losses,
)
from emlens.hooked.model import HookedModel
from emlens.hooked.options import BatchOptions, CorpusOptions, ReadOptions, SamplingOptions
from emlens.hooked.recompute import gradient_checkpointing
from emlens.hooked.sweep import sweep

__all__ = [
    "BASE",
    "Answer",
    "BaseLogProbs",
    "BatchOptions",
    "Condition",
    "CorpusOptions",
    "Edit",
    "HookedModel",
    "Noisy",
    "NonFiniteError",
    "ReadOptions",
    "Sampling",
    "SamplingOptions",
    "Scaled",
    "adapter_norms",
    "answer",
    "gradient_checkpointing",
    "kl_sum",
    "load",
    "loss_sum",
    "patched_deltas",
    "response_losses",
    "sweep",
    "token_kl",
    "token_losses",
    "wrap",
]


def __dir__() -> list[str]:
    return list(__all__)
