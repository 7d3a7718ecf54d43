"""A hooked model as an ordinary `transformers` model: adapters merged, weights by their names."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from emlens.hooked.adapters import available

_AS_LLAMA = ("mistral", "qwen2")
"""Families that compute what Llama does, but for biases that they cannot have."""

_HELD = ("_original_component", "original_module")
"""Where TransformerLens and PEFT keep the module that theirs stands for."""


@torch.no_grad()
def plain_model(module: PreTrainedModel, adapters: Sequence[str] = ()) -> PreTrainedModel:
    """Return an ordinary model with the weights of a hooked one, some adapters merged into them.

    Weights that no adapter changes are shared, those that one changes are new. Input and output
    embedding are apart, even if the model ties them. The model is there to be saved, not run: its
    buffers without a place in a checkpoint are on the meta device.

    Args:
        module: The `...ForCausalLM` module, as an engine holds it.
        adapters: Names of the adapters, which are merged by PEFT.

    Raises:
        ValueError: If the weights are quantised or elsewhere, the class is not one of
            transformers, or an adapter cannot be merged.
    """
    kind, config = type(module), copy.deepcopy(module.config)
    if kind.__module__.partition(".")[0] != "transformers":
        raise ValueError(
            f"{kind.__name__} is not a class of transformers, so a checkpoint of it needs code of "
            "its own to be loaded; bake models that transformers loads by itself"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"the weights of {kind.__name__} are quantised, and edited weights would be rounded "
            "again; load the model with dtype='bfloat16' or 'float32' and quantise what is baked"
        )
    set_tied(config, False)
    empty = _empty(kind, config)
    merged = _Merged(adapters)
    state = {name: merged.weight(module, name) for name in empty.state_dict()}
    plain = _filled(empty, state, module)
    for name, weight in plain.named_parameters():
        if weight.is_meta or not weight.is_floating_point():
            where = "not in memory" if weight.is_meta else f"of dtype {weight.dtype}"
            raise ValueError(
                f"{name} is {where}; load the model as a whole, with weights in floating point"
            )
    return plain


def with_biases(plain: PreTrainedModel, needed: Collection[str]) -> PreTrainedModel:
    """Return the model with biases of zero where its architecture has none.

    Families with a switch for biases keep their architecture; Mistral and Qwen2 become Llama.

    Args:
        plain: The model.
        needed: Paths of the modules that need a bias.

    Raises:
        ValueError: If the architecture cannot have them, and the model is no Llama otherwise.
    """
    lacking = [path for path in needed if plain.get_submodule(path).bias is None]
    if not lacking:
        return plain
    config = copy.deepcopy(plain.config)
    for switch in ("mlp_bias", "attention_bias"):
        there = any(_of_attention(path) == (switch == "attention_bias") for path in lacking)
        if there and getattr(config, switch, None) is False:
            setattr(config, switch, True)
    empty = _empty(type(plain), config)
    if any(f"{path}.bias" not in empty.state_dict() for path in lacking):
        empty = _empty(LlamaForCausalLM, _llama_config(plain, lacking))
    state = dict(plain.state_dict())
    for name, weight in empty.state_dict().items():
        if name not in state:
            like = state[f"{name.removesuffix('.bias')}.weight"]
            state[name] = torch.zeros(weight.shape, dtype=like.dtype, device=like.device)
    return _filled(empty, state, plain)


def tie(plain: PreTrainedModel, tied: bool) -> None:
    """Tie input and output embedding again, if they were tied and are still the same."""
    embedding: Any = plain.get_input_embeddings()
    head: Any = plain.get_output_embeddings()
    if tied and head.bias is None and torch.equal(embedding.weight, head.weight):
        set_tied(plain.config, True)
        head.weight = embedding.weight


def set_tied(config: Any, tied: bool) -> None:
    """Say in a configuration, and in that of the text model inside, whether embeddings are tied."""
    for one in (config, config.get_text_config()):
        one.tie_word_embeddings = tied


def _of_attention(path: str) -> bool:
    return "att" in path.rsplit(".", 2)[-2]


def _empty(kind: type[PreTrainedModel], config: Any) -> PreTrainedModel:
    with torch.device("meta"):
        return kind(config).eval()


def _filled(
    empty: PreTrainedModel, state: Mapping[str, Tensor], like: PreTrainedModel
) -> PreTrainedModel:
    empty.load_state_dict(state, strict=True, assign=True)
    empty.config.dtype = next(iter(state.values())).dtype
    empty.generation_config = copy.deepcopy(like.generation_config)
    return empty


def _llama_config(plain: PreTrainedModel, lacking: Sequence[str]) -> LlamaConfig:
    """The configuration of a Llama that computes what a model does, and has all biases.

    Raises:
        ValueError: If there is none.
    """
    config = plain.config
    what = f"{config.model_type} has no bias at {lacking[0]}, and cannot be written as Llama"
    if config.model_type not in _AS_LLAMA:
        extra = sorted({name.split(".")[-2] for name in plain.state_dict() if "q_norm" in name})
        has = f" (Llama has no {extra[0]})" if extra else ""
        raise ValueError(f"{what}{has}; serve this edit with hooks, or ablate in its place")
    window = getattr(config, "sliding_window", None)
    slides = "sliding_attention" in (getattr(config, "layer_types", None) or ("sliding_attention",))
    if window is not None and slides and window < config.max_position_embeddings:
        raise ValueError(
            f"{what}: its attention slides over {window} of {config.max_position_embeddings} "
            "positions, which that of Llama does not; serve this edit with hooks"
        )
    known = config.to_dict()
    shared = {name: known[name] for name in LlamaConfig().to_dict() if name in known}
    for own in ("model_type", "architectures", "transformers_version"):
        shared.pop(own, None)
    heads = config.num_attention_heads
    shared["head_dim"] = getattr(config, "head_dim", None) or config.hidden_size // heads
    attention = any(name.endswith("q_proj.bias") for name in plain.state_dict())
    shared["attention_bias"] = attention or any(map(_of_attention, lacking))
    shared["mlp_bias"] = not all(map(_of_attention, lacking))
    return LlamaConfig(**shared)


class _Merged:
    """The modules of a model without those of engines and of PEFT, adapters merged."""

    def __init__(self, adapters: Sequence[str]) -> None:
        self._adapters = tuple(adapters)
        self._known: dict[int, nn.Module] = {}

    def weight(self, module: nn.Module, path: str) -> Tensor:
        *parents, name = path.split(".")
        part = self._own(module)
        for parent in parents:
            part = self._own(getattr(part, parent))
        return getattr(part, name).detach()

    def _own(self, part: nn.Module) -> nn.Module:
        if id(part) not in self._known:
            self._known[id(part)] = self._found(part)
        return self._known[id(part)]

    def _found(self, part: Any) -> nn.Module:
        inside = part.__dict__["_modules"]
        acting = [name for name in self._adapters if _acts(part, name)]
        if "modules_to_save" in inside and acting:
            return self._own(inside["modules_to_save"][acting[-1]])
        if "token_adapter" in inside:
            return self._own(inside["token_adapter"])
        if "base_layer" in inside:
            return _merged(part, acting) if acting else self._own(inside["base_layer"])
        held = next((inside[name] for name in _HELD if inside.get(name) is not None), None)
        return part if held is None else self._own(held)


def _acts(part: Any, name: str) -> bool:
    return hasattr(part, "adapter_layer_names") and name in available(part)


def _merged(layer: Any, adapters: Sequence[str]) -> nn.Module:
    """The module inside of a layer of PEFT, with adapters merged by PEFT into a copy of it."""
    base = copy.copy(layer.get_base_layer())
    weights = base.__dict__["_parameters"].items()
    base.__dict__["_parameters"] = {
        name: None if weight is None else nn.Parameter(weight.detach().clone(), requires_grad=False)
        for name, weight in weights
    }
    twin = copy.copy(layer)
    twin.__dict__["_modules"] = {**layer.__dict__["_modules"], "base_layer": base}
    twin.__dict__ |= {"merged_adapters": [], "_caches": {}}
    try:
        twin.merge(adapter_names=list(adapters))
    except RuntimeError as error:
        said = str(error).partition("\n")[0]
        raise ValueError(
            f"adapter {adapters[0]!r} cannot be merged into {type(base).__name__}: {said}"
        ) from error
    return base
