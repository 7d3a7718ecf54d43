"""How arguments that are directions are read."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from emlens._kinds import kind, made_with, some
from emlens.directions.direction import Direction, Directions

_ADVICE = "make one with Direction.of(vector, layer)"

made_with(Directions, _ADVICE)
kind(Sequence[Directions], words="directions")(partial(some, Directions))
made_with(Direction, f"take one, e.g. directions[15], or {_ADVICE}")
