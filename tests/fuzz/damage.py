"""Ways to damage a file, all from one seed."""

from __future__ import annotations

import gzip
import io
import json
import math
import os
import random
import re
import sqlite3
import struct
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pandas as pd
import torch

WRONG = (
    None, True, -1, 0, 1.5, 10**400, 1e999, -1e999, float("nan"), "", "x", "1", "07", "\ud800",
    [], {}, [[]], [None], {"a": 1}, 2**50, -0.5, "resid_post", [1, 2, 3],
)  # fmt: skip
INSTEAD = ("missing", "folder", "pipe", "loop")
DEEP = '{"a":' * 3000 + "1" + "}" * 3000
WORDS = (b"\xff" * 8, b"\0" * 8, struct.pack("<Q", 2**50), struct.pack("<Q", 2**31), b"\x7f" * 4)


def of_bytes(data: bytes, random_: random.Random) -> bytes:
    """Bytes changed in one of many ways that ask nothing of the format."""
    at = random_.randrange(len(data))
    to = random_.randrange(at, len(data)) + 1
    ways: list[Callable[[], bytes]] = [
        lambda: data[:at],
        lambda: data[at:],
        lambda: b"",
        lambda: data[:at] + bytes([data[at] ^ 1 << random_.randrange(8)]) + data[at + 1 :],
        lambda: data[:at] + b"\0" * (to - at) + data[to:],
        lambda: data[:at] + random_.randbytes(8) + data[at:],
        lambda: data[:at] + random_.choice(WORDS) + data[at + 8 :],
        lambda: data[:to] + data[at:],
        lambda: data[:at] + data[to:],
        lambda: data + random_.randbytes(40),
        lambda: data[::-1],
        lambda: data + data,
        lambda: gzip.compress(data),
        lambda: b"\xef\xbb\xbf" + data,
        lambda: data.decode("latin-1").encode("utf-16"),
        lambda: data[:at] + "é".encode("latin-1") + data[at:],
        lambda: data[:at] + b"\xed\xa0\x80" + data[at:],
        lambda: data[:at] + b"\0" + data[at:],
        lambda: data.replace(b"\n", b"\r"),
        lambda: b"<html>not found</html>",
    ]
    return random_.choice(ways)()


def of_json(text: str, random_: random.Random) -> str:
    """JSON of which one value, key or nest is another."""
    value = json.loads(text)
    spots = list(_spots(value))
    if not spots:
        return random_.choice(("[]", "null", "3", '"x"'))
    held, key = random_.choice(spots)
    ways = ("value", "value", "value", "drop", "add", "twice", "deep", "top", "digits", "half")
    way = random_.choice(ways)
    if way == "value":
        held[key] = random_.choice(WRONG)
    elif way == "drop":
        del held[key]
    elif way == "add" and isinstance(held, dict):
        held["invented"] = random_.choice(WRONG)
    elif way == "top":
        value = random_.choice(WRONG)
    else:
        held[key] = "MARK"
    made = json.dumps(value)
    instead = {"deep": DEEP, "digits": "9" * 5000, "half": '"\\udc00"'}.get(way, '"MARK"')
    made = made.replace('"MARK"', instead, 1)
    if way == "twice" and isinstance(held, dict):
        made = made.replace('"MARK"', f'"MARK", {json.dumps(key)}: 1', 1)
    return made


def _spots(value: Any) -> Any:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    if isinstance(value, (dict, list)):
        for key, held in items:
            yield value, key
            if isinstance(held, (dict, list)):
                yield from _spots(held)


def of_json_bytes(data: bytes, random_: random.Random) -> bytes:
    """A file of JSON, damaged as JSON."""
    return of_json(data.decode(), random_).encode("utf-8", "surrogatepass")


def of_lines(data: bytes, random_: random.Random) -> bytes:
    """JSON Lines, one of them damaged as JSON."""
    lines = data.decode().splitlines()
    at = random_.randrange(len(lines))
    lines[at] = of_json(lines[at], random_)
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def of_safetensors(data: bytes, random_: random.Random) -> bytes:
    """A safetensors file with a damaged header, or a damaged record in it."""
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    if random_.random() < 0.6 and "emlens" in header.get("__metadata__", {}):
        kept = header["__metadata__"]
        kept["emlens"] = of_json(kept["emlens"], random_)
        text = json.dumps(header)
    else:
        text = of_json(json.dumps(header), random_)
    made = text.encode()
    made += b" " * (-len(made) % 8)
    return struct.pack("<Q", len(made)) + made + data[8 + size :]


def of_yaml(data: bytes, random_: random.Random) -> bytes:
    """YAML with one line that is another, twice there, or gone."""
    lines = data.decode().splitlines()
    at = random_.randrange(len(lines))
    name = re.split(r":", lines[at])[0]
    bomb = "\n".join([f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)])
    lines[at] = random_.choice(
        [
            f"{name}: {random_.choice(WRONG)!r}",
            f"{name}: " + "[" * 2000,
            f"{name}: " + "9" * 5000,
            f"{name}: 2001-99-99",
            f"{name}: &x [*x]",
            f"a0: &a0 [x]\n{bomb}",
            f"{lines[at]}\n{lines[at]}",
            f"{name}: !!python/name:os.system",
            "\t- :",
            "",
        ]
    )
    return "\n".join(lines).encode()


def of_head(data: bytes, random_: random.Random) -> bytes:
    """A binary file with other numbers in its head."""
    at = random_.randrange(4, min(len(data), 600))
    word = random_.choice(WORDS)
    return data[:at] + word + data[at + len(word) :]


def of_torch(data: bytes, random_: random.Random) -> bytes:
    """A file of `torch.save` with another value in it, or packed."""
    record = torch.load(io.BytesIO(data), weights_only=True)
    if random_.random() < 0.1:
        return _deflated(data)
    width = 8
    wrong = [
        *WRONG,
        torch.zeros(1).expand(10**10),
        torch.zeros(width, dtype=torch.complex64),
        torch.zeros(width, dtype=torch.int64),
        torch.full((width,), math.nan),
        torch.zeros(0),
        torch.zeros(2, width),
        torch.eye(width).to_sparse(),
        torch.ones(()),
        torch.ones(width, requires_grad=True),
        torch.ones(width, dtype=torch.float8_e4m3fn),
        torch.quantize_per_tensor(torch.ones(width), 0.1, 0, torch.qint8),
        torch.ones(width, device="meta"),
    ]
    record[random_.choice(list(record))] = random_.choice(wrong)
    file = io.BytesIO()
    torch.save(random_.choice((record, record, record, list(record))), file)
    return file.getvalue()


def _deflated(data: bytes) -> bytes:
    packed = io.BytesIO()
    whole = zipfile.ZipFile(io.BytesIO(data))
    with whole, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as made:
        for name in whole.namelist():
            made.writestr(name, whole.read(name))
    return packed.getvalue()


def of_csv(data: bytes, random_: random.Random) -> bytes:
    """CSV with one cell that is another, twice there, or gone."""
    rows = [line.split(",") for line in data.decode().splitlines()]
    row = random_.choice(rows[:1] + rows)
    at = random_.randrange(len(row))
    wrong = [str(value) for value in WRONG] + ['"', "a,b", '"a\nb"', "nan", "1e400", row[0]]
    row[at : at + 1] = random_.choice([[random_.choice(wrong)]] * 4 + [[], row[at : at + 1] * 2])
    return "\n".join(map(",".join, rows)).encode("utf-8", "surrogatepass")


def of_parquet(data: bytes, random_: random.Random) -> bytes:
    """Parquet of columns of other types."""
    table = pd.read_parquet(io.BytesIO(data))
    name = random_.choice(list(table))
    wrong: Any = [None, 1, 1.5, b"\xff", ["a"], {"a": 1}, True, "\0", "x" * 10**6, pd.Timestamp(0)]
    way = random_.choice(("values", "drop", "rename", "empty"))
    if way == "values":
        table[name] = pd.Series([random_.choice(wrong)] * len(table))
    elif way == "drop":
        del table[name]
    elif way == "rename":
        table = table.rename(columns={name: "other"})
    else:
        table = table[:0]
    file = io.BytesIO()
    table.to_parquet(file)
    return file.getvalue()


def of_store(data: bytes, random_: random.Random) -> bytes:
    """A store with one record or setting that is another, or with another header."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "store")
        path.write_bytes(data)
        with closing(sqlite3.connect(path)) as database:
            database.text_factory = bytes
            name, key = random_.choice((("rows", "n"), ("settings", "rowid")))
            held = database.execute(f"SELECT {key}, value FROM {name}").fetchall()
            at, value = random_.choice(held)
            wrong = [of_json(value.decode(), random_), None, 3, 1.5, b"\xff", "", "\0"]
            text = random_.choice(wrong[:1] * 8 + wrong[2:])
            if isinstance(text, str):
                text = text.encode("utf-8", "surrogatepass")
                database.execute(
                    f"UPDATE {name} SET value = CAST(? AS TEXT) WHERE {key} = ?", (text, at)
                )
            else:
                database.execute(f"UPDATE {name} SET value = ? WHERE {key} = ?", (text, at))
            more = (
                "",
                "",
                "",
                f"DROP TABLE {name}",
                "PRAGMA user_version=7",
                f"DELETE FROM {name}",
            )
            database.execute(random_.choice(more))
            database.commit()
        return path.read_bytes()


def in_place_of(path: Path, way: str) -> None:
    """Something else where the file was."""
    path.unlink()
    if way == "folder":
        path.mkdir()
    elif way == "pipe":
        os.mkfifo(path)
    elif way == "loop":
        path.symlink_to(path.name)
