"""Control vectors of llama.cpp: GGUF files, as repeng writes them too."""

from __future__ import annotations

import json
import re
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from emlens._files import atomic_path
from emlens.directions.direction import Direction, Directions
from emlens.directions.provenance import Provenance

if TYPE_CHECKING:
    from gguf import GGUFReader

_ARCHITECTURE = "controlvector"
_HINT = f"{_ARCHITECTURE}.model_hint"
_PROVENANCE = "emlens.provenance"
_NAME = re.compile(r"direction\.(\d+)")


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
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    reader = _opened(path)
    architecture = _text(path, reader, "general.architecture")
    if architecture != _ARCHITECTURE:
        raise ValueError(
            f"{path} is a GGUF file of {architecture!r}, not of {_ARCHITECTURE!r}: it holds no "
            "control vector"
        )
    vectors = {}
    for tensor in reader.tensors:
        vectors[_layer(path, tensor)] = torch.from_numpy(tensor.data.astype("=f4"))
    if not vectors:
        raise ValueError(f"{path} is a control vector without any tensor direction.<layer>")
    made = _provenance(path, reader)
    kind = Direction if len(vectors) == 1 else Directions
    try:
        return kind(vectors, "resid_post", made)
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
            "name the layers to write with layers="
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


def _opened(path: Path) -> GGUFReader:
    from gguf import GGUFReader

    try:
        return GGUFReader(path)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise ValueError(
            f"{path} is not a readable GGUF file ({path.stat().st_size} bytes); was it fetched as "
            f"a whole? ({str(error).strip(chr(39))})"
        ) from error


def _layer(path: Path, tensor: Any) -> int:
    shape, kind = tensor.data.shape, tensor.tensor_type.name
    name = _NAME.fullmatch(tensor.name)
    if name is None:
        raise ValueError(
            f"{path} has a tensor {tensor.name!r}, shape {list(shape)}; a control vector has only "
            "direction.<layer>"
        )
    if kind not in ("F32", "F16") or tensor.data.ndim != 1:
        raise ValueError(
            f"{path}: {tensor.name} is {kind} of shape {list(shape)}; one F32 vector is needed"
        )
    if not np.isfinite(tensor.data).all():
        bad = int((~np.isfinite(tensor.data)).sum())
        raise ValueError(f"{path}: {tensor.name} has {bad} value(s) that are not finite")
    return int(name[1])


def _provenance(path: Path, reader: GGUFReader) -> Provenance:
    hint, record = _text(path, reader, _HINT), _text(path, reader, _PROVENANCE)
    if record is None:
        made = Provenance(construction="control vector")
    else:
        try:
            made = Provenance.from_dict(json.loads(record))
        except ValueError as error:
            raise ValueError(f"{path}: {_PROVENANCE} is no provenance: {error}") from error
    if hint in (None, _hint(made)):
        return made
    return replace(made, settings={**made.settings, "model_hint": hint})


def _hint(made: Provenance) -> str:
    return str(made.settings.get("model_hint") or made.model or "unknown")


def _text(path: Path, reader: GGUFReader, key: str) -> str | None:
    field = reader.get_field(key)
    try:
        return None if field is None else str(field.contents())
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: {key} is no text ({error})") from error
