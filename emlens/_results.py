"""What every result can do: show itself as a table, be kept, and be read back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from emlens._door import guard_methods
from emlens._files import write_json
from emlens._reading import expanded, read_json
from emlens._types import check_axes, checked_fields

if TYPE_CHECKING:
    import pandas as pd


_KINDS: dict[str, type[Result]] = {}
"""All kinds of results by name: one may hold another."""


@guard_methods
@dataclass(frozen=True)
class Result:
    """Base of the frozen results that measures, comparisons and training return.

    `AXES` says which lengths belong together: `{"values": "conditions ids"}` has a list for each
    of the field `conditions`, with a value for each of `ids`.
    """

    AXES: ClassVar[Mapping[str, str]] = {}

    def table(self) -> pd.DataFrame:
        """The result as a table, units in the column names."""
        raise NotImplementedError

    def save(self, path: str | Path) -> Path:
        """Write the result as JSON; atomic."""
        path = expanded(path)
        if path.suffix not in (".json", ""):
            raise ValueError(
                f"a {type(self).__name__} is written as JSON, which {path.name} does not say; name "
                f"it {path.with_suffix('.json').name}"
            )
        write_json(path, _plain(self))
        return path

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote; a field that has a default may be missing.

        A figure may be NaN, which says that it is not known; it is never infinite.

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
        """Refuse what types and `AXES` let pass and the methods could not use.

        Raises:
            ValueError: If there is such a thing; it is named.
        """

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        _KINDS[cls.__name__] = guard_methods(cls)

    def _repr_html_(self) -> str:
        return titled_table(type(self).__name__, self.table())


def titled_table(title: str, table: pd.DataFrame) -> str:
    """HTML of a table under a title, both escaped: what a notebook shows."""
    rows = table.to_html(index=False, float_format="%.3f", na_rep="", escape=True)
    return f"<p><b>{escape(title)}</b></p>{rows}"


def _plain(value: object) -> object:
    if isinstance(value, Result):
        own = {item.name: _plain(getattr(value, item.name)) for item in fields(value)}
        return {"kind": type(value).__name__, **own}
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
    kind = held.get("kind")
    if not isinstance(kind, str) or kind not in _KINDS:
        return held
    del held["kind"]
    made = _KINDS[kind](**checked_fields(_KINDS[kind], held))
    check_axes(made, made.AXES)
    seed = getattr(made, "seed", 0)
    if isinstance(seed, int) and seed < 0:
        raise ValueError(f"seed is {seed}, not a whole number from 0")
    made._verify()
    return made
