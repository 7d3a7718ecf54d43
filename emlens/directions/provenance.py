"""Where a direction comes from: enough to describe and to reproduce it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from types import MappingProxyType
from typing import Any

from emlens._types import checked_fields

_VERSIONED = ("emlens", "torch", "transformers", "nnsight")


@dataclass(frozen=True, slots=True)
class Provenance:
    """How a direction was made; immutable, including its settings.

    The ways to build "the misalignment direction" give nearly orthogonal vectors, so
    `construction` is part of every direction and of every result that uses one.

    Attributes:
        construction: `"mean-diff"`, `"trained vector"`, `"random"`, ..., or how it was derived.
        model: Name of the model it was read or trained in.
        revision: Revision of that model.
        adapter: Names of the active adapters, or None.
        tokens: Mask of the tokens that counted.
        weighting: `"token"` or `"conversation"`, for means.
        data: Hashes of the data, by role.
        template: Hash of the chat template.
        n: Numbers of conversations, tokens, steps ..., by role.
        seed: The random seed.
        settings: Further settings of the construction.
        versions: Versions of the packages that made it.
        identity: `model.identity`, a hash of the model's content.
        condition: `Condition.identity`, a hash of the adapters and edits that acted.
    """

    construction: str
    model: str | None = None
    revision: str | None = None
    adapter: str | None = None
    tokens: str | None = None
    weighting: str | None = None
    data: Mapping[str, str] = field(default_factory=dict)
    template: str | None = None
    n: Mapping[str, int] = field(default_factory=dict)
    seed: int | None = None
    settings: Mapping[str, object] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    identity: str | None = None
    condition: str | None = None

    def __post_init__(self) -> None:
        if not self.versions:
            object.__setattr__(self, "versions", package_versions())
        for item in fields(self):
            object.__setattr__(self, item.name, _fixed(getattr(self, item.name)))

    def derived(self, construction: str) -> Provenance:
        """The provenance of something computed from what this one describes."""
        return replace(self, construction=construction)

    def with_settings(self, more: Mapping[str, object]) -> Provenance:
        """The provenance with further settings, or others."""
        return replace(self, settings={**self.settings, **more})

    def to_dict(self) -> dict:
        """A JSON-ready record."""
        return {item.name: _plain(getattr(self, item.name)) for item in fields(self)}

    @classmethod
    def from_dict(cls, record: Mapping) -> Provenance:
        """Read what `to_dict` gave; fields of later versions are kept under `settings`.

        Raises:
            ValueError: If it names no construction, or a field is of another type.
        """
        if not isinstance(record, Mapping) or "construction" not in record:
            raise ValueError("provenance names no construction")
        known = {item.name for item in fields(cls)}
        own = {key: value for key, value in record.items() if key in known}
        try:
            checked_fields(cls, own)
        except ValueError as error:
            raise ValueError(f"the provenance: {error}") from error
        made = cls(**own)
        extra = {key: value for key, value in record.items() if key not in known}
        return made.with_settings(extra) if extra else made


def _fixed(value: Any) -> Any:
    """Dicts and lists, at every depth, as what cannot be changed."""
    if isinstance(value, Mapping):
        return MappingProxyType({key: _fixed(one) for key, one in value.items()})
    return tuple(map(_fixed, value)) if isinstance(value, (list, tuple)) else value


def _plain(value: Any) -> Any:
    """Dicts again, which JSON can hold."""
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    return tuple(map(_plain, value)) if isinstance(value, tuple) else value


def package_versions() -> dict[str, str]:
    """Versions of emlens and of the packages its numbers depend on."""
    return dict(_versions())


@cache
def _versions() -> Mapping[str, str]:
    # reading them takes as long as a small computation
    found = {}
    for name in _VERSIONED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
