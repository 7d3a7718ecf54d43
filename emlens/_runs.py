"""Resuming runs part by part, with the same settings only."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from os.path import commonprefix
from pathlib import Path
from typing import Protocol, TypeVar

from emlens._files import write_json
from emlens._reading import read_json

T = TypeVar("T")
SETTINGS = "settings.json"
START_ANEW = "remove the file to start anew, or give the settings that it was made with"
"""The way out for one file that a run resumes from."""

_SHOWN, _WIDTH = 6, 80
_LABELS = {"identity": ("model", "revision"), "condition": ("adapter", "edits")}
"""What says the same by name: it counts where the content is not known on both sides."""
_MISSING = object()


def check_same(
    found: Mapping[str, object], wanted: Mapping[str, object], what: str, way_out: str
) -> None:
    """Refuse to resume with other settings.

    Both are compared as JSON has them: a tuple equals the list it was written as. Mappings inside
    are compared name by name. Where both know the `identity` of a model or of a `condition`, their
    names are labels and may differ.

    Args:
        found: The stored settings.
        wanted: The settings of this run.
        what: What they belong to, e.g. `"the checkpoint a.safetensors"`.
        way_out: What to do about it.

    Raises:
        ValueError: If they differ; up to six differences are listed.
    """
    there, now = _labelled(
        *(json.loads(json.dumps(dict(settings))) for settings in (found, wanted))
    )
    differ = list(_differences(there, now))
    if not differ:
        return
    shown = differ[:_SHOWN]
    if len(differ) > _SHOWN:
        shown.append(f"and {len(differ) - _SHOWN} more")
    raise ValueError(f"{what} was made with other settings ({'; '.join(shown)}); {way_out}")


class Saves(Protocol):
    """What writes itself to a path."""

    def save(self, path: Path, /) -> object: ...


@dataclass(frozen=True)
class Parts:
    """The folder of a run. A part whose file exists is finished and skipped.

    Attributes:
        folder: The folder; it is created with the first file.
    """

    folder: Path

    def keep_settings(
        self,
        settings: Mapping[str, object],
        what: str,
        way_out: str,
        *,
        free: Collection[str] = (),
        defaults: Mapping[str, object] | None = None,
    ) -> None:
        """Write the settings into the folder, or compare them with the stored ones.

        Args:
            settings: The settings that the parts depend on.
            what: What lies in the folder.
            way_out: What to do if the settings differ.
            free: Names that may differ.
            defaults: Settings that are taken for those that the folder does not name.

        Raises:
            ValueError: If settings differ that are not free.
        """
        path = self.folder / SETTINGS
        if not path.exists():
            write_json(path, dict(settings))
            return
        known = {**(defaults or {}), **read_json(path, dict)}
        found, wanted = (
            {name: value for name, value in record.items() if name not in free}
            for record in (known, settings)
        )
        check_same(found, wanted, what, way_out)

    @property
    def settings(self) -> dict:
        """The stored settings, without identities."""
        found = read_json(self.folder / SETTINGS, dict)
        return {name: value for name, value in found.items() if name not in _LABELS}

    def settings_as(self, make: Callable[[dict], T]) -> T:
        """The stored settings, converted by `make`.

        Raises:
            ValueError: As `make`, with the file.
        """
        try:
            return make(self.settings)
        except ValueError as error:
            path = self.folder / SETTINGS
            raise error if str(path) in str(error) else ValueError(f"{path}: {error}") from error

    def finished(self, name: str, record: str = "") -> bool:
        """Whether a part is finished."""
        return (self.folder / name / record).exists()

    def part(self, name: str, make: Callable[[], dict | Saves], record: str = "") -> Path:
        """Make a part unless it is finished.

        Args:
            name: Its file or folder.
            make: Gives what is kept: a dictionary for JSON, or what saves itself.
            record: Of a folder, the file that is written last.

        Returns:
            The file or folder.
        """
        path = self.folder / name
        if not self.finished(name, record):
            made = make()
            if isinstance(made, dict):
                write_json(path, made)
            else:
                made.save(path)
        return path


def _labelled(there: dict, now: dict) -> tuple[dict, dict]:
    """Both records with the names of what is known by content taken out, or the other way round."""
    for content, labels in _LABELS.items():
        if there.get(content) is None or now.get(content) is None:
            there, now = (
                {name: value for name, value in record.items() if name != content}
                for record in (there, now)
            )
        elif there[content] == now[content]:
            now = {**now, **{name: there[name] for name in labels if name in there}}
    return there, now


def _differences(there: dict, now: dict, above: str = "") -> Iterator[str]:
    for name in dict.fromkeys((*now, *there)):
        one, other = there.get(name, _MISSING), now.get(name, _MISSING)
        if isinstance(one, dict) and isinstance(other, dict):
            yield from _differences(one, other, f"{above}{name}.")
        elif one != other and repr(one) != repr(other):  # NaN is not equal to itself
            old, new = _shown(one, other)
            yield f"{above}{name}: {old} there, {new} now"


def _shown(one: object, other: object) -> tuple[str, str]:
    """Two values in words; of long ones the place where they begin to differ."""
    texts = ["missing" if value is _MISSING else repr(value) for value in (one, other)]
    start = 0
    if max(map(len, texts)) > _WIDTH:
        start = max(0, len(commonprefix(texts)) - _WIDTH // 4)
    cut = [text[start : start + _WIDTH] for text in texts]
    old, new = (
        f"{'...' if start else ''}{part}{'...' if start + _WIDTH < len(text) else ''}"
        for part, text in zip(cut, texts, strict=True)
    )
    return old, new
