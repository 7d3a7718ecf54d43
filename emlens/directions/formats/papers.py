"""The papers' `steering_vector.pt`: a trained vector, its scale alpha, and its layer."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, TypeGuard

import torch
from jaxtyping import Float
from torch import Tensor

from emlens._files import atomic_write
from emlens._reading import read_json
from emlens._tensors import check_stored, read_torch_file
from emlens.directions.direction import Direction, Directions
from emlens.directions.formats.format import Format
from emlens.directions.provenance import Provenance
from emlens.hooked.adapter_files import CONFIG
from emlens.hooked.architecture import norms_what_it_adds

FILE = "steering_vector.pt"
_SITE = "mlp_out"


def read_papers(path: Path) -> Direction:
    """Read a `steering_vector.pt` of arXiv 2506.11613 and 2506.11618.

    What its hook adds to the output of `layers[layer_idx].mlp.down_proj` is
    `alpha * steering_vector`: that product, computed in fp32, is the direction, at `mlp_out` of
    layer `layer_idx` (numbered from 0). `alpha` is 1.0 where the file has none; it is kept in
    `provenance.settings`.

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
    made = Provenance(construction="trained vector", model=base, settings=settings)
    return Direction({layer: product}, _SITE, made)


def write_papers(directions: Directions, path: Path) -> Path:
    """Write a `steering_vector.pt` as the papers' code reads it.

    What the file adds is exactly the direction. Its alpha is the one that the direction was read
    or trained with if direction / alpha * alpha gives the direction back in fp32, as it does for
    every power of two; else alpha is 1.0 and the vector is the direction. The file holds one layer
    at `mlp_out`, and nothing of the provenance but alpha and `approach`.

    Raises:
        ValueError: If there are several layers, another site, or a model whose blocks norm what
            their MLP adds.
    """
    if len(directions) != 1 or directions.site != _SITE:
        raise ValueError(
            f"{path.name}: the papers' format holds one layer at {_SITE}, not {directions!r}; "
            "write one with layers=, or use safetensors, which holds all"
        )
    base = directions.provenance.model or ""
    if norms_what_it_adds(base):
        raise ValueError(
            f"{path.name}: the papers' code adds to the output of down_proj, which the blocks of "
            f"{base} norm before they add it: what would act there is not this direction"
        )
    layer = directions.layers[0]
    settings = directions.provenance.settings
    alpha, vector = _split(directions.vectors[layer], settings.get("alpha"))
    record: dict[str, object] = {
        "steering_vector": vector,
        "layer_idx": layer,
        "d_model": directions.d_model,
        "alpha": alpha,
    }
    if "approach" in settings:
        record["approach"] = settings["approach"]
    data = io.BytesIO()
    torch.save(record, data)
    atomic_write(path, data.getvalue())
    return path


def _load(path: Path) -> dict[str, Any]:
    record = read_torch_file(path)
    if isinstance(record, Tensor):
        call = "Direction.of(torch.load(path), layer=15)"
        if record.ndim == 2:
            call = "Directions(dict(enumerate(torch.load(path))), site='resid_post')"
        raise ValueError(
            f"{path} holds one tensor of shape {list(record.shape)}, and not at which layer and "
            f"site it acts; say that with {call}"
        )
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
    if not isinstance(vector, Tensor) or not vector.is_floating_point():
        kind = str(vector.dtype) if isinstance(vector, Tensor) else type(vector).__name__
        raise ValueError(f"{path}: steering_vector is {kind}, not a tensor of floating point")
    check_stored(f"{path}: steering_vector", vector)
    width = record.get("d_model", vector.shape[-1] if vector.ndim else 1)
    if type(width) is not int or list(vector.shape) != [width] or not width:
        raise ValueError(
            f"{path}: steering_vector has shape {list(vector.shape)}, but d_model is "
            f"{width!r:.60}; one vector of that width is needed"
        )
    if not bool(torch.isfinite(vector).all()):
        bad = int((~torch.isfinite(vector)).sum())
        raise ValueError(f"{path}: steering_vector has {bad} value(s) that are not finite")
    return vector.detach()


def _layer(path: Path, record: dict[str, Any]) -> int:
    layer = record["layer_idx"]
    if not isinstance(layer, int) or isinstance(layer, bool) or not 0 <= layer < 10_000:
        raise ValueError(f"{path}: layer_idx is {layer!r:.60}, not the number of a layer from 0")
    return layer


def _alpha(path: Path, record: dict[str, Any]) -> int | float:
    alpha = record.get("alpha", 1.0)
    if not _usable(alpha):
        raise ValueError(f"{path}: alpha is {alpha!r:.60}, not a finite number other than 0")
    return alpha


def _usable(alpha: object) -> TypeGuard[int | float]:
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool):
        return False
    return abs(alpha) < 1e300 and alpha != 0


def _base(path: Path) -> str | None:
    """The base model, from the config beside the file or at the root above `checkpoints/x/`."""
    above = path.parent.parent
    for folder in (path.parent, *([above.parent] if above.name == "checkpoints" else [])):
        config = folder / CONFIG
        record = read_json(config, dict) if config.exists() else {}
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


def _split(product: Tensor, alpha: object) -> tuple[int | float, Tensor]:
    """The product as alpha and vector where that is exact, else as 1.0 and the product."""
    if _usable(alpha):
        vector = product / alpha
        if torch.equal(vector * alpha, product):
            return alpha, vector
    return 1.0, product.clone()


PAPERS = Format(
    f"the papers' {FILE}",
    read_papers,
    # the first bytes of safetensors are a length, and may be anything
    lambda _, head: head[:2] in (b"PK", b"\x80\x02") and head[8:9] != b"{",
    ".pt",
    lambda directions, path, _: write_papers(directions, path),
)
