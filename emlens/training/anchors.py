"""The anchor penalty: what is likely of given answers stays where the base has it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from emlens.hooked import HookedModel
from emlens.hooked.losses import Targets, loss_sum
from emlens.text import Conversation, Pair, tokenize
from emlens.training.prefix import ROWS_AT_ONCE, PrefixCache, check_counted
from emlens.training.settings import AnchorPenalty, TrainSettings
from emlens.training.trainable import Trainable


class Anchors:
    """The data of one anchor penalty, with the base's scores.

    A score is the log-odds of a pair, or the log-probability of an answer, in nats per token.

    Args:
        model: The model; it has to be the base.
        trainable: What is trained.
        penalty: The penalty.
        settings: Batches and seed.
        place: Which of the penalties it is: it draws in its own order.
        budget: Bytes for prefixes.
        head: Weights of the LM head that are trained.
    """

    def __init__(
        self,
        model: HookedModel,
        trainable: Trainable,
        penalty: AnchorPenalty,
        settings: TrainSettings,
        place: int,
        budget: int,
        head: Sequence[Tensor] = (),
    ) -> None:
        self._model, self._trainable, self._head = model, trainable, head
        self._penalty = penalty
        self._size = penalty.batch_size or settings.batch_size
        self._at_once = self._size * settings.accumulate
        self._seed = [settings.seed, 2 + place]
        rows = tokenize(conversations_of(penalty), model.template)
        model.check_lengths(rows)
        check_counted(rows, "response", "the data of the anchor penalty")
        self._sides = 2 if isinstance(penalty.data[0], Pair) else 1
        self.cache = PrefixCache(model, rows, trainable.below, budget=budget)
        step = max(1, ROWS_AT_ONCE // self._sides)
        with torch.no_grad():
            parts = [
                self._scores(list(range(start, min(start + step, len(self)))), base=True)
                for start in range(0, len(self), step)
            ]
        self._base = torch.cat(parts)

    def __len__(self) -> int:
        return len(self.cache) // self._sides

    def draws(self, done: int = 0) -> Iterator[list[int]]:
        """The places of each update, shuffled anew whenever all have been drawn."""
        generator, n = np.random.default_rng(self._seed), 0
        while True:
            order = generator.permutation(len(self)).tolist()
            for start in range(0, len(order), self._at_once):
                n += 1
                if n > done:
                    yield order[start : start + self._at_once]

    def backward(self, places: Sequence[int]) -> Tensor:
        """Put the gradient of the penalty into the parameters; return its value."""
        values = []
        for start in range(0, len(places), self._size):
            part = list(places[start : start + self._size])
            change = self._scores(part) - self._base[part]
            value = self._penalty.weight * self._cost(change).sum() / len(places)
            value.backward()
            values.append(value.detach())
        return torch.stack(values).sum()

    def _cost(self, change: Tensor) -> Tensor:
        beyond = (change.abs() - self._penalty.margin).clamp(min=0)
        return beyond**2 if self._penalty.shape == "squared" else beyond

    def _scores(self, places: list[int], base: bool = False) -> Tensor:
        """The score of each pair or answer, fp64, with its gradient."""
        rows = [self._sides * place + side for place in places for side in range(self._sides)]
        batch, resume = self.cache.batch(rows)
        targets = Targets.of(batch, "response")
        counts = targets.counts(len(batch)).long().tolist()
        targets = targets.to(self._model.device)
        edits = () if base else self._trainable.edits()
        hidden = self._model.hidden(batch, edits, resume, grad=not base)
        states = targets.predictors(hidden)
        parts = zip(states.split(counts), targets.ids.split(counts), counts, strict=True)
        each = torch.stack(
            [-loss_sum(self._model, one, ids, self._head) / n for one, ids, n in parts]
        )
        if self._sides == 1:
            return each
        aligned, misaligned = each.reshape(-1, 2).unbind(1)
        return misaligned - aligned


def conversations_of(penalty: AnchorPenalty) -> list[Conversation]:
    """The conversations of a penalty: both sides of a pair, one after the other."""
    found: list[Conversation] = []
    for one in penalty.data:
        if isinstance(one, Pair):
            found += [one.conversation("aligned"), one.conversation("misaligned")]
        else:
            found.append(one)
    return found
