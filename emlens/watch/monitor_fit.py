"""Parts of fitting a monitor: splitting by prompt, choosing projections, held-out evidence."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast, get_args

import numpy as np
from jaxtyping import Bool, Float, Int
from torch import Tensor

from emlens.directions import Directions, matched
from emlens.directions.held_out import FOLDS, fold_of, prompts_of
from emlens.directions.probes import classifier, unscaled
from emlens.hooked import HookedModel
from emlens.hooked.sites import Layers, check_layers
from emlens.text import Conversation, Pair, TokenMask
from emlens.text.conversation import content_hash
from emlens.text.repeats import warn_of_repeats
from emlens.watch.held_out import HeldOut, length_slope, longer_is_misaligned
from emlens.watch.projections import AnyDirections, Readout
from emlens.watch.roc import auroc, numbered

HELD_OUT = 0.5
"""Share of prompts that is held out, unless another is given."""


@dataclass(frozen=True, eq=False)
class Labelled:
    """Aligned conversations, then misaligned ones, with the prompt of each.

    Attributes:
        conversations: All of them, `[n]`.
        truth: Which are misaligned, `[n]`.
        keys: A key per conversation, the same for answers to one prompt, `[n]`.
    """

    conversations: list[Conversation]
    truth: Bool[np.ndarray, " n"]
    keys: list[str]

    @classmethod
    def of(
        cls,
        aligned: Sequence[Conversation] | Sequence[Pair],
        misaligned: Sequence[Conversation] | None,
    ) -> Labelled:
        """Label two sides, or the sides of pairs.

        Raises:
            ValueError: If only one side was given.
        """
        sides = _sides(aligned, misaligned)
        for name, side in zip(("aligned", "misaligned"), sides, strict=True):
            warn_of_repeats(side, f"{name} conversations")
        both = [*sides[0], *sides[1]]
        return cls(both, np.arange(len(both)) >= len(sides[0]), prompts_of(both))

    def items_of(self, chosen: Bool[np.ndarray, " n"]) -> list[Conversation]:
        return [self.conversations[i] for i in np.flatnonzero(chosen)]

    def sides_of(self, chosen: Bool[np.ndarray, " n"]) -> tuple[list[Conversation], ...]:
        """The misaligned conversations, and the others."""
        return tuple(self.items_of(chosen & side) for side in (self.truth, ~self.truth))

    def keys_of(self, chosen: Bool[np.ndarray, " n"]) -> list[str]:
        return [self.keys[i] for i in np.flatnonzero(chosen)]

    def fitted(self, held_out: float, seed: int) -> Bool[np.ndarray, " n"]:
        """Which conversations are in the fitted part; no prompt is in both parts.

        Prompts answered on one side and those answered on both are split alike.

        Raises:
            ValueError: If a side has too few prompts to be in both parts.
        """
        sides: dict[str, set[bool]] = {}
        for key, bad in zip(self.keys, self.truth.tolist(), strict=True):
            sides.setdefault(key, set()).add(bad)
        generator = np.random.default_rng([seed, 5])
        away: set[str] = set()
        for kind in ({False, True}, {False}, {True}):
            keys = sorted(key for key, found in sides.items() if found == kind)
            order = generator.permutation(len(keys))
            away.update(keys[i] for i in order[: round(held_out * len(keys))])
        fitted = np.array([key not in away for key in self.keys])
        for name, side in (("aligned", ~self.truth), ("misaligned", self.truth)):
            if not (fitted & side).any() or len(set(self.keys_of(~fitted & side))) < 2:
                prompts = len(set(self.keys_of(side)))
                raise ValueError(
                    f"{prompts} prompt(s) with {name} answers cannot be split into a fitted and a "
                    f"held-out part of two or more (held_out={held_out:g}); give more"
                )
        return fitted


def warn_of_leak(directions: AnyDirections, data: Labelled) -> None:
    """Warn if directions were extracted from all of the conversations that are split here."""
    ours = {content_hash(data.items_of(side)) for side in (data.truth, ~data.truth)}
    named = {"": directions} if isinstance(directions, Directions) else directions
    leaky = [name for name, one in named.items() if ours & set(one.provenance.data.values())]
    if leaky:
        which = ", ".join(map(repr, filter(None, leaky)))
        warnings.warn(
            f"the directions {which}".strip() + " were extracted from these same conversations, so "
            "the held-out figures are too good; give directions=None, or directions from others",
            stacklevel=4,
        )


def areas(
    values: Float[np.ndarray, "n k"], truth: Bool[np.ndarray, " n"], keys: Sequence[str], seed: int
) -> Float[np.ndarray, " k"]:
    """AUROC of each projection, averaged over folds of prompts that have both classes."""
    fold = fold_of(keys, FOLDS, seed).numpy()
    parts = [fold == number for number in range(FOLDS)]
    parts = [part for part in parts if truth[part].any() and not truth[part].all()]
    whole = [np.ones(len(truth), dtype=bool)]
    found = [[auroc(column[p], truth[p]) for p in parts or whole] for column in values.T]
    return np.array(found).mean(axis=1)


def chosen_columns(
    columns: Readout,
    choice: Float[np.ndarray, " k"],
    layers: Layers | None,
    best: int,
    n_layers: int,
) -> list[int]:
    """The columns at given layers, or the best ones.

    Raises:
        ValueError: If there is no direction at one of the layers.
    """
    if layers is None:
        return sorted(np.argsort(-choice, kind="stable")[:best].tolist())
    wanted = check_layers(layers, n_layers)
    missing = sorted(set(wanted) - set(columns.layers))
    if missing:
        raise ValueError(
            f"there are no directions at layers {missing}; there are some at "
            f"{sorted(set(columns.layers))}"
        )
    return [i for i, layer in enumerate(columns.layers) if layer in wanted]


def check_choice(best: int, pooled: bool) -> None:
    """Refuse to choose the best projections if all of them are weighted.

    Raises:
        ValueError: If both are requested.
    """
    if pooled and best > 1:
        raise ValueError(
            f"pooled=True weights all projections, so best={best} has no effect; give layers=, "
            "or leave one of them out"
        )


def logistic(
    values: Float[np.ndarray, "n k"], truth: Bool[np.ndarray, " n"], regularisation: float
) -> tuple[list[float], float]:
    """Weights and offset, on unscaled projections, of a logistic regression on scaled ones."""
    weights, offset = unscaled(classifier("logistic", regularisation).fit(values, truth))
    return weights.tolist(), offset


def evidence(
    model: HookedModel,
    data: Labelled,
    fitted: Bool[np.ndarray, " n"],
    scores: Float[np.ndarray, " n"],
    counts: Int[np.ndarray, " n"],
    tokens: TokenMask,
    seed: int,
) -> HeldOut:
    """The held-out part with its scores, and the effect of length on the fitted part."""
    away = ~fitted
    items, truth = data.items_of(away), data.truth[away]
    return HeldOut(
        scores=scores[away],
        truth=truth,
        tokens=counts[away],
        groups=numbered(data.keys_of(away)),
        matched=_matched_places(model, items, truth, tokens, seed),
        slope=length_slope(scores[fitted], data.truth[fitted], counts[fitted]),
        longer=longer_is_misaligned(data.truth[fitted], counts[fitted]),
    )


def rule(held: HeldOut, max_false_alarms: float | None) -> str:
    """The rule of a threshold in words."""
    if max_false_alarms is None:
        return "hits minus false alarms largest on the held-out conversations (Youden)"
    return held.aligned.rule(max_false_alarms, "held-out aligned prompts")


def _sides(
    aligned: Sequence[Conversation] | Sequence[Pair], misaligned: Sequence[Conversation] | None
) -> tuple[list[Conversation], list[Conversation]]:
    if misaligned is not None:
        if any(isinstance(item, Pair) for item in aligned):
            raise TypeError("aligned holds pairs, which have both sides: leave misaligned out")
        return list(cast(Sequence[Conversation], aligned)), list(misaligned)
    if not all(isinstance(item, Pair) for item in aligned):
        raise ValueError("give misaligned conversations as well, or pairs, which have both sides")
    pairs = cast(Sequence[Pair], aligned)
    return (
        [pair.conversation("aligned") for pair in pairs],
        [pair.conversation("misaligned") for pair in pairs],
    )


def _matched_places(
    model: HookedModel,
    items: list[Conversation],
    truth: Bool[np.ndarray, " n"],
    tokens: TokenMask,
    seed: int,
) -> Int[np.ndarray, "pairs 2"]:
    sides = [[items[i] for i in np.flatnonzero(side)] for side in (truth, ~truth)]
    try:
        found = matched(model, *sides, tokens=tokens, seed=seed)
    except ValueError:
        # no two answers of similar length: there is nothing to compare
        return np.zeros((0, 2), dtype=int)
    # the same object may be given twice; it then has the same score
    place = [{id(items[i]): int(i) for i in np.flatnonzero(side)} for side in (truth, ~truth)]
    return np.array([[place[0][id(a)], place[1][id(b)]] for a, b in zip(*found, strict=True)])


def check_kept(tensors: Mapping[str, Tensor], record: Mapping) -> None:
    """Refuse a record of a monitor with impossible values.

    Raises:
        ValueError: If a value has another type or length, or is not finite.
    """
    threshold = record["threshold"]
    if not isinstance(threshold, float) or math.isnan(threshold):
        raise ValueError(f"threshold is {threshold!r:.40}, not a number")
    for name, values in tensors.items():
        if not bool(values.isfinite().all()):
            raise ValueError(f"{name} has values that are not finite")
    columns = {key: len(record[key]) for key in ("names", "layers")}
    columns |= {key: len(tensors[key]) for key in ("vectors", "weights")}
    if len(set(columns.values())) > 1 or tensors["vectors"].ndim != 2:
        raise ValueError(f"its columns differ in length: {columns}")
    if not all(isinstance(name, str) for name in record["names"]):
        raise ValueError(f"names {record['names']!r:.60} are not all text")
    if not all(type(layer) is int and layer >= 0 for layer in record["layers"]):
        raise ValueError(f"layers {record['layers']} are not whole numbers from 0")
    for key, lowest in {"offset": -math.inf, "max_false_alarms": 0}.items():
        value = record[key]
        youden = key == "max_false_alarms" and value is None
        number = isinstance(value, (int, float)) and math.isfinite(value) and value >= lowest
        if not youden and not number:
            raise ValueError(f"{key} is {value!r:.40}, not a finite number in its range")
    for key, kind in {"model": str, "rule": str, "choice": dict, "record": dict}.items():
        if not isinstance(record[key], kind):
            raise ValueError(f"{key} is {record[key]!r:.40}")
    seed, tokens = record["record"]["seed"], record["record"]["tokens"]
    if type(seed) is not int or seed < 0:
        raise ValueError(f"seed is {seed!r:.40}, not a whole number from 0")
    if tokens not in get_args(TokenMask):
        raise ValueError(f"tokens is {tokens!r:.40}, none of {', '.join(get_args(TokenMask))}")
