"""Training weights, those of an adapter or the model's own: objective, loop and record."""

from __future__ import annotations

from collections.abc import Sequence

from emlens._distributed import alone
from emlens.directions import residual_norm
from emlens.hooked import HookedModel
from emlens.text import Conversation
from emlens.training.loop import Loop
from emlens.training.objective import Objective, Rows
from emlens.training.options import Recording
from emlens.training.provenance import provenance_of
from emlens.training.run import TrainingRun
from emlens.training.settings import KLPenalty, Penalty, TrainSettings
from emlens.training.trainable import Trainable


def fit(
    model: HookedModel,
    train: Sequence[Conversation],
    parts: Trainable,
    settings: TrainSettings,
    construction: str,
    kl: KLPenalty | None,
    penalties: Sequence[Penalty],
    validation: Sequence[Conversation],
    recording: Recording,
) -> TrainingRun:
    """Train what is not a vector, and return the record.

    Args:
        model: The model, frozen but for `parts`.
        train: Conversations of the narrow domain.
        parts: What is trained.
        settings: How.
        construction: What it is called in the provenance.
        kl: The KL penalty.
        penalties: Further penalties.
        validation: Conversations whose loss decides on an early stop.
        recording: What is kept.
    """
    budgets = recording.prefix_budget, recording.log_prob_budget
    rows = Rows.of(model, train, parts.below, settings, budget=budgets[0])
    layers = sorted({layer for layer, _ in parts.written()})
    norms: dict[int, float] = {}
    if layers and penalties:
        with alone():
            norms = residual_norm(model, train, layers)
    objective = Objective(model, parts, rows, settings, kl, penalties, norms, *budgets)
    made = provenance_of(model, parts, train, settings, kl, penalties, construction, validation)
    watched = None
    if validation:
        left = max(0, budgets[0] - objective.prefix_bytes)
        watched = Rows.of(model, validation, parts.below, settings, budget=left, what="validation")
    loop = Loop(parts, objective, settings, recording, None, norms, made, watched)
    return loop.run()
