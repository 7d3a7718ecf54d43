"""Small files that declare far more than they have, and numbers that cannot be: refused by name.

Each is read in a process that is given 300 MB; the peak is measured.
"""

from __future__ import annotations

import io
import json
import re
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from emlens.hooked.attach import attach
from tests.fuzz import files
from tests.fuzz.readers import FILES, Reader, readers
from tests.support.control_vectors import plain_file
from tests.support.models import tiny_model

Damage = Callable[[Path], object]
HALF_A_GIGABYTE = 2**29


def packed(path: Path) -> None:
    """A file of `torch.save` of 500 kB, whose storage unpacks to half a gigabyte."""
    whole = zipfile.ZipFile(io.BytesIO(path.read_bytes()))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:
        for name in whole.namelist():
            with made.open(name, "w", force_zip64=True) as file:
                if name.endswith("/data/0"):
                    for _ in range(HALF_A_GIGABYTE >> 20):
                        file.write(bytes(2**20))
                else:
                    file.write(whole.read(name))
    assert path.stat().st_size < 2**20


def saved(vector: object, **others: object) -> Damage:
    """A file of the papers with this vector."""
    record = {"steering_vector": vector, "layer_idx": 3, "alpha": 1.0, **others}
    return lambda path: torch.save(record, path)


def endless_array(path: Path) -> None:
    """A GGUF file of 102 bytes with an array of 2^50 numbers."""
    key, name = b"general.architecture", b"controlvector"
    head = struct.pack("<4sIQQ", b"GGUF", 3, 0, 2)
    text = struct.pack("<Q", len(key)) + key + struct.pack("<IQ", 8, len(name)) + name
    array = struct.pack("<Q", 1) + b"a" + struct.pack("<IIQ", 9, 0, 2**50)
    path.write_bytes((head + text + array).ljust(102, b"\0"))


def control(tensors: dict[str, np.ndarray]) -> Damage:
    """A control vector written by the `gguf` package alone."""

    return lambda path: plain_file(path, tensors)


def header(change: Callable[[dict, dict], object]) -> Damage:
    """The header of a safetensors file, and the record in it, changed."""

    def write(path: Path) -> None:
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        held = json.loads(data[8 : 8 + size])
        record = json.loads(held["__metadata__"]["emlens"])
        change(held, record)
        held["__metadata__"]["emlens"] = json.dumps(record)
        text = json.dumps(held).encode()
        text += b" " * (-len(text) % 8)
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])

    return write


def raw(data: bytes) -> Damage:
    return lambda path: path.write_bytes(data)


def declared(text: bytes, size: int | None = None) -> Damage:
    """A safetensors file of nothing but this header."""
    return raw(struct.pack("<Q", len(text) if size is None else size) + text)


def renamed(new: str) -> Damage:
    """The first vector of a file of directions under another name."""

    def change(held: dict, _: dict) -> None:
        old = next(name for name in held if name.startswith("vector."))
        held[new] = held.pop(old)

    return header(change)


def norms(value: float) -> Damage:
    """Other residual norms."""
    return header(lambda _, record: record.update(residual_norms=dict.fromkeys(["1"], value)))


def config(**changes: object) -> Damage:
    """Another configuration of an adapter."""
    return lambda path: path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def typed(kind: str, shape: list[int], size: int) -> Damage:
    """A tensor of another type and shape in a file of directions."""

    def change(held: dict, _: dict) -> None:
        for name in [name for name in held if name != "__metadata__"]:
            del held[name]
        held["vector.1"] = {"dtype": kind, "shape": shape, "data_offsets": [0, size]}

    def write(path: Path) -> None:
        header(change)(path)
        data = path.read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        path.write_bytes(data[:end] + bytes(size))

    return write


D = np.ones(8, np.float32)
BOMBS = {
    "deflated": ("papers", packed, "its parts are compressed"),
    "expanded": ("papers", saved(torch.zeros(1).expand(10**10)), "only 1 numbers are stored"),
    "complex torch": ("papers", saved(torch.zeros(8, dtype=torch.complex64)), "complex64"),
    "width 0 torch": ("papers", saved(torch.zeros(0)), r"shape \[0\]"),
    "layer 1.5 torch": ("papers", saved(torch.ones(8), layer_idx=1.5), "layer_idx is 1.5"),
    "NaN torch": ("papers", saved(torch.full((8,), torch.nan)), "not finite"),
    "endless array": ("gguf", endless_array, "declares 1,125,899,906,842,624 bytes"),
    "two names": (
        "gguf",
        control({"direction.1": D, "direction.01": D}),
        "'direction.01'.*a whole number such as 7, not 07",
    ),
    "layer 1.5 gguf": ("gguf", control({"direction.1.5": D}), "'direction.1.5'.*not 07 or 1.5"),
    "wide gguf": ("gguf", raw(b"GGUF" + struct.pack("<IQQ", 3, 2**50, 0)), "2?1,125,899"),
    "layer 1.5": ("directions", renamed("vector.1.5"), "'1.5' is not a whole number from 0"),
    "layer 01": ("directions", renamed("vector.01"), "'01' is not a whole number from 0"),
    "layer -1": ("directions", renamed("vector.-1"), "'-1' is not a whole number from 0"),
    "complex": ("directions", typed("C64", [8], 64), "complex"),
    "width 0": ("directions", typed("F32", [0], 0), r"shape|width|empty"),
    "beyond the file": ("directions", typed("F32", [2**40], 64), "not a readable safetensors"),
    "a list for a header": ("directions", declared(b"[1, 2]  "), "not a readable safetensors"),
    "endless header": ("directions", declared(b"{}", 2**50), "not a readable safetensors"),
    "norm 0": ("directions", norms(0.0), "residual_norms of layer 1 is 0"),
    "negative norm": ("directions", norms(-1.0), "residual_norms of layer 1 is -1"),
    "infinite norm": ("directions", norms(float("inf")), "residual_norms of layer 1 is inf"),
    "norm NaN": ("directions", norms(float("nan")), "residual_norms of layer 1 is nan"),
    "rank of a billion": ("adapter config", config(r=10**9), "its adapter_config.json says rank"),
    "alpha of nothing": ("adapter config", config(lora_alpha=float("nan")), "lora_alpha nan"),
    "steps of other ranks": ("steps' config", config(r=10**9), "different trainings"),
}


@pytest.mark.parametrize("case", BOMBS)
def test_what_cannot_be_is_refused_by_name_fast_and_in_little_memory(tmp_path, case):
    name, damage, message = BOMBS[case]
    whole, place = tmp_path / "whole", tmp_path / "case"
    whole.mkdir(), place.mkdir()
    start = time.monotonic()
    ((kind, said),) = files._child(name, readers(whole)[name], place, [damage])
    assert kind == "clear", said
    assert re.search(message, said), said
    assert time.monotonic() - start < 20


def test_an_adapter_of_rank_a_billion_is_refused_before_a_model_makes_room_for_it(tmp_path):
    (tmp_path / "case").mkdir()
    reader = Reader(
        FILES / "organisms" / "adapter",
        lambda folder: attach(tiny_model("llama"), {"bad": folder}, "tiny"),
        repr,
        inside="adapter_config.json",
    )
    damages = [config(r=10**9), config(rank_pattern={"down_proj": 10**9})]
    for kind, said in files._child("adapter", reader, tmp_path / "case", damages):
        assert "has rank 1000000000" in said, (kind, said)
        assert kind != "hungry", said
