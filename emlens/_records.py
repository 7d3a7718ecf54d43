"""Records of stores as JSON, and the stores of earlier versions, which were JSON Lines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

Kind = Literal["responses", "scores", "screen"]
KEYS: dict[str, str] = {"responses": "key", "scores": "key", "screen": "row"}
"""The field of a record that is its key, by the kind of the store."""


def no_store(path: Path, why: object) -> str:
    """What to say of a file that is no store."""
    return f"{path} is not a store of emlens ({why}); it was left as it is, give another path"


def record_of(text: object, where: str) -> dict:
    """A record from the value of a row.

    Raises:
        ValueError: If it is damaged; `where` says which.
    """
    record = value_of(text, where)
    if not isinstance(record, dict):
        raise ValueError(f"{where}: damaged (it is not a JSON object)")
    return record


def value_of(text: object, where: str) -> object:
    """JSON from a value of a store, which may hold half of a character.

    Raises:
        ValueError: If it is damaged; `where` says which.
    """
    try:
        if not isinstance(text, str):
            raise ValueError(f"{text!r:.40} is no text")
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: damaged ({error}); restore a copy of the file") from error


def lines(path: Path, kind: Kind | None) -> Iterator[dict]:
    """Yield the records of a store in JSON Lines, the first under each key.

    Raises:
        ValueError: If it is no store, or a line is damaged that is not the torn last one.
    """
    fields = [KEYS[kind]] if kind else sorted(set(KEYS.values()))
    seen: set[str] = set()
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                key, record = _keyed(line, fields)
            except (ValueError, RecursionError) as error:
                if number == 1:
                    raise ValueError(no_store(path, f"line 1: {error}")) from error
                if not line.endswith(b"\n"):
                    return
                raise ValueError(
                    f"{path}, line {number}: not a record of a store ({error}); take the line "
                    "out, or restore a copy of the file"
                ) from error
            if key not in seen:
                seen.add(key)
                yield record
    if not seen:
        raise ValueError(no_store(path, "it is empty"))


def _keyed(line: bytes, fields: list[str]) -> tuple[str, dict]:
    """A line of a store in JSON Lines, with its key."""
    record = json.loads(line.decode())
    if not isinstance(record, dict):
        raise ValueError("it is not a JSON object")
    keys = [str(record[field]) for field in fields if field in record]
    if not keys:
        raise ValueError(f"it has no field {' or '.join(fields)}")
    return keys[0], record
