"""Ways to damage a file, all from one seed."""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

WRONG = (
    None, True, -1, 0, 1.5, 10**400, 1e999, -1e999, float("nan"), "", "x", "1", "07", "\ud800",
    [], {}, [[]], [None], {"a": 1}, 2**50, -0.5, "resid_post", [1, 2, 3],
)  # fmt: skip
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


def of_lines(data: bytes, random_: random.Random) -> bytes:
    """JSON Lines, one of them damaged as JSON."""
    lines = data.decode().splitlines()
    at = random_.randrange(len(lines))
    lines[at] = of_json(lines[at], random_)
    return "\n".join(lines).encode()


def of_safetensors(data: bytes, random_: random.Random) -> bytes:
    """A safetensors file with a damaged header, or a damaged record in it."""
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    if random_.random() < 0.6 and "__metadata__" in header:
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


def in_place_of(path: Path, random_: random.Random) -> str:
    """Something else where the file was."""
    path.unlink()
    way = random_.choice(("missing", "folder", "pipe", "loop"))
    if way == "folder":
        path.mkdir()
    elif way == "pipe":
        os.mkfifo(path)
    elif way == "loop":
        path.symlink_to(path.name)
    return way
