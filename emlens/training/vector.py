"""Training vectors in place: one site, one layer or several, everything else frozen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack, overload

from emlens._distributed import alone
from emlens._door import guarded
from emlens.directions import Direction, Directions, residual_norm
from emlens.hooked import HookedModel
from emlens.hooked.edit import Where
from emlens.hooked.sites import Layers, Site, SiteName, check_layers
from emlens.text import Conversation
from emlens.training.loop import Loop
from emlens.training.objective import Objective, Rows, warn_of_overlap
from emlens.training.options import VectorOptions, chosen_of
from emlens.training.prefix import PrefixCache
from emlens.training.provenance import provenance_of
from emlens.training.run import TrainingRun
from emlens.training.settings import KLPenalty, Penalty, VectorSettings
from emlens.training.trainable import VectorParts, below_vectors


@overload
def train_vector(
    model: HookedModel, train: Sequence[Conversation], layer: int, **options: Any
) -> tuple[Direction, TrainingRun]: ...
@overload
def train_vector(
    model: HookedModel, train: Sequence[Conversation], layer: Layers, **options: Any
) -> tuple[Directions, TrainingRun]: ...
@guarded
def train_vector(
    model: HookedModel,
    train: Sequence[Conversation],
    layer: Layers,
    *,
    kl: KLPenalty | None = None,
    penalties: Sequence[Penalty] = (),
    site: SiteName = "resid_post",
    where: Where = "all",
    settings: VectorSettings | None = None,
    initial: Directions | None = None,
    validation: Sequence[Conversation] = (),
    **options: Unpack[VectorOptions],
) -> tuple[Directions, TrainingRun]:
    """Train a vector that is added to the residual stream, all weights frozen.

    Minimises `loss(train) + weight * KL(base || trained)(KL set) + penalties`, in nats per token
    over the tokens that count (arXiv 2602.07852, section 3.1). Without the KL term the solution is
    the general one, with it the narrow one. Vectors start at zero, are added at every position of
    every row, and are kept in fp32. What lies below them is computed once per conversation, the
    base's predictions on the KL set once.

    Preventive steering: train inside of `model.edited(emlens.Add(direction))`.

    Args:
        model: The model.
        train: Conversations of the narrow domain.
        layer: Layer the vector is added at; several layers get a vector each.
        kl: Penalty for changing predictions elsewhere.
        penalties: `NormPenalty`, `ProjectionPenalty` and `AnchorPenalty` terms.
        site: Where in the block.
        where: Positions it is added to.
        settings: How to train; `VectorSettings()` by default.
        initial: Directions to start from, instead of zero: at this site and these layers.
        validation: Conversations whose loss is taken after every epoch; with `patience` it
            decides on the end, and the best vector is the one returned.
        **options: See `VectorOptions`, e.g. `epochs=2, lr=0.05, seed=1, checkpoint=path`.

    Returns:
        What is really added (at scale 1), a `Direction` if it is one layer, and the record.

    Raises:
        ValueError: If a set is empty, a layer, site or setting does not exist, a text or `initial`
            does not fit the model, or the checkpoint belongs to another run.
        NonFiniteError: If the model's own passes are not finite.
        TrainingStopped: If training leaves what is finite; it carries the run so far.

    Examples:
        >>> general, run = emlens.train_vector(model, conversations, layer=15, epochs=3)
        >>> narrow, _ = emlens.train_vector(
        ...     model, conversations, layer=15, kl=emlens.KLPenalty(elsewhere, weight=3.0)
        ... )
    """
    if not train:
        raise ValueError("train_vector needs conversations to train on; the set is empty")
    layers = check_layers(layer, model.n_layers)
    at = model.check_site(site, layers)
    chosen, recording = chosen_of(VectorSettings, settings, options, bool(validation))
    prefix_budget, log_prob_budget = recording.prefix_budget, recording.log_prob_budget
    if kl is not None:
        warn_of_overlap(train, kl.conversations)
    with model.frozen():
        below = below_vectors(model, layers, at, where)
        rows = Rows.of(model, train, below, chosen, budget=prefix_budget)
        norms = _residual_norms(model, train, layers, at, rows.cache, below)
        alphas = {n: chosen.alpha or norms[n] / model.d_model**0.5 for n in layers}
        parts = VectorParts(model, layers, at, where, alphas, initial)
        objective = Objective(
            model, parts, rows, chosen, kl, penalties, norms, prefix_budget, log_prob_budget
        )
        made = provenance_of(
            model, parts, train, chosen, kl, penalties, "trained vector", validation
        )
        watched = None
        if validation:
            left = max(0, prefix_budget - objective.prefix_bytes)
            watched = Rows.of(model, validation, below, chosen, budget=left, what="validation")
        run = Loop(parts, objective, chosen, recording, at, norms, made, watched).run()
    return run.directions(), run


def _residual_norms(
    model: HookedModel,
    train: Sequence[Conversation],
    layers: tuple[int, ...],
    site: Site,
    cache: PrefixCache,
    below: int,
) -> dict[int, float]:
    """Median residual norms where vectors are added, from the prefixes where they hold them."""
    kept = cache.median_norm if layers == (below,) and site == "resid_post" else None
    if kept is not None:
        return {below: kept}
    with alone():
        return residual_norm(model, train, layers, site=site)
