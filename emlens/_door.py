"""Checks of arguments: public functions are decorated, and read each argument by its annotation.

A number has the limits of its name, which are the same everywhere.
"""

from __future__ import annotations

import builtins
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import cache, partial, wraps
from typing import Any, ForwardRef, ParamSpec, TypeVar, Unpack, get_args, get_origin, overload

from emlens._arguments import ANY, LIMITS, Limits
from emlens._kinds import Check, check_of, many, mapping

P = ParamSpec("P")
R = TypeVar("R")
C = TypeVar("C", bound=type)


class _Later(type):
    """Stands for a class that is imported for type checkers only; compares names of classes."""

    def __instancecheck__(cls, value: object) -> bool:
        return any(base.__name__ == cls.__name__ for base in type(value).__mro__)

    def __getattr__(cls, name: str) -> _Later:
        if name.startswith("_"):
            raise AttributeError(name)
        return _Later(name, (), {})


class _Names(dict[str, Any]):
    """The names that an annotation is written in."""

    def __missing__(self, name: str) -> Any:
        return getattr(builtins, name, None) or _Later(name, (), {})


def resolved(annotation: Any, module: Mapping[str, Any]) -> Any:
    """The type that an annotation of a module names."""
    written = annotation
    if isinstance(annotation, ForwardRef):  # of a `TypedDict`, which may be another module's
        written, owner = annotation.__forward_arg__, annotation.__forward_module__
        module = vars(sys.modules[owner]) if isinstance(owner, str) else module
    if not isinstance(written, str):
        return written
    return eval(written, {"__builtins__": {}}, _Names(module))  # noqa: S307, our own source


@overload
def guarded(function: Callable[P, R], /) -> Callable[P, R]: ...
@overload
def guarded(**limits: Limits) -> Callable[[Callable[P, R]], Callable[P, R]]: ...
def guarded(function: Any = None, /, **limits: Limits) -> Any:
    """Check every argument of a function by its annotation; defaults are not checked.

    Args:
        function: The function.
        **limits: Limits of numbers that are not those of their name in `LIMITS`.
    """
    if function is None:
        return partial(_behind, limits=limits)
    return _behind(function, {})


def guard_methods(cls: C) -> C:
    """Check the arguments of the public methods of a class."""
    for name, member in list(vars(cls).items()):
        if name.startswith("_"):
            continue
        if isinstance(member, (classmethod, staticmethod)):
            setattr(cls, name, type(member)(_behind(member.__func__, {})))
        elif inspect.isfunction(member):
            setattr(cls, name, _behind(member, {}))
    return cls


def _behind(function: Callable[P, R], limits: Mapping[str, Limits]) -> Callable[P, R]:
    signature = inspect.signature(function)
    checks: dict[str, Check] = {}
    prepared = False

    @wraps(function)
    def door(*args: P.args, **kwargs: P.kwargs) -> R:
        nonlocal prepared
        if not prepared:
            # at the first call, when every room has said what its kinds are
            checks.update(_checks(function, signature, limits))
            prepared = True
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            return function(*args, **kwargs)  # Python's own words for what is missing
        for name, value in bound.arguments.items():
            if name in checks and value is not signature.parameters[name].default:
                bound.arguments[name] = checks[name](name, value)
        return function(*bound.args, **bound.kwargs)

    return door


def _checks(
    function: Callable[..., Any], signature: inspect.Signature, limits: Mapping[str, Limits]
) -> dict[str, Check]:
    module = getattr(inspect.unwrap(function), "__globals__", {})
    found: dict[str, Check | None] = {}
    for name, parameter in signature.parameters.items():
        if parameter.annotation is parameter.empty:
            continue
        annotation = resolved(parameter.annotation, module)
        check = check_of(annotation, limits.get(name, LIMITS.get(name, ANY)))
        if parameter.kind is parameter.VAR_POSITIONAL and check is not None:
            check = partial(many, tuple, None, check)
        elif parameter.kind is parameter.VAR_KEYWORD:
            own = [p.name for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY]
            check = _check_of_options(annotation, check, own)
        found[name] = check
    return {name: check for name, check in found.items() if check is not None}


def options_of(annotation: Any) -> dict[str, Any]:
    """The types of the options that `Unpack[...]` of a `TypedDict` lists, by name; else none."""
    if get_origin(annotation) is not Unpack:
        return {}
    listed = get_args(annotation)[0].__annotations__
    return {name: resolved(written, {}) for name, written in listed.items()}


def _check_of_options(annotation: Any, check: Check | None, own: Sequence[str]) -> Check | None:
    """The check of `**options`: of each by its name where a `TypedDict` lists them."""
    if get_origin(annotation) is not Unpack:
        return None if check is None else partial(mapping, None, check)
    listed = options_of(annotation).items()
    checks = {name: check_of(type_, LIMITS.get(name, ANY)) for name, type_ in listed}
    return partial(_options, checks, sorted({*own, *checks}))


def _options(
    checks: Mapping[str, Check | None], known: Sequence[str], _: str, given: Mapping[str, Any]
) -> Any:
    read = {}
    for name, value in given.items():
        if name not in checks:
            raise TypeError(f"unknown option {name!r}; there are {', '.join(known)}")
        check = checks[name]
        read[name] = value if check is None else check(name, value)
    return read


def check_fields(settings: Any, **limits: Limits) -> None:
    """Check the fields of a frozen dataclass; to be called in its `__post_init__`.

    Args:
        settings: What was just made.
        **limits: Limits of numbers that are not those of their name in `LIMITS`.
    """
    for name, (check, default) in _field_checks(type(settings), tuple(limits.items())).items():
        value = getattr(settings, name)
        if value is not default:
            object.__setattr__(settings, name, check(name, value))


@cache
def _field_checks(
    cls: type, limits: tuple[tuple[str, Limits], ...]
) -> dict[str, tuple[Check, Any]]:
    owners = {
        name: inspect.getmodule(base)
        for base in reversed(cls.__mro__)
        for name in vars(base).get("__annotations__", {})
    }
    known = {**LIMITS, **dict(limits)}
    found = {}
    for item in fields(cls):
        annotation = resolved(item.type, vars(owners[item.name]))
        check = check_of(annotation, known.get(item.name, ANY))
        if check is not None:
            found[item.name] = (check, item.default)
    return found
