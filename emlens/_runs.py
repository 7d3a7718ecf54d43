"""Runs that go on: the same settings, or refused."""

from __future__ import annotations

from collections.abc import Mapping


def check_same(
    found: Mapping[str, object], wanted: Mapping[str, object], what: str, way_out: str
) -> None:
    """Refuse to go on with something that was made with other settings.

    Args:
        found: The settings it was made with.
        wanted: Those of now.
        what: What was made, for the message.
        way_out: What to do, for the message.

    Raises:
        ValueError: If they differ; each difference is named.
    """
    names = [name for name in {**wanted, **found} if found.get(name) != wanted.get(name)]
    if names:
        listed = ", ".join(f"{name} {found.get(name)!r} now {wanted.get(name)!r}" for name in names)
        raise ValueError(f"{what} was made with other settings ({listed}); {way_out}")
