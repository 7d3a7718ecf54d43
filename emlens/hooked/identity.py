"""What a model is, and what it runs under: by content, never by name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import fields, is_dataclass
from functools import partial
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType
from typing import Any, TypedDict, cast

import numpy as np
import torch
from torch import Tensor, nn

from emlens.hooked.adapters import Adapters
from emlens.hooked.edit import Edit, has_formula
from emlens.hooked.interface import Hooked

SAMPLE = 1024
"""Numbers of each weight that tell a model from another."""

_KNOWN = frozenset({"abc", "builtins", "emlens", "torch", "typing"})
"""Packages whose functions and classes are known by their names."""

_PLAIN = (bool, int, float, str, np.generic, Tensor, np.ndarray)
_CONTENT = (*_PLAIN, FunctionType, MethodType, partial, Mapping, Sequence)
"""Members of a class that are part of what it does."""

_NAMES = frozenset({"_name_or_path", "name_or_path", "architectures", "transformers_version"})
"""What a configuration says of itself besides what it is."""


def model_identity(model: Hooked) -> str:
    """Return 16 letters that tell a model from every other: two folders `final` are two models.

    Made of the configuration, the tokenizer with its chat template and the template's arguments,
    and a fixed sample of every weight of the base; adapters are left out. Cheap at any size: 1,024
    numbers of each weight are read. A model whose weights have changed since, by training say, has
    another identity.
    """
    tokenizer = model.tokenizer
    digest = hashlib.sha256()
    digest.update(_config(model).encode())
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


def versions_of(model: Hooked) -> tuple[object, ...]:
    """What changes whenever a weight is written to or replaced, or a setting is changed."""
    weights = [(id(weight), weight._version) for weight in model.module.parameters()]
    tokenizer: Any = model.tokenizer
    return (*weights, _config(model), len(tokenizer), *_settings(tokenizer))


def acting_identity(model: Hooked) -> str:
    """Return 16 letters that tell what acts now: adapters by weights and strength, and edits.

    Names do not count: an adapter of another name with the same weights is the same.
    """
    # in their order, which counts where one of them is DoRA: it scales what is there
    adapters = [
        [model.adapter_weights(name), model.adapter_scalings(name)] for name in model.acting
    ]
    return digest_of([adapters, list(model.edits_in_force(()))])


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


def _config(model: Hooked) -> str:
    config = getattr(model.module, "config", None)
    record = config.to_dict() if config is not None else {}
    known = {k: v for k, v in record.items() if k not in _NAMES and not k.startswith("_")}
    return _text(known)


def _tokenizer(tokenizer: Any) -> str:
    """What a tokenizer does, its chat template included."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        record = json.loads(backend.to_str())
        # how it was last called is no part of what it is
        record = {k: v for k, v in record.items() if k not in ("padding", "truncation")}
    else:
        record = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    return _text([record, *_settings(tokenizer)])


def _settings(tokenizer: Any) -> tuple[str, Any]:
    """Its chat template and its special tokens."""
    special = getattr(tokenizer, "special_tokens_map", {})
    return str(getattr(tokenizer, "chat_template", None)), dict(special)


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
        formulas = {layer: cast(Any, value).formula(layer) for layer in value.layers}
        yield from _bytes([value.site, value.where, formulas])
    elif isinstance(value, FunctionType):
        for function in _reached(value):
            yield from _function(function)
    elif isinstance(value, MethodType):
        yield from _bytes([value.__func__, value.__self__])
    elif isinstance(value, partial):
        yield from _bytes([value.func, value.args, value.keywords])
    elif isinstance(value, BuiltinFunctionType):
        yield f"function {value.__qualname__}".encode()
    elif is_dataclass(value) or hasattr(value, "__dict__"):
        known = [f.name for f in fields(value)] if is_dataclass(value) else vars(value)
        yield from _bytes([type(value).__qualname__, {n: getattr(value, n) for n in known}])
        if isinstance(value, Edit):
            yield from _bytes([value.site, value.layers, value.where])
            yield from _class(type(value))
    else:
        raise TypeError(
            f"the content of a {type(value).__name__} cannot be told, so what depends on it cannot "
            "be kept and found again; give the edit a formula(layer) that says what it computes"
        )


def _class(kind: type) -> Iterator[bytes]:
    """What a class of the user's does: its methods and constants, those of its bases included."""
    for base in kind.__mro__:
        if base.__module__.partition(".")[0] in _KNOWN:
            continue
        for name, member in vars(base).items():
            if name.startswith("__") and name != "__call__":
                continue
            if isinstance(member, (staticmethod, classmethod)):
                member = member.__func__
            elif isinstance(member, property):
                member = member.fget
            if isinstance(member, _CONTENT):
                yield from _bytes([name, member])


def _reached(function: FunctionType) -> list[FunctionType]:
    """A function, then those of the user's that it encloses or calls by their name."""
    found = [function]
    for one in found:
        if not _own(one):
            continue
        named = [one.__globals__.get(name) for name in _names(one.__code__)]
        for other in (*named, *_enclosed(one)):
            if isinstance(other, FunctionType) and _own(other) and other not in found:
                found.append(other)
    return found


def _function(function: FunctionType) -> Iterator[bytes]:
    """A function by its name if it is a library's, else by its code and what it refers to."""
    yield function.__qualname__.encode()
    if not _own(function):
        return
    values = [*_enclosed(function)]
    for name in _names(function.__code__):
        value = function.__globals__.get(name)
        # modules and classes go by their names
        values += [value] if isinstance(value, _PLAIN) else []
    kept = [value for value in values if not isinstance(value, FunctionType)]
    others = [value for value in values if isinstance(value, FunctionType) and not _own(value)]
    yield from _code(function.__code__)
    yield from _bytes([function.__defaults__, function.__kwdefaults__, kept])
    yield from (other.__qualname__.encode() for other in others)


def _code(code: CodeType) -> Iterator[bytes]:
    yield code.co_code
    yield from _bytes([code.co_names, [c for c in code.co_consts if not isinstance(c, CodeType)]])
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _code(inner)


def _names(code: CodeType) -> list[str]:
    """Names that code refers to, functions inside of it included."""
    inner = [name for c in code.co_consts if isinstance(c, CodeType) for name in _names(c)]
    return [*code.co_names, *inner]


def _enclosed(function: FunctionType) -> list[Any]:
    return [cell.cell_contents for cell in function.__closure__ or ()]


def _own(function: FunctionType) -> bool:
    """Whether a function is the user's, and not of emlens or PyTorch."""
    return (function.__module__ or "").partition(".")[0] not in _KNOWN
