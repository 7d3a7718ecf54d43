"""Many edits of one batch for the price of one prefix, with adapters where conditions name them.

Below the lowest layer that any of several edits touches, the forward pass is the same for all
of them; it runs once, and each edit runs only the blocks above.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

from emlens.hooked.edit import Edit
from emlens.hooked.model import HookedModel
from emlens.text import TokenBatch

Condition = Sequence[Edit] | str | tuple[str | None, Sequence[Edit]]
"""Edits; or the name of an adapter; or both, where None is the base without adapters."""

Conditions = Mapping[str, Condition]
"""Named conditions. An empty set of edits is the model as it stands."""

_AS_IT_IS = object()


def parts_of(condition: Condition) -> tuple[object, Sequence[Edit]]:
    """The adapter of a condition (or a mark for none named), and its edits."""
    if isinstance(condition, str):
        return condition, ()
    if isinstance(condition, tuple) and len(condition) == 2:
        adapter, edits = condition
        if adapter is None or isinstance(adapter, str):
            return adapter, edits  # type: ignore[return-value]
    return _AS_IT_IS, condition  # type: ignore[return-value]


@contextmanager
def under(model: HookedModel, condition: Condition) -> Iterator[Sequence[Edit]]:
    """Let a condition's adapter act inside the block, and give its edits.

    Example:
        >>> with under(model, ("finance", [emlens.Ablate(direction)])) as edits:
        ...     model.generate(questions, edits)
    """
    adapter, edits = parts_of(condition)
    with _acting(model, adapter):
        yield edits


@torch.no_grad()
def sweep_hidden(
    model: HookedModel, batch: TokenBatch, conditions: Conditions
) -> Iterator[tuple[str, Float[Tensor, "batch pos d_model"]]]:
    """Yield the final hidden states under each condition, sharing the unedited prefix.

    The numbers are those of `model.hidden(batch, edits)`, one condition after the other; only
    one condition's states are held at a time.
    """
    batch = batch.to(model.device)
    parts = {name: parts_of(condition) for name, condition in conditions.items()}
    kept: dict[object, dict[int, Tensor]] = {}
    for name, (adapter, edits) in parts.items():
        with _acting(model, adapter):
            if adapter not in kept:
                depths = [model.prefix_layer(e) for a, e in parts.values() if a == adapter]
                wanted = sorted({depth for depth in depths if depth is not None and depth >= 0})
                kept[adapter] = model.prefix(batch, wanted) if wanted else {}
            depth = model.prefix_layer(edits)
            if depth is None and kept[adapter]:
                depth = max(kept[adapter])
            resume = None
            if depth is not None and depth in kept[adapter]:
                resume = depth, kept[adapter][depth]
            hidden = model.hidden(batch, edits, resume)
        yield name, hidden


@contextmanager
def _acting(model: HookedModel, adapter: object) -> Iterator[None]:
    if adapter is _AS_IT_IS:
        yield
        return
    with model.adapter(adapter):  # type: ignore[arg-type]
        yield
