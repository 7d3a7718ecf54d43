"""Argument checks: decorators check each argument of public functions by its annotation.

The limits of numbers depend on their name, and are the same everywhere.
"""

from __future__ import annotations

import builtins
import inspect
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache, partial, wraps
from typing import Any, ForwardRef, ParamSpec, TypeVar, Unpack, cast, get_args, get_origin, overload

from emlens._arguments import ANY, LIMITS, Limits, listed, shown
from emlens._guesses import nearest, unknown
from emlens._kinds import Check, check_of, many, mapping

ALIKE = 0.85
"""How alike an option of another library is to one of our own that is meant."""

P = ParamSpec("P")
R = TypeVar("R")
C = TypeVar("C", bound=type)


class _Later(type):
    """Placeholder of a class that is imported for type checkers only; compares class names."""

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
        **limits: Limits of numbers that differ from those in `LIMITS`.
    """
    if function is None:
        return partial(_behind, limits=limits)
    return _behind(function, {})


def guard_methods(cls: C) -> C:
    """Check the arguments of public methods of a class, and the names of its constructor."""
    for name, member in list(vars(cls).items()):
        if name.startswith("_"):
            continue
        if isinstance(member, (classmethod, staticmethod)):
            setattr(cls, name, type(member)(_behind(member.__func__, {})))
        elif inspect.isfunction(member):
            setattr(cls, name, _behind(member, {}))
    if is_dataclass(cls):
        guard_names(cls)
    return cast(C, cls)


def guard_names(cls: C) -> C:
    """Suggest a name if a dataclass is constructed with an unknown one."""
    made: Any = vars(cls).get("__init__")
    if made is None:
        return cls
    signature = inspect.signature(made)

    @wraps(made)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        _check_names(cls.__name__, signature, (self, *args), kwargs)
        made(self, *args, **kwargs)

    type.__setattr__(cls, "__init__", init)
    return cls


def _check_names(
    what: str,
    signature: inspect.Signature,
    args: Sequence[object],
    kwargs: Mapping[str, object],
    options: Collection[str] = (),
) -> None:
    """Refuse unknown names, and positional values that need a name.

    Raises:
        TypeError: With a suggestion.
    """
    parameters = signature.parameters.values()
    kinds = {parameter.kind for parameter in parameters}
    placed = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    own = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY] + sorted(options)
    known = [*(name for name in placed if name not in ("self", "cls")), *own]
    open_ended = inspect.Parameter.VAR_KEYWORD in kinds and not options
    strange = [name for name in kwargs if name not in known]
    if strange and not open_ended:
        said = f"{what}() got an unexpected keyword argument"
        raise TypeError(unknown(said, strange[0], known))
    if len(args) > len(placed) and inspect.Parameter.VAR_POSITIONAL not in kinds and own:
        by_place = ", ".join(name for name in placed if name not in ("self", "cls"))
        by_name = listed([f"{name}=" for name in own if name not in kwargs])
        raise TypeError(
            f"{what}({by_place}) takes no other positional arguments; name what "
            f"{shown(args[len(placed)])} is: {by_name}"
        )


def _behind(function: Callable[P, R], limits: Mapping[str, Limits]) -> Callable[P, R]:
    signature = inspect.signature(function)
    checks: dict[str, Check] = {}
    options: list[str] = []
    prepared = False

    @wraps(function)
    def door(*args: P.args, **kwargs: P.kwargs) -> R:
        nonlocal prepared
        if not prepared:
            # at the first call, when every room has said what its kinds are
            checks.update(_checks(function, signature, limits))
            options.extend(_options_in(function, signature))
            prepared = True
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            _check_names(function.__qualname__, signature, args, kwargs, options)
            return function(*args, **kwargs)  # Python's own words for what is missing
        for name, value in bound.arguments.items():
            if name in checks and value is not signature.parameters[name].default:
                bound.arguments[name] = checks[name](name, value)
        return function(*bound.args, **bound.kwargs)

    setattr(door, "_limits", limits)  # noqa: B010
    return door


def check_given(function: Callable[..., Any], **given: object) -> None:
    """Check some arguments of a guarded function without calling it.

    Raises:
        TypeError: If one is of a wrong type, or there is no such argument.
        ValueError: If one is out of range or unknown.
    """
    plain = inspect.unwrap(function)
    signature = inspect.signature(plain)
    checks = _checks(plain, signature, getattr(function, "_limits", {}))
    rest = {name: value for name, value in given.items() if name not in signature.parameters}
    for name in given.keys() - rest.keys():
        if name in checks and given[name] is not signature.parameters[name].default:
            checks[name](name, given[name])
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD and name in checks:
            checks[name](name, rest)


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
            own = [
                p.name
                for p in signature.parameters.values()
                if p.kind is not p.VAR_KEYWORD and p.name not in ("self", "cls")
            ]
            check = _check_of_options(annotation, check, own)
        found[name] = check
    return {name: check for name, check in found.items() if check is not None}


def _options_in(function: Callable[..., Any], signature: inspect.Signature) -> Iterator[str]:
    """Names of the options that a function lists."""
    module = getattr(inspect.unwrap(function), "__globals__", {})
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            yield from options_of(resolved(parameter.annotation, module))


def options_of(annotation: Any) -> dict[str, Any]:
    """The types of the options that `Unpack[...]` of a `TypedDict` lists, by name; else none."""
    if get_origin(annotation) is not Unpack:
        return {}
    listed = get_args(annotation)[0].__annotations__
    return {name: resolved(written, {}) for name, written in listed.items()}


def _check_of_options(annotation: Any, check: Check | None, own: Sequence[str]) -> Check | None:
    """The check of `**options`: of each by its name where a `TypedDict` lists them."""
    if get_origin(annotation) is not Unpack:
        return partial(_passed_on, own, check)
    typed = options_of(annotation).items()
    checks = {name: check_of(type_, LIMITS.get(name, ANY)) for name, type_ in typed}
    return partial(_options, checks, sorted({*own, *checks}))


def _options(
    checks: Mapping[str, Check | None], known: Sequence[str], _: str, given: Mapping[str, Any]
) -> Any:
    read = {}
    for name, value in given.items():
        if name not in checks:
            raise TypeError(unknown("unknown option", name, known))
        check = checks[name]
        read[name] = value if check is None else check(name, value)
    return read


def _passed_on(own: Sequence[str], check: Check | None, name: str, given: Mapping[str, Any]) -> Any:
    """Options of another library; refused if an own option was meant."""
    for option in given:
        if meant := nearest(option, own, ALIKE):
            raise TypeError(f"unknown option {option!r}; did you mean {meant}?")
    return given if check is None else mapping(None, check, name, given)


def check_fields(settings: Any, **limits: Limits) -> None:
    """Check the fields of a frozen dataclass; to be called in its `__post_init__`.

    Args:
        settings: The new object.
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
