"""Tries out, at load, which sites a model has and whether it can resume after a layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from emlens.hooked.architecture import PARALLEL
from emlens.hooked.hook_plan import Point, Tap
from emlens.hooked.sites import SITES, Site
from emlens.hooked.truth import Truth, apart, in_short
from emlens.text import pack
from emlens.text.tokens import TokenRow

if TYPE_CHECKING:
    from emlens.hooked.model import HookedModel

_AROUND: tuple[Site, ...] = ("resid_pre", "resid_post")
_INSIDE: tuple[Site, ...] = ("attn_out", "resid_mid", "mlp_out")
_BEFORE: tuple[tuple[Site, Site], ...] = (
    ("resid_pre", "attn_out"),
    ("resid_pre", "mlp_out"),
    ("attn_out", "mlp_out"),
)
_WIDTH = 4


@dataclass(frozen=True)
class _Push:
    """Adds a vector as long as the residual is to one row."""

    unit: Tensor
    row: int
    layer: int
    site: Site
    where: str = "all"

    @property
    def layers(self) -> tuple[int, ...]:
        return (self.layer,)

    def delta(self, residual: Tensor, layer: int) -> Tensor:
        delta = torch.zeros_like(residual)
        if residual.ndim != 3:
            return delta  # which the tap behind it sees, and the check refuses
        length = residual[self.row].float().norm(dim=-1, keepdim=True)
        delta[self.row] = (length * self.unit.to(residual.device)).to(residual.dtype)
        return delta


class Tried:
    """One pass over copies of one row, each edited at another site, and the first not at all."""

    def __init__(self, model: HookedModel, row: TokenRow, sites: Sequence[Site]) -> None:
        kinds = model.architecture.kinds
        places: list[Point] = [(layer, site) for layer in kinds for site in sites]
        self.model, self.sites, self.last = model, sites, model.n_layers - 1
        self.rows = {place: 1 + i for i, place in enumerate(places)}
        nothing = (False,) * _WIDTH
        short = TokenRow(row.input_ids[:_WIDTH], nothing, nothing, "probe of edits")
        (batch,) = pack([short] * (1 + len(self.rows)), pad_id=model.pad_id)
        generator = torch.Generator().manual_seed(1)
        unit = torch.randn(model.d_model, generator=generator)
        pushes = [
            _Push(unit / unit.norm(), row, layer, site) for (layer, site), row in self.rows.items()
        ]
        wanted: set[Point] = set(places)
        wanted |= {(layer + 1, "resid_pre") for layer in kinds if layer < self.last}
        wanted |= {(layer, "resid_post") for layer in _resumed(model.n_layers)}
        self.taps = {place: Tap(*place) for place in sorted(wanted)}
        edits: list[Any] = [*pushes, *self.taps.values()]
        self.shape = (*batch.input_ids.shape, model.d_model)
        self.hidden = model.hidden(batch, edits)

    def at(self, layer: int, site: Site) -> Tensor:
        return self.taps[layer, site].seen.float()


def grant_sites(model: HookedModel, truth: Truth) -> Tried:
    """Try every site at one layer of each kind, and keep those that are what they are called.

    Raises:
        RuntimeError: If not even what enters and leaves a block can be read and edited.
    """
    (row, *_) = truth.plain.rows
    missing: dict[Site, str] = {site: reason for site in _INSIDE if (reason := model._lacks(site))}
    tried = None
    if not missing:
        _set(model, {})
        try:
            tried = Tried(model, row, SITES)
        except Exception as error:
            missing = dict.fromkeys(_INSIDE, f"reading it failed ({in_short(error)})")
    if tried is None:
        # they are checked against each other, so that one alone proves nothing
        first = next(iter(missing.values()))
        missing = {site: missing.get(site, first) for site in _INSIDE}
        _set(model, missing)
        tried = Tried(model, row, _AROUND)
    _check_around(tried)
    if tried.sites == SITES:
        missing = _wrong_inside(tried)
    _set(model, missing)
    return tried


def try_resume(model: HookedModel, tried: Tried, truth: Truth) -> None:
    """Resume after a few layers, without the blocks below where that is right.

    Raises:
        RuntimeError: If a pass that is resumed is not the full pass.
    """
    (row, *_) = truth.plain.rows
    nothing = (False,) * _WIDTH
    short = TokenRow(row.input_ids[:_WIDTH], nothing, nothing, "probe of resuming")
    (batch,) = pack([short, short], pad_id=model.pad_id)
    expected = tried.hidden[:1].float()
    gap = ""
    for skips in (True, False):
        if skips and not truth.architecture.skips:
            continue
        model.architecture = replace(model.architecture, skips=skips)
        try:
            for layer in _resumed(model.n_layers):
                residual = tried.taps[layer, "resid_post"].seen[:1].repeat(2, 1, 1)
                found = model.hidden(batch, resume=(layer, residual)).float()
                gap = apart(found, expected.expand_as(found), model.dtype)
                if gap:
                    break
        except Exception as error:
            gap = in_short(error)
        if not gap:
            return
    raise RuntimeError(f"{model.name}: a pass resumed after a layer is not the full pass ({gap})")


def _resumed(n_layers: int) -> list[int]:
    """The middle layer, and the last two: a block may need more of those below than it gets."""
    return sorted({n_layers // 2, max(n_layers - 2, 0), n_layers - 1})


def _set(model: HookedModel, missing: dict[Site, str]) -> None:
    sites = tuple(site for site in SITES if site not in missing)
    model.architecture = replace(model.architecture, sites=sites, missing=missing)


def _check_around(tried: Tried) -> None:
    """What enters and leaves blocks: shapes, the way from one to the next, and edits there."""
    model, name = tried.model, tried.model.name
    for (layer, site), tap in tried.taps.items():
        if site in _AROUND and tuple(tap.seen.shape) != tried.shape:
            raise RuntimeError(
                f"{name}, layer {layer}: {site} has shape {tuple(tap.seen.shape)}, expected "
                f"{tried.shape}; there is no one residual stream in this architecture"
            )
    for (layer, site), row in tried.rows.items():
        if site in _AROUND:
            _check_push(tried, tried.at(layer, site), row, layer)
    end = model.normalize(tried.taps[tried.last, "resid_post"].seen).float()
    if gap := apart(end, tried.hidden.float(), model.dtype):
        raise RuntimeError(
            f"{name}: the final norm of what the last block gives is not what the head reads "
            f"({gap}); the model does something there that emlens does not support"
        )
    for layer in model.architecture.kinds:
        before, after = tried.at(layer, "resid_pre"), tried.at(layer, "resid_post")
        if gap := apart(before[tried.rows[layer, "resid_post"]], before[0], model.dtype):
            raise RuntimeError(
                f"{name}, layer {layer}: an edit of what the block gives changes what it got "
                f"({gap})"
            )
        # elsewhere an edit may come between the two
        rows = [0, *(row for (at, _), row in tried.rows.items() if at == layer)]
        if layer < tried.last and (
            gap := apart(tried.at(layer + 1, "resid_pre")[rows], after[rows], model.dtype)
        ):
            raise RuntimeError(
                f"{name}, layer {layer}: what the block gives is not what the next one gets "
                f"({gap}); the model changes the residual stream between its blocks"
            )


def _check_push(tried: Tried, seen: Tensor, row: int, layer: int) -> None:
    """An edit moves the residual by its own length, and the end of the model with it."""
    model, n = tried.model, len(tried.hidden)
    moved = (seen[row] - seen[0]).norm(dim=-1, keepdim=True)
    end = (tried.hidden[row].float() - tried.hidden[0].float()).abs().amax()
    if not float(end) > 0 or apart(moved, seen[0].norm(dim=-1, keepdim=True), model.dtype):
        raise RuntimeError(
            f"{model.name}: an edit at layer {layer} left row {row} of {n} as it was; the hook "
            "does not reach the whole batch"
        )


def _wrong_inside(tried: Tried) -> dict[Site, str]:
    """The sites inside of blocks that are not what they are called, and why."""
    model, parallel = tried.model, False
    for layer in model.architecture.kinds:
        for site in _INSIDE:
            shape = tuple(tried.taps[layer, site].seen.shape)
            if shape != tried.shape:
                reason = f"{site} of layer {layer} has shape {shape} instead of {tried.shape}"
                return dict.fromkeys(_INSIDE, reason)
        at = {site: tried.at(layer, site) for site in SITES}
        row = {site: tried.rows[layer, site] for site in SITES}
        total = at["resid_pre"] + at["attn_out"] + at["mlp_out"]
        plain = [i for i in range(len(total)) if i not in (row["resid_mid"], row["resid_post"])]
        middle = at["resid_mid"] + at["mlp_out"]
        mid = row["resid_mid"]
        gap = apart(total[plain], at["resid_post"][plain], model.dtype)
        gap = gap or apart(middle[mid], at["resid_post"][mid], model.dtype)
        if gap:
            reason = f"block {layer} adds more than attention and MLP ({gap})"
            return dict.fromkeys(_INSIDE, reason)
        for before, edited in _BEFORE:
            if gap := apart(at[before][row[edited]], at[before][0], model.dtype):
                reason = f"at layer {layer} an edit of {edited} changes {before} before it ({gap})"
                return dict.fromkeys(_INSIDE, reason)
        moved = (at["mlp_out"][row["attn_out"]] - at["mlp_out"][0]).abs().amax()
        parallel |= not float(moved) > 1e-4 * float(at["mlp_out"][0].abs().amax())
    return {"resid_mid": PARALLEL} if parallel else {}
