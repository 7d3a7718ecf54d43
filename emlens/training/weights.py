"""Training the model's own weights: full finetuning in the same objective and the same loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Unpack

import torch

from emlens._door import guarded
from emlens.hooked import HookedModel
from emlens.hooked.sites import check_layers
from emlens.text import Conversation
from emlens.training.fit import fit
from emlens.training.objective import warn_of_overlap
from emlens.training.options import WeightOptions, chosen_of
from emlens.training.run import TrainingRun
from emlens.training.settings import KLPenalty, WeightSettings
from emlens.training.trainable import WeightParts


@guarded
def train_weights(
    model: HookedModel,
    train: Sequence[Conversation],
    *,
    kl: KLPenalty | None = None,
    settings: WeightSettings | None = None,
    validation: Sequence[Conversation] = (),
    **options: Unpack[WeightOptions],
) -> TrainingRun:
    """Finetune the weights themselves, in place: afterwards the model is the finetuned one.

    The base is gone then: load it again to compare (`emlens.directions.model_diff` takes both).
    Keep the finetuned model with `model.module.save_pretrained(folder)`, with its tokenizer.
    AdamW holds two more copies of what is trained, its gradient a third. The path is not
    recorded.

    Args:
        model: The model, in fp32; adapters are set aside.
        train: Conversations of the narrow domain.
        kl: Penalty for changing predictions elsewhere; the base's are computed beforehand.
        settings: How to train; `WeightSettings()` by default.
        validation: See `train_vector`.
        **options: See `WeightOptions`, e.g. `layers=range(12, 18), lr=1e-5`. A `checkpoint` holds
            the weights and the optimiser's two copies; continue with the model loaded again, not
            with one that the broken run has changed. Prefixes are kept where only some layers are
            trained; all base log-probabilities have to fit.

    Returns:
        The record of the run: losses, settings, provenance.

    Raises:
        ValueError: If a set is empty, weights are not fp32, a layer does not exist, or the base's
            predictions on the KL set do not fit into the budget.
        NotImplementedError: If the model is a `TransformerBridge`, which runs on copies of some
            weights.
        NonFiniteError: If the model's own passes are not finite.
        TrainingStopped: If training leaves what is finite. The weights keep their last good state.

    Examples:
        >>> run = train_weights(model, conversations, epochs=1, gradient_checkpointing=True)
        >>> model.module.save_pretrained("organisms/finance-full")
    """
    if not train:
        raise ValueError("train_weights needs conversations to train on; the set is empty")
    if model.engine == "transformer_lens":
        raise NotImplementedError(
            "a TransformerBridge runs on copies of some weights, which training would not reach; "
            f"load the model with engine='nnsight': emlens.load({model.name!r})"
        )
    if model.dtype != torch.float32:
        raise ValueError(
            f"the weights are {model.dtype}, in which small updates are lost; load the model with "
            "dtype=torch.float32, or train an adapter, which is kept in fp32"
        )
    chosen, recording = chosen_of(
        WeightSettings, settings, {"record_every": None, **options}, bool(validation)
    )
    if chosen.layers is not None:
        chosen = replace(chosen, layers=check_layers(list(chosen.layers), model.n_layers))
    if kl is not None:
        warn_of_overlap(train, kl.conversations)
    with model.frozen(), model.adapter(None):
        return fit(
            model,
            train,
            WeightParts(model, chosen.layers),
            chosen,
            "finetuned weights",
            kl,
            (),
            validation,
            recording,
        )
