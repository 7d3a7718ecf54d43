"""Checks and conversions of values by annotated types.

Rooms add their own types with `kind` and `made_with`.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import (
    Any,
    Literal,
    TypeVar,
    Union,
    get_args,
    get_origin,
    is_typeddict,
)

from emlens._arguments import (
    ANY,
    Limits,
    a_or_an,
    choice,
    flag,
    is_list,
    listed,
    number,
    numbers,
    path,
    shown,
    text,
    texts,
    whole,
    wholes,
)

Check = Callable[[str, Any], Any]
"""Takes the name of an argument and what was given; returns what is meant, or raises."""
Registered = TypeVar("Registered", bound=Callable[..., Any])

_MANY = (Sequence, Iterable, Collection, list, tuple, set, frozenset)
_NUMBERS: Mapping[Any, tuple[Callable[..., Any], str]] = {
    int: (whole, "a whole number"),
    float: (number, "a number"),
}
_LISTS: Mapping[Any, tuple[Callable[..., Any], str]] = {
    int: (wholes, "a list of whole numbers"),
    float: (numbers, "a list of numbers"),
}
_KINDS: dict[Any, Check] = {str: text, bool: flag, Path: path, str | Path: path}
_WORDS: dict[Any, str] = {str: "text", bool: "True or False", Path: "a path", str | Path: "a path"}


def kind(*annotations: Any, words: str = "") -> Callable[[Registered], Registered]:
    """Register a function that converts arguments with these annotations.

    Args:
        *annotations: Types as annotated, without `None`.
        words: Their name in errors; the name of the type by default.
    """

    def register(check: Registered) -> Registered:
        _KINDS.update(dict.fromkeys(annotations, check))
        _WORDS.update(dict.fromkeys(annotations, words) if words else {})
        return check

    return register


def instance(wanted: type, advice: str, name: str, value: Any) -> Any:
    """Return the value if it is an instance of a class.

    Raises:
        TypeError: If it is not; `advice` says how to get one.
    """
    if not isinstance(value, wanted):
        more = f"; {advice}" if advice else ""
        raise TypeError(f"{name} must be {words_of(wanted)}, not {shown(value)}{more}")
    return value


def made_with(wanted: type, advice: str) -> None:
    """Register how instances of a class are made, for error messages."""
    _KINDS[wanted] = partial(instance, wanted, advice)


def check_of(annotation: Any, limits: Limits = ANY) -> Check | None:
    """The check of a type; None if there is nothing to check.

    Args:
        annotation: The type.
        limits: Limits of a number.
    """
    if annotation is Any:
        return None
    if annotation in _KINDS:
        return _KINDS[annotation]
    if annotation in _NUMBERS:
        return partial(_limited, _NUMBERS[annotation][0], limits)
    if isinstance(annotation, TypeVar):
        return check_of(annotation.__bound__, limits) if annotation.__bound__ else None
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return _check_of_union(arguments, limits)
    if origin is Literal:
        return partial(choice, arguments)
    if origin is tuple and arguments[-1:] != (...,):
        return partial(_fields, tuple(check_of(part, limits) for part in arguments))
    if origin in _MANY and arguments:
        return _check_of_many(origin, arguments[0], limits)
    if origin in (Mapping, dict):
        value = arguments[1]
        # an entry may be an empty list, where an argument may not
        loose = get_origin(value) in _MANY and get_args(value)[0] is str
        made = _MADE.get(get_origin(value), list)
        read = partial(many, made, str, text) if loose else check_of(value, limits)
        return partial(mapping, check_of(arguments[0]), read)
    if origin is Callable:
        return _callable
    if not isinstance(annotation, type) or annotation is object or is_typeddict(annotation):
        return None
    if getattr(annotation, "_is_protocol", False):
        return partial(_offers, annotation, frozenset(_members(annotation)))
    if _dimensions(annotation) is not None and _takes_arrays(annotation):
        return partial(_tensor, annotation)
    return partial(instance, annotation, "")


def _dimensions(annotation: Any) -> str | None:
    """The shape that an annotation of `jaxtyping` names."""
    return vars(annotation).get("dim_str") if isinstance(annotation, type) else None


def _takes_arrays(annotation: Any) -> bool:
    return getattr(annotation.array_type, "__module__", "").startswith("torch")


def _tensor(wanted: type, name: str, value: Any) -> Any:
    """Return a tensor; NumPy's arrays become one."""
    if type(value).__module__ == "numpy" and value.dtype.kind in "fiu":
        import torch

        value = torch.as_tensor(value)
    held = hasattr(type(value), "vector")
    return instance(wanted, "take its .vector" if held else "", name, value)


def words_of(annotation: Any) -> str:
    """What errors call a type."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation in _WORDS:
        return _WORDS[annotation]
    if annotation in _NUMBERS:
        return _NUMBERS[annotation][1]
    if origin in (Union, types.UnionType):
        return listed([words_of(part) for part in arguments if part is not types.NoneType])
    if origin is Literal:
        return listed([repr(one) for one in arguments])
    if origin is tuple and arguments[-1:] != (...,):
        return f"a tuple of {len(arguments)}"
    if origin in _MANY and arguments:
        one = words_of(arguments[0])
        return _LISTS[arguments[0]][1] if arguments[0] in _LISTS else f"a list, each {one}"
    if origin in (Mapping, dict):
        return f"a dict, each value {words_of(arguments[1])}"
    dimensions = _dimensions(annotation)
    if dimensions is not None:
        return f"a tensor of shape [{dimensions.strip()}]"
    return a_or_an(getattr(annotation, "__name__", str(annotation)))


def _members(protocol: type) -> Iterable[str]:
    for base in protocol.__mro__:
        if getattr(base, "_is_protocol", False):
            names = (*vars(base), *vars(base).get("__annotations__", {}))
            yield from (name for name in names if not name.startswith("_"))


def _offers(protocol: type, members: frozenset[str], name: str, value: Any) -> Any:
    # `isinstance` would compute every property
    if missing := members - set(dir(value)):
        raise TypeError(
            f"{name} must be {words_of(protocol)}, not {shown(value)}, which has no "
            f"{', '.join(sorted(missing))}"
        )
    return value


def _check_of_union(parts: Sequence[Any], limits: Limits) -> Check | None:
    wanted = tuple(part for part in parts if part is not types.NoneType)
    whole_union = Union[wanted]  # noqa: UP007, the parts are known at run time alone
    if whole_union in _KINDS:
        check: Check | None = _KINDS[whole_union]
    elif len(wanted) == 1:
        check = check_of(wanted[0], limits)
    else:
        if {str, Path} <= set(wanted):  # two ways to write one thing
            others = [part for part in wanted if part not in (str, Path)]
            # a lone text is a path, and no list of texts
            first = any(get_origin(part) in _MANY for part in others)
            wanted = (str | Path, *others) if first else (*others, str | Path)
        wanted = _one_mapping(wanted)
        checks = [check_of(part, limits) for part in wanted]
        known = [one for one in checks if one is not None]
        words = words_of(Union[wanted])  # noqa: UP007
        streams = sum(get_origin(part) in _MANY for part in wanted)
        check = partial(_any_of, known, words, streams) if len(known) == len(checks) else None
    if check is None or types.NoneType not in parts:
        return check
    return partial(_or_none, check)


def _one_mapping(parts: Sequence[Any]) -> tuple[Any, ...]:
    """Several types of dicts as one, whose values may be of any of their types."""
    dicts = [part for part in parts if get_origin(part) in (Mapping, dict)]
    if len(dicts) < 2:
        return tuple(parts)
    keys, values = (
        Union[tuple(get_args(part)[place] for part in dicts)]  # noqa: UP007
        for place in (0, 1)
    )
    return (*(part for part in parts if part not in dicts), Mapping[keys, values])


def _any_of(checks: Sequence[Check], words: str, streams: int, name: str, value: Any) -> Any:
    said: list[Exception] = []
    if isinstance(value, Iterator) and streams > 1:
        value = list(value)  # each of the checks reads it from its start
    for check in checks:
        try:
            return check(name, value)
        except (TypeError, ValueError) as error:
            said.append(error)
    # of the right type but a value that cannot be, or wrong at one place: that says more
    for error in said:
        if not isinstance(error, TypeError) or str(error).startswith(f"{name}["):
            raise error
    raise TypeError(f"{name} must be {words}, not {shown(value)}")


def _check_of_many(origin: Any, item: Any, limits: Limits) -> Check:
    if item in _LISTS:
        return partial(_limited, _LISTS[item][0], limits)
    if item is str:
        return texts
    return partial(many, _MADE.get(origin, list), item, check_of(item, limits))


def _streamed(items: Iterable[Any]) -> Iterable[Any]:
    """What may be longer than memory is checked as it is read."""
    return items


_MADE: dict[Any, Callable[[Iterable[Any]], Any]] = {
    **{kind: kind for kind in (tuple, set, frozenset)},
    Iterable: _streamed,
}


def many(
    made: Callable[[Iterable[Any]], Any], item: Any, check: Check | None, name: str, value: Any
) -> Any:
    if isinstance(item, type) and check is not None and _fits(item, value):
        value = [value]
    if not is_list(value):
        how = check.args[1] if isinstance(check, partial) and check.func is instance else ""
        how = f"; {how}" if how else ""
        raise TypeError(f"{name} must be a list, each {words_of(item)}, not {shown(value)}{how}")
    if made is _streamed and not isinstance(value, Iterator):
        made = list
    return made(one if check is None else check(f"{name}[{i}]", one) for i, one in enumerate(value))


def _fields(checks: Sequence[Check | None], name: str, value: Any) -> tuple[Any, ...]:
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise TypeError(f"{name} must be a tuple of {len(checks)}, not {shown(value)}")
    if len(value) != len(checks):
        raise ValueError(f"{name} must be a tuple of {len(checks)}, not of {len(value)}")
    parts = enumerate(zip(checks, value, strict=True))
    return tuple(one if check is None else check(f"{name}[{i}]", one) for i, (check, one) in parts)


def some(item: type, name: str, value: Any) -> list[Any]:
    """Return instances of a class; a single one becomes a list.

    Raises:
        TypeError: If an item has another class; its index is given.
        ValueError: If there are none.
    """
    found = many(list, item, check_of(item), name, value)
    if not found:
        raise ValueError(f"{name} is empty; give at least one {item.__name__}")
    return found


def _fits(item: type, value: Any) -> bool:
    try:
        return isinstance(value, item)
    except TypeError:
        return False


def mapping(keys: Check | None, values: Check | None, name: str, given: Any) -> Any:
    if not isinstance(given, Mapping):
        raise TypeError(f"{name} must be a dict, not {shown(given)}")
    if keys is not None:
        for key in given:
            keys(f"a key of {name}", key)
    if values is None:
        return given
    return {key: values(f"{name}[{key!r}]", value) for key, value in given.items()}


def _callable(name: str, value: Any) -> Any:
    if not callable(value):
        raise TypeError(f"{name} must be a function, not {shown(value)}")
    return value


def _limited(check: Callable[..., Any], limits: Limits, name: str, value: Any) -> Any:
    return check(name, value, limits)


def _or_none(check: Check, name: str, value: Any) -> Any:
    return None if value is None else check(name, value)
