"""Attaching saved LoRA adapters to a base model; on any mismatch the model does not change."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.functional import cast_adapter_dtype
from torch import Tensor, nn

from emlens.hooked.adapter_files import PREFIX, compare_bases, read_adapter
from emlens.hooked.adapter_kinds import MERGE, check_config, check_name, check_rank
from emlens.hooked.adapters import Adapters, Weights, available, delete_from, kept_gradients, switch
from emlens.hooked.architecture import Architecture
from emlens.hooked.untouched import untouched

_IN_THE_WAY = ("ModulesToSaveWrapper(", "modules_to_save cannot be applied to modules of type")
"""What PEFT says where an adapter meets another one's module."""


def attach(module: nn.Module, adapters: Mapping[str, str | Path], model_name: str) -> None:
    """Put saved LoRA adapters into a base model, in place; none of them acts afterwards.

    Adapter weights in half precision are kept in fp32, as PEFT does. All other weights stay where
    and what they are, which is proved.

    Args:
        module: The `...ForCausalLM` module.
        adapters: Name to folder, or to a hub name (`"org/name"`, `"org/name/sub/folder"`).
        model_name: Name of the base model, compared with the one an adapter records.

    Raises:
        FileNotFoundError: If an adapter does not exist.
        ValueError: If an adapter is not LoRA, would change the base, does not fit it, has weights
            that find no place, or changes nothing. The module is then unchanged.
    """
    what = " or ".join(f"adapter {name!r}" for name in adapters)
    with kept_gradients(module), untouched(module, what):
        for name, source in adapters.items():
            check_name(module, name)
            config, weights = read_adapter(name, str(source))
            compare_bases(name, config.base_model_name_or_path, model_name)
            _put(module, name, config, weights, model_name)


def inject(
    module: nn.Module,
    name: str,
    config: LoraConfig,
    model_name: str,
    weights: Weights | None = None,
) -> None:
    """Put one LoRA adapter into a model, in place; it does not act, and its weights are fp32.

    Other adapters keep acting.

    Args:
        module: The `...ForCausalLM` module.
        name: Its name.
        config: PEFT's configuration.
        model_name: What errors call the model.
        weights: Its weights by the keys that PEFT saves them under; None for a new adapter.

    Raises:
        ValueError: If the name cannot be used, no module fits, the adapter would change the base,
            its rank is larger than a module allows, or, of a new one, dropout is asked for or a
            start that is computed from data. The module is then as it was.
    """
    check_name(module, name)
    if weights is None and config.lora_dropout:
        raise ValueError(
            f"lora_dropout is {config.lora_dropout}; emlens runs models without dropout, so that "
            "a training can be repeated"
        )
    if weights is None and config.init_lora_weights == "eva":
        raise ValueError(
            f"adapter {name!r} has init_lora_weights='eva', an initialisation that is computed "
            "from data; make it with PEFT's initialize_lora_eva_weights and give the model to "
            "emlens.wrap"
        )
    with kept_gradients(module), untouched(module, f"adapter {name!r}"):
        _put(module, name, deepcopy(config), weights, model_name)


def remove(module: nn.Module, name: str) -> None:
    """Take an adapter out of a model; where none is left, the base's own module is back."""
    held = [(path, part) for path, part in Adapters(module).parts() if name in available(part)]
    with kept_gradients(module), _quiet():
        for _, part in held:
            delete_from(part, name)
    for path, part in held:
        parent, _, child = path.rpartition(".")
        owner = module.get_submodule(parent)
        # of layers around layers the outermost stands for all
        if not available(part) and getattr(owner, child, None) is part:
            lora = hasattr(part, "get_base_layer")
            setattr(owner, child, part.get_base_layer() if lora else part.original_module)
    configs: Any = getattr(module, "peft_config", {})
    configs.pop(name, None)
    if not configs and "peft_config" in module.__dict__:
        del module.__dict__["peft_config"]


def _put(
    module: nn.Module,
    name: str,
    config: LoraConfig,
    weights: Weights | None,
    model_name: str,
) -> None:
    check_config(module, name, config)
    known = {id(part) for part in module.modules()}
    before = {
        id(layer): [] if layer.disable_adapters else list(layer.active_adapters)
        for _, layer in Adapters(module).parts()
    }
    try:
        with _quiet():
            inject_adapter_in_model(config, module, adapter_name=name)
        cast_adapter_dtype(module, name)
        for _, layer in Adapters(module).parts():
            switch(layer, before.get(id(layer), []))
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        if any(sign in str(error) for sign in _IN_THE_WAY):
            others = ", ".join(repr(other) for other in Adapters(module).names if other != name)
            raise ValueError(
                f"adapter {name!r} cannot stand beside {others}: one replaces a module as a whole "
                "(modules_to_save), and the other adapts it; load them on two models"
            ) from error
        raise ValueError(f"adapter {name!r} does not fit {model_name}: {error}") from error
    for part in module.modules():
        if id(part) not in known:
            part.training = module.training
    _check_places(module, name)
    if weights is not None:
        _fill(module, name, weights, model_name)


def _check_places(module: nn.Module, name: str) -> None:
    """Refuse ranks that a module does not have, and wrappers around what has to stay visible."""
    adapters = Adapters(module)
    for path, layer in adapters.lora_layers(name).items():
        if not hasattr(layer, "parameter_name"):
            check_rank(name, path, layer.r[name], layer.in_features, layer.out_features)
    blocks = Architecture.of(module).blocks
    paths = [path for path, _ in adapters.parts()]
    for path, part in adapters.parts():
        if not hasattr(part, "original_module") or name not in available(part):
            continue
        inside = path.removeprefix(f"{blocks}.")
        if f"{blocks}.".startswith(f"{path}.") or (inside != path and inside.isdigit()):
            raise ValueError(
                f"adapter {name!r} replaces {path} as a whole (modules_to_save), which holds "
                "decoder blocks; emlens reads these from the base's own modules"
            )
        nested = [other for other in paths if other.startswith(f"{path}.")]
        if nested:
            raise ValueError(
                f"adapter {name!r} replaces {path} as a whole (modules_to_save), and another "
                f"adapter works inside of it, at {nested[0]}; load them on two models"
            )


def _fill(module: nn.Module, name: str, weights: Weights, model_name: str) -> None:
    """Copy weights into an adapter; every one finds its place, and every place its weight."""
    own = Adapters(module).parameters(name)
    state = _without_base(module, name, weights, own)
    for key, place in own.items():
        if key in state and state[key].shape != place.shape:
            path, _, part = key.removesuffix(".weight").rpartition(".")
            raise ValueError(
                f"adapter {name!r} does not fit {model_name}: {part} at {path} is "
                f"{list(state[key].shape)}, this model and the adapter's rank need "
                f"{list(place.shape)}"
            )
    try:
        with Adapters(module).asked_for(name):
            result = set_peft_model_state_dict(module, state, adapter_name=name)
    except KeyError as error:
        raise ValueError(
            f"adapter {name!r} does not fit {model_name}: it has no weights for {error.args[0]}"
        ) from error
    except RuntimeError as error:
        raise ValueError(f"adapter {name!r} does not fit {model_name}: {error}") from error
    tied = tuple(
        f"{path}."
        for path, part in Adapters(module).parts()
        if getattr(getattr(part, "token_adapter", None), "tied_adapter", None) is not None
    )
    missing = [k for k in result.missing_keys if f".{name}." in f"{k}." and not k.startswith(tied)]
    if missing or result.unexpected_keys:
        what = f"no weights for {missing[0]}" if missing else ""
        left = f"no place for {result.unexpected_keys[0]}" if result.unexpected_keys else ""
        raise ValueError(
            f"adapter {name!r} does not fit {model_name}: it has "
            f"{' and '.join(part for part in (what, left) if part)}"
        )
    _check_effect(module, name)


def _without_base(
    module: nn.Module, name: str, weights: Weights, own: Weights
) -> dict[str, Tensor]:
    """Leave copies of the base's tensors out, as PEFT saves beside LoRA on embeddings.

    Raises:
        ValueError: If one of them is not what the base has.
    """
    base = {
        re.sub(r"\.(base_layer|original_module|token_adapter)(?=\.)", "", path): tensor
        for path, tensor in (
            *module.named_parameters(remove_duplicate=False),
            *module.named_buffers(),
        )
        if not re.search(rf"\.{re.escape(name)}(\.|$)", path)
    }
    kept: dict[str, Tensor] = {}
    for key, value in weights.items():
        key = key.removeprefix(PREFIX)
        there = None if key in own else base.get(key.replace(".base_layer.", "."))
        if there is None:
            kept[key] = value
        elif value.shape != there.shape:
            raise ValueError(
                f"adapter {name!r} brings its own {key} of {list(value.shape)}, and the base has "
                f"{list(there.shape)}, as after a resized vocabulary; {MERGE}"
            )
        elif not _same(value, there):
            raise ValueError(
                f"adapter {name!r} brings its own {key} (save_embedding_layers), which differs "
                f"from the one that all conditions share; {MERGE}"
            )
    return kept


def _same(value: Tensor, there: Tensor) -> bool:
    """Whether two tensors agree, in the coarser of their types."""
    dtype = min(value.dtype, there.dtype, key=lambda kind: kind.itemsize)
    return torch.equal(value.to(there.device, dtype), there.to(dtype))


def _check_effect(module: nn.Module, name: str) -> None:
    """Refuse weights that are not finite, and plain LoRA that adds nothing."""
    others = False
    for key, tensor in Adapters(module).parameters(name).items():
        if re.search(r"\.lora_(embedding_)?[AB](\.weight)?$", key):
            continue
        others = True
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"adapter {name!r} has weights at {key} that are not finite")
    products = _products(module, name)
    if not others:
        check_weights(products, name)
    elif not all(bool(w.isfinite().all()) for parts in products.values() for w in parts.values()):
        raise ValueError(f"adapter {name!r} has weights that are not finite")


def check_weights(products: Mapping[str, Mapping[str, Tensor]], name: str) -> None:
    """Refuse an adapter by its `A` and `B` at each module's path.

    Raises:
        ValueError: If a weight is not finite, or the adapter changes nothing.
    """
    for path, weights in products.items():
        if not all(bool(weight.isfinite().all()) for weight in weights.values()):
            raise ValueError(f"adapter {name!r} has weights at {path} that are not finite")
    if not any(all(bool(w.any()) for w in weights.values()) for weights in products.values()):
        raise ValueError(
            f"adapter {name!r} changes nothing: A or B is zero in each of its {len(products)} "
            "modules; was it saved before it was trained?"
        )


def _products(module: nn.Module, name: str) -> dict[str, dict[str, Tensor]]:
    """`A` and `B` of every module that one adapter targets, by the module's path."""
    found = {}
    for path, layer in Adapters(module).lora_layers(name).items():
        if name in layer.lora_A:
            found[path] = {p: getattr(layer, p)[name].weight for p in ("lora_A", "lora_B")}
        else:
            parts = ("lora_embedding_A", "lora_embedding_B")
            found[path] = {part: getattr(layer, part)[name] for part in parts}
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Several adapters on one model, come and go, are what is wanted; PEFT warns of them."""
    with warnings.catch_warnings():
        for message in (
            "Already found a `peft_config` attribute",
            "Adapter .* was active which is now deleted",
            "Model has `tie_word_embeddings=True` and a tied layer is part",
            "`lora_bias=True` was passed but the targeted layer",
        ):
            warnings.filterwarnings("ignore", message=message)
        yield
