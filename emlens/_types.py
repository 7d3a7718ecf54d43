"""Checks of JSON values against the annotations of dataclasses."""

from __future__ import annotations

import sys
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from functools import cache, reduce
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, is_typeddict

T = TypeVar("T")
_NUMBERS = (int, float)


def checked_fields(kind: type, record: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a dataclass's fields, lists as tuples, each of the type it is annotated with.

    A `float` may be NaN, for unknown, but not infinite unless the class lists the field in
    `INFINITE`.

    Raises:
        ValueError: If a field is missing or unknown, or a value is of another type; it is named.
    """
    known, needed = _names(kind)
    missing, unknown = needed - set(record), set(record) - known
    if missing or unknown:
        raise ValueError(
            f"does not fit this version of {kind.__name__}: missing {sorted(missing)}, unknown "
            f"{sorted(unknown)}"
        )
    hints, endless = _hints(kind), getattr(kind, "INFINITE", ())
    return {
        name: _Checker(name in endless).checked(value, hints[name], name)
        for name, value in record.items()
    }


def check_settings(kind: type, names: Iterable[str], what: str = "setting") -> None:
    """Refuse names that are not fields of a settings class.

    Raises:
        ValueError: With the unknown and the known names.
    """
    known = [item.name for item in fields(kind)]
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise ValueError(
            f"unknown {what}(s) {', '.join(unknown)}; the settings are {', '.join(known)}"
        )


def checked_row(kind: type[T], record: Mapping[str, Any], what: str) -> T:
    """A dataclass from a row of a store.

    Lone surrogates, which a store may hold and no table can show, become U+FFFD.

    Raises:
        ValueError: As `checked_fields`; `what` says what the row is not.
    """
    try:
        found = checked_fields(kind, record)
    except ValueError as error:
        raise ValueError(f"not {what} of emlens: {error}") from error
    return kind(
        **{
            name: value if not isinstance(value, str) or _whole(value) else _mended(value)
            for name, value in found.items()
        }
    )


def _whole(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= mark <= "\udfff" for mark in text)


def _mended(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


@cache
def _names(kind: type) -> tuple[frozenset[str], frozenset[str]]:
    """All fields, and those without a default."""
    needed = (
        item.name
        for item in fields(kind)
        if item.default is MISSING and item.default_factory is MISSING
    )
    return frozenset(item.name for item in fields(kind)), frozenset(needed)


@cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def array_of(hint: Any) -> tuple[type, list[str]] | None:
    """What an annotated array holds, and the names of its axes; None for anything else."""
    held = getattr(hint, "dtypes", None)
    if not held:
        return None
    kinds = {"float64": float, "int64": int, "bool": bool, "bool_": bool}
    return next(kinds[name] for name in held if name in kinds), hint.dim_str.split()


def _listed(inner: Any, axis: str) -> Any:
    """The type of a list along an axis, whose name may be its length."""
    return tuple[(inner,) * int(axis)] if axis.isdigit() else tuple[inner, ...]


class _Checker:
    def __init__(self, endless: bool) -> None:
        self.endless = endless

    def checked(self, value: Any, hint: Any, where: str) -> Any:
        array = array_of(hint)
        if array is not None:
            leaf, axes = array
            hint = reduce(_listed, reversed(axes), leaf)
        origin, inner = get_origin(hint), get_args(hint)
        if origin is Literal:
            return self._must(value in inner, value, f"one of {', '.join(map(repr, inner))}", where)
        if origin in (Union, types.UnionType):
            return self._one_of(value, inner, where)
        if origin is tuple:
            return self._tuple(value, inner, where)
        if is_typeddict(hint):
            return self._row(value, _hints(hint), where)
        if origin in (dict, Mapping):
            self._must(isinstance(value, dict), value, "an object", where)
            return {
                key: self.checked(one, inner[1], f"{where}.{key}") for key, one in value.items()
            }
        if hint is float:
            number = isinstance(value, _NUMBERS) and not isinstance(value, bool)
            self._must(number, value, "a number", where)
            held = self.endless or value != value or abs(value) <= sys.float_info.max
            self._must(held, value, "a finite number", where)
            return value
        if hint in (dict, object, Any):
            self._must(hint is not dict or isinstance(value, dict), value, "an object", where)
            return frozen(value)
        if hint is int and isinstance(value, int):
            held = not isinstance(value, bool) and abs(value) < 2**63
            self._must(held, value, "a whole number of 64 bits", where)
        names = {int: "a whole number", str: "text", bool: "true or false", type(None): "null"}
        return self._must(isinstance(value, hint), value, names.get(hint, hint.__name__), where)

    def _tuple(self, value: Any, inner: tuple[Any, ...], where: str) -> tuple:
        self._must(isinstance(value, (list, tuple)), value, "a list", where)
        if inner[-1] is not Ellipsis:
            self._must(len(value) == len(inner), value, f"a list of {len(inner)}", where)
            each = inner
        else:
            each = (inner[0],) * len(value)
        return tuple(
            self.checked(one, hint, f"{where}[{i}]")
            for i, (one, hint) in enumerate(zip(value, each, strict=True))
        )

    def _row(self, value: Any, hints: dict[str, Any], where: str) -> dict[str, Any]:
        held = isinstance(value, dict) and set(value) == set(hints)
        self._must(held, value, f"an object with {', '.join(hints)}", where)
        return {key: self.checked(one, hints[key], f"{where}.{key}") for key, one in value.items()}

    def _one_of(self, value: Any, inner: tuple[Any, ...], where: str) -> Any:
        if value is None and type(None) in inner:
            return None
        said: list[str] = []
        for hint in inner:
            if hint is not type(None):
                try:
                    return self.checked(value, hint, where)
                except ValueError as error:
                    said.append(str(error))
        raise ValueError(said[0])

    def _must(self, holds: bool, value: Any, wanted: str, where: str) -> Any:
        if not holds:
            shown = repr(value)
            shown = shown if len(shown) <= 60 else f"{shown[:60]}..."
            raise ValueError(f"{where} is {shown}, not {wanted}")
        return value


def frozen(value: Any) -> Any:
    """Lists as tuples, at every depth."""
    if isinstance(value, dict):
        return {key: frozen(one) for key, one in value.items()}
    return tuple(map(frozen, value)) if isinstance(value, list) else value


def check_axes(kind: type, values: Mapping[str, Any], axes: Mapping[str, str]) -> None:
    """Compare lengths: an axis is another field, or a name that stands for one length.

    A name with a star stands for a length of its own at each place of the first axis:
    `"texts tokens*"` is for texts of different lengths. Of a name with a question mark, keys may
    be missing. Rows that are objects have the same keys, with values of one kind under each.

    Args:
        kind: The dataclass.
        values: Its fields; those with a default may be missing.
        axes: The axes of a field, by its name.

    Raises:
        ValueError: If two that belong together differ; the field is named.
    """
    lengths: dict[object, Any] = {}
    _, needed = _names(kind)
    for item in fields(kind):
        if item.name not in values:
            continue
        value, along = values[item.name], axes.get(item.name, "").split()
        _check_axis(item.name, value, along, values, lengths, (), item.name in needed)
        if _hints(kind)[item.name] == tuple[dict, ...]:
            _check_rows(item.name, value)


def _check_axis(
    where: str,
    value: Any,
    axes: list[str],
    values: Mapping[str, Any],
    lengths: dict[object, Any],
    above: tuple[object, ...],
    required: bool,
) -> None:
    if not axes:
        return
    empty = not above and len(value) == 0
    if empty and not required:
        return
    axis, *rest = axes
    required, axis = required and not axis.endswith("?"), axis.rstrip("?")
    along = values.get(axis)
    if isinstance(value, Mapping):
        known = (
            set(along) if along is not None else lengths.setdefault(f"keys of {axis}", set(value))
        )
        strange, absent = set(value) - known, (known - set(value) if required else set())
        if strange or absent:
            what = f"{min(strange)!r}, which is none of" if strange else f"no {min(absent)!r} of"
            raise ValueError(f"{where} has {what} {axis}")
        items: Any = value.items()
    else:
        if along is None and empty:
            return  # left empty, it says nothing of the others
        key = (axis, above[:1]) if axis.endswith("*") else axis
        wanted = len(along) if along is not None else lengths.setdefault(key, len(value))
        if len(value) != wanted:
            raise ValueError(f"{where} has {len(value)} values for {wanted} {axis.rstrip('*')}")
        items = enumerate(value)
    for key, one in items:
        _check_axis(f"{where}[{key!r}]", one, rest, values, lengths, (*above, key), required)


def _check_rows(where: str, rows: tuple[dict, ...]) -> None:
    kinds: dict[str, type] = {}
    for number, row in enumerate(rows):
        if set(row) != set(rows[0]):
            name = min(set(row) ^ set(rows[0]))
            raise ValueError(f"{where}[{number}] and {where}[0] differ in having {name!r}")
        for name, value in row.items():
            kind = float if type(value) is int else type(value)
            if value is not None and kinds.setdefault(name, kind) is not kind:
                raise ValueError(
                    f"{where}[{number}].{name} is {value!r:.40}, unlike the rows before it"
                )
