"""Training a LoRA adapter in the same objective and loop, and random adapters as controls."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import fields, replace
from typing import Any, Unpack

import torch

from emlens._door import guarded
from emlens.hooked import HookedModel
from emlens.hooked.lora_scaling import Factors, adapter_factors
from emlens.hooked.sites import check_layers
from emlens.text import Conversation
from emlens.training.fit import fit
from emlens.training.objective import warn_of_overlap
from emlens.training.options import AdapterOptions, chosen_of
from emlens.training.run import TrainingRun, TrainingStopped
from emlens.training.settings import AdapterSettings, KLPenalty, Penalty
from emlens.training.trainable import AdapterParts


@guarded
def train_adapter(
    model: HookedModel,
    train: Sequence[Conversation],
    name: str,
    *,
    kl: KLPenalty | None = None,
    penalties: Sequence[Penalty] = (),
    settings: AdapterSettings | None = None,
    validation: Sequence[Conversation] = (),
    **options: Unpack[AdapterOptions],
) -> TrainingRun:
    """Train a LoRA adapter on a model; afterwards it is there, and `model.adapter(name)` is it.

    The objective and the loop are those of `train_vector`. An adapter that the model has already
    (from `emlens.load(adapters=...)`, or trained before) continues from its weights. Weights of the
    base stay frozen, those of the adapter are fp32. Blocks below the first one adapted are
    computed once per conversation.

    The papers' rank-1 adapter: `layers=[24], modules=["down_proj"], rank=1, alpha=256`, rsLoRA.

    Args:
        model: The model; any adapter in force is set aside.
        train: Conversations of the narrow domain.
        name: What the adapter is called on the model.
        kl: Penalty for changing predictions elsewhere; the base is the model without adapters.
        penalties: `NormPenalty` and `ProjectionPenalty`, on the columns by which `down_proj` and
            `o_proj` write into the residual stream; and `AnchorPenalty`.
        settings: How to train; `AdapterSettings()` by default.
        validation: See `train_vector`.
        **options: See `AdapterOptions`, e.g. `rank=32, modules=("q_proj", "v_proj")`.

    Returns:
        The record of the run.

    Raises:
        ValueError: If a set is empty, or a module, layer, rank or setting does not fit, as one
            that an adapter of that name does not have. After this and any other error but the
            last, the model has no new adapter.
        NotImplementedError: If a new adapter is asked for on a `TransformerBridge`.
        NonFiniteError: If the model's own passes are not finite.
        TrainingStopped: If training leaves what is finite. The adapter keeps its last good state.

    Examples:
        >>> run = emlens.train_adapter(model, conversations, "finance", layers=[15], epochs=3)
        >>> with model.adapter("finance"):
        ...     model.generate(questions)
    """
    if not train:
        raise ValueError("train_adapter needs conversations to train on; the set is empty")
    chosen, recording = chosen_of(
        AdapterSettings, settings, {"record_every": None, **options}, bool(validation)
    )
    if kl is not None:
        warn_of_overlap(train, kl.conversations)
    new = name not in model.adapters
    if new:
        _add(model, name, chosen)
    else:
        asked = {item.name for item in fields(chosen)} if settings else set(options)
        chosen = _as_it_stands(model, name, chosen, asked)
    try:
        with model.frozen(), model.adapter(None):
            return fit(
                model,
                train,
                AdapterParts(model, name),
                chosen,
                "trained adapter",
                kl,
                penalties,
                validation,
                recording,
            )
    except TrainingStopped:
        raise
    except BaseException:  # half trained, it would be trained on by the same call
        if new:
            model.remove_adapter(name)
        raise


def _as_it_stands(
    model: HookedModel, name: str, settings: AdapterSettings, asked: Collection[str]
) -> AdapterSettings:
    """Settings with the shape of an adapter that already exists.

    Raises:
        ValueError: If another shape was asked for.
    """
    configs: Any = getattr(model.module, "peft_config", {})
    config, paths = configs.get(name), list(model.lora_layers(name))
    blocks = {layer for path in paths if (layer := model.architecture.layer_of(path)) is not None}
    standing: dict[str, Any] = {
        "layers": tuple(sorted(blocks)),
        "modules": tuple(dict.fromkeys(path.rpartition(".")[2] for path in paths)),
    }
    if config is not None:
        standing |= {"rank": config.r, "alpha": config.lora_alpha, "rslora": config.use_rslora}
    layers = range(model.n_layers) if settings.layers is None else settings.layers
    wanted = {"layers": tuple(sorted(check_layers(list(layers), model.n_layers)))}
    for field_name, value in standing.items():
        ours: Any = wanted.get(field_name, getattr(settings, field_name))
        same = _named_by(paths, ours) if field_name == "modules" else ours == value
        if field_name in asked and not same:
            raise ValueError(
                f"adapter {name!r} already exists, with {field_name} {value}, and {ours} was "
                "asked for; train it on as it is, or give a new one another name"
            )
    return replace(settings, **standing)


def _named_by(paths: Sequence[str], names: Collection[str]) -> bool:
    """Whether names, or ends of paths, name all of some modules, and nothing besides."""
    found = {n: {path for path in paths if f".{path}".endswith(f".{n}")} for n in names}
    return all(found.values()) and set().union(*found.values()) == set(paths)


def _add(model: HookedModel, name: str, settings: AdapterSettings) -> None:
    # importing PEFT takes seconds
    from peft import LoraConfig

    layers = None
    if settings.layers is not None:
        layers = list(check_layers(list(settings.layers), model.n_layers))
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]
        use_rslora=settings.rslora,
        target_modules=list(settings.modules),
        layers_to_transform=layers,
        layers_pattern=model.architecture.blocks.rpartition(".")[2] if layers else None,
        base_model_name_or_path=model.name,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        model.add_adapter(name, config)


@guarded
def random_adapter(model: HookedModel, like: str, name: str = "random", seed: int = 0) -> str:
    """Put a random adapter onto the model, beside the one that it is a control for.

    It has the same `A` and scale in every module, and a Gaussian `B` with which
    `||scale * B A||_F` of that module is the same. So it reads what the other one reads, is as
    large, and writes at random. `measures.match_kl` gives the strength of equal KL.

    Args:
        model: A model with adapters.
        like: The adapter that it is a control for.
        name: What the new one is called.
        seed: Seed of `B`.

    Returns:
        Its name: a condition for measures.

    Raises:
        ValueError: If there is no adapter `like`, it is not plain LoRA or changes nothing, or the
            name is taken.

    Examples:
        >>> chance = emlens.training.random_adapter(model, "general")
        >>> emlens.log_odds(model, pairs, {"base": None, "general": "general", "random": chance})
    """
    factors = adapter_factors(model, like)
    configs: Any = model.module.peft_config
    generator = torch.Generator().manual_seed(seed)
    weights = dict(model.adapter_weights(like))
    for path in sorted(factors):
        weights[f"{path}.lora_B.weight"] = _drawn(factors[path], generator)
    model.add_adapter(name, configs[like], weights)
    return name


def _drawn(one: Factors, generator: torch.Generator) -> torch.Tensor:
    """A random `B` of the norm that the product with `A` has."""
    drawn = torch.randn(one.b.shape, generator=generator).to(one.b.device)
    size = Factors(one.layer, one.a, drawn, one.scale).norm
    return drawn * (one.norm / size if size else 0.0)
