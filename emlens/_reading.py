"""Reading text: all files of text, JSON, YAML and CSV are opened and checked here."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, TextIO

DEEPEST = 100
"""Levels of lists and objects inside each other that a file may have."""

_BAD = re.compile("[\udc80-\udcff\0]")
_PAIR = r"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"
_HALF = re.compile(rf"\\\\|{_PAIR}|(\\u[dD][89a-fA-F][0-9a-fA-F]{{2}})")
_LONG = re.compile(r"\d{4301,}")
_TOKEN = re.compile(r'"((?:[^"\\]|\\.)*)"(\s*:)?|[{}\[\]]', re.DOTALL)
_MARKS = {
    b"\x1f\x8b": "compressed with gzip; unpack it first",
    b"BZh": "compressed with bzip2; unpack it first",
    b"\xfd7zXZ": "compressed with xz; unpack it first",
    b"\x28\xb5\x2f\xfd": "compressed with zstandard; unpack it first",
    b"PK\x03\x04": "a zip archive; unpack it first",
    b"\xff\xfe": "UTF-16; save it as UTF-8",
    b"\xfe\xff": "UTF-16; save it as UTF-8",
    b"PAR1": "Parquet, not text",
}
_KINDS = {dict: "an object (names and values)", list: "a list"}


def expanded(path: str | os.PathLike[str]) -> Path:
    """A path with `~` expanded.

    Raises:
        ValueError: If it cannot be a path.
    """
    found = Path(path)
    if "\0" in str(found):
        raise ValueError(f"{str(found)!r} cannot be the name of a file: it holds a NUL")
    try:
        return found.expanduser()
    except RuntimeError as error:
        raise ValueError(f"{found}: there is no home folder to put for ~ ({error})") from error


def readable(path: str | os.PathLike[str], missing: str = "no file {}") -> Path:
    """The path of a readable file; nothing is read yet, so that it never waits for a pipe.

    Raises:
        FileNotFoundError: If it does not exist, with the message `missing`.
        IsADirectoryError: If it is a folder.
        PermissionError: If it may not be read.
        OSError: If it is a pipe, a socket or a device, or cannot be reached.
    """
    found = expanded(path)
    try:
        mode = found.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        link = f" ({found} is a link to nothing)" if found.is_symlink() else ""
        raise FileNotFoundError(missing.format(found) + link) from None
    except OSError as error:
        raise type(error)(f"{found} cannot be read: {error.strerror or error}") from error
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(f"{found} is a folder; a file is needed")
    if not stat.S_ISREG(mode):
        raise OSError(
            f"{found} is a pipe, a socket or a device, not a file; write it into a file first"
        )
    if not os.access(found, os.R_OK):
        raise PermissionError(f"{found} cannot be read; check its permissions")
    return found


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """All bytes of a file."""
    return readable(path).read_bytes()


def read_head(path: str | os.PathLike[str], size: int) -> bytes:
    """The first bytes of a file."""
    with readable(path).open("rb") as file:
        return file.read(size)


def read_text(path: str | os.PathLike[str]) -> str:
    """Read UTF-8, with or without a byte order mark; line ends become one newline.

    Raises:
        OSError: As `readable`.
        ValueError: If it is not UTF-8, compressed, or holds a NUL; line and byte are named.
    """
    path = readable(path)
    with _opened(path) as file:
        text = file.read()
    bad = _BAD.search(text)
    if bad:
        start = text.rfind("\n", 0, bad.start()) + 1
        line = text[start : bad.start() + 1]
        raise _not_text(path, text.count("\n", 0, start) + 1, line)
    return text


def read_lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, str]]:
    """Yield number and text of each line, as `read_text`, without holding the file."""
    path = readable(path)
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            bad = _BAD.search(line)
            if bad:
                raise _not_text(path, number, line[: bad.start() + 1])
            yield number, line


def read_json(path: str | os.PathLike[str], kind: type | None = None) -> Any:
    """Read JSON.

    Args:
        path: The file.
        kind: What it must hold, `dict` or `list`.

    Raises:
        OSError: As `readable`.
        ValueError: If it is not text, not JSON, names a key twice, is too deep, or holds another
            kind; the file and, where there is one, the line are named.
    """
    value = parsed_json(read_text(path), str(expanded(path)))
    if kind is not None and not isinstance(value, kind):
        raise ValueError(f"{path} must hold {_KINDS[kind]}, not {_shown(value)}")
    return value


def read_jsonl(path: str | os.PathLike[str]) -> Iterator[tuple[int, dict]]:
    """Yield line number and record of each line that is not blank.

    Raises:
        OSError: As `readable`.
        ValueError: If a line is not UTF-8 or no JSON object; file and line are named.
    """
    for number, line in read_lines(path):
        if not line.strip():
            continue
        record = parsed_json(line, str(path), number)
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number}: expected an object, got {line[:60]!r}")
        yield number, record


def read_csv(
    path: str | os.PathLike[str], needed: Collection[str] = ()
) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield line number and record of each row under the names of the first.

    Args:
        path: The file.
        needed: Columns that it must have.

    Raises:
        OSError: As `readable`.
        ValueError: If it is not UTF-8, lacks a column, names one twice, or a row has more or
            fewer fields than there are names.
    """
    import csv

    path = expanded(path)
    rows = csv.reader((line for _, line in read_lines(path)), strict=True)
    try:
        names = next(rows, [])
        if not names or len(set(names)) < len(names):
            raise ValueError(
                f"{path}, line 1: a CSV file begins with the names of its columns, each once; "
                f"this has {', '.join(names)[:100] or 'nothing'}"
            )
        if not set(needed) <= set(names):
            raise ValueError(
                f"{path} must have the columns {', '.join(needed)}; it has {', '.join(names)}"
            )
        for row in rows:
            if row and len(row) != len(names):
                raise ValueError(
                    f"{path}, line {rows.line_num}: {len(row)} fields under {len(names)} columns"
                )
            if row:
                yield rows.line_num, dict(zip(names, row, strict=True))
    except csv.Error as error:
        raise ValueError(f"{path}, line {rows.line_num}: not valid CSV ({error})") from error


def parsed_json(text: str, where: str, line: int | None = None) -> Any:
    """Parse JSON of a file, or of one line of it.

    Raises:
        ValueError: If it is not JSON, names a key twice, is too deep, or holds half a character.
    """

    def at(position: int) -> str:
        number = line if line is not None else text.count("\n", 0, position) + 1
        return f"{where}, line {number}"

    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        start = f"{where}, line {line}: not" if line is not None else f"{where} is not"
        raise ValueError(f"{start} valid JSON ({error})") from error
    except _Repeated as error:
        raise ValueError(f"{at(_second(text))}: the key {error} occurs twice") from None
    except RecursionError:
        raise ValueError(f"{at(0)}: nested too deep; {DEEPEST} levels are read") from None
    except ValueError as error:
        digits = _LONG.search(text)
        raise ValueError(
            f"{at(digits.start() if digits else 0)}: a number of more than 4,300 digits"
        ) from error
    if _too_deep(value):
        raise ValueError(f"{at(0)}: nested too deep; {DEEPEST} levels are read")
    half = next((found for found in _HALF.finditer(text) if found[1]), None)
    if half:
        raise ValueError(
            f"{at(half.start())}: {half[0]} is half of a character (a lone surrogate), not text"
        )
    return value


def _opened(path: Path) -> TextIO:
    head = read_head(path, 8)
    for mark, what in _MARKS.items():
        if head.startswith(mark):
            raise ValueError(f"{path}, line 1, byte 1: this is {what}; UTF-8 text is needed")
    return path.open(encoding="utf-8-sig", errors="surrogateescape")


def _not_text(path: Path, number: int, until: str) -> ValueError:
    """The error about the last character of `until`, the start of a line."""
    if number == 1:
        until = until.removeprefix("\ufeff")
    byte = len(until[:-1].encode("utf-8", "surrogateescape")) + 1
    if until[-1] == "\0":
        what = "a NUL, which is not text (is it UTF-16, or cut off by a crash?)"
    else:
        what = f"0x{ord(until[-1]) - 0xDC00:02x}, which is not UTF-8; save the file as UTF-8"
    return ValueError(f"{path}, line {number}, byte {byte} of it: {what}")


class _Repeated(Exception):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _Repeated(ascii(key[:60]))
            seen.add(key)
    return found


def _second(text: str) -> int:
    """Where valid JSON names a key of one object for the second time."""
    open_now: list[set[str]] = []
    for token in _TOKEN.finditer(text):
        if token[0] in "{[":
            open_now.append(set())
        elif token[0] in "}]":
            open_now.pop()
        elif token[2] is not None:
            key = json.loads(f'"{token[1]}"')
            if key in open_now[-1]:
                return token.start()
            open_now[-1].add(key)
    return 0


def _too_deep(value: Any) -> bool:
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(DEEPEST):
        held = (one.values() if isinstance(one, dict) else one for one in level)
        level = [part for parts in held for part in parts if type(part) in (dict, list)]
    return bool(level)


def _shown(value: Any) -> str:
    if isinstance(value, (dict, list)):
        return _KINDS[type(value)]
    return f"{value!r:.60}"
