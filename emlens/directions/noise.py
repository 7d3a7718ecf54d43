"""What sampling error does to the cosine of two directions, and the cosine without it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from emlens._arguments import guarded
from emlens._stats import Interval
from emlens.directions.direction import Directions

LEVEL = 0.95


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
    def of(cls, directions: Directions, layer: int) -> Estimate:
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

        `2 r / (1 + r)` of the split-half cosine `r` (Spearman and Brown), or else one minus the
        expected squared norm of the error over that of the vector.
        """
        if self.split_half is not None:
            return 2 * self.split_half / (1 + max(self.split_half, -0.999))
        square = float(self.vector @ self.vector)
        return None if self.noise is None or not square else 1 - self.noise / square

    @property
    def variances(self) -> np.ndarray:
        """Of the coordinates, `[d_model]`."""
        return np.zeros_like(self.vector) if self.errors is None else self.errors**2

    def covariance(self, first: np.ndarray, second: np.ndarray) -> float:
        """`first' S second`, with `S` the covariance of the error."""
        if self.draws is not None:
            return float(((self.draws @ first) * (self.draws @ second)).mean())
        return float((first * second) @ self.variances)

    def overlap(self, other: Estimate) -> float:
        """`trace(S T)` of the covariances of two errors; independent of each other, or the same."""
        if self.draws is not None and other.draws is not None:
            products = (self.draws @ other.draws.T) ** 2
            if other is not self:
                return float(products.mean())
            n = len(products)
            return float((products.sum() - np.trace(products)) / max(n * (n - 1), 1))
        if self.draws is not None:
            return float((self.draws**2 @ other.variances).mean())
        if other.draws is not None:
            return other.overlap(self)
        return float(self.variances @ other.variances)


@guarded
def projection(directions: Directions, onto: Directions) -> dict[int, Interval]:
    """Return how far directions go along others, with 95% intervals, layer by layer.

    The length of the component along `onto` (taken as known), in units of the residual stream.
    Its error is that of this one axis, from the directions under shuffled labels: coordinates are
    correlated, and their standard errors do not give it.

    Args:
        directions: Directions with shuffled labels, as `mean_diff` gives.
        onto: The axes; only their directions matter.

    Raises:
        ValueError: If sites differ, no layer is shared, or no shuffled labels are known.
    """
    directions.cosine(onto)
    found = {}
    for layer in directions.layers:
        if layer not in onto:
            continue
        estimate = Estimate.of(directions, layer)
        if estimate.draws is None:
            raise ValueError(
                f"nothing is known of the noise of {directions!r} at layer {layer}; mean_diff, "
                "model_diff and edit_diff keep what shuffled labels give"
            )
        axis = onto.vectors[layer].double().numpy()
        axis = axis / np.linalg.norm(axis)
        along = float(estimate.vector @ axis)
        reach = _quantile(estimate) * float(np.sqrt(estimate.covariance(axis, axis)))
        found[layer] = Interval(along, along - reach, along + reach)
    return found


@dataclass(frozen=True, slots=True)
class Corrected:
    """A cosine without the sampling error of its two vectors.

    Attributes:
        value: The corrected cosine; None where it is not known.
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

    Noise makes vectors longer and pulls their cosine towards zero; the raw cosine is divided by
    the root of the two reliabilities. By noise the result may lie beyond 1.

    The interval (Fieller's, with the delta method for the norms) takes the covariance of the
    errors from the directions under shuffled labels where there are any, since coordinates of a
    residual stream are far from independent; else from the standard errors, coordinates taken as
    independent.

    Args:
        first: A direction and its error.
        second: Another.
        names: What notes call them.
        same_data: Both were read from the same text with the same labels: their errors agree,
            which would add to the cosine. What the same shuffles of the labels give in both is
            taken off; without such draws nothing is corrected.
    """
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
        product -= float((first.draws * second.draws).sum(1).mean())
    squares = _true_square(first), _true_square(second)
    value = product / float(np.sqrt(squares[0] * squares[1]))
    for name, estimate in zip(names, (first, second), strict=True):
        if estimate.noise is None:
            return Corrected(value, note=f"standard errors of {name} not known")
    if same_data:
        return Corrected(value, note="read from the same text: no interval")
    low, high = _interval(first, second, product, squares)
    return Corrected(value, low, high, "" if low is not None else "too noisy for an interval")


def _true_square(estimate: Estimate) -> float:
    return float(estimate.vector @ estimate.vector) * (estimate.reliability or 0.0)


def _interval(
    a: Estimate, b: Estimate, product: float, squares: tuple[float, float]
) -> tuple[float | None, float | None]:
    """Fieller's interval of `product / norms`, with `norms` the root of both true squares."""
    norms = float(np.sqrt(squares[0] * squares[1]))
    both = a.overlap(b)
    spread = a.covariance(b.vector, b.vector) + b.covariance(a.vector, a.vector) - both
    # each reading of a variance at a noisy vector counts the noise once too often
    spread = max(spread, both)
    relative, shared = 0.0, 0.0
    for one, other, square in ((a, b, squares[0]), (b, a, squares[1])):
        own = one.overlap(one)
        variance = max(4 * one.covariance(one.vector, one.vector) - 2 * own, 2 * own)
        # the split-half cosine measures the noise itself, with an error of its own
        variance += 2 * own if one.split_half is not None else 0.0
        relative += variance / (4 * square**2)
        shared += one.covariance(one.vector, other.vector) / square
    z = _quantile(a, b)
    top = norms**2 * (1 - z**2 * relative)
    middle = norms * (product - z**2 * shared)
    rest = product**2 - z**2 * spread
    square = middle**2 - top * rest
    if top <= 0 or square < 0:
        return None, None
    root = float(np.sqrt(square))
    return (middle - root) / top, (middle + root) / top


def _quantile(*estimates: Estimate) -> float:
    from scipy.stats import norm, t

    # the draws know a variance by their number, and what they are drawn from by its own
    rough = [
        1 / len(e.draws) + (1 / (e.n - 1) if e.n and e.n > 1 else 0)
        for e in estimates
        if e.draws is not None
    ]
    tail = 0.5 + LEVEL / 2
    return float(t.ppf(tail, 1 / max(rough)) if rough else norm.ppf(tail))
