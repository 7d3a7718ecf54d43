"""How arguments that are directions are read."""

from __future__ import annotations

from functools import partial

from emlens._arguments import instance, kind
from emlens.directions.direction import Direction, Directions

_ADVICE = "make one with Direction.of(vector, layer)"

kind("Directions")(partial(instance, Directions, _ADVICE))
kind("Direction")(partial(instance, Direction, f"take one, e.g. directions[15], or {_ADVICE}"))
