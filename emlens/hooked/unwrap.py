"""What people bring: bridges, nnsight models, PEFT models and plain ones, unwrapped."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in memory, as the engines take it.

    Attributes:
        module: The `...ForCausalLM` module.
        tokenizer: Its tokenizer, where the object had one.
        engine: The engine that the object is made for, or None for any.
        bridge: The `TransformerBridge` it came in, or None.
    """

    module: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None = None
    engine: str | None = None
    bridge: Any = None


def unwrap(model: object) -> LoadedModel:
    """Find the causal language model in what the user brings; nothing is copied or changed.

    Takes a `TransformerBridge`; nnsight's `TransformersModel` (`LanguageModel`, nnterp's
    `StandardizedTransformer`) and `NNsight`; a PEFT model; a `transformers` model.

    Raises:
        TypeError: If it is none of these.
        ValueError: If emlens cannot run it in this form.
    """
    kind = type(model).__name__
    if _is(model, "transformer_lens.model_bridge", "TransformerBridge"):
        return _of_bridge(model)
    if _is(model, "nnsight.modeling.vllm", "VLLM"):
        raise TypeError(
            "nnsight's VLLM keeps its weights in another process; give its model as a "
            "TransformersModel"
        )
    if _is(model, "nnsight.intervention.envoy", "Envoy"):
        return _of_nnsight(model)
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return unwrap(model.module)
    if isinstance(model, nn.Module):
        return LoadedModel(_bare(model), None)
    if isinstance(model, str):
        raise TypeError(f"cannot wrap a name; emlens.load({model!r}) loads a model by its name")
    raise TypeError(
        f"cannot wrap a {kind}; give a TransformerBridge, an nnsight or nnterp model, a PEFT "
        "model or a transformers causal language model"
    )


def own_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer of a bridge as the model has it: TransformerLens makes it prepend BOS.

    What the model's own does is in its files, which the bridge has loaded before; where they are
    gone the tokenizer is taken as it is, with a warning.
    """
    begins = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    if not begins or not tokenizer.init_kwargs.get("add_bos_token"):
        return tokenizer
    from transformers import AutoTokenizer

    try:
        own = AutoTokenizer.from_pretrained(tokenizer.name_or_path, local_files_only=True)
    except Exception:
        warnings.warn(
            f"TransformerLens makes tokenizers prepend BOS, and that of {tokenizer.name_or_path} "
            "cannot be loaded again to see whether it does so by itself; give wrap the model's own "
            "tokenizer",
            stacklevel=3,
        )
        return tokenizer
    return tokenizer if own("a").input_ids == tokenizer("a").input_ids else own


def check_weights_are_there(module: nn.Module, name: str) -> None:
    """Refuse a model on the meta device that nothing brings weights for.

    Raises:
        ValueError: Naming the first weight that is missing.
    """
    for owner in module.modules():
        if "_hf_hook" in owner.__dict__:
            continue
        for path, weight in owner.named_parameters(recurse=False):
            if weight.is_meta and not _is_brought_in(module, owner):
                raise ValueError(
                    f"{name} has no weights: {path} of {type(owner).__name__} is on the meta "
                    "device; load them with from_pretrained, or use emlens.load(..., remote=...)"
                )


def _is_brought_in(module: nn.Module, owner: nn.Module) -> bool:
    """Whether a hook of accelerate above a module brings its weights in."""
    above = (part for part in module.modules() if "_hf_hook" in part.__dict__)
    return any(owner is part for hooked in above for part in hooked.modules())


def shadow(module: PreTrainedModel) -> PreTrainedModel:
    """A second tree of modules over the very same weights, for the engines to put hooks on.

    TransformerLens swaps modules and sets eager attention in place, nnsight replaces `forward`;
    they do so to the shadow, and the user's model stays as it is. Parameters and buffers are
    shared, and so are accelerate's hooks, which own the weights that they bring in and out.
    """
    shared: dict[int, Any] = {id(tensor): tensor for tensor in module.parameters()}
    shared |= {id(tensor): tensor for tensor in module.buffers()}
    shared |= {id(state): state for state in _quantised_states(module)}
    # what a pass with a graph has left behind cannot be copied
    left = (value for part in module.modules() for value in part.__dict__.values())
    shared |= {
        id(value): value.detach()
        for value in left
        if isinstance(value, Tensor) and not value.is_leaf
    }
    offloading = [part.__dict__.get("_hf_hook") for part in module.modules()]
    shared |= {id(hook): hook for hook in offloading if hook is not None}
    return copy.deepcopy(module, shared)


def _quantised_states(module: nn.Module) -> Iterator[Any]:
    """What bitsandbytes keeps beside 8-bit weights, taken over from them as at a first pass.

    Its layers move it there when they first run, and a second tree of modules would take it away.
    """
    for part in module.modules():
        if type(part).__name__ != "Linear8bitLt" or not hasattr(part, "init_8bit_state"):
            continue
        layer: Any = part
        if getattr(layer.weight, "CB", None) is not None:
            layer.init_8bit_state()
        yield layer.state


def _of_bridge(bridge: Any) -> LoadedModel:
    if getattr(bridge, "compatibility_mode", False):
        raise ValueError(
            "this TransformerBridge is in compatibility mode: its weights may be folded and "
            "centred, so its residual stream is not the model's and directions would not fit "
            "any other engine; wrap the bridge before enable_compatibility_mode()"
        )
    try:
        module = bridge.original_model
    except AttributeError as error:
        raise ValueError(
            "this TransformerBridge has no model in this process; boot it with "
            "TransformerBridge.boot_transformers"
        ) from error
    return LoadedModel(module, bridge.tokenizer, "transformer_lens", bridge)


def _of_nnsight(model: Any) -> LoadedModel:
    if getattr(model, "dispatched", True) is False:
        # what nnsight does by itself at the first trace: until then there are no weights
        model.dispatch()
    return LoadedModel(_bare(model._module), getattr(model, "tokenizer", None), "nnsight")


def _bare(module: nn.Module) -> PreTrainedModel:
    """The `...ForCausalLM` inside of a PEFT model; any other module as it is."""
    if _is(module, "peft", "PeftModel"):
        wrapped: Any = module
        kinds = {config.peft_type.value: config for config in wrapped.peft_config.values()}
        for kind, config in kinds.items():
            if config.is_prompt_learning:
                raise ValueError(
                    f"this PEFT model uses {kind}, which works on the input and not on the "
                    "modules; emlens runs LoRA adapters"
                )
            if kind == "XLORA":
                raise ValueError(
                    "this PEFT model uses XLORA, which mixes its adapters anew for every token; "
                    "emlens runs LoRA adapters"
                )
        module = wrapped.get_base_model()
    _check_switches(module)
    for name, config in (getattr(module, "peft_config", None) or {}).items():
        from emlens.hooked.adapter_kinds import check_lora

        check_lora(module, name, config)
    return cast(PreTrainedModel, module)


def _check_switches(module: nn.Module) -> None:
    """Refuse parts of PEFT that would keep acting when the base is asked for."""
    if "peft" not in sys.modules:
        return
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    known: set[int] = set()
    for path, part in module.named_modules():
        if id(part) in known:
            continue
        if isinstance(part, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            layer: Any = part
            known |= {id(inner) for inner in layer.modules()}
        elif type(part).__module__.partition(".")[0] == "peft":
            raise ValueError(
                f"this model has an {type(part).__name__} of PEFT at {path}, which acts whatever "
                "adapter is asked for, the base included; emlens runs LoRA adapters"
            )


def _is(model: object, module: str, name: str) -> bool:
    """Whether `model` is of a class of a library, without importing it: then it cannot be."""
    kind = getattr(sys.modules.get(module), name, None)
    return isinstance(kind, type) and isinstance(model, kind)
