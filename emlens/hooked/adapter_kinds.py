"""Which adapters emlens runs: what is refused by name and configuration, before it is built."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from emlens.hooked.adapter_files import check_kind
from emlens.hooked.adapters import Adapters

_PEFTS_WORDS = frozenset(
    {
        *LoraLayer.adapter_layer_names,
        *LoraLayer.other_param_names,
        "base_layer",
        "modules_to_save",
        "original_module",
        "token_adapter",
        "token_indices",
        "trainable_tokens_delta",
        "trainable_tokens_original",
    }
)
MERGE = "merge it into a model of its own with PEFT's merge_and_unload() and load that model"
"""What to do with an adapter that emlens does not run."""
_WITH_PEFT = "run it with PEFT itself"
_REFUSED = {
    "layer_replication": ("it repeats blocks of the base", MERGE),
    "kasa_config": ("KaSA cuts singular values out of the base's weights", MERGE),
    "alora_invocation_tokens": ("it acts only after certain tokens of each row", _WITH_PEFT),
    "arrow_config": ("it routes each token among other adapters", _WITH_PEFT),
    "monteclora_config": ("it draws new weights in every pass", _WITH_PEFT),
    "use_qalora": ("QALoRA pools the inputs of quantised modules", _WITH_PEFT),
    "megatron_config": ("it is for Megatron's parallel modules", _WITH_PEFT),
}
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "mica", "eva")
_OVERWRITING_STARTS = ("pissa", "olora", "corda", "lora_ga")


def check_name(module: nn.Module, name: str) -> None:
    """Refuse the name of a new adapter that the model or PEFT would mix up with something else.

    Raises:
        ValueError: If the name is taken, empty, has dots, or names a part of the model or a word
            of PEFT or PyTorch.
    """
    if not isinstance(name, str) or not name or "." in name:
        raise ValueError(f"{name!r} cannot name an adapter; give a name without dots")
    if name in Adapters(module).names:
        raise ValueError(f"there is an adapter {name!r} already; choose another name")
    parts = {word for path, _ in module.named_modules() for word in path.split(".")}
    parts |= {path.rpartition(".")[2] for path, _ in module.named_parameters()}
    parts |= {path.rpartition(".")[2] for path, _ in module.named_buffers()}
    if name in parts | _PEFTS_WORDS or any(
        hasattr(kind(), name) for kind in (nn.ModuleDict, nn.ParameterDict)
    ):
        raise ValueError(
            f"{name!r} cannot name an adapter, since a part of the model, or of PEFT's layers, is "
            "called so; choose another name"
        )


def check_config(module: nn.Module, name: str, config: LoraConfig) -> None:
    """Refuse an adapter that emlens could run only in part, or that would change the base.

    Args:
        module: The `...ForCausalLM` module that it is for.
        name: What errors call it.
        config: PEFT's configuration.

    Raises:
        ValueError: If it is no LoRA, rewrites weights of the base or shares them, is a variant
            that emlens does not run, or has a rank or `lora_alpha` that makes no sense.
    """
    check_kind(name, config)
    check_lora(module, name, config)
    check_alpha(name, config)
    _check_rank(module, name, config)


def check_lora(module: nn.Module, name: str, config: Any) -> None:
    """The part of `check_config` that holds for an adapter that is in a model already.

    Raises:
        ValueError: If it has changed the base, or is a variant that emlens does not run.
    """
    if not isinstance(config, LoraConfig):
        return
    for option, (reason, instead) in _REFUSED.items():
        if getattr(config, option, None):
            raise ValueError(
                f"adapter {name!r} has {option}, which emlens does not run: {reason}; {instead}"
            )
    for item in fields(config):
        variant = item.metadata.get("is_lora_variant") and item.name != "use_dora"
        if variant and getattr(config, item.name):
            raise ValueError(
                f"adapter {name!r} has {item.name}, a variant of LoRA that emlens does not run; "
                f"{_WITH_PEFT}"
            )
    _check_start(name, config.init_lora_weights)
    if config.bias != "none" and _has_bias(module):
        raise ValueError(
            f"adapter {name!r} has bias={config.bias!r}, which replaces biases of the base that "
            f"all conditions share; {MERGE}, or train one with bias='none'"
        )


def _check_start(name: str, start: Any) -> None:
    word = start.lower() if isinstance(start, str) else start
    if word in _PLAIN_STARTS:
        return
    if isinstance(word, str) and word.startswith(_OVERWRITING_STARTS):
        raise ValueError(
            f"adapter {name!r} has init_lora_weights={start!r}, which rewrites the weights of the "
            "base that all conditions share; convert it to plain LoRA with PEFT's "
            "save_pretrained(folder, path_initial_model_for_weight_conversion=...)"
        )
    what = "which quantises the weights of the base" if word == "loftq" else "unknown to emlens"
    raise ValueError(f"adapter {name!r} has init_lora_weights={start!r}, {what}; {MERGE}")


def _has_bias(module: nn.Module) -> bool:
    return any(
        path.endswith("bias") and ".lora_" not in path for path, _ in module.named_parameters()
    )


def check_alpha(name: str, config: LoraConfig) -> None:
    """Refuse a scale that is no number.

    Raises:
        ValueError: If it is not finite, or 0.
    """
    for alpha in (config.lora_alpha, *(config.alpha_pattern or {}).values()):
        number = isinstance(alpha, (int, float)) and not isinstance(alpha, bool)
        if not number or not math.isfinite(alpha) or alpha == 0:
            raise ValueError(
                f"adapter {name!r} has lora_alpha {alpha!r}; it has to be a finite number other "
                "than 0, for the adapter to do something"
            )


def _check_rank(module: nn.Module, name: str, config: LoraConfig) -> None:
    """Compare ranks with the modules they are for, while nothing has been allocated yet."""
    ranks = (config.r, *(config.rank_pattern or {}).values())
    for rank in ranks:
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise ValueError(f"adapter {name!r} has rank {rank!r}; a rank is a whole number from 1")
    for path, part in _targets(module, config):
        pattern = (p for p in config.rank_pattern or {} if re.match(rf"(.*\.)?({p})$", path))
        rank = (config.rank_pattern or {}).get(next(pattern, ""), config.r)
        check_rank(name, path, rank, *_sizes(part))
    largest = max(
        (min(sizes) for _, part in module.named_modules() if (sizes := _sizes(part))), default=0
    )
    if largest and max(ranks) > largest:
        raise ValueError(
            f"adapter {name!r} has rank {max(ranks)}; no module of the model allows more than "
            f"{largest}"
        )


def check_rank(name: str, path: str, rank: int, inputs: int = 0, outputs: int = 0) -> None:
    """Refuse a rank that a module does not have; sizes of 0 are not known.

    Raises:
        ValueError: If the rank is larger than inputs or outputs.
    """
    if inputs and outputs and rank > min(inputs, outputs):
        raise ValueError(
            f"adapter {name!r} has rank {rank} at {path}, which maps {inputs} dimensions to "
            f"{outputs}; the rank cannot be larger than either"
        )


def _targets(module: nn.Module, config: LoraConfig) -> Iterator[tuple[str, nn.Module]]:
    """The modules that an adapter names; those that PEFT has still to choose are left out."""
    named = config.target_modules
    if named is None or (isinstance(named, str) and named.lower() == "all-linear"):
        return
    for path, part in module.named_modules():
        if path and ".lora_" not in path and check_target_module_exists(config, path):
            yield path, part


def _sizes(part: Any) -> tuple[int, ...]:
    """Inputs and outputs of a linear module or an embedding, or of experts'; () of another."""
    base: Any = part.get_base_layer() if isinstance(part, LoraLayer) else part
    for names in (("in_features", "out_features"), ("num_embeddings", "embedding_dim")):
        inputs, outputs = (getattr(base, name, None) for name in names)
        if isinstance(inputs, int) and isinstance(outputs, int):
            return inputs, outputs
    matrices = [w.shape[-2:] for w in base.parameters(recurse=False) if w.ndim > 1]
    return tuple(max(matrices, key=min)) if matrices else ()
