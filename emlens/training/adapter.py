"""Training a LoRA adapter: PEFT's layers in the same objective and the same loop."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from emlens.hooked import HookedModel, check_layers
from emlens.text import Conversation
from emlens.training.fit import fit
from emlens.training.loop import Recording
from emlens.training.objective import warn_of_overlap
from emlens.training.prefix import LOG_PROB_BUDGET, PREFIX_BUDGET
from emlens.training.run import TrainingRun
from emlens.training.settings import AdapterSettings, KLPenalty, Penalty, given
from emlens.training.trainable import AdapterParts


def train_adapter(
    model: HookedModel,
    train: Sequence[Conversation],
    name: str,
    *,
    kl: KLPenalty | None = None,
    penalties: Sequence[Penalty] = (),
    settings: AdapterSettings | None = None,
    validation: Sequence[Conversation] = (),
    record_every: int | None = None,
    record_gradients: bool = False,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 20,
    prefix_budget: int = PREFIX_BUDGET,
    log_prob_budget: int = LOG_PROB_BUDGET,
    progress: bool = True,
    **overrides: Any,
) -> TrainingRun:
    """Train a LoRA adapter on a model; afterwards it is there, and `model.adapter(name)` is it.

    The objective and the loop are those of `train_vector`. An adapter that the model has already
    (from `emlens.load(adapters=...)`, or trained before) goes on from where it is. Weights of the
    base stay frozen, those of the adapter are fp32. Blocks below the first one adapted are
    computed once per conversation.

    The papers' rank-1 adapter: `layers=[24], modules=["down_proj"], rank=1, alpha=256`, rsLoRA.

    Args:
        model: The model; any adapter in force is set aside.
        train: Conversations of the narrow domain.
        name: What the adapter is called on the model.
        kl: Penalty for changing predictions elsewhere; the base is the model without adapters.
        penalties: `NormPenalty` and `ProjectionPenalty`, on the columns by which `down_proj` and
            `o_proj` write into the residual stream.
        settings: How to train; `AdapterSettings()` by default.
        validation: See `train_vector`.
        record_every: Updates between two records of `A` and `B`; None for start and end only.
        record_gradients: See `train_vector`.
        checkpoint: See `train_vector`.
        checkpoint_every: See `train_vector`.
        prefix_budget: See `train_vector`.
        log_prob_budget: See `train_vector`.
        progress: Show a progress bar with loss, KL and norm.
        **overrides: Fields of `AdapterSettings`, e.g. `rank=32, modules=("q_proj", "v_proj")`.

    Returns:
        The record of the run.

    Raises:
        ValueError: If a set is empty, or a module, layer, rank or setting does not fit. The model
            has no new adapter then.
        NotImplementedError: If a new adapter is asked for on a `TransformerBridge`.
        TrainingStopped: If a loss is not finite. The adapter keeps its last good state.

    Example:
        >>> run = emlens.train_adapter(model, conversations, "finance", layers=[15], epochs=3)
        >>> with model.adapter("finance"):
        ...     model.generate(questions)
    """
    if not train:
        raise ValueError("train_adapter needs conversations to train on; the set is empty")
    chosen = given(AdapterSettings, settings, overrides, bool(validation))
    if kl is not None:
        warn_of_overlap(train, kl.conversations)
    new = name not in model.adapters
    if new:
        _add(model, name, chosen)
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
                Recording(
                    every=record_every,
                    gradients=record_gradients,
                    checkpoint=None if checkpoint is None else Path(checkpoint),
                    checkpoint_every=checkpoint_every,
                ),
                (prefix_budget, log_prob_budget),
                progress,
            )
    except ValueError:
        if new:
            model.remove_adapter(name)
        raise


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
