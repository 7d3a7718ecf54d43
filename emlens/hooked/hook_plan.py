"""One forward pass' worth of reads and edits, the same for every engine."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from emlens.hooked.edit import Edit, Where, where_mask
from emlens.hooked.sites import SITES, Site, check_site
from emlens.text import TokenBatch

Pool = Callable[[Tensor], Tensor]
"""Reduces a residual `[batch, pos, d_model]` on the device, inside the hook."""

Point = tuple[int, Site]


class Tap:
    """An edit that changes nothing and keeps the residual that it sees."""

    where: Where = "all"

    def __init__(self, layer: int, site: Site = "resid_post") -> None:
        self.site: Site = site
        self.layers: tuple[int, ...] = (layer,)
        self.seen = torch.empty(0)

    def delta(self, residual: Tensor, layer: int) -> Tensor:
        self.seen = residual
        return torch.zeros_like(residual)


class Visit:
    """The points a forward pass has to stop at, and what happens at each.

    An engine calls the visit with the tensor it finds at a point and puts back what it
    returns; where the visit returns the very same tensor nothing needs to be written. Edits
    act before reads, so a read at an edited point sees the edited residual.

    Args:
        edits: What to change.
        masks: Positions per `where`, `[batch, pos]`; None stands for all.
        reads: Layers to read.
        site: The site they are read at.
        pool: Applied to each read; the identity by default.

    Attributes:
        norms: Of the residual at each point, `[batch, pos]`, by the order of steps: a value that
            is not finite, or too large for a norm of the model to square, has none.
        logits: Sum of each row's logits at each step, `[batch]`, where a server decodes.
    """

    def __init__(
        self,
        edits: Sequence[Edit] = (),
        masks: Mapping[Where, Bool[Tensor, "batch pos"] | None] | None = None,
        reads: Iterable[int] = (),
        site: Site = "resid_post",
        pool: Pool | None = None,
    ) -> None:
        self.read: dict[int, Tensor] = {}
        self.norms: dict[Point, list[Tensor]] = {}
        self.logits: list[Tensor] | None = None
        self.masks = dict(masks or {})
        self.reads: set[Point] = {(layer, site) for layer in reads}
        self.pool = pool
        self.edits: dict[Point, list[Edit]] = defaultdict(list)
        for edit in edits:
            for layer in edit.layers:
                self.edits[layer, check_site(edit.site)].append(edit)
        self.points = _in_order(self.reads | set(self.edits))
        self.start = 0

    @classmethod
    def of(
        cls,
        batch: TokenBatch,
        edits: Sequence[Edit] = (),
        reads: Iterable[int] = (),
        site: Site = "resid_post",
        pool: Pool | None = None,
    ) -> Visit:
        """The visit of a teacher-forced batch."""
        masks: dict[Where, Bool[Tensor, "batch pos"] | None] = {
            edit.where: where_mask(batch, edit.where) for edit in edits
        }
        return cls(edits, masks, reads, site, pool)

    @classmethod
    def of_generation(cls, batch: TokenBatch, edits: Sequence[Edit], new_tokens: int) -> Visit:
        """The visit of a left-padded batch of prompts and of the tokens generated from it."""
        masks: dict[Where, Bool[Tensor, "batch pos"] | None] = {}
        for edit in edits:
            mask = where_mask(batch, edit.where)
            if mask is not None:
                if edit.where == "response":
                    mask[:, -1] = True
                tail = mask.new_full((len(mask), new_tokens), edit.where == "response")
                mask = torch.cat([mask, tail], dim=1)
            masks[edit.where] = mask
        return cls(edits, masks)

    def add(self, tap: Tap) -> None:
        """Keep a residual as it is after the edits there are."""
        for layer in tap.layers:
            self.edits[layer, tap.site].append(tap)
        self.points = _in_order(self.reads | set(self.edits))

    def starts_at(self, position: int) -> None:
        """Say which column of the masks the next tensors begin at (a decoding step moves it)."""
        self.start = position

    def found(self) -> dict[str, Tensor]:
        """The norms of the residual, `[batch, pos]`, by what errors call the point."""
        return {
            f"the residual of {{}} at layer {layer} ({site})": torch.cat(steps, dim=-1)
            for (layer, site), steps in self.norms.items()
        }

    def plain(self) -> SimpleNamespace:
        """The same visit as plain data, which can travel to where emlens is not installed."""
        return SimpleNamespace(**vars(self))

    def __call__(
        self, layer: int, site: Site, residual: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_model"]:
        """Edit and read the residual found at a point; return what belongs there."""
        return at_point(self, layer, site, residual)

    def attention(
        self,
        layer: int,
        before: Float[Tensor, "batch pos d_model"] | None,
        contribution: Float[Tensor, "batch pos d_model"],
    ) -> Float[Tensor, "batch pos d_model"]:
        """Visit `attn_out`, and `resid_mid` where `before`, the block's input, is given."""
        return at_attention(self, layer, before, contribution)


def _in_order(points: Iterable[Point]) -> list[Point]:
    return sorted(points, key=lambda point: (point[0], SITES.index(point[1])))


# Written as functions of a visit's data, with nothing but torch in them: on a server, where
# emlens is absent, they run on the plain copy. Annotations inside of them would travel too.


def at_point(
    visit: Any, layer: int, site: Site, residual: Float[Tensor, "batch pos d_model"]
) -> Float[Tensor, "batch pos d_model"]:
    """What `Visit.__call__` does, on a visit or its plain copy."""
    # the arithmetic of an edit or a pool is its own, whatever precision the model runs in
    with torch.autocast(residual.device.type, enabled=False):
        for edit in visit.edits.get((layer, site), ()):
            delta = edit.delta(residual, layer).to(residual.dtype)
            mask = visit.masks.get(edit.where)
            if mask is not None:
                columns = mask[:, visit.start : visit.start + residual.shape[1]]
                delta = delta * columns.to(residual.device).unsqueeze(-1)
            residual = residual + delta
        note_norm(visit, layer, site, residual)
        if (layer, site) in visit.reads:
            # a copy, since some blocks add to what they have read in place
            found = residual.clone()
            visit.read[layer] = found if visit.pool is None else visit.pool(found)
    return residual


def note_norm(visit: Any, layer: int, site: Site, residual: Tensor) -> None:
    """Keep the norms found at a point; a step that begins at the first position starts anew."""
    wide = torch.promote_types(residual.dtype, torch.float32)
    found = torch.linalg.vector_norm(residual.detach(), dim=-1, dtype=wide)
    steps = visit.norms.setdefault((layer, site), [])
    if not visit.start:
        steps.clear()
    steps.append(found)


def of_rows(norms: Any, real: Tensor) -> dict:
    """The largest norm of each row at each point, `[batch]`; not finite where one is not."""
    return {
        point: [steps[-1].masked_fill(real.to(steps[-1].device) == 0, 0.0).amax(1)]
        for point, steps in norms.items()
    }


def at_attention(
    visit: Any,
    layer: int,
    before: Float[Tensor, "batch pos d_model"] | None,
    contribution: Float[Tensor, "batch pos d_model"],
) -> Float[Tensor, "batch pos d_model"]:
    """What `Visit.attention` does, on a visit or its plain copy.

    `resid_mid` is no module's output: what an edit adds to it goes into attention's share,
    which is the one way in which it reaches both the MLP and the residual stream.
    """
    after = at_point(visit, layer, "attn_out", contribution)
    if before is None:
        return after
    middle = before.to(after.device) + after
    edited = at_point(visit, layer, "resid_mid", middle)
    return after if edited is middle else edited - before.to(after.device)
