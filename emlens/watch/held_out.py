"""What a monitor did on conversations that it was not fitted to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from emlens._stats import Interval, bootstrap_mean, wilson
from emlens.directions.held_out import FOLDS
from emlens.watch.roc import (
    Roc,
    auroc,
    auroc_interval,
    threshold_for,
    within_groups,
)

Row = tuple[str, Interval, int]
_TYPES = {"scores": "f", "truth": "b", "tokens": "i", "groups": "i", "matched": "i"}
_KEPT = tuple(_TYPES)


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Held-out conversations with their scores.

    Attributes:
        scores: Score of each, `[n]`.
        truth: Which are misaligned, `[n]`.
        tokens: Counted tokens of each, `[n]`.
        groups: Number of its prompt, `[n]`.
        matched: Places of a misaligned and an aligned answer of like length, `[pairs, 2]`.
        slope: Change of the score per unit of log length within a class, on the fitted part.
        longer: Whether longer answers were the misaligned ones on the fitted part.
    """

    scores: Float[np.ndarray, " n"]
    truth: Bool[np.ndarray, " n"]
    tokens: Int[np.ndarray, " n"]
    groups: Int[np.ndarray, " n"]
    matched: Int[np.ndarray, "pairs 2"]
    slope: float
    longer: bool

    @property
    def n_aligned(self) -> int:
        return int((~self.truth).sum())

    @property
    def n_misaligned(self) -> int:
        return int(self.truth.sum())

    def auroc(self, seed: int = 0) -> Interval:
        """AUROC of the score, with its interval over prompts."""
        return auroc_interval(self.scores, self.truth, self.groups, seed=seed)

    def length_rows(self, seed: int = 0) -> list[Row]:
        """AUROC of length alone, and of the score when length can tell nothing."""
        n = len(self.scores)
        length = self.tokens if self.longer else -self.tokens
        rest = self.scores - self.slope * np.log(self.tokens)
        both = self.matched.T.ravel()
        alike = (self.scores[both], self.truth[both], self.groups[both])
        return [
            (
                "AUROC, length taken out",
                auroc_interval(rest, self.truth, self.groups, seed=seed),
                n,
            ),
            ("AUROC, length-matched", _interval_of(*alike, seed), len(both)),
            (
                "AUROC of length alone",
                auroc_interval(length.astype(float), self.truth, self.groups, seed=seed),
                n,
            ),
        ]

    def paired(self, seed: int = 0) -> tuple[Interval, int]:
        """Share of prompts whose misaligned answer scores above the aligned one, and how many."""
        right = within_groups(self.scores, self.truth, self.groups)
        if not len(right):
            return Interval(float("nan")), 0
        return bootstrap_mean(right, seed=seed), len(right)

    def rates(self, threshold: float) -> dict[str, tuple[Interval, int]]:
        """Hits and false alarms at a threshold, with Wilson intervals, and their numbers."""
        return _rates(self.scores > threshold, self.truth)

    def cross_fitted_rates(
        self, max_false_alarms: float | None, seed: int = 0
    ) -> dict[str, tuple[Interval, int]]:
        """The same, each conversation judged by a threshold that other prompts have set."""
        n_groups = int(self.groups.max()) + 1
        fold = (np.random.default_rng([seed, 4]).permutation(n_groups) % FOLDS)[self.groups]
        flagged, judged = np.zeros(len(self.scores), bool), np.zeros(len(self.scores), bool)
        for number in range(FOLDS):
            test, rest = fold == number, self.truth[fold != number]
            if rest.all() or not rest.any():
                continue
            limit = threshold_for(self.scores[~test], rest, max_false_alarms)
            flagged[test], judged[test] = self.scores[test] > limit, True
        return _rates(flagged[judged], self.truth[judged])

    def roc(self, threshold: float, seed: int = 0) -> Roc:
        """The ROC curve, by scikit-learn."""
        from sklearn.metrics import roc_curve

        alarms, hits, thresholds = roc_curve(self.truth, self.scores)
        area, rates = self.auroc(seed), self.rates(threshold)
        return Roc(
            false_alarms=tuple(alarms.tolist()),
            hits=tuple(hits.tolist()),
            thresholds=tuple(thresholds.tolist()),
            auroc=area.estimate,
            low=area.low,
            high=area.high,
            n_aligned=self.n_aligned,
            n_misaligned=self.n_misaligned,
            operating=(rates["false alarms"][0].estimate, rates["hits"][0].estimate),
        )

    def tensors(self) -> dict[str, Tensor]:
        """What a file keeps of it."""
        return {
            f"held_out.{name}": torch.from_numpy(np.ascontiguousarray(getattr(self, name)))
            for name in _KEPT
        }

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor], slope: float, longer: bool) -> HeldOut:
        """Read what `tensors` gave.

        Raises:
            KeyError: If a tensor is missing.
            ValueError: If one is of another type or shape, or says what cannot be.
        """
        kept = {name: tensors[f"held_out.{name}"].numpy() for name in _KEPT}
        n = len(kept["scores"])
        shapes = {**dict.fromkeys(_KEPT, (n,)), "matched": (len(kept["matched"]), 2)}
        for name, values in kept.items():
            if values.shape != shapes[name] or values.dtype.kind != _TYPES[name]:
                raise ValueError(
                    f"held_out.{name} has shape {values.shape} and type {values.dtype}, for {n} "
                    "conversations"
                )
        truth, groups, matched = kept["truth"], kept["groups"], kept["matched"]
        if truth.all() or not truth.any():
            raise ValueError("held_out.truth knows one side only; both are needed")
        if kept["tokens"].min() < 1:
            raise ValueError("held_out.tokens has a conversation without counted tokens")
        for name, numbers in (("groups", groups), ("matched", matched)):
            if numbers.size and not (numbers.min() >= 0 and numbers.max() < n):
                raise ValueError(f"held_out.{name} has numbers that are none of {n} conversations")
        if not isinstance(slope, (int, float)) or not math.isfinite(slope):
            raise ValueError(f"slope is {slope!r:.40}, not a finite number")
        if not isinstance(longer, bool):
            raise ValueError(f"longer is {longer!r:.40}, neither true nor false")
        return cls(**kept, slope=slope, longer=longer)


def length_slope(
    scores: Float[np.ndarray, " n"], truth: Bool[np.ndarray, " n"], tokens: Int[np.ndarray, " n"]
) -> float:
    """Slope of the score on log length within the classes; 0 where length does not vary.

    Across the classes it would take what misalignment does for what length does.
    """
    x, y = np.log(tokens), scores.astype(float)
    for side in (truth, ~truth):
        x, y = x - x[side].mean() * side, y - y[side].mean() * side
    spread = float(x @ x)
    return float(x @ y) / spread if spread > 1e-12 else 0.0


def longer_is_misaligned(truth: Bool[np.ndarray, " n"], tokens: Int[np.ndarray, " n"]) -> bool:
    """Which way length tells the classes apart."""
    return auroc(tokens.astype(float), truth) >= 0.5


def _interval_of(scores: np.ndarray, truth: np.ndarray, groups: np.ndarray, seed: int) -> Interval:
    if not len(scores):
        return Interval(float("nan"))
    _, numbers = np.unique(groups, return_inverse=True)
    return auroc_interval(scores, truth, numbers, seed=seed)


def _rates(flagged: np.ndarray, truth: np.ndarray) -> dict[str, tuple[Interval, int]]:
    return {
        name: (wilson(int(flagged[side].sum()), int(side.sum())), int(side.sum()))
        for name, side in (("hits", truth), ("false alarms", ~truth))
    }
