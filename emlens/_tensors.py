"""safetensors files with one JSON record in the header: written as a whole, read without pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from emlens._files import atomic_write

_KEY = "emlens"


def write_tensors(path: Path, kind: str, tensors: Mapping[str, Tensor], record: dict) -> Path:
    """Write tensors and a record of the given kind; the same content gives the same bytes."""
    plain = {name: tensors[name].contiguous() for name in sorted(tensors)}
    # one key: safetensors does not keep the order of several
    header = {_KEY: json.dumps({"kind": kind, **record}, sort_keys=True)}
    atomic_write(path, save(plain, metadata=header))
    return path


def read_tensors(path: Path, kind: str) -> tuple[dict[str, Tensor], dict]:
    """Read a file that `write_tensors` wrote.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is truncated, or of another kind.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    record = json.loads(header.get(_KEY, "{}"))
    found = record.pop("kind", None)
    if found != kind:
        raise ValueError(
            f"{path} holds no {kind} (kind {found!r}; tensors {', '.join(sorted(tensors)[:4])})"
        )
    return tensors, record
