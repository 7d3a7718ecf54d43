"""Many edits of one batch for the price of one prefix, with adapters where conditions name them.

Below the lowest layer that any of several edits touches, the forward pass is the same for all
of them; it runs once, and each edit runs only the blocks above.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

from emlens.hooked.adapters import Adapters
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
    """Yield the final hidden states under each condition, sharing what is the same below.

    An adapter that is limited to some layers leaves the base's states below them, so that several
    adapters share these as well. The numbers are those of `model.hidden(batch, edits)`, one
    condition after the other; only one condition's states are held at a time.
    """
    batch = batch.to(model.device)
    plan = _plan(model, conditions)
    kept: dict[object, dict[int, Tensor]] = {}
    for name, condition in conditions.items():
        adapter, edits = parts_of(condition)
        source, depth = plan[name]
        if source not in kept:
            depths = {at for of, at in plan.values() if of == source and at is not None}
            wanted = sorted(depth for depth in depths if depth >= 0)
            with _acting(model, source):
                kept[source] = model.prefix(batch, wanted) if wanted else {}
        if depth is None and kept[source]:
            depth = max(kept[source])
        resume = None
        if depth is not None and depth in kept[source]:
            resume = depth, kept[source][depth]
        with _acting(model, adapter):
            hidden = model.hidden(batch, edits, resume)
        yield name, hidden


def _plan(model: HookedModel, conditions: Conditions) -> dict[str, tuple[object, int | None]]:
    """Whose states each condition goes on from, and the layer it does so after (None: any)."""
    parts = {name: parts_of(condition) for name, condition in conditions.items()}
    if all(adapter is _AS_IT_IS for adapter, _ in parts.values()):
        return {name: (_AS_IT_IS, model.prefix_layer(edits)) for name, (_, edits) in parts.items()}
    standing = _AS_IT_IS if model.active_adapter else None
    acting = {n: standing if adapter is _AS_IT_IS else adapter for n, (adapter, _) in parts.items()}
    times = Counter(acting.values())
    plan: dict[str, tuple[object, int | None]] = {}
    for name, (_, edits) in parts.items():
        adapter, depth = acting[name], model.prefix_layer(edits)
        if not isinstance(adapter, str) or times[adapter] > 1:
            plan[name] = adapter, depth
        else:
            below = Adapters(model.module).lowest_block(adapter, model.architecture) - 1
            plan[name] = None, below if depth is None else min(depth, below)
    return plan


@contextmanager
def _acting(model: HookedModel, adapter: object) -> Iterator[None]:
    if adapter is _AS_IT_IS:
        yield
        return
    with model.adapter(adapter):  # type: ignore[arg-type]
        yield
