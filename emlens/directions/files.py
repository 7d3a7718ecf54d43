"""Directions on disk: safetensors with the provenance in the header, written atomically."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from emlens._files import atomic_write
from emlens.directions.provenance import Provenance
from emlens.hooked import check_site

if TYPE_CHECKING:
    from emlens.directions.direction import Directions

FORMAT = "emlens.directions.1"
_VECTOR, _ERROR = "vector.", "standard_error."


def save_directions(directions: Directions, path: Path) -> Path:
    """Write directions to `path` (`.safetensors` is added where it has no suffix)."""
    path = path if path.suffix else path.with_suffix(".safetensors")
    tensors = {f"{_VECTOR}{layer}": v for layer, v in directions.vectors.items()}
    tensors |= {f"{_ERROR}{layer}": e for layer, e in directions.standard_errors.items()}
    header = {
        "format": FORMAT,
        "site": directions.site,
        "provenance": directions.provenance.to_json(),
        "residual_norms": json.dumps(dict(directions.residual_norms)),
        "split_half": json.dumps(dict(directions.split_half)),
    }
    atomic_write(path, save({k: v.contiguous() for k, v in tensors.items()}, metadata=header))
    return path


def load_directions(path: Path) -> Directions:
    """Read a file that `save_directions` wrote.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is truncated, of another format, or holds values that are not finite.
    """
    from emlens.directions.direction import Direction, Directions

    if not path.exists():
        raise FileNotFoundError(f"no directions at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    if header.get("format") != FORMAT:
        raise ValueError(
            f"{path} holds no emlens directions (format {header.get('format')!r}, expected "
            f"{FORMAT!r}; tensors {sorted(tensors)[:4]})"
        )
    vectors = _by_layer(tensors, _VECTOR)
    kind = Direction if len(vectors) == 1 else Directions
    return kind(
        vectors,
        check_site(header["site"]),
        Provenance.from_json(header["provenance"]),
        residual_norms=_numbers(header["residual_norms"]),
        standard_errors=_by_layer(tensors, _ERROR),
        split_half=_numbers(header["split_half"]),
    )


def _by_layer(tensors: dict[str, torch.Tensor], prefix: str) -> dict[int, torch.Tensor]:
    return {int(k.removeprefix(prefix)): v for k, v in tensors.items() if k.startswith(prefix)}


def _numbers(text: str) -> dict[int, float]:
    return {int(layer): float(value) for layer, value in json.loads(text).items()}
