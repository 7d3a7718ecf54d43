"""Goldens of the embedded chat model: a handful of numbers on real weights."""

from __future__ import annotations

import emlens
from emlens import Ablate, Add, efficiency, influence, log_odds, mean_diff
from emlens.directions import random_direction


def numbers(model: emlens.HookedModel) -> dict:
    """What is kept of the real model."""
    pairs = emlens.load_pairs("finance")[:4]
    bad, good = ([p.conversation(s) for p in pairs] for s in ("misaligned", "aligned"))
    found = mean_diff(model, bad, good, layers=[8, 15, 22])
    at = found[15]
    conditions = {"base": [], "added": [Add(at, dose=0.3)], "ablated": [Ablate(at)]}
    text = emlens.corpus(documents=4)
    other = random_direction(at, 1)
    return {
        "log_odds": log_odds(model, pairs, conditions).values,
        "mean_diff": {str(n): float(found[n].vector.norm()) for n in (8, 15, 22)},
        "influence": influence(
            model, text, {"v": at}, doses=[0.1], controls=1, conditions=conditions, max_tokens=48
        ),
        "efficiency": efficiency(model, bad, {"v": at, "w": other}, factors=[0.5, 2.0]),
    }
