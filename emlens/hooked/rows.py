"""Passes of models that do not run a batch as others do: row by row, or a norm that runs twice."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from emlens.hooked.hook_plan import Tap, Visit
from emlens.text import TokenBatch

Run = Callable[..., Tensor]


def by_rows(run: Run, batch: TokenBatch, visit: Visit, last: int | None, resume: Any) -> Tensor:
    """Run each row of a batch without its padding; the visit sees the batch as it is.

    Edits are asked for the change of a whole batch, in which other rows are zero; a pool is
    given all rows at once. Padding comes back as zeros.
    """
    real = batch.mask("all")
    hidden: list[Tensor] = []
    reads: dict[int, list[Tensor]] = defaultdict(list)
    norms: dict[Any, list[Tensor]] = defaultdict(list)
    for place, columns in enumerate(real):
        own = _visit_of(visit, place, columns, real)
        part = None if resume is None else (resume[0], _cut(resume[1], place, columns))
        hidden.append(run(batch.row(place), own, last, part))
        for layer, value in own.read.items():
            reads[layer].append(value)
        for point, steps in own.norms.items():
            norms[point].append(torch.cat(steps, 1)[..., None])
    for point, found in norms.items():
        visit.norms[point] = [_together(found, real)[..., 0]]
    for layer, values in reads.items():
        whole = _together(values, real)
        visit.read[layer] = whole if visit.pool is None else visit.pool(whole)
    return _together(hidden, real) if last is None else torch.empty(0)


def to_end(model: Any, batch: TokenBatch, visit: Visit, _: int | None, resume: Any) -> Tensor:
    """A pass to the end of a model whose final norm runs elsewhere, too."""
    end = Tap(model.n_layers - 1)
    visit.add(end)
    model._run(batch, visit, model.n_layers - 1, resume)
    return model.normalize(end.seen)


class _InRow:
    """An edit of a batch, for a pass over one of its rows."""

    def __init__(self, edit: Any, place: int, real: Bool[Tensor, "batch pos"]) -> None:
        self.edit, self.place, self.real = edit, place, real
        self.where = edit.where

    def delta(self, residual: Tensor, layer: int) -> Tensor:
        real = self.real.to(residual.device)
        whole = residual.new_zeros(*real.shape, residual.shape[-1])
        whole[self.place, real[self.place]] = residual[0]
        return self.edit.delta(whole, layer)[self.place, real[self.place]].unsqueeze(0)


def _visit_of(visit: Visit, place: int, columns: Tensor, real: Tensor) -> Visit:
    own = Visit()
    for point, edits in visit.edits.items():
        in_row: list[Any] = [_InRow(edit, place, real) for edit in edits]
        own.edits[point] = in_row
    for where, mask in visit.masks.items():
        own.masks[where] = None if mask is None else _cut(mask, place, columns)
    own.reads, own.points = visit.reads, visit.points
    return own


def _cut(values: Tensor, place: int, columns: Tensor) -> Tensor:
    return values[place : place + 1, columns.to(values.device)]


def _together(rows: Sequence[Tensor], real: Bool[Tensor, "batch pos"]) -> Tensor:
    whole = rows[0].new_zeros(*real.shape, rows[0].shape[-1])
    whole[real.to(whole.device)] = torch.cat([row[0] for row in rows])
    return whole
