"""Attaching saved LoRA adapters to a base model: all of it fits, or nothing is changed."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.functional import cast_adapter_dtype
from peft.utils import load_peft_weights
from safetensors import SafetensorError
from torch import Tensor, nn

from emlens.hooked.adapters import Adapters, available, kept_gradients, switch

_FILE = "adapter_config.json"
_PREFIX = "base_model.model."


def attach(module: nn.Module, adapters: Mapping[str, str | Path], model_name: str) -> None:
    """Inject saved LoRA adapters into a base model, in place; none of them acts afterwards.

    Adapter weights in half precision are kept in fp32, as PEFT does.

    Args:
        module: The `...ForCausalLM` module.
        adapters: Name to folder, or to a hub name (`"org/name"`, `"org/name/sub/folder"`).
        model_name: Name of the base model, compared with the one an adapter records.

    Raises:
        FileNotFoundError: If there is no adapter at a place.
        ValueError: If an adapter is not LoRA, does not fit the base, has weights that find no
            place, or changes nothing. The module is then as it was.
    """
    for name, source in adapters.items():
        if not name or "." in name:
            raise ValueError(f"{name!r} cannot name an adapter; leave dots out of it")
        with _undone_if_it_fails(module, name), kept_gradients(module):
            _attach(module, name, str(source), model_name)


def _attach(module: nn.Module, name: str, source: str, model_name: str) -> None:
    config, state = read_adapter(name, source)
    _compare_bases(name, config.base_model_name_or_path, model_name)
    try:
        with _quiet():
            inject_adapter_in_model(config, module, adapter_name=name)
    except ValueError as error:
        raise ValueError(f"adapter {name!r} does not fit {model_name}: {error}") from error
    cast_adapter_dtype(module, name)
    _check_shapes(module, name, state, model_name)
    result = set_peft_model_state_dict(module, state, adapter_name=name)
    missing = [key for key in result.missing_keys if f".{name}." in f"{key}."]
    if missing or result.unexpected_keys:
        what = f"no weights for {missing[0]}" if missing else ""
        left = f"no place for {result.unexpected_keys[0]}" if result.unexpected_keys else ""
        raise ValueError(
            f"adapter {name!r} does not fit {model_name}: it has "
            f"{' and '.join(part for part in (what, left) if part)}"
        )
    check_weights(_products(module, name), name)
    for _, layer in Adapters(module).parts():
        switch(layer, ())


@contextmanager
def _quiet() -> Iterator[None]:
    """Several adapters on one model, come and go, are what is wanted; PEFT warns of both."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        warnings.filterwarnings("ignore", message="Adapter .* was active which is now deleted")
        yield


def inject(module: nn.Module, name: str, config: LoraConfig, model_name: str) -> None:
    """Inject a new LoRA adapter, in place; it does not act, and its weights are fp32.

    What acts beside it goes on acting.

    Raises:
        ValueError: If the name is taken or has dots, no module fits, the rank is larger than a
            module allows, or dropout is asked for. The module is then as it was.
    """
    if not name or "." in name:
        raise ValueError(f"{name!r} cannot name an adapter; leave dots out of it")
    if name in Adapters(module).names:
        raise ValueError(f"there is an adapter {name!r} already; choose another name")
    if config.lora_dropout:
        raise ValueError(
            f"lora_dropout is {config.lora_dropout}; emlens runs models without dropout, so that "
            "a training can be repeated"
        )
    before = {
        id(layer): (list(layer.active_adapters), layer.disable_adapters)
        for _, layer in Adapters(module).parts()
    }
    with _undone_if_it_fails(module, name), kept_gradients(module):
        try:
            with _quiet():
                inject_adapter_in_model(config, module, adapter_name=name)
        except ValueError as error:
            raise ValueError(f"adapter {name!r} does not fit {model_name}: {error}") from error
        cast_adapter_dtype(module, name)
        for _, layer in Adapters(module).parts():
            active, disabled = before.get(id(layer), ([name], True))
            layer.set_adapter(active)
            layer.enable_adapters(not disabled)
        for path, weights in _products(module, name).items():
            a, b = (weights[part].shape for part in weights)
            if a[0] > min(a[1], b[0]):
                raise ValueError(
                    f"adapter {name!r} has rank {a[0]} at {path}, which maps {a[1]} dimensions to "
                    f"{b[0]}; the rank cannot be larger than either"
                )


def remove(module: nn.Module, name: str) -> None:
    """Take an adapter out of a model; where none is left, the base's own module is back."""
    for path, layer in list(Adapters(module).parts()):
        if name not in getattr(layer, "lora_A", {}):
            continue
        with _quiet():
            layer.delete_adapter(name)
        if not available(layer):
            parent, _, child = path.rpartition(".")
            setattr(module.get_submodule(parent), child, layer.get_base_layer())
    getattr(module, "peft_config", {}).pop(name, None)


def read_adapter(name: str, source: str) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Read the config and the weights of a LoRA adapter, by their names in the base model.

    Args:
        name: What errors call it.
        source: A folder or a hub name.

    Raises:
        FileNotFoundError: If there is no adapter.
        ValueError: If it is not LoRA, or its weights are truncated.
    """
    local = Path(source).expanduser()
    where: dict[str, Any] = {}
    if local.exists():
        source = str(local)
        if not (local / _FILE).is_file():
            inside = sorted(str(p.parent.relative_to(local)) for p in local.rglob(_FILE))
            hint = f"; there are some inside: {', '.join(inside[:3])}" if inside else ""
            raise FileNotFoundError(f"adapter {name!r}: {source} has no {_FILE}{hint}")
    elif source.count("/") > 1 and not source.startswith(("/", ".", "~")):
        owner, repository, where["subfolder"] = source.split("/", 2)
        source = f"{owner}/{repository}"
    try:
        config = PeftConfig.from_pretrained(source, **where)
        weights = load_peft_weights(source, device="cpu", **where)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"adapter {name!r}: found none at {source!r}, neither as a folder nor on the hub "
            f"({str(error).splitlines()[0]})"
        ) from error
    except SafetensorError as error:
        raise ValueError(
            f"adapter {name!r}: its weights in {source} are not readable ({error}); were they "
            "fetched as a whole?"
        ) from error
    if not isinstance(config, LoraConfig):
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise ValueError(f"adapter {name!r} is of the kind {kind}; emlens runs LoRA adapters")
    return config, {key.removeprefix(_PREFIX): value for key, value in weights.items()}


def _compare_bases(name: str, recorded: str | None, model_name: str) -> None:
    if recorded and _plain(recorded) != _plain(model_name):
        warnings.warn(
            f"adapter {name!r} records {recorded!r} as its base, but this model is "
            f"{model_name!r}; its effect is only that of its training on the same weights",
            stacklevel=4,
        )


def _plain(name: str) -> str:
    """A model's name without owner, case, and the marks of a quantised copy."""
    last = name.rstrip("/").rsplit("/", 1)[-1].lower()
    return last.removesuffix("-bnb-4bit").removesuffix("-unsloth")


def _check_shapes(module: nn.Module, name: str, state: dict[str, Tensor], base: str) -> None:
    for path, weights in _products(module, name).items():
        for part, weight in weights.items():
            kept = state.get(f"{path}.{part}.weight")
            if kept is not None and kept.shape != weight.shape:
                raise ValueError(
                    f"adapter {name!r} does not fit {base}: {part} at {path} is "
                    f"{list(kept.shape)}, this model and the adapter's rank need "
                    f"{list(weight.shape)}"
                )


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
def _undone_if_it_fails(module: nn.Module, name: str) -> Iterator[None]:
    """Take an adapter out again when it could not be attached."""
    before = dict(module.named_modules())
    config = getattr(module, "peft_config", None)
    configs = None if config is None else dict(config)
    try:
        yield
    except BaseException:
        for _, layer in list(Adapters(module).parts()):
            if name in getattr(layer, "lora_A", {}):
                with _quiet():
                    layer.delete_adapter(name)
        for path, part in before.items():
            if path and module.get_submodule(path) is not part:
                parent, _, child = path.rpartition(".")
                setattr(module.get_submodule(parent), child, part)
        if configs is None:
            if hasattr(module, "peft_config"):
                delattr(module, "peft_config")
        else:
            module.peft_config = configs  # type: ignore[assignment]
        raise
