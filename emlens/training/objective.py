"""The objective: loss on the training set, KL elsewhere, and further penalties."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import ceil

import numpy as np
import torch
from torch import Tensor

from emlens.directions.fits import check_fits
from emlens.hooked import HookedModel
from emlens.hooked.finite import late_checks
from emlens.hooked.losses import Targets, kl_sum, loss_sum
from emlens.hooked.recompute import gradient_checkpointing
from emlens.text import Conversation, TokenMask, tokenize
from emlens.text.conversation import content_hash
from emlens.training.anchors import Anchors
from emlens.training.prefix import BasePredictions, PrefixCache, check_counted
from emlens.training.settings import (
    AnchorPenalty,
    KLPenalty,
    NormPenalty,
    Penalty,
    ProjectionPenalty,
    TrainSettings,
)
from emlens.training.trainable import Trainable

Term = Callable[["Rows", list[int]], tuple[Tensor, int]]
"""A sum over the tokens of some rows, and how many those are."""


@dataclass(frozen=True, slots=True)
class Losses:
    """The terms of one update, before it: nats per token."""

    loss: float
    kl: float | None
    penalty: float | None


@dataclass(frozen=True, slots=True)
class Draw:
    """What one update sees, by places: of the training set, the KL set, and each anchor's data."""

    train: list[int]
    kl: list[int]
    anchors: list[list[int]]


@dataclass
class Rows:
    """Conversations with their prefixes, drawn in a seeded order."""

    cache: PrefixCache
    batch_size: int
    accumulate: int
    tokens: TokenMask
    seed: int

    @classmethod
    def of(
        cls,
        model: HookedModel,
        conversations: Sequence[Conversation],
        below: int,
        settings: TrainSettings,
        *,
        budget: int,
        tokens: TokenMask | None = None,
        batch_size: int | None = None,
        seed: int | None = None,
        what: str = "train",
    ) -> Rows:
        """Tokenise conversations and compute their prefixes, under what is in force.

        Raises:
            ValueError: If a conversation has no token that counts (how many, and the first ones),
                or one is longer than the model's positions.
        """
        rows, counted = tokenize(conversations, model.template), tokens or settings.tokens
        model.check_lengths(rows)
        check_counted(rows, counted, what)
        return cls(
            PrefixCache(model, rows, below, budget=budget),
            batch_size or settings.batch_size,
            settings.accumulate,
            counted,
            settings.seed if seed is None else seed,
        )

    @property
    def per_epoch(self) -> int:
        """Updates of one epoch."""
        return ceil(len(self.cache) / (self.batch_size * self.accumulate))

    def draws(self, done: int = 0) -> Iterator[list[int]]:
        """The places of each update, epoch after epoch, each shuffled anew; the last may be fewer.

        Args:
            done: Updates that are over.
        """
        generator, n = np.random.default_rng(self.seed), 0
        while True:
            order = generator.permutation(len(self.cache)).tolist()
            for start in range(0, len(order), self.batch_size * self.accumulate):
                n += 1
                if n > done:
                    yield order[start : start + self.batch_size * self.accumulate]

    def passes(self, places: Sequence[int]) -> list[list[int]]:
        """The places of each forward pass of an update."""
        size = self.batch_size
        return [list(places[start : start + size]) for start in range(0, len(places), size)]

    def counted(self, places: Sequence[int]) -> int:
        """Tokens that count among some rows; the first of a row is never predicted."""
        return sum(len(Targets.of(self.cache.tokens([place]), self.tokens)) for place in places)


class Objective:
    """`loss(train) + weight * KL(base || trained)(KL set) + penalties`, all in nats per token.

    Args:
        model: The model.
        trainable: What is trained; the base is taken while it rests.
        train: Rows of the narrow domain.
        settings: Batches, tokens and seed.
        kl: The KL penalty.
        penalties: Further penalties.
        residual_norms: Median residual norm by layer, the unit of sizes.
        prefix_budget: Bytes for prefixes.
        log_prob_budget: Bytes for the base's log-probabilities.
    """

    def __init__(
        self,
        model: HookedModel,
        trainable: Trainable,
        train: Rows,
        settings: TrainSettings,
        kl: KLPenalty | None,
        penalties: Sequence[Penalty],
        residual_norms: Mapping[int, float],
        prefix_budget: int,
        log_prob_budget: int,
    ) -> None:
        self._model, self._trainable = model, trainable
        self._head = _trained_head(model, trainable)
        self._checkpointing = settings.gradient_checkpointing
        on_written = [one for one in penalties if not isinstance(one, AnchorPenalty)]
        self._penalties, self._norms = on_written, dict(residual_norms)
        self._kl = kl
        _check_penalties(model, on_written, trainable)
        self.train = train
        self.elsewhere: Rows | None = None
        self.anchors: list[Anchors] = []
        for i, one in enumerate(penalties):
            if isinstance(one, AnchorPenalty):
                left = max(0, prefix_budget - self.prefix_bytes)
                with trainable.resting():
                    made = Anchors(model, trainable, one, settings, i, left, self._head)
                self.anchors.append(made)
        if kl is None:
            return
        with trainable.resting():
            self.elsewhere = Rows.of(
                model,
                kl.conversations,
                trainable.below,
                settings,
                budget=max(0, prefix_budget - self.prefix_bytes),
                tokens=kl.tokens,
                batch_size=kl.batch_size or settings.batch_size,
                seed=settings.seed + 1,
                what="conversations of the KL penalty",
            )
            self._base = BasePredictions(model, self.elsewhere.cache, kl.tokens, log_prob_budget)
        if not trainable.keeps_base and not self._base.held:
            raise ValueError(
                f"the base's log-probabilities on the KL set take {self._base.bytes / 2**30:.2f} "
                f"GiB, more than log_prob_budget ({log_prob_budget / 2**30:.2f} GiB); training the "
                "weights changes the base, so they cannot be computed later: raise the budget, or "
                "take a smaller KL set"
            )

    @property
    def prefix_bytes(self) -> int:
        """Bytes that the prefixes of all sets take."""
        sets = [self.train, *([self.elsewhere] if self.elsewhere else []), *self.anchors]
        return sum(one.cache.bytes for one in sets)

    def computing(self) -> AbstractContextManager:
        """Context in which gradients are taken.

        Raises:
            ValueError: If gradient checkpointing is asked for and an edit acts inside of a block.
        """
        if not self._checkpointing:
            return nullcontext()
        return gradient_checkpointing(self._model, self._trainable.edits())

    def draws(self, done: int = 0) -> Iterator[Draw]:
        """What each update sees.

        Args:
            done: Updates that are over.
        """
        train = self.train.draws(done)
        elsewhere = self.elsewhere.draws(done) if self.elsewhere else None
        anchors = [one.draws(done) for one in self.anchors]
        while True:
            kl = next(elsewhere) if elsewhere else []
            yield Draw(next(train), kl, [next(one) for one in anchors])

    def backward(self, drawn: Draw) -> Losses:
        """Put the gradient of one update into the parameters; return the terms."""
        terms: dict[str, Tensor] = {}
        with late_checks():
            terms["loss"] = self._over_passes(self.train, drawn.train, self._loss)
            if self._kl is not None and self.elsewhere is not None:
                weight = self._kl.weight
                terms["kl"] = self._over_passes(self.elsewhere, drawn.kl, self._divergence, weight)
            costs = [self._backward_penalties()] if self._penalties else []
            for anchors, places in zip(self.anchors, drawn.anchors, strict=True):
                costs.append(anchors.backward(places).to(terms["loss"].device))
            if costs:
                home = costs[-1].device
                terms["penalty"] = torch.stack([one.to(home, torch.float64) for one in costs]).sum()
        home = terms["loss"].device
        values = torch.stack([term.to(home, torch.float64) for term in terms.values()]).tolist()
        found = dict(zip(terms, values, strict=True))
        return Losses(found["loss"], found.get("kl"), found.get("penalty"))

    def evaluate(self, rows: Rows) -> float:
        """Loss on other rows, nats per token."""
        sums, count = [], 0
        with torch.no_grad(), late_checks():
            for places in rows.passes(range(len(rows.cache))):
                total, n = self._loss(rows, places, grad=False)
                sums.append(total.double())
                count += n
        return float(torch.stack(sums).sum()) / count

    # -- the terms ----------------------------------------------------------------------------

    def _over_passes(
        self, rows: Rows, places: Sequence[int], term: Term, weight: float = 1.0
    ) -> Tensor:
        passes = rows.passes(places)
        whole = rows.counted(places) if len(passes) > 1 else None
        values = []
        for part in passes:
            total, n = term(rows, part)
            mean = total / (whole or n)
            (mean * weight).backward()
            values.append(mean.detach().double())
        return torch.stack(values).sum()

    def _loss(self, rows: Rows, places: list[int], grad: bool = True) -> tuple[Tensor, int]:
        targets, states = self._predictors(rows, places, grad)
        return loss_sum(self._model, states, targets.ids, self._head), len(targets)

    def _divergence(self, rows: Rows, places: list[int]) -> tuple[Tensor, int]:
        targets, states = self._predictors(rows, places, True)
        return kl_sum(self._model, self._base.of(places), states, self._head), len(targets)

    def _predictors(self, rows: Rows, places: list[int], grad: bool) -> tuple[Targets, Tensor]:
        batch, resume = rows.cache.batch(places)
        targets = Targets.of(batch, rows.tokens).to(self._model.device)
        hidden = self._model.hidden(batch, self._trainable.edits(), resume, grad=grad)
        return targets, targets.predictors(hidden)

    def _backward_penalties(self) -> Tensor:
        terms = []
        for layer, vector in self._trainable.written():
            for penalty in self._penalties:
                if isinstance(penalty, NormPenalty):
                    size = (vector / self._norms[layer]) ** 2
                    terms.append(penalty.weight * size.sum())
                elif isinstance(penalty, ProjectionPenalty) and layer in penalty.directions:
                    axis = penalty.directions[layer].unit().vector.to(vector.device)
                    terms.append(penalty.weight * (vector @ axis / self._norms[layer]) ** 2)
        total = torch.stack(terms).sum()
        total.backward()
        return total.detach()


def _trained_head(model: HookedModel, trainable: Trainable) -> list[Tensor]:
    trained = {id(weight) for weight in trainable.parameters.values()}
    head = model.module.get_output_embeddings()
    return [weight for weight in head.parameters() if id(weight) in trained] if head else []


def _check_penalties(
    model: HookedModel, penalties: Sequence[Penalty], trainable: Trainable
) -> None:
    layers = sorted({layer for layer, _ in trainable.written()})
    if penalties and not layers:
        raise ValueError(
            "penalties act on what is written into the residual stream, and none of the adapted "
            "modules writes into it; adapt down_proj or o_proj, or leave penalties out"
        )
    for penalty in penalties:
        if not isinstance(penalty, ProjectionPenalty):
            continue
        check_fits(model, penalty.directions, "the penalty's direction")
        if not any(layer in penalty.directions for layer in layers):
            raise ValueError(
                f"the penalty's directions have layers {penalty.directions.layers}, but what is "
                f"trained writes at {tuple(layers)}"
            )


def warn_of_overlap(train: Sequence[Conversation], elsewhere: Sequence[Conversation]) -> None:
    """Warn of conversations that are trained on and protected at once."""
    known = {content_hash([item]) for item in train}
    shared = sum(content_hash([item]) in known for item in elsewhere)
    if shared:
        warnings.warn(
            f"{shared} of the {len(elsewhere)} conversations of the KL set are in the training "
            "set as well: the penalty forbids there what the loss asks for",
            stacklevel=4,
        )
