"""Values that are not finite raise an error that names the condition and the row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from textwrap import shorten
from typing import NoReturn

import torch
from jaxtyping import Bool
from torch import Tensor

from emlens.hooked.condition import Condition
from emlens.hooked.interface import Hooked

SHOWN = 160
"""Letters of what acts that an error shows."""

LATE = 4
"""Checks that may be open inside of `late_checks`."""

_open: ContextVar[list[Callable[[], None]] | None] = ContextVar("open_checks", default=None)


class NonFiniteError(ValueError):
    """A forward pass gave values that are not finite; condition, row and place are named."""


@contextmanager
def late_checks() -> Iterator[None]:
    """Look at each check a few passes later inside the block, so that a loop waits for no pass.

    All have been looked at when the block ends. They raise what they would have raised at once.
    """
    if _open.get() is not None:
        yield
        return
    waiting: list[Callable[[], None]] = []
    token = _open.set(waiting)
    try:
        try:
            yield
        finally:
            # an error in the block may come of what a check would have said
            for look in waiting:
                look()
    finally:
        _open.reset(token)


def check_finite(
    model: Hooked,
    values: Mapping[str, Tensor],
    names: Sequence[str],
    real: Bool[Tensor, "batch pos"] | None = None,
    condition: Condition | None = None,
) -> None:
    """Refuse values that are not finite.

    Args:
        model: The model, under the condition that the values were made under.
        values: One number per row, or per row and position, by what they are (`"the loss of
            {}"`, for the name of the row), first to last.
        names: What each row is called.
        real: The positions that count, where values have positions; all by default. What goes
            beyond these does not count.
        condition: What the values were made under, where that is not in force any more.

    Raises:
        NonFiniteError: Naming the condition, the row, and the first of the values.
    """
    if not values:
        return
    # one number for all: on a GPU every look at one waits for the pass
    first = next(iter(values.values())).device
    sums = [value.detach().sum().to(first, torch.float32) for value in values.values()]
    under = condition or model.condition_in_force
    look_at(torch.stack(sums).sum(), lambda: _name(model, values, names, real, under))


def look_at(total: Tensor, blame: Callable[[], None]) -> None:
    """Let `blame` raise where a number is not finite: at once, or later inside of `late_checks`.

    Args:
        total: The number, a tensor of one.
        blame: Finds out what it comes of; where nothing is wrong it returns.
    """
    waiting = _open.get()
    if waiting is None:
        if not bool(total.isfinite()):
            blame()
        return
    arrived = None
    if total.is_cuda:
        stream = torch.cuda.current_stream(total.device)
        total = total.to("cpu", non_blocking=True)
        arrived = stream.record_event()

    def look() -> None:
        if arrived is not None:
            arrived.synchronize()
        if not bool(total.isfinite()):
            token = _open.set(None)
            try:
                blame()
            finally:
                _open.reset(token)

    waiting.append(look)
    if len(waiting) > LATE:
        waiting.pop(0)()


def _name(
    model: Hooked,
    values: Mapping[str, Tensor],
    names: Sequence[str],
    real: Bool[Tensor, "batch pos"] | None,
    condition: Condition | None,
) -> None:
    """Refuse what of the values is not finite, if there is something."""
    for what, value in values.items():
        bad = ~value.detach().isfinite()
        if real is not None and bad.ndim == 2:
            steps = min(bad.shape[1], real.shape[1])
            bad = bad[:, :steps] & real[:, :steps].to(bad.device)
        if bool(bad.any()):
            row = int(bad.nonzero()[0, 0])
            refuse(model, what.replace("{}", names[row]), condition)


def refuse(model: Hooked, what: str, condition: Condition | None = None) -> NoReturn:
    """Say that something is not finite.

    Raises:
        NonFiniteError: Always.
    """
    under = condition or model.condition_in_force
    said = shorten(str(under), SHOWN)
    named = f"condition {under.name!r} ({said})" if under.name else said
    advice: list[str] = []
    if under.edits:
        advice.append("make the scale, dose or value of the edit smaller")
    if model.dtype == torch.float16:
        advice.append("load the model with dtype=torch.bfloat16 or torch.float32")
    elif model.dtype != torch.float32:
        advice.append("load the model with dtype=torch.float32")
    raise NonFiniteError(
        f"{what} under {named} is not finite in {str(model.dtype).removeprefix('torch.')}; "
        + (", or ".join(advice) or "look for damaged weights")
    )
