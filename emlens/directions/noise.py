"""What sampling error does to the cosine of two directions, and the cosine without it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike

from emlens._stats import reach
from emlens.directions.vectors import Vectors

SAME = 1e-6
"""Distance of a cosine from 1 that is rounding."""
PLAIN_DRAWS = 200
"""Draws of the error where standard errors are all that is known."""


@dataclass(frozen=True)
class Estimate:
    """The direction of one layer with what is known of its sampling error.

    Attributes:
        vector: The direction, `[d_model]`.
        errors: Standard error of each coordinate, `[d_model]`.
        draws: Directions under shuffled labels, `[draws, d_model]`: draws of the error.
        split_half: Cosine of the directions of two halves of the data.
        n: Conversations of the smaller side, where that is known.
    """

    vector: np.ndarray
    errors: np.ndarray | None = None
    draws: np.ndarray | None = None
    split_half: float | None = None
    n: int | None = None

    @classmethod
    def of(cls, directions: Vectors, layer: int) -> Estimate:
        """What one layer of directions carries."""
        half = directions.split_half.get(layer)
        errors, draws = directions.standard_errors.get(layer), directions.shuffled.get(layer)
        made = directions.provenance
        return cls(
            directions.vectors[layer].double().numpy(),
            None if errors is None else errors.double().numpy(),
            None if draws is None else draws.double().numpy(),
            None if half is None or np.isnan(half) else half,
            min((made.n[role] for role in made.data if role in made.n), default=None),
        )

    @cached_property
    def noise(self) -> float | None:
        """Expected squared norm of the error, the trace of its covariance."""
        if self.errors is not None:
            return float(self.variances.sum())
        return None if self.draws is None else float((self.draws**2).sum(1).mean())

    @cached_property
    def reliability(self) -> float | None:
        """Share of the squared norm that is not error; None where nothing is known of it.

        `2 r / (1 + r)` of the split-half cosine `r` (Spearman and Brown), which knows of prompts
        that both sides share; or else one minus the expected squared norm of the error over that
        of the vector.
        """
        if self.split_half is not None:
            return 2 * self.split_half / (1 + max(self.split_half, -0.999))
        square = float(self.vector @ self.vector)
        return None if self.noise is None or not square else 1 - self.noise / square

    @property
    def true_square(self) -> float:
        """Squared norm without that of the error."""
        return float(self.vector @ self.vector) * (self.reliability or 0.0)

    @property
    def false_square(self) -> float:
        """What the error adds to the squared norm."""
        return float(self.vector @ self.vector) - self.true_square

    @cached_property
    def drawn(self) -> np.ndarray:
        """Draws of the error, as large as the reliability says, `[draws, d_model]`.

        Those under shuffled labels have the covariance of the error; standard errors alone give
        coordinates that are independent.
        """
        draws = self.draws
        if draws is None:
            random = np.random.default_rng(0).standard_normal((PLAIN_DRAWS, len(self.vector)))
            errors = np.zeros_like(self.vector) if self.errors is None else self.errors
            draws = random * errors
        square = float((draws**2).sum(1).mean())
        return draws * np.sqrt(max(self.false_square, 0.0) / square) if square else draws

    @property
    def variances(self) -> np.ndarray:
        """Of the coordinates, `[d_model]`."""
        return np.zeros_like(self.vector) if self.errors is None else self.errors**2

    def covariance(self, first: np.ndarray, second: np.ndarray) -> float:
        """`first' S second`, with `S` the covariance of the error."""
        if self.draws is not None:
            return float(((self.draws @ first) * (self.draws @ second)).mean())
        return float((first * second) @ self.variances)

    def reach(self, axis: np.ndarray) -> float:
        """Half the 95% interval of the length along a unit vector."""
        return float(_quantile(self)) * float(np.sqrt(self.covariance(axis, axis)))


@dataclass(frozen=True, slots=True)
class Corrected:
    """A cosine without the sampling error of its two vectors.

    Attributes:
        value: The corrected cosine, in [-1, 1]; None where it is not known.
        low: Lower end of its 95% interval; None where that is not known.
        high: Upper end.
        note: Why something is not known.
    """

    value: float | None = None
    low: float | None = None
    high: float | None = None
    note: str = ""


def corrected_cosine(
    first: Estimate, second: Estimate, names: tuple[str, str], same_data: bool = False
) -> Corrected:
    """Return the cosine that two directions would have without sampling error.

    Noise makes vectors longer and pulls their cosine towards zero. The correction for attenuation
    (disattenuation; Spearman 1904) divides by the root of both reliabilities. With `a`, `b` the
    vectors and `e`, `f` their errors, that is

    `(a.b - E[e.f]) / sqrt((|a|^2 - E[|e|^2]) (|b|^2 - E[|f|^2]))`,

    all three expectations from one model of the noise: its size from the reliability, its shape,
    and what two readings of one text share, from the directions under shuffled labels. The same
    shuffles stand behind both, so that they are resampled in pairs, and a direction has cosine 1
    with itself. Independent errors have `E[e.f] = 0`.

    The interval is Fieller's: it holds the cosines `r` in [-1, 1] at which the numerator less `r`
    times the denominator is within its own error of zero, linear and quadratic parts of the noise
    both counted. Value and interval are limited to [-1, 1]; where nothing is told of the cosine
    the interval is all of that.

    Args:
        first: A direction and its error.
        second: Another.
        names: What notes call them.
        same_data: Both were read from the same text with the same labels, so that their errors
            are shared. Without draws of these nothing is corrected.
    """
    if same_data and _cosine(first.vector, second.vector) > 1 - SAME:
        return Corrected(1.0, 1.0, 1.0)
    for name, estimate in zip(names, (first, second), strict=True):
        if estimate.reliability is None:
            return Corrected(note=f"errors of {name} not known")
        if estimate.reliability <= 0:
            share = f"reliability {estimate.reliability:.2f}"
            return Corrected(note=f"{name} is not told from noise ({share})")
    product = float(first.vector @ second.vector)
    if same_data:
        if first.draws is None or second.draws is None or len(first.draws) != len(second.draws):
            return Corrected(note="read from the same text: errors not independent")
        product -= float((first.drawn * second.drawn).sum(1).mean())
    norms = float(np.sqrt(first.true_square * second.true_square))
    value = min(max(product / norms, -1.0), 1.0)
    for name, estimate in zip(names, (first, second), strict=True):
        if estimate.noise is None:
            return Corrected(value, note=f"standard errors of {name} not known")
    low, high = _interval(first, second, product, norms, same_data)
    return Corrected(value, low, high, "too noisy to tell" if high - low >= 2 else "")


def _interval(
    a: Estimate, b: Estimate, product: float, norms: float, paired: bool
) -> tuple[float, float]:
    """The cosines at which `product - cosine * norms` is not told from zero."""
    e, f = a.drawn, b.drawn
    tilt_a, tilt_b = norms / a.true_square, norms / b.true_square
    # what one draw moves to first order, and pairs of draws to second, as 1 and as the cosine
    if paired:
        lines = [(e @ b.vector + f @ a.vector, tilt_a * (e @ a.vector) + tilt_b * (f @ b.vector))]
        cross = e @ f.T
        bends = [(_apart((cross + cross.T) / 2), _apart(tilt_a * e @ e.T + tilt_b * f @ f.T) / 2)]
    else:
        lines = [
            (e @ b.vector, tilt_a * (e @ a.vector)),
            (f @ a.vector, tilt_b * (f @ b.vector)),
        ]
        bends = [
            ((e @ f.T).ravel() / 2**0.5, np.zeros(len(e) * len(f))),
            *((np.zeros_like(x), x / 2) for x in (_apart(tilt_a * e @ e.T),)),
            *((np.zeros_like(x), x / 2) for x in (_apart(tilt_b * f @ f.T),)),
        ]
    cosines = np.linspace(-1, 1, 4001)
    linear, square = (
        sum(
            (one**2).mean() - 2 * cosines * (one * other).mean() + cosines**2 * (other**2).mean()
            for one, other in parts
        )
        for parts in (lines, bends)
    )
    # a variance is read at noisy vectors, which counts the quadratic part twice more
    spread = np.maximum(linear - 2 * square, 2 * square)
    if paired:  # what the errors share is known by these draws alone
        own = ((e**2).sum(1) / _mean(e**2) + (f**2).sum(1) / _mean(f**2)) / 2
        both = (e * f).sum(1)
        spread = spread + ((both - both.mean() * own) ** 2).mean() / len(e)
    spread = spread + _size_errors(a, b, norms, cosines, paired)
    # of a difference of two estimates less is known than of either
    rough = np.maximum(linear / np.maximum(spread, 1e-300), 1.0) ** 2
    reach = _quantile(a, b, roughness=np.minimum(rough, 4.0)) * np.sqrt(spread)
    gap = np.abs(product - cosines * norms)
    # of a difference of two estimates less is known than of either
    rough = np.maximum(linear / np.maximum(spread, 1e-300), 1.0) ** 2
    reach = _quantile(a, b, roughness=np.minimum(rough, 4.0)) * np.sqrt(spread)
    inside = cosines[gap <= reach + SAME * norms]
    value = min(max(product / norms, -1.0), 1.0)
    return min([value, *inside]), max([value, *inside])


def _size_errors(
    a: Estimate, b: Estimate, norms: float, cosines: np.ndarray, paired: bool
) -> np.ndarray:
    """What the error of the size of the noise adds to the variance, by cosine."""
    parts = []
    for one in (a, b):
        size = max(one.false_square, 1e-150)  # its square is above zero, too
        # of standard errors it is small; half the data know it as well as one split, and draws
        # as well as their number
        known = 1.0 if one.split_half is not None else 1 / len(one.drawn)
        own = float((_apart(one.drawn @ one.drawn.T) ** 2).mean())
        relative = 0.0 if one.split_half is None and one.errors is not None else 2 * own * known
        parts.append((relative / size**2, cosines * norms * size / one.true_square / 2))
    (first, ours), (second, theirs) = parts
    if not paired:
        return first * ours**2 + second * theirs**2
    shared = float((a.drawn * b.drawn).sum(1).mean())
    return max(first, second) * (ours + theirs - shared) ** 2


def _mean(squares: np.ndarray) -> float:
    """Mean squared norm of draws; 1 where there is no noise at all."""
    return float(squares.sum(1).mean()) or 1.0


def _apart(products: np.ndarray) -> np.ndarray:
    """The products of different draws."""
    return products[~np.eye(len(products), dtype=bool)]


def _cosine(first: np.ndarray, second: np.ndarray) -> float:
    size = float(np.linalg.norm(first) * np.linalg.norm(second))
    return float(first @ second) / size if size else 0.0


def _quantile(*estimates: Estimate, roughness: ArrayLike = 1.0) -> np.ndarray:
    # the draws know a variance by their number, and what they are drawn from by its own
    rough = [
        1 / len(e.draws) + (1 / (e.n - 1) if e.n and e.n > 1 else 0)
        for e in estimates
        if e.draws is not None
    ]
    return reach(1 / (max(rough) * np.asarray(roughness)) if rough else np.inf)
