"""One interface to a hooked model, and what is measured on its hidden states."""

from emlens.hooked.condition import Condition
from emlens.hooked.delta_patching import patched_deltas
from emlens.hooked.edit import Edit
from emlens.hooked.finite import NonFiniteError
from emlens.hooked.load import load, wrap
from emlens.hooked.lora_scaling import Noisy, Scaled, adapter_norms
from emlens.hooked.losses import (
    BaseLogProbs,
    response_losses,
    token_kl,
)
from emlens.hooked.model import HookedModel
from emlens.hooked.options import BatchOptions, CorpusOptions, ReadOptions, SamplingOptions

__all__ = [
    "BaseLogProbs",
    "BatchOptions",
    "Condition",
    "CorpusOptions",
    "Edit",
    "HookedModel",
    "Noisy",
    "NonFiniteError",
    "ReadOptions",
    "SamplingOptions",
    "Scaled",
    "adapter_norms",
    "load",
    "patched_deltas",
    "response_losses",
    "token_kl",
    "wrap",
]


def __dir__() -> list[str]:
    return list(__all__)
