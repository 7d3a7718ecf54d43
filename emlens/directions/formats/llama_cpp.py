"""Control vectors of llama.cpp: GGUF files, as repeng writes them too."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import numpy as np
import torch

from emlens._files import atomic_path
from emlens._gguf import Declared, read_gguf_file
from emlens._reading import parsed_json
from emlens.directions.direction import Directions
from emlens.directions.formats.format import Format
from emlens.directions.provenance import Provenance

_ARCHITECTURE = "controlvector"
_HINT = f"{_ARCHITECTURE}.model_hint"
_PROVENANCE = "emlens.provenance"
_NAME = re.compile(r"direction\.(0|[1-9]\d{0,4})")


def read_gguf(path: Path) -> Directions:
    """Read a control vector.

    llama.cpp and repeng add `direction.<i>` to the output of block `i`, blocks numbered from 0:
    emlens' `resid_post` of layer `i`. A `direction.0`, which repeng may write and llama.cpp
    refuses, is read as layer 0.

    Two writers shift what they have read: llama.cpp's own generator writes what it found at the
    output of block `i` as `direction.<i+1>`. What is read here is where the vector acts.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is truncated, no control vector, or holds a tensor that is none of a
            layer, not F32 or F16, or not finite, or tensors of several widths.
    """
    found = read_gguf_file(path, _ARCHITECTURE)
    architecture = found.fields.get("general.architecture")
    if architecture != _ARCHITECTURE:
        raise ValueError(
            f"{path} is a GGUF file of {architecture!r}, not of {_ARCHITECTURE!r}: it holds no "
            "control vector"
        )
    vectors = {}
    for name, tensor in found.tensors.items():
        vectors[_layer(path, name, tensor)] = torch.from_numpy(_checked(path, name, tensor))
    if not vectors:
        raise ValueError(f"{path} is a control vector without any tensor direction.<layer>")
    made = _provenance(path, found.fields)
    try:
        return Directions(vectors, "resid_post", made)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def write_gguf(directions: Directions, path: Path, model_hint: str | None = None) -> Path:
    """Write a control vector as llama.cpp and repeng read it; the vectors in fp32, as they are.

    Holds `resid_post` of layers from 1 on, and the provenance under a key of emlens' own, which
    the other readers pass over. Residual norms, standard errors, means and what else is known of
    the directions are not held.

    Args:
        directions: What to write.
        path: The file.
        model_hint: What the file names as its model (repeng: the `model_type` of its config); by
            default what it was read with, then the model's name.

    Raises:
        ValueError: If the site is another, or there is a layer 0, which llama.cpp refuses.
    """
    if directions.site != "resid_post":
        raise ValueError(
            f"{path.name}: a control vector acts at resid_post, the output of a block; these "
            f"directions are at {directions.site} and would act elsewhere"
        )
    if 0 in directions:
        raise ValueError(
            f"{path.name}: llama.cpp refuses a file with direction.0, so layer 0 cannot be held; "
            "choose layers to write with layers="
        )
    from gguf import GGUFWriter

    def check(written: Path) -> None:
        again = read_gguf(written).vectors
        if list(again) != list(directions) or not all(
            torch.equal(again[layer], vector) for layer, vector in directions.vectors.items()
        ):
            raise ValueError("it reads back as other vectors")

    with (
        # the library does not say so where the disk is full
        atomic_path(path, check) as temporary,
        closing(GGUFWriter(temporary, _ARCHITECTURE)) as writer,
    ):
        writer.add_string(_HINT, model_hint or _hint(directions.provenance))
        writer.add_uint32(f"{_ARCHITECTURE}.layer_count", len(directions))
        record = json.dumps(directions.provenance.to_dict(), sort_keys=True)
        writer.add_string(_PROVENANCE, record)
        for layer, vector in directions.vectors.items():
            writer.add_tensor(f"direction.{layer}", vector.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    return path


def _layer(path: Path, name: str, tensor: Declared) -> int:
    found = _NAME.fullmatch(name)
    if found is None:
        raise ValueError(
            f"{path} has a tensor {name!r}, shape {list(tensor.shape)}; a control vector has only "
            "direction.<layer>, its layer a whole number such as 7, not 07 or 1.5"
        )
    return int(found[1])


def _checked(path: Path, name: str, tensor: Declared) -> np.ndarray:
    if tensor.values is None or len(tensor.shape) != 1:
        from gguf import GGMLQuantizationType

        known = {kind.value: kind.name for kind in GGMLQuantizationType}
        raise ValueError(
            f"{path}: {name} is {known.get(tensor.type, f'of the unknown type {tensor.type}')} of "
            f"shape {list(tensor.shape)}; one F32 vector is needed"
        )
    if not np.isfinite(tensor.values).all():
        bad = int((~np.isfinite(tensor.values)).sum())
        raise ValueError(f"{path}: {name} has {bad} value(s) that are not finite")
    return tensor.values.astype("=f4")


def _provenance(path: Path, held: Mapping[str, object]) -> Provenance:
    hint, record = (None if held.get(k) is None else str(held[k]) for k in (_HINT, _PROVENANCE))
    if record is None:
        made = Provenance(construction="control vector")
    else:
        try:
            made = Provenance.from_dict(parsed_json(record, _PROVENANCE))
        except ValueError as error:
            raise ValueError(f"{path}: {_PROVENANCE} is no provenance: {error}") from error
    if hint in (None, _hint(made)):
        return made
    return made.with_settings({"model_hint": hint})


def _hint(made: Provenance) -> str:
    return str(made.settings.get("model_hint") or made.model or "unknown")


GGUF = Format(
    "GGUF control vectors", read_gguf, lambda _, head: head[:4] == b"GGUF", ".gguf", write_gguf
)
