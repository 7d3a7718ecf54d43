"""What every result can do: show itself as a table, be kept, and be read back."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np

from emlens._files import read_json, write_json

if TYPE_CHECKING:
    import pandas as pd


_KINDS: dict[str, type[Result]] = {}
"""All kinds of results by name: one may hold another."""


@dataclass(frozen=True)
class Result:
    """Base of the frozen results that measures, comparisons and training return."""

    def table(self) -> pd.DataFrame:
        """The result as a table, units in the column names."""
        raise NotImplementedError

    def save(self, path: str | Path) -> Path:
        """Write the result as JSON; atomic."""
        path = Path(path)
        write_json(path, _plain(self))
        return path

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote; a field that has a default may be missing.

        Raises:
            ValueError: If the file holds another kind of result, or lacks a field.
        """
        record = read_json(Path(path))
        if not isinstance(record, dict) or record.pop("kind", None) != cls.__name__:
            raise ValueError(f"{path} does not hold a {cls.__name__}")
        known = {item.name for item in fields(cls)}
        later = {
            item.name
            for item in fields(cls)
            if item.default is not MISSING or item.default_factory is not MISSING
        }
        missing, unknown = known - later - set(record), set(record) - known
        if missing or unknown:
            raise ValueError(
                f"{path} does not fit this version of {cls.__name__}: "
                f"missing {sorted(missing)}, unknown {sorted(unknown)}"
            )
        return cls(**{name: _frozen(value) for name, value in record.items()})

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        _KINDS[cls.__name__] = cls

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


def _frozen(value: object) -> object:
    if isinstance(value, dict):
        held = {key: _frozen(item) for key, item in value.items()}
        kind = held.get("kind")
        if not isinstance(kind, str) or kind not in _KINDS:
            return held
        del held["kind"]
        return _KINDS[kind](**held)
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value
