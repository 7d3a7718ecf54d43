"""What a golden is: a computation whose numbers are kept, and how they are compared."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

import emlens
from emlens import Direction, Directions
from emlens._results import Result
from emlens.hooked.load import Engine
from tests.support.solutions import direction, several, with_adapters

KEPT = Path(__file__).parent / "kept"
NUMBERS = KEPT / "numbers"

RTOL, ATOL = 1e-4, 2e-5
"""How far fp32 may be off on another processor: with PyTorch's and MKL's kernels for processors
without AVX (`ATEN_CPU_CAPABILITY=default`) most goldens are within 1e-5 and 1e-6, and all of the
measures within 1e-4 and 1e-5."""


class World:
    """A tiny model with three LoRA adapters, none of which acts, and directions for it."""

    def __init__(self, folder: Path, engine: Engine = "nnsight") -> None:
        self.folder, self.engine = folder, engine

    @cached_property
    def model(self) -> emlens.HookedModel:
        return with_adapters(self.folder / "adapters", self.engine)

    @cached_property
    def direction(self) -> Direction:
        return direction(self.model)

    @cached_property
    def several(self) -> Directions:
        return several(self.model)


@dataclass(frozen=True)
class Golden:
    """A computation, and how far its numbers may be from the kept ones.

    Attributes:
        name: Group and name.
        compute: Gives what is kept; it leaves the world's model as it was.
        rtol: Relative tolerance.
        atol: Absolute tolerance.
        both_engines: It gives the same on either engine, within twice the tolerance.
    """

    name: str
    compute: Callable[[World], Any]
    rtol: float
    atol: float
    both_engines: bool


GOLDENS: dict[str, Golden] = {}


def golden(
    name: str, rtol: float = RTOL, atol: float = ATOL, both_engines: bool = False
) -> Callable[[Callable[[World], Any]], Callable[[World], Any]]:
    """Keep what a function gives."""

    def keep(compute: Callable[[World], Any]) -> Callable[[World], Any]:
        assert name not in GOLDENS, name
        GOLDENS[name] = Golden(name, compute, rtol, atol, both_engines)
        return compute

    return keep


def plain(value: Any) -> Any:
    """What JSON can hold of a value, without loss."""
    if isinstance(value, Directions):
        return _of_directions(value)
    if isinstance(value, Result):
        named = {item.name: plain(getattr(value, item.name)) for item in fields(value)}
        return {"kind": type(value).__name__, **named}
    if isinstance(value, pd.DataFrame):
        rows = value.astype(object).to_numpy().tolist()
        return {"columns": [str(name) for name in value.columns], "rows": plain(rows)}
    if isinstance(value, torch.Tensor):
        return plain(value.detach().cpu().tolist())
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        return plain(value.item())
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _of_directions(value: Directions) -> dict:
    """The numbers of directions; of their provenance what says how they were made."""
    return {
        "site": value.site,
        "construction": value.provenance.construction,
        "data": plain(value.provenance.data),
        "vectors": plain(value.vectors),
        "standard errors": {n: float(v.norm()) for n, v in plainly(value.standard_errors)},
        "means": {n: float(v.norm()) for n, v in plainly(value.means)},
        "shuffled": {n: plain(v.norm(dim=-1)) for n, v in plainly(value.shuffled)},
        "residual norms": plain(value.residual_norms),
        "split half": plain(value.split_half),
        "auroc": plain(value.auroc),
        "measured": plain(value.measured),
    }


def plainly(tensors: Mapping[int, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    return ((str(layer), tensor) for layer, tensor in tensors.items())


def differences(kept: Any, found: Any, rtol: float, atol: float, at: str = "") -> list[str]:
    """Where two plain values differ, a line each.

    Strings, whole numbers, lengths and names must be equal. Results may have gained fields.
    """
    if _is_number(kept) and _is_number(found):
        exact = isinstance(kept, int) and isinstance(found, int)
        close = kept == found if exact else math.isclose(kept, found, rel_tol=rtol, abs_tol=atol)
        return [] if close else [f"{at}: {kept!r} was kept, {found!r} found"]
    if isinstance(kept, dict) and isinstance(found, dict):
        lost = [f"{at}/{name} is missing" for name in kept if name not in found]
        more = [f"{at}/{name} is new" for name in found if name not in kept]
        lines = lost + ([] if "kind" in kept else more)
        for name in kept:
            if name in found:
                lines += differences(kept[name], found[name], rtol, atol, f"{at}/{name}")
        return lines
    if isinstance(kept, list) and isinstance(found, list):
        if len(kept) != len(found):
            return [f"{at}: {len(kept)} were kept, {len(found)} found"]
        return [
            line
            for i, pair in enumerate(zip(kept, found, strict=True))
            for line in differences(*pair, rtol, atol, f"{at}/{i}")
        ]
    same = type(kept) is type(found) and kept == found
    return [] if same else [f"{at}: {kept!r} was kept, {found!r} found"]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def read_numbers(group: str) -> dict[str, Any]:
    """The kept numbers of a group, by name."""
    return json.loads((NUMBERS / f"{group}.json").read_text(encoding="utf-8"))


def write_numbers(group: str, numbers: Mapping[str, Any]) -> None:
    """Keep the numbers of a group, a line each."""
    NUMBERS.mkdir(parents=True, exist_ok=True)
    lines = [
        f"{json.dumps(name)}: {json.dumps(value, ensure_ascii=False, allow_nan=False)}"
        for name, value in numbers.items()
    ]
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    (NUMBERS / f"{group}.json").write_text(text, encoding="utf-8")
