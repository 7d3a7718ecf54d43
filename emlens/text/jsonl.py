"""Reading JSON Lines with the line number in every error."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path


def read_jsonl(path: Path) -> Iterator[tuple[int, dict]]:
    """Yield line number and record of each line that is not blank.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a line is not a JSON object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not valid JSON ({error})") from error
            if not isinstance(record, dict):
                raise ValueError(f"{path}, line {number}: expected an object, got {line[:60]!r}")
            yield number, record
