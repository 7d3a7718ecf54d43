"""Append-only JSON Lines: a line is whole or not there, and nothing is kept twice."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path


class JsonLines:
    """Records in a file, one a line, each under a key of its own.

    A record is written with one call and synced, so that a process that is killed leaves whole
    lines and at most one torn end, which is cut off when the file is opened again.

    Args:
        path: The file; made with its folder at the first record.
        key: Name of the field that tells records apart.

    Raises:
        ValueError: If a line in the middle is damaged (it is named).
    """

    def __init__(self, path: str | Path, key: str) -> None:
        self.path, self._key = Path(path), key
        self._records: dict[str, dict] = {}
        if self.path.exists():
            self._mend()
            text = self.path.read_text(encoding="utf-8")
            # not splitlines: answers may hold other line separators
            for number, line in enumerate(text.split("\n")[:-1], 1):
                self._take(line, number)

    def __len__(self) -> int:
        return len(self._records)

    def __contains__(self, key: object) -> bool:
        return key in self._records

    def __iter__(self) -> Iterator[dict]:
        return iter(self._records.values())

    def __getitem__(self, key: str) -> dict:
        return self._records[key]

    def add(self, record: Mapping) -> bool:
        """Write a record; False where its key is there already, and nothing is written then."""
        key = record[self._key]
        if key in self._records:
            return False
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps(dict(record), ensure_ascii=False, sort_keys=True) + "\n"
        with self.path.open("ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
        self._records[key] = dict(record)
        return True

    def _mend(self) -> None:
        """Cut off a last line that was not written whole."""
        data = self.path.read_bytes()
        if data and not data.endswith(b"\n"):
            with self.path.open("rb+") as file:
                file.truncate(data.rfind(b"\n") + 1)

    def _take(self, line: str, number: int) -> None:
        try:
            record = json.loads(line)
            key = record[self._key]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.path}, line {number}: not a record with {self._key!r} ({error}); remove "
                "the line, and what it held is made again"
            ) from error
        self._records.setdefault(key, record)
