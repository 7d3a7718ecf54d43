"""How arguments that are directions are read."""

from __future__ import annotations

from emlens._kinds import made_with
from emlens.directions.direction import Direction, Directions

_ADVICE = "make one with Direction.of(vector, layer)"

made_with(Directions, _ADVICE)
made_with(Direction, f"take one, e.g. directions[15], or {_ADVICE}")
