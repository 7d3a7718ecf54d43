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
_PREFIXES = _VECTOR, _ERROR, _MEAN, _SHUFFLED = (
    "vector.",
    "standard_error.",
    "mean.",
    "shuffled.",
)


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
        "measured": {name: dict(values) for name, values in directions.measured.items()},
    }
    return write_tensors(path, KIND, tensors, record)


def load_directions(path: Path) -> Directions:
    """Read a file that `save_directions` wrote.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is truncated, of another kind, lacks part of the record, or holds
            tensors of other names, of several widths, or values that are not finite.
    """
    tensors, record = read_tensors(path, KIND)
    try:
        return _directions(tensors, record)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} holds no whole record of directions: {error}") from error


def _directions(tensors: Mapping[str, torch.Tensor], record: Mapping) -> Directions:
    from emlens.directions.direction import Direction, Directions

    kept = [_by_layer(tensors, prefix) for prefix in _PREFIXES]
    other = [name for name in tensors if not name.startswith(_PREFIXES)]
    if other:
        raise ValueError(f"it has tensors that are no part of one: {', '.join(sorted(other)[:6])}")
    vectors, errors, means, shuffled = kept
    kind = Direction if len(vectors) == 1 else Directions
    return kind(
        vectors,
        check_site(record["site"]),
        Provenance.from_dict(record["provenance"]),
        residual_norms=_numbers(record["residual_norms"]),
        standard_errors=errors,
        split_half=_numbers(record["split_half"]),
        means=means,
        shuffled=shuffled,
        auroc=_numbers(record.get("auroc", {})),
        measured={name: _numbers(of) for name, of in record.get("measured", {}).items()},
    )


def _by_layer(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[int, torch.Tensor]:
    return {int(k.removeprefix(prefix)): v for k, v in tensors.items() if k.startswith(prefix)}


def _numbers(record: Mapping[str, float]) -> dict[int, float]:
    return {int(layer): float(value) for layer, value in record.items()}
