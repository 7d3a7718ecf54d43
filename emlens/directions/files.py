"""Directions on disk: safetensors with the provenance in the header."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

from emlens._tensors import read_tensors, whole_record, write_tensors
from emlens.directions.provenance import Provenance
from emlens.directions.vectors import Evidence, Vectors
from emlens.hooked.sites import check_site

KIND = "directions"
_PREFIXES = _VECTOR, _ERROR, _MEAN, _SHUFFLED = (
    "vector.",
    "standard_error.",
    "mean.",
    "shuffled.",
)


def write_vectors(directions: Vectors, path: Path) -> Path:
    """Write directions to `path`; `.safetensors` is added where it has no suffix.

    Raises:
        ValueError: If the suffix is that of another format.
    """
    path = path if path.suffix else path.with_suffix(".safetensors")
    if path.suffix != ".safetensors":
        raise ValueError(
            f"cannot save {path.name}: directions are kept as .safetensors; other formats are "
            "written by emlens.directions.write_directions"
        )
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


def read_vectors(path: Path) -> Vectors:
    """Read a file that `write_vectors` wrote.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is truncated, of another kind, lacks part of the record, or holds
            tensors of other names, of several widths, or values that are not finite.
    """
    tensors, record = read_tensors(path, KIND)
    with whole_record(path, "record of directions"):
        return _vectors(tensors, record)


def _vectors(tensors: Mapping[str, torch.Tensor], record: Mapping) -> Vectors:
    kept = [_by_layer(tensors, prefix) for prefix in _PREFIXES]
    other = [name for name in tensors if not name.startswith(_PREFIXES)]
    if other:
        raise ValueError(f"it has tensors that are no part of one: {', '.join(sorted(other)[:6])}")
    vectors, errors, means, shuffled = kept
    known = Evidence(
        residual_norms=read_norms(record["residual_norms"]),
        standard_errors=errors,
        split_half=_numbers(record["split_half"], "split_half", -1.001, 1.001),
        means=means,
        shuffled=shuffled,
        auroc=_numbers(record.get("auroc", {}), "auroc", 0, 1),
        measured={name: _numbers(of, name) for name, of in record.get("measured", {}).items()},
    )
    made = Provenance.from_dict(record["provenance"])
    return Vectors(vectors, check_site(record["site"]), made, known)


def _by_layer(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[int, torch.Tensor]:
    return {
        layer_named(k.removeprefix(prefix), k): v
        for k, v in tensors.items()
        if k.startswith(prefix)
    }


def layer_named(number: object, what: str) -> int:
    """The layer that a key names: `7`, and neither `07`, `1.5` nor `-1`.

    Raises:
        ValueError: If it names none.
    """
    if not isinstance(number, str) or not re.fullmatch(r"0|[1-9]\d{0,4}", number, re.ASCII):
        raise ValueError(f"{what} names no layer: {number!r:.40} is not a whole number from 0")
    return int(number)


def _numbers(
    record: Mapping[str, float], what: str, low: float = -math.inf, high: float = math.inf
) -> dict[int, float]:
    """Numbers by layer; `low` and `high` are what they can be, NaN is "not known"."""
    found = {layer_named(layer, what): value for layer, value in record.items()}
    for layer, value in found.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not (math.isnan(value) or low <= value <= high):
            raise ValueError(f"{what} of layer {layer} is {value!r:.40}")
    return {layer: float(value) for layer, value in found.items()}


def read_norms(record: Mapping[str, float]) -> dict[int, float]:
    """Norms by layer.

    Raises:
        ValueError: If one is not above 0 and finite.
    """
    found = _numbers(record, "residual_norms", 0, sys.float_info.max)
    for layer, norm in found.items():
        if not norm > 0:
            raise ValueError(f"residual_norms of layer {layer} is {norm}; a norm is above 0")
    return found
