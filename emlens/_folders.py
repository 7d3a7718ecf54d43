"""Folders that are replaced as a whole: what was there stays until the new one is complete."""

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
    """Give an empty folder beside `folder`; it takes its place unless the block raises.

    Where the process is killed between the two renames, `recovered` brings the old folder back.
    One process at a time may write a folder.

    Args:
        folder: What is written.
        own: Names of files that belong to what is replaced; others in the folder are kept.

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
    """Finish what a killed `whole_folder` has left of `folder`, if anything; the folder itself."""
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
    """Have a file or folder on the disk; systems that cannot open folders need not."""
    with suppress(PermissionError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
