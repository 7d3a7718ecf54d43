"""Held-out conversations of a monitor: scores, rates, ROC and length."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from emlens._stats import Interval, share_of_units
from emlens.directions.held_out import FOLDS
from emlens.watch.roc import (
    Roc,
    auroc,
    auroc_interval,
    promise,
    threshold_for,
    within_groups,
)

Row = tuple[str, Interval, int]
_TYPES = {"scores": "f", "truth": "b", "tokens": "i", "groups": "i", "matched": "i"}
_KEPT = tuple(_TYPES)


@dataclass(frozen=True, eq=False)
class Aligned:
    """Aligned conversations on which a threshold is set.

    Attributes:
        scores: Score of each, `[n]`.
        groups: Number of its prompt, `[n]`.
    """

    scores: Float[np.ndarray, " n"]
    groups: Int[np.ndarray, " n"]

    def threshold(self, max_false_alarms: float) -> float:
        return threshold_for(
            self.scores, np.zeros(len(self.scores), bool), self.groups, max_false_alarms
        )

    def promise(self, threshold: float) -> Interval:
        return promise(self.scores, self.groups, threshold)

    def tensors(self) -> dict[str, Tensor]:
        """Tensors to write to a file."""
        return {f"calibration.{name}": torch.from_numpy(part) for name, part in vars(self).items()}

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor]) -> Aligned | None:
        """Read the tensors of a file; None if there are none.

        Raises:
            ValueError: If their lengths or types do not match.
        """
        kept = {key: tensors.get(f"calibration.{key}") for key in ("scores", "groups")}
        if kept["scores"] is None or kept["groups"] is None:
            return None
        found = {key: one.numpy() for key, one in kept.items() if one is not None}
        shapes = {one.shape for one in found.values()}
        kinds = found["scores"].dtype.kind + found["groups"].dtype.kind
        if len(shapes) > 1 or found["scores"].ndim != 1 or kinds != "fi":
            raise ValueError(f"calibration has shapes {sorted(shapes)} and types {kinds}, not fi")
        return cls(**found)

    def rule(self, max_false_alarms: float, named: str) -> str:
        """The rule of a threshold in words; warns if there are too few conversations for it."""
        found = self.promise(self.threshold(max_false_alarms)).estimate
        n = len(np.unique(self.groups))
        if found <= max_false_alarms + 1e-9:
            return (
                f"at most {max_false_alarms:.1%} false alarms of new conversations, by {n} {named}"
            )
        said = f"the highest score of {n} {named}, which promises {found:.1%} false alarms"
        if max_false_alarms:
            need = math.ceil(1 / max_false_alarms - 1 - 1e-9)
            warnings.warn(
                f"the threshold is {said}; {max_false_alarms:.1%} needs {need}: give more "
                "conversations, or a larger max_false_alarms",
                stacklevel=4,
            )
        return said


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Held-out conversations with their scores.

    Attributes:
        scores: Score of each, `[n]`.
        truth: Which are misaligned, `[n]`.
        tokens: Counted tokens of each, `[n]`.
        groups: Number of its prompt, `[n]`.
        matched: Indices of a misaligned and an aligned answer of similar length, `[pairs, 2]`.
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

    @property
    def aligned(self) -> Aligned:
        """The aligned conversations."""
        return Aligned(self.scores[~self.truth], self.groups[~self.truth])

    def auroc(self) -> Interval:
        """AUROC of the score, with its interval over prompts."""
        return auroc_interval(self.scores, self.truth, self.groups)

    def length_rows(self) -> list[Row]:
        """AUROC of length alone, and of the score at matched length."""
        n = len(self.scores)
        length = self.tokens if self.longer else -self.tokens
        rest = self.scores - self.slope * np.log(self.tokens)
        both = self.matched.T.ravel()
        alike = (self.scores[both], self.truth[both], self.groups[both])
        return [
            ("AUROC, length taken out", auroc_interval(rest, self.truth, self.groups), n),
            ("AUROC, length-matched", auroc_interval(*alike), len(both)),
            (
                "AUROC of length alone",
                auroc_interval(length.astype(float), self.truth, self.groups),
                n,
            ),
        ]

    def paired(self, seed: int = 0) -> tuple[Interval, int]:
        """Share of prompts whose misaligned answer scores above the aligned one, and how many."""
        right = within_groups(self.scores, self.truth, self.groups)
        if not len(right):
            return Interval(float("nan")), 0
        return share_of_units(right, np.ones(len(right)), seed=seed), len(right)

    def rates(self, threshold: float) -> dict[str, tuple[Interval, int]]:
        """Hits and false alarms at a threshold, with intervals over prompts, and their numbers."""
        return _rates(self.scores > threshold, self.truth, self.groups)

    def cross_fitted_rates(
        self, max_false_alarms: float | None, seed: int = 0
    ) -> dict[str, tuple[Interval, int]]:
        """The same, with each conversation judged by a threshold set on other prompts."""
        n_groups = int(self.groups.max()) + 1
        fold = (np.random.default_rng([seed, 4]).permutation(n_groups) % FOLDS)[self.groups]
        flagged, judged = np.zeros(len(self.scores), bool), np.zeros(len(self.scores), bool)
        for number in range(FOLDS):
            test, rest = fold == number, self.truth[fold != number]
            if rest.all() or not rest.any():
                continue
            limit = threshold_for(self.scores[~test], rest, self.groups[~test], max_false_alarms)
            flagged[test], judged[test] = self.scores[test] > limit, True
        return _rates(flagged[judged], self.truth[judged], self.groups[judged])

    def roc(self, threshold: float) -> Roc:
        """The ROC curve, by scikit-learn."""
        from sklearn.metrics import roc_curve

        alarms, hits, thresholds = roc_curve(self.truth, self.scores)
        area, rates = self.auroc(), self.rates(threshold)
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
        """Tensors to write to a file."""
        return {
            f"held_out.{name}": torch.from_numpy(np.ascontiguousarray(getattr(self, name)))
            for name in _KEPT
        }

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor], slope: float, longer: bool) -> HeldOut:
        """Read the tensors of a file.

        Raises:
            KeyError: If a tensor is missing.
            ValueError: If one has another type or shape, or impossible values.
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
            raise ValueError("held_out.truth has one class only; both are needed")
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

    Across the classes, effects of misalignment would count as effects of length.
    """
    x, y = np.log(tokens), scores.astype(float)
    for side in (truth, ~truth):
        x, y = x - x[side].mean() * side, y - y[side].mean() * side
    spread = float(x @ x)
    return float(x @ y) / spread if spread > 1e-12 else 0.0


def longer_is_misaligned(truth: Bool[np.ndarray, " n"], tokens: Int[np.ndarray, " n"]) -> bool:
    """Whether longer answers are the misaligned ones."""
    return auroc(tokens.astype(float), truth) >= 0.5


def _rates(
    flagged: np.ndarray, truth: np.ndarray, groups: np.ndarray
) -> dict[str, tuple[Interval, int]]:
    found = {}
    for name, side in (("hits", truth), ("false alarms", ~truth)):
        _, place = np.unique(groups[side], return_inverse=True)
        counts = np.bincount(place), np.bincount(place, flagged[side])
        rate = share_of_units(*counts[::-1]) if side.any() else Interval(float("nan"))
        found[name] = rate, int(side.sum())
    return found
