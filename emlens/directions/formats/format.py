"""What a format of directions is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from emlens.directions.direction import Directions


@dataclass(frozen=True)
class Format:
    """A format that is read, and perhaps written; `emlens._registry.FORMATS` lists them.

    Attributes:
        says: What it is, as errors list it.
        read: Reads a file; one that is a `folder` takes the folder, too.
        holds: Whether a file is of it, by its path and first bytes. Of several that say so, the
            last one in the list.
        suffix: Of its files, where directions are looked for by it.
        write: Writes directions, with the model type that a file may name.
        folder: Whether it is a folder.
    """

    says: str
    read: Callable[[Path], Directions]
    holds: Callable[[Path, bytes], bool]
    suffix: str | None = None
    write: Callable[[Directions, Path, str | None], Path] | None = None
    folder: bool = False
