"""safetensors files with a JSON record in the header: atomic writes, reads without pickle.

The declared sizes are compared with the file size before anything is allocated.
"""

from __future__ import annotations

import json
import pickle
import pickletools
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from emlens._files import atomic_path, atomic_write
from emlens._reading import expanded, parsed_json, readable

_KEY = "emlens"
_SUFFIX = ".safetensors"
_GLOBAL = re.compile(r"Unsupported \w+: (?:GLOBAL )?(\S+)")


def write_tensors(path: Path, kind: str, tensors: Mapping[str, Tensor], record: dict) -> Path:
    """Write tensors and a record of the given kind; the same content gives the same bytes.

    Raises:
        ValueError: If the suffix belongs to another format.
    """
    path = expanded(path)
    if path.suffix in (".gguf", ".pt", ".json", ".jsonl", ".npz", ".csv", ".bin"):
        raise ValueError(
            f"a {kind} is written as safetensors, not as {path.name}; name it "
            f"{path.with_suffix(_SUFFIX).name}"
        )
    plain = {name: tensors[name].contiguous() for name in sorted(tensors)}
    # one key: safetensors does not keep the order of several
    header = {_KEY: json.dumps({"kind": kind, **record}, sort_keys=True)}
    atomic_write(path, save(plain, metadata=header))
    return path


def write_header(path: Path, values: Mapping[str, str]) -> None:
    """Add values to the metadata of a safetensors file; its tensors are copied, not loaded."""
    with path.open("rb") as old:
        header = json.loads(old.read(int.from_bytes(old.read(8), "little")))
        header["__metadata__"] = {**header.get("__metadata__", {}), **values}
        head = json.dumps(header, separators=(",", ":")).encode()
        head += b" " * (-len(head) % 8)
        with atomic_path(path) as temporary, temporary.open("wb") as new:
            new.write(len(head).to_bytes(8, "little") + head)
            shutil.copyfileobj(old, new, 1 << 24)


@contextmanager
def opened_tensors(path: Path) -> Iterator[Any]:
    """A safetensors file opened by `safe_open`; errors name the file.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is not a safetensors file, or truncated.
    """
    path = readable(path)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OverflowError, MemoryError, RuntimeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not a readable safetensors file ({path.stat().st_size} bytes): {error}; "
            "was the download complete?"
        ) from error


def read_tensors(path: Path, kind: str) -> tuple[dict[str, Tensor], dict]:
    """Read a file that `write_tensors` wrote.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is truncated, of another kind, or its record is damaged.
    """
    path = expanded(path)
    with opened_tensors(path) as file:
        header = file.metadata() or {}
        names = sorted(file.keys())
        record = parsed_json(header.get(_KEY, "{}"), f"the record in the header of {path}")
        found = record.pop("kind", None) if isinstance(record, dict) else None
        if found != kind:
            raise ValueError(
                f"{path} holds no {kind} (kind {found!r}; tensors {', '.join(names[:4])})"
            )
        tensors = {name: file.get_tensor(name) for name in names}
    return tensors, record


@contextmanager
def whole_record(path: Path, kind: str) -> Iterator[None]:
    """Turn errors about parts of a file into errors about the file.

    Raises:
        ValueError: If a part is missing, or of another type or shape.
    """
    try:
        yield
    except KeyError as error:
        raise ValueError(f"{path} holds no whole {kind}: it has no {error}") from error
    except (
        ValueError,
        TypeError,
        AttributeError,
        IndexError,
        RuntimeError,
        OverflowError,
    ) as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"{path} holds no whole {kind}: {error}") from error


def read_torch_file(path: Path) -> object:
    """Read a file of `torch.save` that holds tensors and plain values.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is damaged, declares more than it has, or would have to run code.
    """
    path = readable(path)
    check_torch_file(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        asked = _GLOBAL.search(str(error))
        raise ValueError(
            f"{path} needs more than tensors and numbers to be read "
            f"({asked[1] if asked else 'unknown'}), and emlens runs no code from a file; write it "
            "again with plain values"
        ) from error
    except Exception as error:  # of damaged bytes torch raises anything, AssertionError included
        raise ValueError(
            f"{path} is not a readable torch file ({path.stat().st_size} bytes); was the download "
            f"complete? ({str(error).partition('. ')[0]})"
        ) from error


def check_torch_file(path: Path) -> None:
    """Refuse a file of `torch.save` that would unpack to more than its size.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is damaged, compressed, or declares more than it has.
    """
    path = readable(path)
    size = path.stat().st_size
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                _check_members(archive.infolist(), size)
                for name in archive.namelist():
                    if name.endswith("data.pkl"):
                        _check_numbers(archive.read(name), size)
        else:
            # a stream of pickles: the sizes of its storages are in the first ones
            _check_numbers(path.read_bytes(), size)
    except (
        zipfile.BadZipFile,
        _More,
        OSError,
        NotImplementedError,
        EOFError,
        RuntimeError,
    ) as error:
        raise ValueError(
            f"{path} is not a readable torch file ({size} bytes); was the download complete? "
            f"({error})"
        ) from error


class _More(Exception):
    pass


def _check_members(members: list[zipfile.ZipInfo], size: int) -> None:
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise _More("its parts are compressed, as torch.save never leaves them")
    declared = sum(member.file_size for member in members)
    if declared > size:
        raise _More(f"its parts declare {declared:,} bytes")


def _check_numbers(pickled: bytes, size: int) -> None:
    """Follow the sizes of storages, each the last number before it is referred to."""
    last: object = None
    try:
        for operation, value, _ in pickletools.genops(pickled):
            if operation.name == "BINPERSID" and isinstance(last, int) and last > size:
                raise _More(f"a tensor declares {last:,} values")
            if isinstance(value, int) and not operation.name.endswith(("PUT", "GET")):
                last = value
            if operation.name == "STOP":
                break
    except (ValueError, UnicodeDecodeError, KeyError, OverflowError) as error:
        raise _More(str(error).partition("\n")[0]) from error


def check_stored(where: str, tensor: Tensor) -> None:
    """Refuse a tensor that is larger than what is stored of it, as `expand` makes one.

    Raises:
        ValueError: If it is, or it is not on the CPU as plain numbers.
    """
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
    if not plain or tensor.is_quantized:
        raise ValueError(f"{where} is not a plain tensor ({tensor.layout}, on {tensor.device})")
    stored = tensor.untyped_storage().nbytes() // max(1, tensor.element_size())
    if tensor.numel() > stored:
        raise ValueError(
            f"{where} has shape {list(tensor.shape)}, but only {stored:,} numbers are stored of it"
        )
