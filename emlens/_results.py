"""The base of all results: display, figures, saving and loading."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, dataclass_transform, get_type_hints

import numpy as np

from emlens._door import guard_methods
from emlens._files import write_json
from emlens._reading import expanded, read_json
from emlens._stats import LEVEL, level_in_force
from emlens._types import array_of, check_axes, checked_fields

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

ROWS = 60
"""The most rows of a result that a notebook shows."""

LINE = 160
"""Characters of a result in one line."""

_KINDS: dict[str, type[Result]] = {}
"""All kinds of results by name: one may hold another."""


class Shown:
    """Base of everything with a table: one line as text, the table in a notebook."""

    _level_note = ""

    def __str__(self) -> str:
        return one_line(f"{type(self).__name__}: {self._said()}")

    def __repr__(self) -> str:
        return f"<{self}>"

    def _repr_html_(self) -> str:
        table, note = self._summary()
        below = f"<p>{escape(note)}</p>" if note else ""
        return titled_table(f"{self._title}{self._level_note}", table) + below

    def _summary(self) -> tuple[pd.DataFrame, str]:
        """What a notebook shows of the table, and what it says of the rest."""
        table = self.table()
        if len(table) <= ROWS:
            return table, ""
        return table.head(ROWS), f"The first {ROWS} of {len(table):,} rows; table() has all."

    def table(self) -> pd.DataFrame:
        """Return a table, with units in the column names."""
        raise NotImplementedError

    @property
    def _title(self) -> str:
        """What stands above its table."""
        return type(self).__name__

    def _said(self) -> str:
        """What a line says of it."""
        return f"{len(self.table())} rows"


@dataclass_transform(frozen_default=True, eq_default=False, field_specifiers=(field,))
@guard_methods
@dataclass(frozen=True, eq=False, repr=False)
class Result(Shown):
    """Base of the results that measures, comparisons and training return: frozen dataclasses.

    A subclass is made a dataclass without being decorated. Fields that are annotated as arrays,
    `Float[np.ndarray, "conditions ids"]`, accept anything that NumPy does and hold read-only
    arrays. Their dimensions are names of other fields, or lengths; `AXES` declares the same for
    fields of other types. Results are equal if all values are, with NaN equal to NaN.

    Attributes:
        level: Level of its intervals; by default the current one.
    """

    AXES: ClassVar[Mapping[str, str]] = {}
    HOLDS_ENDS: ClassVar[bool] = False
    """Whether it holds the ends of intervals, and not what they are worked out from."""

    level: float = field(default_factory=level_in_force, kw_only=True)

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        dataclass(frozen=True, eq=False, repr=False)(cls)
        _KINDS[cls.__name__] = guard_methods(cls)

    def __post_init__(self) -> None:
        for name, (dtype, axes) in _arrays(type(self)).items():
            array = np.array(getattr(self, name), dtype=dtype)
            if not array.size:
                array = array.reshape(array.shape + (0,) * (len(axes) - array.ndim))
            array.setflags(write=False)
            object.__setattr__(self, name, array)

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return all(_same(getattr(self, x.name), getattr(other, x.name)) for x in fields(self))

    def plot(self, ax: Axes | None = None) -> Axes | list[Axes]:
        """Draw the result."""
        raise NotImplementedError

    def at_level(self, level: float) -> Self:
        """Return the same result with intervals at another level, e.g. 0.9.

        Raises:
            ValueError: If it holds only the ends of its intervals.
        """
        if level != self.level and self.HOLDS_ENDS:
            raise ValueError(
                f"a {type(self).__name__} holds the ends of its intervals, at {100 * self.level:g}%"
                f"; measure again inside of `with emlens.interval_level({level:g}):`"
            )
        inside = {x.name: getattr(self, x.name) for x in fields(self)}
        held = {k: v.at_level(level) for k, v in inside.items() if isinstance(v, Result)}
        return replace(self, **{**held, "level": level})

    def save(self, path: str | Path) -> Path:
        """Write the result as JSON; atomic."""
        path = expanded(path)
        if path.suffix not in (".json", ""):
            raise ValueError(
                f"a {type(self).__name__} is written as JSON, not as {path.name}; name "
                f"it {path.with_suffix('.json').name}"
            )
        write_json(path, _plain(self))
        return path

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote; fields with a default may be missing.

        Numbers may be NaN, for unknown, but not infinite.

        Raises:
            OSError: If the file cannot be read.
            ValueError: If the file holds another kind of result, lacks a field, or holds a value
                of another type or a list of another length; the field is named.
        """
        record = read_json(path)
        if not isinstance(record, dict) or record.get("kind") != cls.__name__:
            raise ValueError(f"{path} does not hold a {cls.__name__}")
        try:
            return _built(record)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def _verify(self) -> None:
        """Refuse what types and lengths let pass and the methods could not use.

        Raises:
            ValueError: If there is such a thing; it is named.
        """

    @property
    def _level_note(self) -> str:
        return "" if self.level == LEVEL else f", intervals at {100 * self.level:g}%"

    def _said(self) -> str:
        """What a line says of it: the names along its axes, or how many."""
        along = dict.fromkeys(axis for axes in _axes(type(self)).values() for axis in axes.split())
        held = {axis: getattr(self, axis) for axis in along if hasattr(self, axis)}
        return ", ".join(_named(*one) for one in held.items()) or super()._said()


def titled_table(title: str, table: pd.DataFrame) -> str:
    """HTML of a table under a title, both escaped: what a notebook shows."""
    rows = table.to_html(index=False, float_format="%.3f", na_rep="", escape=True)
    return f"<p><b>{escape(title)}</b></p>{rows}"


def one_line(text: str) -> str:
    """A text on one line, cut where it is long."""
    text = " ".join(text.split())
    return text if len(text) <= LINE else f"{text[: LINE - 3]}..."


def _named(axis: str, values: Any) -> str:
    words = isinstance(values, tuple) and all(isinstance(one, (str, int)) for one in values)
    names = ", ".join(map(str, values)) if words else ""
    return f"{axis} {names}" if 0 < len(names) <= 60 else f"{len(values)} {axis}"


@cache
def _arrays(cls: type[Result]) -> dict[str, tuple[type, list[str]]]:
    """Type and axes of the fields that are arrays."""
    found = {name: array_of(hint) for name, hint in get_type_hints(cls).items()}
    return {name: array for name, array in found.items() if array is not None}


def _axes(cls: type[Result]) -> dict[str, str]:
    """The axes of every field that has some."""
    found = {name: " ".join(axes) for name, (_, axes) in _arrays(cls).items()}
    for base in reversed(cls.__mro__):
        found |= vars(base).get("AXES", {})
    return found


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, np.ndarray) and isinstance(second, np.ndarray):
        return np.array_equal(first, second, equal_nan=first.dtype.kind == "f")
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return first.keys() == second.keys() and all(_same(first[k], second[k]) for k in first)
    if isinstance(first, tuple) and isinstance(second, tuple):
        return len(first) == len(second) and all(map(_same, first, second))
    return bool(first == second or (first != first and second != second))


def _plain(value: object) -> object:
    if isinstance(value, Result):
        own = {item.name: _plain(getattr(value, item.name)) for item in fields(value)}
        level = own.pop("level")
        return {"kind": type(value).__name__, **own, **({} if level == LEVEL else {"level": level})}
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _built(value: Any) -> Any:
    """The result that a record with its kind is of, and so the results inside of it."""
    if isinstance(value, list):
        return [_built(item) for item in value]
    if not isinstance(value, dict):
        return value
    held = {key: _built(item) for key, item in value.items()}
    name = held.get("kind")
    if not isinstance(name, str) or name not in _KINDS:
        return held
    del held["kind"]
    kind = _KINDS[name]
    checked = checked_fields(kind, {"level": LEVEL, **held})
    check_axes(kind, checked, _axes(kind))
    seed = checked.get("seed", 0)
    if isinstance(seed, int) and seed < 0:
        raise ValueError(f"seed is {seed}, not a whole number from 0")
    if not 0 < checked["level"] < 1:
        raise ValueError(f"level is {checked['level']}, not between 0 and 1")
    made = kind(**checked)
    made._verify()
    return made
