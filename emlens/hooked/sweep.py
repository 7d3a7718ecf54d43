"""Many edits of one batch for the price of one prefix.

Below the lowest layer that any of several edits touches, the forward pass is the same for all
of them; it runs once, and each edit runs only the blocks above.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from emlens.hooked.edit import Edit
from emlens.hooked.model import HookedModel
from emlens.text import TokenBatch

Conditions = Mapping[str, Sequence[Edit]]
"""Named sets of edits. An empty set is the untouched model."""


@torch.no_grad()
def sweep_hidden(
    model: HookedModel, batch: TokenBatch, conditions: Conditions
) -> Iterator[tuple[str, Float[Tensor, "batch pos d_model"]]]:
    """Yield the final hidden states under each condition, sharing the unedited prefix.

    The numbers are those of `model.hidden(batch, edits)`, one condition after the other; only
    one condition's states are held at a time.
    """
    batch = batch.to(model.device)
    depths = {name: model.prefix_layer(edits) for name, edits in conditions.items()}
    wanted = sorted({depth for depth in depths.values() if depth is not None and depth >= 0})
    kept = model.prefix(batch, wanted) if wanted else {}
    for name, edits in conditions.items():
        depth = depths[name]
        if depth is None and wanted:
            depth = wanted[-1]
        resume = (depth, kept[depth]) if depth is not None and depth in kept else None
        yield name, model.hidden(batch, edits, resume)
