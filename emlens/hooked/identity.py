"""What a model is, and what it runs under: by content, never by name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import fields, is_dataclass
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor, nn

from emlens.hooked.adapters import Adapters
from emlens.hooked.edit import Edit, has_formula
from emlens.hooked.interface import Hooked

SAMPLE = 1024
"""Numbers of each weight that tell a model from another."""

_NAMES = frozenset({"_name_or_path", "name_or_path", "architectures", "transformers_version"})
"""What a configuration says of itself besides what it is."""


def model_identity(model: Hooked) -> str:
    """Return 16 letters that tell a model from every other: two folders `final` are two models.

    Made of the configuration, the tokenizer with its chat template and the template's arguments,
    and a fixed sample of every weight of the base; adapters are left out. Cheap at any size: 1,024
    numbers of each weight are read. A model whose weights have changed since, by training say, has
    another identity.
    """
    module, tokenizer = model.module, model.tokenizer
    digest = hashlib.sha256()
    config = getattr(module, "config", None)
    record = config.to_dict() if config is not None else {}
    known = {k: v for k, v in record.items() if k not in _NAMES and not k.startswith("_")}
    digest.update(_text(known).encode())
    digest.update(_tokenizer(tokenizer).encode())
    if model.template.arguments:
        digest.update(_text(model.template.record).encode())
    for shape, values in _sampled(model):
        digest.update(f"{shape}".encode())
        # weights that are elsewhere are known by name alone
        digest.update(f"{model.name} {model.revision}".encode() if values is None else values)
    return digest.hexdigest()[:16]


class Identities(TypedDict):
    """`model.identity`, and `Condition.identity` of what is in force."""

    identity: str
    condition: str


def identities(model: Hooked) -> Identities:
    """What a model is and what it runs under now: what everything that is kept depends on."""
    return {"identity": model.identity, "condition": acting_identity(model)}


def versions_of(model: Hooked) -> tuple[int, ...]:
    """What changes whenever a weight is written to."""
    return tuple(weight._version for weight in model.module.parameters())


def acting_identity(model: Hooked) -> str:
    """Return 16 letters that tell what acts now: adapters by weights and strength, and edits.

    Names do not count: an adapter of another name with the same weights is the same.
    """
    adapters = [
        digest_of([model.adapter_weights(name), model.adapter_scalings(name)])
        for name in model.acting
    ]
    return digest_of([sorted(adapters), list(model.edits_in_force(()))])


def digest_of(value: object) -> str:
    """Return 16 letters of a hash of the content of a value, tensors and all.

    Raises:
        TypeError: If there is something in it whose content cannot be told.
    """
    digest = hashlib.sha256()
    for part in _bytes(value):
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.hexdigest()[:16]


def base_weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Weights of the base and their paths, those of adapters left out."""
    adapters = Adapters(module)
    kept = (adapters.parameters(name).values() for name in adapters.names)
    own = {weight.data_ptr() for weights in kept for weight in weights}
    for path, weight in module.named_parameters():
        if weight.is_meta or weight.data_ptr() not in own:
            yield path, weight


def _sampled(model: Hooked) -> Iterator[tuple[tuple[int, ...], bytes | None]]:
    for path, weight in base_weights(model.module):
        found = _at_hand(model.module, path, weight)
        if found is None:
            yield tuple(weight.shape), None
            continue
        flat = found.detach().reshape(-1)
        places = torch.linspace(0, len(flat) - 1, min(SAMPLE, len(flat)), dtype=torch.float64)
        values = flat[places.round().long().to(flat.device)].cpu().contiguous()
        yield tuple(weight.shape), values.view(torch.uint8).numpy().tobytes()


def _at_hand(module: nn.Module, path: str, weight: Tensor) -> Tensor | None:
    """A weight, also one that accelerate keeps on the CPU or the disk; None if it is remote."""
    if not weight.is_meta:
        return weight
    parent, _, name = path.rpartition(".")
    hook: Any = getattr(module.get_submodule(parent), "_hf_hook", None)
    kept = getattr(hook, "weights_map", None)
    return kept[name] if kept is not None and name in kept else None


def _tokenizer(tokenizer: Any) -> str:
    """What a tokenizer does, its chat template included."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        record = json.loads(backend.to_str())
        # how it was last called is no part of what it is
        record = {k: v for k, v in record.items() if k not in ("padding", "truncation")}
    else:
        record = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    special = getattr(tokenizer, "special_tokens_map", {})
    return _text([record, str(getattr(tokenizer, "chat_template", None)), special])


def _text(value: object) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=True, default=str)


def _bytes(value: Any) -> Iterator[bytes]:
    """The content of a value as bytes, each part with its kind."""
    if value is None or isinstance(value, (bool, int, float, str, np.generic)):
        plain = value.item() if isinstance(value, np.generic) else value
        yield f"{type(plain).__name__} {plain!r}".encode()
    elif isinstance(value, (bytes, range, torch.dtype, torch.device, type)):
        yield f"{type(value).__name__} {value!r}".encode()
    elif isinstance(value, (Tensor, np.ndarray)):
        tensor = torch.as_tensor(value).detach().cpu().contiguous()
        yield f"tensor {tensor.dtype} {tuple(tensor.shape)}".encode()
        yield tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(value, Mapping):
        yield f"mapping {len(value)}".encode()
        for key in sorted(value, key=str):
            yield from _bytes(key)
            yield from _bytes(value[key])
    elif isinstance(value, Set):
        yield from _bytes(sorted(map(str, value)))
    elif isinstance(value, Sequence):
        yield f"sequence {len(value)}".encode()
        for item in value:
            yield from _bytes(item)
    elif isinstance(value, Edit) and has_formula(value):
        formulas: Any = {layer: value.formula(layer) for layer in value.layers}  # type: ignore
        yield from _bytes([value.site, value.where, formulas])
    elif isinstance(value, FunctionType):
        yield from _function(value)
    elif isinstance(value, (BuiltinFunctionType, MethodType)):
        yield f"function {value.__qualname__}".encode()
        if isinstance(value, MethodType):
            yield from _bytes(value.__self__)
    elif is_dataclass(value) or hasattr(value, "__dict__"):
        known = [f.name for f in fields(value)] if is_dataclass(value) else vars(value)
        yield from _bytes([type(value).__qualname__, {n: getattr(value, n) for n in known}])
        if isinstance(value, Edit):
            yield from _bytes(type(value).delta)
    else:
        raise TypeError(
            f"the content of a {type(value).__name__} cannot be told, so what depends on it cannot "
            "be kept and found again; give the edit a formula(layer) that says what it computes"
        )


def _function(function: FunctionType) -> Iterator[bytes]:
    """A function by its name if it is emlens' own, else by its code and what it encloses."""
    yield function.__qualname__.encode()
    if function.__module__.partition(".")[0] == __name__.partition(".")[0]:
        return
    code = function.__code__
    yield code.co_code
    inner = [item for item in code.co_consts if not isinstance(item, CodeType)]
    enclosed = [cell.cell_contents for cell in function.__closure__ or ()]
    yield from _bytes([code.co_names, inner, function.__defaults__, enclosed])
