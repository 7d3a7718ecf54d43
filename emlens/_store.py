"""One store for answers, scores and screens: rows under their keys in an SQLite file."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, TypeVar

from emlens._files import atomic_path, remove_leftovers, temporary_beside
from emlens._reading import expanded
from emlens._records import KEYS, Kind, lines, no_store, record_of, value_of
from emlens._runs import check_same

T = TypeVar("T")
APPLICATION, VERSION = int.from_bytes(b"emls", "big"), 1
"""What the header of our files says."""

WAIT = 60.0
"""Seconds to wait while another process writes."""

PAGE = 5000
"""Rows that are read at once."""

_READERS = {"responses": "Responses.load", "scores": "Scores.load", "screen": "emlens export"}
_MAGIC, _HEADER = b"SQLite format 3\0", 100
# a process that closes a file loses its locks on it, those of SQLite in other threads included
_LOCK = threading.RLock()
# a child inherits what SQLite knows of the locks that threads hold, and none of the threads
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_LOCK.acquire, after_in_parent=_LOCK.release, after_in_child=_LOCK.release
    )


class Store:
    """Records in one SQLite file, each under its key, in insertion order.

    The file is created if it is missing. No connection is held between calls, so threads, forks and
    other processes can share a store: each row is stored once, by whoever is first.

    Args:
        path: The file.
        kind: The kind of its records.
        settings: The settings that the records depend on; JSON.

    Raises:
        ValueError: If the file exists and is not such a store, or was made with other settings; or
            if its suffix is that of another kind of file. The file is not changed.
        OSError: If the file cannot be created.
    """

    def __init__(
        self, path: str | Path, kind: Kind, settings: Mapping[str, object] | None = None
    ) -> None:
        self.path, self.kind = expanded(path), kind
        wanted = json.loads(json.dumps(dict(settings or {})))
        if not self.path.exists():
            _make(self.path, kind, wanted)
        if not is_store(self.path):
            raise ValueError(_not_to_be_written(self.path, kind))
        found = _settings(self.path, kind)
        remove_leftovers(_target(self.path))
        way_out = "choose another file, or delete it to start anew"
        check_same(found, wanted, str(self.path), way_out)

    def __len__(self) -> int:
        with _opened(self.path, "rw") as database:
            return database.execute("SELECT count(*) FROM rows").fetchone()[0]

    def __iter__(self) -> Iterator[dict]:
        return _rows(self.path, "rw")

    def add(self, records: Iterable[Mapping]) -> list[dict]:
        """Write records in one transaction: all of them, or none on an error.

        Returns:
            The records as stored: for a key that existed, the earlier one.

        Raises:
            OSError: If the disk is full or not writable; stored rows are intact.
            ValueError: If a record is longer than SQLite can hold (1 GB).
        """
        rows = [(str(record[KEYS[self.kind]]), text_of(record)) for record in records]
        with _opened(self.path, "rw") as database:
            database.execute("BEGIN IMMEDIATE")
            database.executemany("INSERT OR IGNORE INTO rows (key, value) VALUES (?, ?)", rows)
            select = "SELECT value FROM rows WHERE key = ?"
            kept = [(database.execute(select, (key,)).fetchone()[0], key) for key, _ in rows]
            database.execute("COMMIT")
        return [record_of(text, f"{self.path}, row of the key {key!r}") for text, key in kept]

    def remove(self, keys: Iterable[object]) -> None:
        """Remove records, in one transaction."""
        with _opened(self.path, "rw") as database:
            database.execute("BEGIN IMMEDIATE")
            database.executemany("DELETE FROM rows WHERE key = ?", [(str(key),) for key in keys])
            database.execute("COMMIT")


def read(path: str | Path, kind: Kind | None = None) -> Iterator[dict]:
    """Records of a store, or of one in JSON Lines from an earlier version.

    Nothing is written. An incomplete last line, left by a killed run, is skipped.

    Args:
        path: The file.
        kind: The required kind; any by default.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a store, has another kind, or is damaged (the line is given).
    """
    path = expanded(path)
    if not is_store(path):
        return lines(path, kind)
    _settings(path, kind)
    return _rows(path, "ro")


def read_rows(path: str | Path, kind: Kind, make: Callable[[dict], T]) -> tuple[T, ...]:
    """The records of a store, converted by `make`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: As `read`, or as `make`, with the file and the number of the record.
    """
    made: list[T] = []
    for record in read(path, kind):
        try:
            made.append(make(record))
        except ValueError as error:
            raise ValueError(f"{expanded(path)}, record {len(made) + 1}: {error}") from error
    return tuple(made)


def export(path: str | Path, out: str | Path) -> int:
    """Write the records of a store as JSON Lines, atomically; return their number.

    Raises:
        FileNotFoundError: If there is no such store.
        FileExistsError: If `out` already exists.
        ValueError: If it is not a store.
    """
    records, out, written = read(path), expanded(out), 0
    if out.exists():
        itself = "the store itself" if out.samefile(expanded(path)) else "there already"
        raise FileExistsError(f"{out} is {itself}; give the path of a new file")
    with atomic_path(out) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        for record in records:
            file.write(f"{text_of(record)}\n")
            written += 1
    return written


def is_store(path: str | Path) -> bool:
    """Whether a file is an SQLite store of emlens; False for other text.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be a store of any version.
    """
    path = expanded(path)
    if path.is_dir() or not path.is_file():
        if not path.exists():
            raise FileNotFoundError(f"no file {path}")
        what = "a folder" if path.is_dir() else "not a regular file"
        raise ValueError(no_store(path, f"it is {what}"))
    with _LOCK, path.open("rb") as file:
        head = file.read(_HEADER)
    if not head.startswith(_MAGIC):
        return False
    if len(head) < _HEADER:
        raise ValueError(no_store(path, "it is a part of an SQLite database"))
    if int.from_bytes(head[68:72], "big") != APPLICATION:
        raise ValueError(no_store(path, "it is an SQLite database of another program"))
    version = int.from_bytes(head[60:64], "big")
    if version != VERSION:
        raise ValueError(f"{path} is a store of a later version of emlens ({version}); update it")
    return True


def text_of(record: Mapping) -> str:
    """A record as one line of JSON; half of a surrogate pair, which no file can hold, escaped."""
    text = json.dumps(dict(record), ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(dict(record))
    return text


def _not_to_be_written(path: Path, kind: Kind) -> str:
    """Why a text file is no place for records."""
    new = path.with_suffix(".sqlite").name
    try:
        next(lines(path, kind))
    except ValueError as error:
        return f"{error}, such as {new}"
    return (
        f"{path} is a store of an earlier version of emlens, in JSON Lines, which is not written "
        f"any more; {_READERS[kind]} reads it. Give a new path, such as {new}"
    )


def _make(path: Path, kind: Kind, settings: Mapping[str, object]) -> None:
    """Create a store atomically, unless another process was first."""
    if path.suffix.lower() in (".json", ".jsonl", ".csv"):
        new = path.with_suffix(".sqlite").name
        raise ValueError(f"{path}: a store is an SQLite file; give a path such as {new}")
    target = _target(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(target)
    try:
        with _told(path), closing(_connect(temporary, "rwc")) as database:
            database.execute("PRAGMA journal_mode=MEMORY")
            database.execute("BEGIN IMMEDIATE")
            database.execute(f"PRAGMA application_id={APPLICATION}")
            database.execute(f"PRAGMA user_version={VERSION}")
            database.execute("CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL)")
            database.execute(
                "CREATE TABLE rows (n INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, "
                "value TEXT NOT NULL)"
            )
            said = {"kind": kind, **settings}
            lines = [(name, json.dumps(value)) for name, value in said.items()]
            database.executemany("INSERT INTO settings VALUES (?, ?)", lines)
            database.execute("COMMIT")
        _put(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _target(path: Path) -> Path:
    """The file itself, where the path is a link; SQLite writes beside it."""
    return Path(os.path.realpath(path))


def _put(temporary: Path, path: Path) -> None:
    """Give a file its name, unless the name is taken."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass
    except OSError:
        # a file system without links
        if not path.exists():
            os.rename(temporary, path)


def _settings(path: Path, kind: Kind | None) -> dict[str, object]:
    """The settings of a store.

    Raises:
        ValueError: If the store is of another kind.
    """
    with _opened(path, "ro") as database:
        rows = database.execute("SELECT name, value FROM settings").fetchall()
    found = {name: value_of(value, f"{path}, setting {name!r}") for name, value in rows}
    held = found.pop("kind", None)
    if kind not in (None, held):
        raise ValueError(f"{path} is a store of kind {held!r}, not {kind!r}; give another path")
    return found


def _rows(path: Path, mode: Literal["ro", "rw"]) -> Iterator[dict]:
    """Records in their order, some at a time, so that no lock is held while they are used."""
    last = 0
    while True:
        with _opened(path, mode) as database:
            select = "SELECT n, value FROM rows WHERE n > ? ORDER BY n LIMIT ?"
            rows = database.execute(select, (last, PAGE)).fetchall()
        for last, text in rows:
            yield record_of(text, f"{path}, row {last}")
        if len(rows) < PAGE:
            return


def _connect(path: Path, mode: Literal["ro", "rw", "rwc"]) -> sqlite3.Connection:
    address = f"{path.absolute().as_uri()}?mode={mode}"
    database = sqlite3.connect(address, timeout=WAIT, isolation_level=None, uri=True)
    if mode != "ro":
        # the log that SQLite offers besides fails on the network file systems of clusters
        database.execute("PRAGMA journal_mode=DELETE")
        database.execute("PRAGMA synchronous=FULL")
    return database


@contextmanager
def _opened(path: Path, mode: Literal["ro", "rw"]) -> Iterator[sqlite3.Connection]:
    """A connection; to read what a killed run left half written, one to a copy that is mended."""
    with _LOCK, _told(path), ExitStack() as open_now:
        database = open_now.enter_context(closing(_connect(path, mode)))
        while mode == "ro" and _left_half_written(database):
            folder = Path(open_now.enter_context(TemporaryDirectory()))
            copied = _copied(path, folder)
            again = _connect(folder / "copy", "rw") if copied else _connect(path, "ro")
            database = open_now.enter_context(closing(again))
        yield database


def _left_half_written(database: sqlite3.Connection) -> bool:
    """Whether a write has to be undone before the file can be read."""
    try:
        database.execute("SELECT name FROM settings").fetchall()
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode != sqlite3.SQLITE_READONLY_ROLLBACK:
            raise
        return True
    return False


def _copied(path: Path, folder: Path) -> bool:
    """Copy a store with what is to be undone; False where another process was at it."""
    path = _target(path)
    journal, copy = Path(f"{path}-journal"), folder / "copy"
    try:
        before = [(one.stat().st_ino, one.stat().st_mtime_ns) for one in (path, journal)]
        shutil.copyfile(journal, f"{copy}-journal")
        shutil.copyfile(path, copy)
        after = [(one.stat().st_ino, one.stat().st_mtime_ns) for one in (path, journal)]
    except FileNotFoundError:
        return False
    return before == after


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Say errors of SQLite with the file and what to do."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise TimeoutError(
                f"{path}: another process has been writing for {WAIT:g} seconds; run the same "
                "call again when it is done"
            ) from error
        # Python's own error, of a text that is not UTF-8, has no code
        if code in (0, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR):
            raise ValueError(
                f"{path} is damaged ({error}); restore a copy of it, or delete it to start anew"
            ) from error
        if code == sqlite3.SQLITE_TOOBIG:
            raise ValueError(
                f"{path}: a record is too long for a store ({error}); stored rows are intact"
            ) from error
        raise OSError(
            f"{path}: {error}; stored rows are intact. Make room on the disk, check "
            "the rights to the folder, and run the same call again"
        ) from error
