"""How far each layer's direction can be trusted: a table, and warnings in words."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from emlens._stats import LEVEL
from emlens.directions.noise import Estimate
from emlens.directions.vectors import Vectors, cosine
from emlens.hooked.sites import hook_name

if TYPE_CHECKING:
    import pandas as pd

TOP = 2
"""Dimensions whose share of a direction's energy is reported."""

# Beyond these a layer is warned of.
CONCENTRATED, LIKE_THE_MEAN, UNSTABLE, WEAK = 0.5, 0.8, 0.5, 0.65


def trust_table(directions: Vectors) -> pd.DataFrame:
    """See `Directions.table`."""
    import pandas as pd

    doses, norms = directions.doses, directions.norms
    rows = [
        {
            "layer": layer,
            "hook": hook_name(layer, directions.site),
            "norm": norms[layer],
            "norm error": _norm_error(directions, layer),
            "dose": doses.get(layer),
            "angle error (degrees)": _angle_error(directions, layer),
            "split-half cosine": directions.split_half.get(layer),
            "cosine with mean": _cosine_with_mean(directions, layer),
            f"energy in {TOP} dimensions": energy_share(directions.vectors[layer]),
            "held-out AUROC": directions.auroc.get(layer),
            "norm / shuffled": shuffled_ratio(directions, layer),
            **{name: values.get(layer) for name, values in directions.measured.items()},
        }
        for layer in directions.layers
    ]
    return pd.DataFrame(rows).dropna(axis=1, how="all")


_SHORT = {
    "norm error": "+-",
    "angle error (degrees)": "angle +-",
    "split-half cosine": "split-half",
    "cosine with mean": "cos mean",
    f"energy in {TOP} dimensions": f"top-{TOP} energy",
    "held-out AUROC": "AUROC",
    "norm / shuffled": "/ shuffled",
    "held-out accuracy": "accuracy",
    "share of squared differences": "share",
}


def trust_text(directions: Vectors) -> str:
    """The table for a terminal, with short headings."""
    table = trust_table(directions).drop(columns="hook").rename(columns=_SHORT)
    for name in table.columns.drop("layer"):
        digits = "{:.3g}" if name in ("norm", "+-", "dose") else "{:.2f}"
        table[name] = table[name].map(digits.format)
    return table.to_string(index=False)


def warnings_of(directions: Vectors) -> list[str]:
    """See `Directions.warnings`."""
    checks: list[tuple[Callable[[int], float | None], Callable[[float], bool], str]] = [
        (
            lambda layer: energy_share(directions.vectors[layer]),
            lambda share: share > CONCENTRATED and directions.d_model > 8 * TOP,
            f"{{:.0%}} of the energy is in {TOP} dimensions",
        ),
        (
            lambda layer: _cosine_with_mean(directions, layer),
            lambda value: abs(value) > LIKE_THE_MEAN,
            "cosine {:.2f} with the mean activation: mostly more or less of what is always there",
        ),
        (
            directions.split_half.get,
            lambda value: value < UNSTABLE,
            "two halves of the data agree to a cosine of only {:.2f}",
        ),
        (
            directions.auroc.get,
            lambda value: value < WEAK,
            "the projection tells held-out conversations apart no better than AUROC {:.2f}",
        ),
        (
            lambda layer: shuffled_ratio(directions, layer),
            lambda ratio: ratio < 1,
            "{:.2f} times as long as what shuffled labels give (95th percentile)",
        ),
    ]
    found = []
    for measure, alarming, words in checks:
        values = {layer: measure(layer) for layer in directions.layers}
        bad = {n: v for n, v in values.items() if v is not None and alarming(v)}
        if bad:
            found.append(f"{_layers(list(bad))}: {_range(list(bad.values()), words)}")
    return found


def energy_share(vector: Tensor) -> float:
    """Share of the squared norm that lies in the `TOP` largest dimensions."""
    squares = vector.double() ** 2
    return float(squares.topk(min(TOP, len(squares))).values.sum() / squares.sum())


def shuffled_ratio(directions: Vectors, layer: int) -> float | None:
    """The norm, as a multiple of the 95th percentile of the norms under shuffled labels."""
    draws = directions.shuffled.get(layer)
    if draws is None:
        return None
    edge = float(draws.norm(dim=-1).quantile(LEVEL))
    return directions.norms[layer] / edge if edge > 0 else math.inf


def _cosine_with_mean(directions: Vectors, layer: int) -> float | None:
    mean = directions.means.get(layer)
    return None if mean is None else cosine(directions.vectors[layer], mean)


def _norm_error(directions: Vectors, layer: int) -> float | None:
    """Of the norm, to first order: the error along the vector."""
    estimate = Estimate.of(directions, layer)
    size = np.linalg.norm(estimate.vector)
    if estimate.noise is None or not size:
        return None
    unit = estimate.vector / size
    return math.sqrt(estimate.covariance(unit, unit))


def _angle_error(directions: Vectors, layer: int) -> float | None:
    """Of the direction: the errors across it, against its length."""
    estimate, along = Estimate.of(directions, layer), _norm_error(directions, layer)
    if estimate.noise is None or along is None:
        return None
    across = math.sqrt(max(estimate.noise - along**2, 0.0))
    return math.degrees(math.atan2(across, np.linalg.norm(estimate.vector)))


def _layers(layers: list[int]) -> str:
    """`layer 3`, or `layers 0-4, 7`."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    parts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(parts)}"


def _range(values: list[float], words: str) -> str:
    """The words with the value, or with the least and the largest of several."""
    field = words[words.index("{") : words.index("}") + 1]
    low, high = field.format(min(values)), field.format(max(values))
    return words.replace(field, low if low == high else f"{low} to {high}")
