"""The head of a GGUF file: what it declares, compared with what is there before it is read."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from mmap import ACCESS_READ, mmap
from pathlib import Path

import numpy as np

from emlens._reading import readable

_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_FORMATS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_FLOATS = {0: "f4", 1: "f2"}
_MOST_DIMENSIONS = 4


@dataclass(frozen=True, slots=True)
class Declared:
    """A tensor of a GGUF file; `values` of F32 (type 0) and F16 (1) alone."""

    shape: tuple[int, ...]
    type: int
    values: np.ndarray | None


@dataclass(frozen=True, slots=True)
class GGUF:
    """Numbers and texts of a GGUF file by their key (arrays are passed over), and its tensors."""

    fields: Mapping[str, object]
    tensors: Mapping[str, Declared]


def read_gguf_file(path: Path, architecture: str) -> GGUF:
    """Read a file; of another architecture, only its fields.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it declares more than is there, names a thing twice, or is of an unknown
            version.
    """
    path = readable(path)
    if not path.stat().st_size:
        raise ValueError(f"{path} is not a readable GGUF file (0 bytes)")
    with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as data:
        head = _Head(data, architecture)
        try:
            return head.read()
        except _NoText as error:
            raise ValueError(f"{path}: {error}") from error
        except (_Damaged, struct.error) as error:
            raise ValueError(
                f"{path} is not a readable GGUF file ({len(data)} bytes); was the download "
                f"complete? ({error})"
            ) from error


class _Damaged(Exception):
    pass


class _NoText(Exception):
    pass


class _Head:
    """A place in the bytes of a file, which moves on with every value."""

    def __init__(self, data: mmap, architecture: str) -> None:
        self.data, self.size, self.at, self.order = data, len(data), 4, "<"
        self.architecture = architecture

    def read(self) -> GGUF:
        if self.data[:4] != b"GGUF":
            raise _Damaged(f"it begins with {self.data[:4]!r}")
        version = self._number(4)
        if not version & 0xFFFF:
            self.order, version = ">", struct.unpack("<I", struct.pack(">I", version))[0]
        if version not in _VERSIONS:
            raise _Damaged(f"version {version}; {_VERSIONS[0]} and {_VERSIONS[1]} are read")
        n_tensors, n_fields = self._number(10), self._number(10)
        # the least that a tensor and a field take
        if 24 * n_tensors + 13 * n_fields > self.size:
            raise _Damaged(f"it declares {n_tensors:,} tensors and {n_fields:,} fields")
        fields: dict[str, object] = {}
        for _ in range(n_fields):
            key = self._text("the key of a field")
            if key in fields:
                raise _Damaged(f"the field {key!r} occurs twice")
            fields[key] = self._value(key, self._number(4))
        if fields.get("general.architecture") != self.architecture:
            return GGUF(fields, {})
        declared = [self._tensor() for _ in range(n_tensors)]
        step = fields.get("general.alignment", 32)
        if not isinstance(step, int) or step < 1 or step & (step - 1):
            raise _Damaged(f"general.alignment is {step!r}, not a power of two")
        start = -(-self.at // step) * step
        tensors: dict[str, Declared] = {}
        for name, shape, kind, offset in declared:
            if name in tensors:
                raise _Damaged(f"the tensor {name!r} occurs twice")
            tensors[name] = self._values(name, shape, kind, start + offset)
        return GGUF(fields, tensors)

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name, n = self._text("the name of a tensor"), self._number(4)
        if not 1 <= n <= _MOST_DIMENSIONS:
            raise _Damaged(f"tensor {name!r} has {n} dimensions")
        shape = tuple(self._number(10) for _ in range(n))
        return name, shape[::-1], self._number(4), self._number(10)

    def _values(self, name: str, shape: tuple[int, ...], kind: int, start: int) -> Declared:
        if kind not in _FLOATS:
            return Declared(shape, kind, None)
        dtype = np.dtype(self.order + _FLOATS[kind])
        count = 1
        for size in shape:
            count *= size
        if count < 1 or start + count * dtype.itemsize > self.size:
            raise _Damaged(
                f"tensor {name!r} of shape {list(shape)} would end at byte "
                f"{start + count * dtype.itemsize:,}"
            )
        whole = np.frombuffer(self.data[start : start + count * dtype.itemsize], dtype)
        return Declared(shape, kind, whole.reshape(shape))

    def _value(self, key: str, kind: int) -> object:
        if kind == _STRING:
            return self._text(key)
        if kind in _FORMATS:
            return self._number(kind)
        if kind != _ARRAY:
            raise _Damaged(f"the field {key!r} is of the unknown type {kind}")
        kind, length = self._number(4), self._number(10)
        if kind == _STRING:
            if 8 * length > self.size:
                raise _Damaged(f"the field {key!r} declares {length:,} values")
            for _ in range(length):
                self._skip(self._number(10))
        elif kind in _FORMATS:
            self._skip(length * struct.calcsize(_FORMATS[kind]))
        else:
            raise _Damaged(f"the field {key!r} is an array of the unknown type {kind}")
        return None

    def _number(self, kind: int):
        form = self.order + _FORMATS[kind]
        (value,) = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return value

    def _text(self, what: str) -> str:
        length = self._number(10)
        start = self.at
        self._skip(length)
        try:
            return self.data[start : self.at].decode()
        except UnicodeDecodeError as error:
            raise _NoText(f"{what} is no text ({error})") from error

    def _skip(self, length: int) -> None:
        if self.at + length > self.size:
            raise _Damaged(f"it declares {length:,} bytes at byte {self.at:,}")
        self.at += length
