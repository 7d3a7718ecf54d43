"""Several conditions of one batch share the computation below their lowest layer.

Below the lowest layer that any of several conditions touches, the forward pass is the same for
all of them; it runs once, and each condition runs only the blocks above.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from emlens._door import guarded
from emlens.hooked.condition import Acting, Condition, ConditionLike, K, conditions_of
from emlens.hooked.head import Head
from emlens.hooked.model import HookedModel
from emlens.text import TokenBatch


@torch.no_grad()
@guarded
def sweep(
    model: HookedModel, batch: TokenBatch, conditions: Mapping[K, ConditionLike]
) -> Iterator[tuple[K, Float[Tensor, "batch pos d_model"], Head]]:
    """Yield the final hidden states under each condition, with the LM head they belong to.

    Layers below all changes are computed once; adapters limited to some layers share the base's
    states below these as well. The numbers equal those of running the conditions one by one; the
    states of one condition at a time are held in memory.

    Args:
        model: The model.
        batch: Tokens, `[batch, pos]`.
        conditions: Named conditions.

    Examples:
        >>> for name, hidden, head in sweep(model, batch, {"base": None, "medical": "medical"}):
        ...     losses = token_losses(head, targets.predictors(hidden), targets.ids)
    """
    batch = batch.to(model.device)
    named = conditions_of(model, conditions)
    plan = _plan(model, named)
    kept: dict[tuple[Acting, ...] | None, dict[int, Tensor]] = {}
    for name, condition in named.items():
        source, depth = plan[name]
        if source not in kept:
            depths = {at for of, at in plan.values() if of == source and at is not None}
            wanted = sorted(depth for depth in depths if depth >= 0)
            with model.under(Condition(source, name=condition.name)):
                kept[source] = model.prefix(batch, wanted) if wanted else {}
        if depth is None and kept[source]:
            depth = max(kept[source])
        resume = None
        if depth is not None and depth in kept[source]:
            resume = depth, kept[source][depth]
        with model.under(condition):
            hidden, head = model.hidden(batch, resume=resume), model.head()
        yield name, hidden, head


def _plan(
    model: HookedModel, conditions: Mapping[K, Condition]
) -> dict[K, tuple[tuple[Acting, ...] | None, int | None]]:
    """Whose states each condition starts from, and the layer it does so after (None: any)."""
    times = Counter(condition.adapters for condition in conditions.values())
    plan: dict[K, tuple[tuple[Acting, ...] | None, int | None]] = {}
    for name, condition in conditions.items():
        depth = model.prefix_layer(condition.edits)
        if condition.adapters is None or times[condition.adapters] > 1:
            plan[name] = condition.adapters, depth
        else:
            below = min(map(model.lowest_block, condition.names)) - 1
            plan[name] = None, below if depth is None else min(depth, below)
    return plan
