"""Conditions: the adapters that act, and the edits."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeAlias, TypeVar, runtime_checkable

from emlens._kinds import kind
from emlens.hooked.edit import Edit
from emlens.hooked.identity import acting_identity
from emlens.hooked.interface import Hooked

BASE = "base"
"""What the base model is called where nothing else names it."""


@runtime_checkable
class Altered(Protocol):
    """An adapter that acts changed: scaled, under noise, with a direction projected out."""

    @property
    def adapter(self) -> str:
        """Its name on the model."""
        ...

    def altering(self, model: Any) -> AbstractContextManager[None]:
        """Change the adapter inside the block; afterwards it is as it was, bit by bit."""
        ...


@runtime_checkable
class HasCondition(Protocol):
    """Something trained that can be applied to a model, such as an `Organism`."""

    def on(self, model: Any) -> Any: ...


Acting: TypeAlias = str | Altered
"""An adapter that acts: its name, or the name with what is changed about it."""


@dataclass(frozen=True)
class Condition:
    """The adapters that act and the edits: everything beside the tokens that a pass depends on.

    Users rarely construct one: wherever a condition is expected, `None`, `[]`, an edit, a list of
    edits, the name of an adapter (or several), `(name, edits)` and an `Organism` are converted.

    Attributes:
        adapters: Names of the adapters that act; None is the base, without adapters.
        edits: Edits, besides those of an enclosing `model.edited`.
        name: Its name in error messages; not part of its identity.

    Examples:
        >>> emlens.log_odds(
        ...     model,
        ...     pairs,
        ...     {
        ...         "base": None,
        ...         "steered": emlens.Add(v),
        ...         "medical": "medical",
        ...         "medical, ablated": ("medical", [emlens.Ablate(v)]),
        ...     },
        ... )
    """

    adapters: tuple[Acting, ...] | None = None
    edits: tuple[Edit, ...] = ()
    name: str = field(default="", compare=False, repr=False, kw_only=True)

    def __post_init__(self) -> None:
        adapters: Any = () if self.adapters is None else self.adapters
        if _acts(adapters):
            adapters = (adapters,)
        if not isinstance(adapters, Sequence) or not all(map(_acts, adapters)):
            raise TypeError(
                f"the adapters of a condition are {_shown(adapters)}; give names, or None for the "
                "base"
            )
        edits: Any = self.edits
        if not _edits(edits):
            raise TypeError(
                f"the edits of a condition are {_shown(edits)}; give edits such as "
                "emlens.Add(direction)"
            )
        object.__setattr__(self, "adapters", tuple(adapters) or None)
        object.__setattr__(self, "edits", (edits,) if _edit(edits) else tuple(edits))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the adapters that act; none for the base."""
        return tuple(a if isinstance(a, str) else a.adapter for a in self.adapters or ())

    def with_edits(self, *edits: Edit) -> Condition:
        """The same condition with further edits after its own."""
        return replace(self, edits=(*self.edits, *edits))

    def identity(self, model: Hooked) -> str:
        """A hash of everything that acts, 16 letters.

        It depends on all parameters of the active adapters, their strengths, and the vectors of all
        edits, including those of enclosing blocks; not on names.

        Raises:
            TypeError: If the content of an edit cannot be determined.
        """
        with model.under(self):
            return acting_identity(model)

    def described(self, model: Hooked) -> str:
        """A description of everything that acts, including edits of enclosing blocks."""
        return str(Condition(self.adapters, (*model.edits_in_force(()), *self.edits)))

    def __str__(self) -> str:
        adapters = " + ".join(map(str, self.adapters or ()))
        parts = [f"adapter {adapters}"] if adapters else [BASE]
        return ", ".join([*parts, *map(repr, self.edits)])


ConditionLike: TypeAlias = (
    Condition
    | HasCondition
    | Edit
    | Altered
    | str
    | Sequence[Edit]
    | Sequence[Acting]
    | tuple[Acting | Sequence[Acting] | None, Edit | Sequence[Edit]]
    | None
)
"""What users may write for a condition; `condition_of` says what each means."""


@kind(ConditionLike, words="a condition")
def _any_condition(_: str, given: Any) -> Any:
    """`condition_of` reads it, which knows the model."""
    return given


Conditions: TypeAlias = Mapping[Any, ConditionLike]
"""Named conditions; a name that is not text, such as a step, is shown as text."""

K = TypeVar("K", bound=Hashable)


@kind(Conditions, words="conditions by name")
def _any_conditions(_: str, given: Any) -> Any:
    """`conditions_of` reads them."""
    return given


def by_name(given: Any, what: str = "conditions") -> Mapping[Any, ConditionLike]:
    """Conditions by name; one without is called after its adapters, its edits `edited`.

    Errors call them `what`.

    Raises:
        TypeError: If it is not a condition, or several adapters, which may act together or apart.
    """
    if isinstance(given, Mapping):
        return given
    if isinstance(given, Sequence) and not isinstance(given, str) and all(map(_acts, given)):
        names = ", ".join(f"{str(one)!r}: {str(one)!r}" for one in given)
        raise TypeError(f"{what} are given by name, e.g. {{'base': None, {names}}}")
    if _acts(given) or _edit(given) or _edits(given):
        return {str(given) if _acts(given) else "edited": given}
    if isinstance(given, tuple) and len(given) == 2 and _names(given[0]) and _edits(given[1]):
        names = () if given[0] is None else (given[0],) if _acts(given[0]) else given[0]
        return {", ".join(["+".join(map(str, names))] * bool(names) + ["edited"]): given}
    if isinstance(given, (Condition, HasCondition)) and not isinstance(given, type):
        return {str(getattr(given, "name", "") or "condition"): given}
    raise TypeError(f"{what} are given by name, e.g. {{'steered': ...}}, not as {_shown(given)}")


def condition_of(model: Hooked, given: ConditionLike, name: str = "") -> Condition:
    """Convert what was given to a condition.

    - `None` is the base, without adapters.
    - `[]`, an edit or a list of edits name no adapter: those of the enclosing
      `with model.adapter(...)` act, else none: the base. An adapter that the model was brought
      with is not an enclosing one.
    - An adapter's name, or a list of names: these act.
    - `(name, edits)`: both; `(None, edits)` is the base with edits.
    - An `Organism`: what it was trained to be.

    Edits of an enclosing `model.edited` act in every condition, but are not part of it.

    Args:
        model: The model that will run under it.
        given: A condition in any of these forms.
        name: What errors call it.

    Raises:
        ValueError: If the model has no such adapter.
        TypeError: If it has none of these forms.
    """
    found = _read(model, given, f"condition {name!r}" if name else "a condition")
    for adapter in found.names:
        model.check_adapter(adapter)
    return replace(found, name=name) if name else found


def conditions_of(model: Hooked, given: Mapping[K, ConditionLike] | None) -> dict[K, Condition]:
    """Return named conditions; by default the one that names nothing, `[]`.

    Its name is that of the adapter of the enclosing `with model.adapter(...)`, or `"base"`. A
    condition without a name, such as an edit, is compared with it; see `by_name`. Names are kept as
    given. A name of several parts is a tuple, since joined words could be another name.

    Raises:
        ValueError: If there are no conditions, or the model has no such adapter.
        TypeError: If one is not a condition, or they have no names.
    """
    if not isinstance(given, Mapping):
        base: Any = {"+".join(map(str, model.enclosing_adapters or (BASE,))): []}
        given = base if given is None else base | dict(by_name(given))
    if not given:
        raise ValueError('there are no conditions; give at least one, e.g. {"base": None}')
    return {key: condition_of(model, value, str(key)) for key, value in given.items()}


def _read(model: Hooked, given: Any, what: str) -> Condition:
    if given is None or isinstance(given, Condition):
        return given or Condition()
    if _acts(given):
        return Condition((given,))
    if _edit(given):
        return Condition(model.enclosing_adapters, (given,))
    if isinstance(given, HasCondition) and not isinstance(given, type):
        return _read(model, given.on(model), what)
    if isinstance(given, tuple) and len(given) == 2 and _names(given[0]) and _edits(given[1]):
        return Condition(given[0], given[1])
    if isinstance(given, Sequence) and given and all(map(_acts, given)):
        return Condition(tuple(given))
    if isinstance(given, Sequence) and _edits(given):
        return Condition(model.enclosing_adapters, tuple(given))
    raise TypeError(
        f"{what} is {_shown(given)}; give None (the base), an edit such as emlens.Add(direction), "
        "a list of edits, an adapter's name, or (name, edits)"
    )


def _acts(value: object) -> bool:
    return isinstance(value, (str, Altered)) and not isinstance(value, type)


def _edit(value: object) -> bool:
    # a class has what its objects have
    return isinstance(value, Edit) and not isinstance(value, type)


def _names(value: object) -> bool:
    """Whether something says which adapters act: None, a name, or names."""
    if value is None or _acts(value):
        return True
    return isinstance(value, Sequence) and bool(value) and all(map(_acts, value))


def _edits(value: object) -> bool:
    if _edit(value):
        return True
    if not isinstance(value, Sequence) or isinstance(value, str):
        return False
    return all(map(_edit, value))


def _shown(value: object) -> str:
    if isinstance(value, type):
        return f"the class {value.__name__}"
    kind = type(value).__name__
    kind = f"{'an' if kind[0] in 'AEIOaeio' else 'a'} {kind}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        kinds = dict.fromkeys(type(item).__name__ for item in value)
        return f"{kind} of {', '.join(kinds) or 'nothing'}"
    return kind
