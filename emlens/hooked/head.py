"""The LM head of a condition, which stays that of the condition after it has been left."""

from __future__ import annotations

import sys

from jaxtyping import Float
from torch import Tensor, nn

from emlens.hooked.condition import Condition
from emlens.hooked.interface import Hooked


class Head:
    """The LM head under the adapters that act where it is taken, whatever acts when it runs.

    Hidden states of a condition belong to its head: an adapter may have a head of its own
    (`modules_to_save`, or LoRA on it).

    Args:
        model: The model, under the condition that the hidden states are of.
    """

    def __init__(self, model: Hooked) -> None:
        self._model = model
        self._adapters = None
        if adapted(model.module.get_output_embeddings()):
            self._adapters = model.adapters_in_force

    @property
    def n_vocab(self) -> int:
        return self._model.n_vocab

    def unembed(self, hidden: Float[Tensor, "n d_model"]) -> Float[Tensor, "n vocab"]:
        """Return the logits of final hidden states in fp32, soft cap and scale included."""
        model = self._model
        if self._adapters is None or self._adapters == model.adapters_in_force:
            return model.unembed(hidden)
        with model.under(Condition(self._adapters)):
            return model.unembed(hidden)


def adapted(module: nn.Module | None) -> bool:
    """Whether PEFT has put a layer of its own into the place of a module, or inside of it."""
    if module is None or "peft" not in sys.modules:
        return False
    return any(type(part).__module__.partition(".")[0] == "peft" for part in module.modules())
