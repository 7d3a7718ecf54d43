"""Directions on disk: safetensors with the provenance in the header."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from emlens._tensors import read_tensors, write_tensors
from emlens.directions.provenance import Provenance
from emlens.hooked import check_site

if TYPE_CHECKING:
    from emlens.directions.direction import Directions

KIND = "directions"
_VECTOR, _ERROR, _MEAN, _SHUFFLED = "vector.", "standard_error.", "mean.", "shuffled."


def save_directions(directions: Directions, path: Path) -> Path:
    """Write directions to `path` (`.safetensors` is added where it has no suffix)."""
    path = path if path.suffix else path.with_suffix(".safetensors")
    tensors = {
        f"{prefix}{layer}": tensor
        for prefix, items in (
            (_VECTOR, directions.vectors),
            (_ERROR, directions.standard_errors),
            (_MEAN, directions.means),
            (_SHUFFLED, directions.shuffled),
        )
        for layer, tensor in items.items()
    }
    record = {
        "site": directions.site,
        "provenance": directions.provenance.to_dict(),
        "residual_norms": dict(directions.residual_norms),
        "split_half": dict(directions.split_half),
        "auroc": dict(directions.auroc),
    }
    return write_tensors(path, KIND, tensors, record)


def load_directions(path: Path) -> Directions:
    """Read a file that `save_directions` wrote.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is truncated, of another kind, or holds values that are not finite.
    """
    from emlens.directions.direction import Direction, Directions

    tensors, record = read_tensors(path, KIND)
    vectors = _by_layer(tensors, _VECTOR)
    kind = Direction if len(vectors) == 1 else Directions
    return kind(
        vectors,
        check_site(record["site"]),
        Provenance.from_dict(record["provenance"]),
        residual_norms=_numbers(record["residual_norms"]),
        standard_errors=_by_layer(tensors, _ERROR),
        split_half=_numbers(record["split_half"]),
        means=_by_layer(tensors, _MEAN),
        shuffled=_by_layer(tensors, _SHUFFLED),
        auroc=_numbers(record.get("auroc", {})),
    )


def _by_layer(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[int, torch.Tensor]:
    return {int(k.removeprefix(prefix)): v for k, v in tensors.items() if k.startswith(prefix)}


def _numbers(record: Mapping[str, float]) -> dict[int, float]:
    return {int(layer): float(value) for layer, value in record.items()}
