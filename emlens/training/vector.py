"""Training a vector in place: one site of one layer, everything else frozen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from math import ceil, isfinite

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from emlens._distributed import alone, leads
from emlens.directions import Direction, Provenance, residual_norm
from emlens.edits import Shift
from emlens.hooked import (
    HookedModel,
    SiteName,
    Targets,
    Where,
    check_layers,
    check_site,
    kl_sum,
    loss_sum,
)
from emlens.text import Conversation, TokenMask, content_hash, template_hash, tokenize
from emlens.training.prefix import LOG_PROB_BUDGET, PREFIX_BUDGET, BasePredictions, PrefixCache
from emlens.training.run import Step, TrainingRun, TrainingStopped, trajectory
from emlens.training.settings import KLPenalty, VectorSettings


def train_vector(
    model: HookedModel,
    train: Sequence[Conversation],
    layer: int,
    *,
    kl: KLPenalty | None = None,
    site: SiteName = "resid_post",
    where: Where = "all",
    settings: VectorSettings | None = None,
    initial: Direction | None = None,
    record_every: int = 1,
    prefix_budget: int = PREFIX_BUDGET,
    log_prob_budget: int = LOG_PROB_BUDGET,
    progress: bool = True,
    **overrides,
) -> tuple[Direction, TrainingRun]:
    """Train a vector that is added to the residual stream, all weights frozen.

    Minimises `loss(train) + weight * KL(base || trained)(KL set)`, both in nats per token over
    the tokens that count (arXiv 2602.07852, section 3.1). Without the KL term the solution is
    the general one, with it the narrow one. The vector starts at zero, is added at every
    position of every row, and is kept in fp32. What lies below it is computed once per
    conversation, the base's predictions on the KL set once.

    Args:
        model: The model.
        train: Conversations of the narrow domain.
        layer: Layer the vector is added at.
        kl: Penalty for changing predictions elsewhere.
        site: Where in the block.
        where: Positions it is added to.
        settings: How to train; `VectorSettings()` by default.
        initial: A direction to start from, instead of zero.
        record_every: Updates between two records of the path.
        prefix_budget: Bytes for prefixes; what does not fit is recomputed.
        log_prob_budget: Bytes for base log-probabilities; likewise.
        progress: Show a progress bar with loss, KL and norm.
        **overrides: Fields of `VectorSettings`, e.g. `epochs=2, lr=0.05, seed=1`.

    Returns:
        The trained direction (what is really added, at scale 1) and the record of the run.

    Raises:
        ValueError: If a set is empty, or a layer, site or setting does not exist.
        TrainingStopped: If a loss is not finite; it names the batch and carries the run so far.

    Example:
        >>> general, run = emlens.train_vector(model, conversations, layer=15, epochs=3)
        >>> narrow, _ = emlens.train_vector(
        ...     model, conversations, layer=15, kl=emlens.KLPenalty(elsewhere, weight=3.0)
        ... )
    """
    if not train:
        raise ValueError("train_vector needs conversations to train on; the set is empty")
    (layer,) = check_layers(layer, model.n_layers)
    site = check_site(site, model.sites, model.name, [layer])
    base = settings or VectorSettings()
    chosen = VectorSettings(**{**asdict(base), **overrides})
    place = Shift(torch.zeros(model.d_model), layer, site, where)
    trainer = _Trainer(model, train, kl, place, chosen, prefix_budget, log_prob_budget)
    with model.frozen():
        return trainer.run(initial, record_every, progress)


@dataclass
class _Objective:
    """One term of the loss: rows with their prefixes, drawn in a seeded order."""

    cache: PrefixCache
    batch_size: int
    tokens: TokenMask
    seed: int

    def draws(self) -> Iterator[list[int]]:
        """Batches of places, epoch after epoch, each shuffled anew; the last may be smaller."""
        generator = np.random.default_rng(self.seed)
        while True:
            order = generator.permutation(len(self.cache)).tolist()
            for start in range(0, len(order), self.batch_size):
                yield order[start : start + self.batch_size]


@dataclass
class _Penalty:
    """The KL term: its rows, the base's predictions on them, and its weight."""

    rows: _Objective
    base: BasePredictions
    weight: float


class _Trainer:
    """The state of one run, from tokens to the last update."""

    def __init__(
        self,
        model: HookedModel,
        train: Sequence[Conversation],
        kl: KLPenalty | None,
        place: Shift,
        settings: VectorSettings,
        prefix_budget: int,
        log_prob_budget: int,
    ) -> None:
        self.model, self.kl, self.place, self.settings = model, kl, place, settings
        below = model.prefix_layer([place])
        self._below = -1 if below is None else below
        self._prefix_budget = prefix_budget
        self.train = self._objective(train, settings.batch_size, settings.tokens, settings.seed)
        self.penalty = self._kl_term(kl, log_prob_budget) if kl else None
        self.size = self._residual_norm(train)
        self.alpha = settings.alpha or self.size / model.d_model**0.5
        self.provenance = self._provenance(train)

    def run(
        self, initial: Direction | None, record_every: int, progress: bool
    ) -> tuple[Direction, TrainingRun]:
        parameter = self._start(initial)
        optimiser = torch.optim.AdamW(
            [parameter], lr=self.settings.lr, weight_decay=self.settings.weight_decay
        )
        per_epoch = ceil(len(self.train.cache) / self.settings.batch_size)
        total = per_epoch * self.settings.epochs
        train = self.train.draws()
        elsewhere = self.penalty.rows.draws() if self.penalty else None
        steps: list[Step] = []
        records, at = [self._added(parameter)], [0]
        quiet = not (progress and leads())
        with tqdm(total=total, desc="training", unit="update", disable=quiet) as bar:
            for step in range(total):
                rate = self.settings.rate(step, total)
                optimiser.param_groups[0]["lr"] = rate
                optimiser.zero_grad()
                places = next(train)
                loss = self._backward_loss(parameter, places)
                divergence = None
                if self.penalty and elsewhere:
                    divergence = self._backward_kl(parameter, self.penalty, next(elsewhere))
                self._check(loss, divergence, places, steps, records, at)
                gradient = self._gradient_norm(parameter)
                optimiser.step()
                norm = float(self._added(parameter).norm())
                steps.append(Step(step, loss, divergence, norm, gradient, rate))
                if (step + 1) % record_every == 0 or step + 1 == total:
                    records.append(self._added(parameter))
                    at.append(step + 1)
                bar.set_postfix(_shown(loss, divergence, norm, norm / self.size))
                bar.update()
        run = self._record(steps, records, at)
        return run.direction(), run

    # -- the two terms ------------------------------------------------------------------------

    def _backward_loss(self, parameter: Tensor, places: list[int]) -> float:
        batch, resume = self.train.cache.batch(places)
        targets = Targets.of(batch, self.settings.tokens)
        hidden = self.model.hidden(batch, [self._shift(parameter)], resume, grad=True)
        total = loss_sum(self.model, targets.predictors(hidden), targets.ids)
        mean = total / len(targets)
        mean.backward()
        return float(mean.detach())

    def _backward_kl(self, parameter: Tensor, penalty: _Penalty, places: list[int]) -> float:
        batch, resume = penalty.rows.cache.batch(places)
        targets = Targets.of(batch, penalty.rows.tokens)
        hidden = self.model.hidden(batch, [self._shift(parameter)], resume, grad=True)
        total = kl_sum(self.model, penalty.base.of(places), targets.predictors(hidden))
        mean = total / len(targets)
        (mean * penalty.weight).backward()
        return float(mean.detach())

    # -- pieces -------------------------------------------------------------------------------

    def _objective(
        self, conversations: Sequence[Conversation], batch_size: int, tokens: TokenMask, seed: int
    ) -> _Objective:
        rows = tokenize(conversations, self.model.tokenizer)
        cache = PrefixCache(self.model, rows, self._below, budget=self._prefix_budget)
        return _Objective(cache, batch_size, tokens, seed)

    def _kl_term(self, kl: KLPenalty, log_prob_budget: int) -> _Penalty:
        self._prefix_budget = max(0, self._prefix_budget - self.train.cache.bytes)
        size = kl.batch_size or self.settings.batch_size
        rows = self._objective(kl.conversations, size, kl.tokens, self.settings.seed + 1)
        base = BasePredictions(self.model, rows.cache, kl.tokens, log_prob_budget)
        return _Penalty(rows, base, kl.weight)

    def _residual_norm(self, train: Sequence[Conversation]) -> float:
        """Median residual norm where the vector is added, from the prefixes where they hold it."""
        layer, site = self.place.layer, self.place.site
        kept = self.train.cache.median_norm
        if site == "resid_post" and self._below == layer and kept is not None:
            return kept
        with alone():
            return residual_norm(self.model, train, layer, site=site)[layer]

    def _start(self, initial: Direction | None) -> Tensor:
        start = torch.zeros(self.model.d_model)
        if initial is not None:
            if initial.d_model != self.model.d_model:
                raise ValueError(
                    f"the initial direction has width {initial.d_model}, the model has d_model "
                    f"{self.model.d_model}"
                )
            start = initial.vector / self.alpha
        return start.to(self.model.device).requires_grad_()

    def _shift(self, parameter: Tensor) -> Shift:
        return Shift(self.alpha * parameter, self.place.layer, self.place.site, self.place.where)

    def _added(self, parameter: Tensor) -> Tensor:
        return (self.alpha * parameter).detach().clone()

    def _gradient_norm(self, parameter: Tensor) -> float:
        limit = float("inf") if self.settings.clip is None else self.settings.clip
        return float(torch.nn.utils.clip_grad_norm_([parameter], limit))

    def _check(
        self,
        loss: float,
        divergence: float | None,
        places: list[int],
        steps: list[Step],
        records: list[Tensor],
        at: list[int],
    ) -> None:
        if isfinite(loss) and isfinite(divergence or 0.0):
            return
        names = ", ".join(self.train.cache.rows[place].name for place in places)
        raise TrainingStopped(
            f"update {len(steps)}: loss {loss}, KL {divergence} is not finite on the batch "
            f"{names}; try a smaller lr or fp32 weights. The run up to here is kept in .run",
            self._record(steps, records, at),
        )

    def _record(self, steps: list[Step], records: list[Tensor], at: list[int]) -> TrainingRun:
        return TrainingRun(
            settings=self.provenance.settings,
            steps=tuple(steps),
            path=trajectory(records),
            path_steps=tuple(at),
            layer=self.place.layer,
            site=self.place.site,
            residual_norm=self.size,
            provenance=self.provenance,
        )

    def _provenance(self, train: Sequence[Conversation]) -> Provenance:
        kl = self.kl
        penalty = {"weight": kl.weight, "tokens": kl.tokens} if kl else None
        data = {"train": content_hash(train)}
        n = {"train": len(train)}
        if kl:
            data["kl"], n["kl"] = content_hash(kl.conversations), len(kl.conversations)
        settings = {**asdict(self.settings), "alpha": self.alpha, "where": self.place.where}
        return Provenance(
            construction="trained vector, narrow (KL)" if kl else "trained vector, general",
            model=self.model.name,
            revision=self.model.revision,
            adapter=self.model.active_adapter,
            tokens=self.settings.tokens,
            data=data,
            template=template_hash(self.model.tokenizer),
            n=n,
            seed=self.settings.seed,
            settings={**settings, "kl": penalty},
        )


def _shown(loss: float, divergence: float | None, norm: float, dose: float) -> dict[str, str]:
    shown = {"loss": f"{loss:.3f}"}
    if divergence is not None:
        shown["KL"] = f"{divergence:.4f}"
    return {**shown, "norm": f"{norm:.1f}", "dose": f"{dose:.2f}"}
