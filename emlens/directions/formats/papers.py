"""The papers' `steering_vector.pt`: a trained vector, its scale alpha, and its layer."""

from __future__ import annotations

import io
import math
import pickle
import re
import struct
from pathlib import Path
from typing import Any, TypeGuard

import torch
from jaxtyping import Float
from torch import Tensor

from emlens._files import atomic_write, read_json
from emlens.directions.direction import Direction, Directions
from emlens.directions.provenance import Provenance
from emlens.hooked.architecture import norms_what_it_adds

FILE = "steering_vector.pt"
_SITE = "mlp_out"
_CONFIG = "adapter_config.json"
_GLOBAL = re.compile(r"Unsupported \w+: (?:GLOBAL )?(\S+)")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def read_papers(path: Path) -> Direction:
    """Read a `steering_vector.pt` of arXiv 2506.11613 and 2506.11618.

    What its hook adds to the output of `layers[layer_idx].mlp.down_proj` is
    `alpha * steering_vector`: that product, computed in fp32, is the direction, at `mlp_out` of
    layer `layer_idx` (numbered from 0). `alpha` is 1.0 where the file has none; it is kept in
    `provenance.settings`, so that `write_papers` restores both, bit for bit.

    Where a block norms what its MLP adds (Gemma 2 and 3, OLMo 2), the output of `down_proj` is not
    `mlp_out`, and the file holds no direction of the stream: it is refused if an
    `adapter_config.json` above it names such a base.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is truncated, would have to run code to be read, lacks a key, or holds a
            vector that is not finite or has another width than the file says.
    """
    record = _load(path)
    vector, layer = _vector(path, record), _layer(path, record)
    alpha = _alpha(path, record)
    product = vector.float() * alpha
    if not bool(torch.isfinite(product).all()):
        raise ValueError(f"{path}: alpha {alpha} times its steering_vector is not finite in fp32")
    base = _base(path)
    settings: dict[str, object] = {"alpha": alpha}
    settings |= {"approach": record["approach"]} if "approach" in record else {}
    settings |= {} if vector.dtype == torch.float32 else {"dtype": str(vector.dtype)[6:]}
    if lost := _rounding(vector.float(), product, alpha):
        settings["rounding"] = lost
    made = Provenance(construction="trained vector", model=base, settings=settings)
    return Direction({layer: product}, _SITE, made)


def write_papers(directions: Directions, path: Path) -> Path:
    """Write a `steering_vector.pt` as the papers' code reads it.

    `alpha` is the one that the direction was read or trained with; if no fp32 vector times that
    alpha is exactly this direction, alpha is 1.0 and the vector is the direction. The file holds
    one layer at `mlp_out`, and nothing of the provenance but alpha and `approach`.

    Raises:
        ValueError: If there are several layers, or another site.
    """
    if len(directions) != 1 or directions.site != _SITE:
        raise ValueError(
            f"{path.name}: the papers' format holds one layer at {_SITE}, not {directions!r}; "
            "write one with layers=, or use safetensors, which holds all"
        )
    layer = directions.layers[0]
    alpha, vector = _parts(directions.vectors[layer], directions.provenance.settings)
    record: dict[str, object] = {
        "steering_vector": vector,
        "layer_idx": layer,
        "d_model": directions.d_model,
        "alpha": alpha,
    }
    if "approach" in directions.provenance.settings:
        record["approach"] = directions.provenance.settings["approach"]
    data = io.BytesIO()
    torch.save(record, data)
    atomic_write(path, data.getvalue())
    return path


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        record = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        asked = _GLOBAL.search(str(error))
        raise ValueError(
            f"{path} needs more than tensors and numbers to be read "
            f"({asked[1] if asked else 'unknown'}), and emlens runs no code from a file; write it "
            "again with plain values"
        ) from error
    except (RuntimeError, EOFError, OSError, LookupError, ValueError, struct.error) as error:
        raise ValueError(
            f"{path} is not a readable torch file ({path.stat().st_size} bytes); was it fetched "
            f"as a whole? ({str(error).partition('. ')[0]})"
        ) from error
    if not isinstance(record, dict):
        raise ValueError(f"{path} holds a {type(record).__name__}, not a dict with a vector")
    missing = [key for key in ("steering_vector", "layer_idx") if key not in record]
    if missing:
        have = ", ".join(map(str, list(record)[:6])) or "nothing"
        raise ValueError(
            f"{path} has no {' and no '.join(missing)}; it has {have}. A file of the papers has "
            "steering_vector, layer_idx, d_model and alpha"
        )
    return record


def _vector(path: Path, record: dict[str, Any]) -> Float[Tensor, " d_model"]:
    vector = record["steering_vector"]
    if not isinstance(vector, Tensor) or vector.dtype not in _DTYPES.values():
        kind = str(vector.dtype) if isinstance(vector, Tensor) else type(vector).__name__
        raise ValueError(f"{path}: steering_vector is {kind}, not one of {', '.join(_DTYPES)}")
    width = record.get("d_model", vector.shape[-1] if vector.ndim else 1)
    if list(vector.shape) != [width]:
        raise ValueError(
            f"{path}: steering_vector has shape {list(vector.shape)}, but d_model is {width}; "
            "one vector of that width is needed"
        )
    if not bool(torch.isfinite(vector).all()):
        bad = int((~torch.isfinite(vector)).sum())
        raise ValueError(f"{path}: steering_vector has {bad} value(s) that are not finite")
    return vector.detach()


def _layer(path: Path, record: dict[str, Any]) -> int:
    layer = _plain(record["layer_idx"])
    if not isinstance(layer, int) or isinstance(layer, bool) or layer < 0:
        raise ValueError(f"{path}: layer_idx is {layer!r}, not the number of a layer from 0")
    return layer


def _alpha(path: Path, record: dict[str, Any]) -> int | float:
    alpha = _plain(record.get("alpha", 1.0))
    if not _usable(alpha):
        raise ValueError(f"{path}: alpha is {alpha!r}, not a finite number other than 0")
    return alpha


def _usable(alpha: object) -> TypeGuard[int | float]:
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool):
        return False
    return math.isfinite(alpha) and alpha != 0


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


def _base(path: Path) -> str | None:
    """The base model, from the config beside the file or at the root above `checkpoints/x/`."""
    above = path.parent.parent
    for folder in (path.parent, *([above.parent] if above.name == "checkpoints" else [])):
        config = folder / _CONFIG
        record = read_json(config) if config.is_file() else {}
        base = record.get("base_model") or record.get("base_model_name_or_path")
        if base:
            if norms_what_it_adds(str(base)):
                raise ValueError(
                    f"{path} was trained in {base} ({config}), whose blocks norm the output of "
                    "down_proj before they add it: alpha * steering_vector is no vector of the "
                    "stream there"
                )
            return str(base)
    return None


def _rounding(vector: Tensor, product: Tensor, alpha: float) -> list[list[int]]:
    """Where dividing the product by alpha misses the vector: `[index, units in the last place]`."""
    missed = _bits(vector).long() - _bits(_divided(product, alpha)).long()
    return [[i, int(missed[i])] for i in missed.nonzero()[:, 0].tolist()]


def _parts(product: Tensor, settings: dict[str, Any]) -> tuple[int | float, Tensor]:
    """The alpha and the vector whose product this is, exactly."""
    alpha = settings.get("alpha")
    if _usable(alpha):
        places = torch.tensor(settings.get("rounding", []), dtype=torch.long).reshape(-1, 2)
        bits = _bits(_divided(product, alpha)).long()
        bits[places[:, 0]] += places[:, 1]
        vector = bits.int().view(torch.float32)
        if torch.equal(_bits(vector * alpha), _bits(product)):
            narrow = vector.to(_DTYPES[settings.get("dtype", "float32")])
            return alpha, narrow if torch.equal(narrow.float(), vector) else vector
    return 1.0, product.clone()


def _divided(product: Tensor, alpha: float) -> Tensor:
    return (product.double() / float(alpha)).float()


def _bits(vector: Tensor) -> Tensor:
    return vector.contiguous().view(torch.int32)
