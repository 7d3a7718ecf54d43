"""Atomic writes: files are written beside the target, synced, then moved into place."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from errno import EIO
from functools import cache
from pathlib import Path
from typing import NoReturn
from uuid import uuid4

from emlens._reading import expanded

_DAY = 24 * 60 * 60.0
_OURS = re.compile(r"\..+\.emlens-(?P<host>[0-9a-f]{8})-(?P<pid>\d+)-[0-9a-f]{8}\.tmp")


@contextmanager
def atomic_path(path: str | Path, check: Callable[[Path], object] | None = None) -> Iterator[Path]:
    """Yield a temporary path that replaces `path` unless the block or `check` raises.

    Leftovers of killed processes in the folder are removed first.

    Args:
        path: The file.
        check: Reads the new file if other libraries wrote it, as not all report a full disk. If it
            raises, the old file is kept.

    Raises:
        OSError: If it cannot be written, or does not pass the check; `path` is named.
    """
    target = expanded(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(target)
    try:
        try:
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
        except OSError as error:
            raise_about(error, temporary, target)
        if check is not None:
            _checked(temporary, target, check)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def temporary_beside(target: Path) -> Path:
    """A path beside a file or folder, which names the process that writes it."""
    remove_leftovers(target)
    mark = f"emlens-{_host()}-{os.getpid()}-{uuid4().hex[:8]}"
    return target.with_name(f".{target.name[:100]}.{mark}.tmp")


def raise_about(error: OSError, temporary: Path, target: Path) -> NoReturn:
    """Raise an error about a temporary path as one about the target."""
    name = os.fsdecode(error.filename or temporary)
    if not name.startswith(str(temporary)):
        raise error
    name = name.replace(str(temporary), str(target), 1)
    raise OSError(error.errno or EIO, error.strerror or str(error), name) from error


def _checked(temporary: Path, target: Path, check: Callable[[Path], object]) -> None:
    try:
        check(temporary)
    except Exception as error:
        before = "the file of before is kept" if target.exists() else "nothing is kept"
        said = str(error).replace(str(temporary), "it")
        raise OSError(
            f"{target} was not written completely, {before}; is the disk full? ({said})"
        ) from error


def remove_leftovers(target: Path) -> None:
    """Remove temporary files of dead processes, but none that may still be written.

    Only processes of this host can be checked; files of others have to be a day old.
    """
    # names of before the process was part of them
    unmarked = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}\.tmp")
    for found in target.parent.glob(".*.tmp"):
        ours = _OURS.fullmatch(found.name)
        if not ours and not unmarked.fullmatch(found.name):
            continue
        with suppress(OSError):  # another process may be faster
            dead = ours and ours["host"] == _host() and not _lives(int(ours["pid"]))
            if dead or time.time() - found.stat().st_mtime > _DAY:
                shutil.rmtree(found) if found.is_dir() else found.unlink()


@cache
def _host() -> str:
    """Names the machine, its start and the space of process ids: 8 hexadecimal digits."""
    parts = [platform.node()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return sha256_of("|".join(parts).encode())[:8]


def _lives(pid: int) -> bool:
    """Whether there is such a process here; where that cannot be asked, it may be."""
    if os.name != "posix":
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def atomic_write(path: str | Path, data: bytes | str) -> None:
    """Write a file atomically; text as UTF-8."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def write_json(path: str | Path, value: object) -> None:
    """Write JSON atomically."""
    atomic_write(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def sha256_of(data: bytes) -> str:
    """SHA-256 of bytes, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def sha256_of_file(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal; the file is read in chunks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
