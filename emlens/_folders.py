"""Folders that are replaced atomically: the old one stays until the new one is complete."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from emlens._files import raise_about, temporary_beside
from emlens._reading import expanded


@contextmanager
def whole_folder(folder: str | Path, own: Collection[str] = ()) -> Iterator[Path]:
    """Yield an empty folder that replaces `folder` unless the block raises.

    If the process is killed between the two renames, `recovered` restores the old folder. One
    process at a time may write a folder.

    Args:
        folder: The folder to write.
        own: Names of files that are replaced; other files in the folder are kept.

    Raises:
        OSError: If a file cannot be written; it is named as in `folder`.
    """
    target = recovered(expanded(folder).absolute())
    target.parent.mkdir(parents=True, exist_ok=True)
    new = temporary_beside(target)
    new.mkdir()
    try:
        yield new
        for path in (*new.rglob("*"), new):
            sync(path)
        old = _aside(target)
        if target.exists():
            os.rename(target, old)
        os.rename(new, target)
        sync(target.parent)
        for name in own:
            (old / name).unlink(missing_ok=True)
    except OSError as error:
        raise_about(error, new, target)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        recovered(target)


def recovered(folder: Path) -> Path:
    """Complete a `whole_folder` that was killed, if any; return the folder."""
    old = _aside(folder.absolute())
    if not old.is_dir():
        return folder
    if not folder.exists():
        os.rename(old, folder)
        return folder
    for path in old.iterdir():
        if not (folder / path.name).exists():
            os.rename(path, folder / path.name)
    shutil.rmtree(old)
    return folder


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def sync(path: Path) -> None:
    """Sync a file or folder to disk, on systems that can."""
    with suppress(PermissionError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
