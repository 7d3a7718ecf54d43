"""The check at load: finds out what a model can do, or refuses it with the reason."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from emlens.hooked.adapters import available
from emlens.hooked.grants import grant_sites, try_resume
from emlens.hooked.state import evaluating
from emlens.hooked.truth import Said, Truth, apart, in_short, running, truth_of
from emlens.text import TokenBatch, pack
from emlens.text.batches import PaddingSide
from emlens.text.tokens import TokenRow

if TYPE_CHECKING:
    from emlens.hooked.model import HookedModel

_SIDES: tuple[PaddingSide, ...] = ("left", "right")


@torch.no_grad()
def self_check(model: HookedModel, truth: Truth | None = None) -> None:
    """Compare a model with the module as it was brought, and find out what it can do.

    Checked: that the logits are the model's own, for single rows and with padding on either side;
    each site at one layer of each kind of block, with an edit there; resuming; that every adapter
    acts. Sites that are not what they are called are taken from the model, with the reason. Where
    padding changes the numbers, such batches run one row at a time from now on.

    Args:
        model: The model.
        truth: What it said by itself; by default what its module says now.

    Raises:
        RuntimeError: Naming what disagreed, and by how much.
        ValueError: If the model cannot run by itself.
    """
    truth = truth or truth_of(model.module, model.name)
    before, model.architecture = model.architecture, replace(truth.architecture, skips=False)
    with evaluating(model.module):
        try:
            _find_how_it_runs(model, truth.plain)
            tried = grant_sites(model, truth)
            try_resume(model, tried, truth)
            _check_adapters(model, truth)
        except Exception as error:
            model.architecture = before
            if isinstance(error, RuntimeError) and model.name in str(error):
                raise
            raise _cannot(model, error) from error
    _say_how_it_runs(model)


def _cannot(model: HookedModel, error: Exception) -> RuntimeError:
    other = "; engine='nnsight' may run it" if model.engine != "nnsight" else ""
    return RuntimeError(
        f"{model.name}: the {model.engine} engine cannot run this model ({in_short(error)}){other}"
    )


def _find_how_it_runs(model: HookedModel, said: Said) -> None:
    """Set which batches run as they are, and what a pass is told, so that the logits are right."""
    plain = model.architecture
    if plain.padding and _padded_is_right(model, said, *plain.padding):
        return
    first, failed = "", None
    for told in _less_and_less(plain.told):
        model.architecture = replace(plain, told=told, padding=())
        try:
            gap = _differ(_logits(model, said), said.logits, model.dtype)
        except Exception as error:
            failed = error
            continue
        first = first or gap
        if gap and (factor := _factor(model, said)):
            scale = model.architecture.logit_scale * factor
            model.architecture = replace(model.architecture, logit_scale=scale)
            gap = _differ(_logits(model, said), said.logits, model.dtype)
        if not gap:
            break
    else:
        if failed is not None and not first:
            raise failed
        raise RuntimeError(_refusal(model, first))
    alone = model.architecture
    sides = []
    for side in plain.padding:
        model.architecture = replace(alone, padding=_SIDES)
        if _padded_is_right(model, said, side):
            sides.append(side)
    model.architecture = replace(alone, padding=tuple(sides))


def _less_and_less(told: tuple[str, ...]) -> list[tuple[str, ...]]:
    without = tuple(name for name in told if name != "position_ids")
    least = tuple(name for name in without if name != "attention_mask")
    return list(dict.fromkeys((told, without, least)))


def _padded_is_right(model: HookedModel, said: Said, *sides: PaddingSide) -> bool:
    try:
        both = Said(said.rows * len(sides), said.logits * len(sides))
        return not _differ(_logits(model, both, sides), both.logits, model.dtype)
    except Exception:
        return False  # a model that cannot run at all says so when rows run alone


def _logits(
    model: HookedModel, said: Said, sides: Sequence[PaddingSide] = ("right",)
) -> list[Tensor]:
    """The logits of each row, as this engine makes them; of all rows once for each side."""
    batch = _padded(said.rows[: len(said.rows) // len(sides)], sides, model.pad_id)
    batch = batch.to(model.device)
    hidden = model.hidden(batch)
    expected = (*batch.input_ids.shape, model.d_model)
    if tuple(hidden.shape) != expected:
        raise RuntimeError(
            f"{model.name}: final hidden states have shape {tuple(hidden.shape)}, expected "
            f"{expected}; the architecture is not supported"
        )
    real = batch.mask("all").to(hidden.device)
    found = {place: model.unembed(hidden[i][real[i]]) for i, place in enumerate(batch.index)}
    return [found[place] for place in range(len(said.rows))]


def _padded(rows: Sequence[TokenRow], sides: Sequence[PaddingSide], pad_id: int) -> TokenBatch:
    """One batch, in which rows are padded on one side after the other."""
    batches = [pack(rows, pad_id=pad_id, padding_side=side)[0] for side in sides]
    names = (one.name for one in fields(TokenBatch))
    columns = {name: [getattr(batch, name) for batch in batches] for name in names}
    index = [n * len(rows) + place for n, batch in enumerate(batches) for place in batch.index]
    whole = {
        name: torch.cat(values) for name, values in columns.items() if isinstance(values[0], Tensor)
    }
    return replace(batches[0], **whole, index=tuple(index), names=sum(columns["names"], ()))


def _factor(model: HookedModel, said: Said) -> float:
    """What the logits would have to be multiplied by, where that is one number; else 0."""
    ours, theirs = torch.cat(_logits(model, said)), torch.cat(said.logits)
    if ours.shape != theirs.shape:
        return 0.0
    ours, theirs = ours.double(), theirs.double().to(ours.device)
    factor = float((ours * theirs).sum() / (ours * ours).sum())
    apart = _differ([(factor * ours).float()], [theirs.float()], model.dtype)
    return 0.0 if apart else float(f"{factor:.7g}")


def _refusal(model: HookedModel, gap: str) -> str:
    if model.engine == "transformer_lens":
        return (
            f"{model.name}: TransformerLens computes other logits than the model itself ({gap}); "
            "use engine='nnsight'"
        )
    return (
        f"{model.name}: unembed does not reproduce the model's logits ({gap}); its LM head does "
        "something after the final norm that emlens does not know"
    )


def _say_how_it_runs(model: HookedModel) -> None:
    architecture = model.architecture
    if bad := [side for side in _SIDES if side not in architecture.padding]:
        warnings.warn(
            f"{model.name}: padded on the {' or '.join(bad)} its passes are not those of single "
            "rows, so such batches run one row at a time, which is slower",
            stacklevel=6,
        )
    if not architecture.steady:
        warnings.warn(
            f"{model.name}: its attention is not causal throughout, so that what follows a token "
            "can change its residuals and logits; a text is read as a whole, and losses may see "
            "what they predict",
            stacklevel=6,
        )


def _check_adapters(model: HookedModel, truth: Truth) -> None:
    """Compare each adapter with what the model itself says under it."""
    adapters = model._adapters
    for name, (said, base) in truth.adapted.items():
        if all(torch.equal(a, b) for a, b in zip(said.logits, base.logits, strict=True)):
            raise RuntimeError(f"{model.name}: adapter {name!r} changes nothing")
        parts = {path: part for path, part in adapters.parts() if name in available(part)}
        with model.adapter(name), running(parts) as ran:
            gap = _differ(_logits(model, said), said.logits, model.dtype)
        if never := sorted(said.ran - ran):
            raise RuntimeError(
                f"{model.name}: the {model.engine} engine never runs adapter {name!r} at "
                f"{never[0]}, since it has modules of its own there; use engine='nnsight'"
            )
        if gap:
            raise RuntimeError(f"adapter {name!r} of " + _refusal(model, gap))


def _differ(ours: Sequence[Tensor], theirs: Sequence[Tensor], dtype: torch.dtype) -> str:
    """How far apart the logits of rows are, in words; empty where they are the same."""
    pairs = zip(ours, theirs, strict=True)
    return next((gap for mine, other in pairs if (gap := apart(mine, other, dtype))), "")
