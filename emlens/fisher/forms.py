"""Quadratic and linear forms of a Fisher profile, with their errors: its arithmetic, per layer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from emlens._stats import reach
from emlens.fisher.sums import Documents, FisherSums

CONTROLS = 256
"""Random directions that others are compared with."""

CHUNK = 2048
"""Directions that are scored at once."""


@dataclass(frozen=True)
class Forms:
    """What the documents of a profile say about vectors, per unit of displacement.

    Attributes:
        quadratic: `v' F v` in nats per token, `[n]`.
        error: Standard error of it over documents, their draws included, `[n]`.
        draw_error: Standard error of it from the draws alone, `[n]`.
        linear: Derivative of the next-token loss along `v` in nats per token, `[n]`.
        linear_error: Standard error of it over documents, `[n]`.
        covariance: Covariance of the errors of both forms over documents, `[n]`.
        ratio_error: Standard error over documents of the logarithm of the quadratic form as a
            multiple of that of a reference vector, paired by document, `[n]`; NaN without one.
        reference: The quadratic form of the reference vector; NaN without one.
        sampled: Documents that the errors come from.
    """

    quadratic: np.ndarray
    error: np.ndarray
    draw_error: np.ndarray
    linear: np.ndarray
    linear_error: np.ndarray
    covariance: np.ndarray
    ratio_error: np.ndarray
    reference: float
    sampled: int

    def interval(self) -> tuple[np.ndarray, np.ndarray]:
        """95% interval of the quadratic form: on a log scale, so that it stays positive."""
        with np.errstate(divide="ignore", invalid="ignore"):
            factor = np.exp(_quantile(self.sampled) * self.error / self.quadratic)
            return self.quadratic / factor, self.quadratic * factor

    def ratio(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Quadratic forms as multiples of that of the reference, with 95% intervals."""
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = self.quadratic / self.reference
            factor = np.exp(_quantile(self.sampled) * self.ratio_error)
            return ratio, ratio / factor, ratio * factor

    def loss_change(
        self, signed: Float[np.ndarray, "n doses"]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Change of loss to second order at signed norms, with its 95% interval."""
        bend = 0.5 * signed**2
        change = signed * self.linear[:, None] + bend * self.quadratic[:, None]
        variance = (
            (signed * self.linear_error[:, None]) ** 2
            + (bend * self.error[:, None]) ** 2
            + 2 * signed * bend * self.covariance[:, None]
        )
        reach = _quantile(self.sampled) * np.sqrt(variance.clip(min=0))
        return change, change - reach, change + reach


def forms(
    sums: FisherSums,
    place: int,
    vectors: Float[Tensor, "n d_model"],
    half: int | None = None,
    reference: Float[Tensor, " d_model"] | None = None,
) -> Forms:
    """Return the forms of vectors at the `place`-th layer, over all documents or one half.

    With a reference vector they are compared with its form on the same documents.
    """
    chosen = [half] if half is not None else [0, 1]
    parts = [
        _forms(sums, place, dict.fromkeys(chosen, part), reference)
        for part in vectors.float().split(CHUNK)
    ]
    return Forms(
        *(
            np.concatenate([getattr(part, name) for part in parts])
            for name in (
                "quadratic",
                "error",
                "draw_error",
                "linear",
                "linear_error",
                "covariance",
                "ratio_error",
            )
        ),
        reference=parts[0].reference,
        sampled=parts[0].sampled,
    )


def crossed(
    sums: FisherSums,
    place: int,
    first: Float[Tensor, "n d_model"],
    second: Float[Tensor, "n d_model"],
) -> Forms:
    """Return the forms where each half of the documents meets vectors of its own.

    Vectors that were found on the first half (0) are scored on the second (1), and the other way
    round; both together are the average over all documents.
    """
    return _forms(sums, place, {1: first, 0: second})


def halves_seen(sums: FisherSums) -> tuple[int, int]:
    """How many documents are in either half."""
    counts = np.zeros(2)
    for documents in sums.fresh:
        counts += np.bincount(documents.halves.numpy(), minlength=2)
    if sums.totals is not None:
        counts += sums.totals.documents.numpy()
    return int(counts[0]), int(counts[1])


def tokens_seen(sums: FisherSums) -> int:
    """How many predicted tokens there are in all."""
    total = sum(float(documents.counts.sum()) for documents in sums.fresh)
    return int(total + (0 if sums.totals is None else float(sums.totals.counts.sum())))


def eigen(
    sums: FisherSums, place: int, halves: tuple[int, ...]
) -> tuple[Float[Tensor, " n"], Float[Tensor, "n d_model"]]:
    """Eigenvalues of summed `g g'`, descending, and eigenvectors, over one half or both."""
    if sums.totals is not None:
        matrix = sums.totals.covariances[place, list(halves)].double().sum(0)
    else:
        factor = torch.cat([_factor(part, place, half) for part in sums.fresh for half in halves])
        if len(factor) < factor.shape[1]:
            _, values, vectors = torch.linalg.svd(factor, full_matrices=False)
            return values**2, vectors
        matrix = factor.T @ factor
    values, vectors = torch.linalg.eigh(matrix)
    return values.flip(0).clamp(min=0), vectors.T.flip(0)


def _factor(documents: Documents, place: int, half: int) -> Float[Tensor, "n d_model"]:
    """Rows whose products sum up to those of one half of the documents, fp64."""
    draws = documents.draws[place][documents.halves == half].double()
    return draws.flatten(0, 1) / draws.shape[1] ** 0.5


def controls(sums: FisherSums, place: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the quadratic forms of random unit vectors, and of unit differences of activations.

    Ascending; what directions are compared with.
    """
    random = np.random.default_rng(seed)
    activations = sums.tokens.activations[place]
    noise = torch.from_numpy(random.standard_normal((CONTROLS, activations.shape[1])))
    first, second = (random.permutation(len(activations)) for _ in range(2))
    return (
        _sorted_forms(sums, place, noise.float()),
        _sorted_forms(sums, place, activations[first] - activations[second]),
    )


def _sorted_forms(sums: FisherSums, place: int, vectors: Float[Tensor, "n d_model"]) -> np.ndarray:
    """Return the quadratic forms of vectors at norm 1, ascending; zero vectors are left out."""
    norms = vectors.norm(dim=1, keepdim=True)
    units = (vectors / norms)[norms[:, 0] > 0]
    return np.sort(forms(sums, place, units).quadratic) if len(units) else np.zeros(0)


def percentiles(values: np.ndarray, controls: np.ndarray) -> np.ndarray:
    """Return the share of sorted controls below each value, percent; NaN without any."""
    if not len(controls):
        return np.full(len(values), np.nan)
    return 100 * np.searchsorted(controls, values) / len(controls)


def _forms(
    sums: FisherSums, place: int, vectors: dict[int, Tensor], reference: Tensor | None = None
) -> Forms:
    """The forms where the documents of each half meet the vectors given for it."""
    asked = len(next(iter(vectors.values())))
    if reference is not None:
        # as one more vector, the last, which is taken off at the end
        last = reference.float()[None]
        vectors = {half: torch.cat([of_half, last]) for half, of_half in vectors.items()}
    n = len(next(iter(vectors.values())))
    quadratic, linear, count, documents = np.zeros(n), np.zeros(n), 0.0, 0.0
    totals = sums.totals
    for half, of_half in vectors.items():
        if totals is None:
            break
        matrix = totals.covariances[place, half].float()
        quadratic += ((of_half @ matrix) * of_half).sum(1).double().numpy()
        linear += (of_half.double() @ totals.losses[place, half]).numpy()
        count += float(totals.counts[half])
        documents += float(totals.documents[half])
    singles = sums.fresh if totals is None else [sums.sample]
    seen = [_single(part, place, vectors) for part in singles if part is not None]
    x, within, slopes, counts = (np.concatenate(parts) for parts in zip(*seen, strict=True))
    if totals is None:
        quadratic, linear = x.sum(0), slopes.sum(0)
        count, documents = float(counts.sum()), float(len(counts))
    if not count:
        raise ValueError("no document of the profile is left to score with")
    quadratic, linear = quadratic / count, linear / count
    scale = documents**0.5 / count
    bent = x - counts[:, None] * quadratic
    sloped = slopes - counts[:, None] * linear
    ratio_error, base = np.full(n, np.nan), float("nan")
    if reference is not None:
        with np.errstate(divide="ignore", invalid="ignore"):
            relative = bent / quadratic
        apart = relative - relative[:, -1:]
        ratio_error, base = scale * _joint(apart, apart) ** 0.5, float(quadratic[-1])
    columns = (
        quadratic,
        scale * _joint(bent, bent) ** 0.5,
        scale * within.mean(0) ** 0.5,
        linear,
        scale * _joint(sloped, sloped) ** 0.5,
        scale**2 * _joint(bent, sloped),
        ratio_error,
    )
    kept = (column[:asked] for column in columns)
    return Forms(*kept, reference=base, sampled=len(counts))


def _single(
    documents: Documents, place: int, vectors: dict[int, Tensor]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Per document: its quadratic forms, their variance from the draws, slopes, and tokens."""
    found = []
    for half, of_half in vectors.items():
        chosen = documents.halves == half
        draws, losses = documents.draws[place], documents.losses[place]
        counts = documents.counts[chosen]
        if not bool(chosen.all()):
            draws, losses = draws[chosen], losses[chosen]
        squares = (draws @ of_half.T).square_()
        x, k = squares.mean(1), squares.shape[1]
        # the variance between draws, over the number of draws
        within = (squares.square_().mean(1) - x.square()).clamp_(min=0)
        within = within / (k - 1) if k > 1 else torch.full_like(x, torch.nan)
        found.append((x, within, losses @ of_half.T, counts))
    return tuple(torch.cat([part[i] for part in found]).double().numpy() for i in range(4))  # type: ignore[return-value]


def _joint(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Covariance over documents; NaN for a single one."""
    if len(one) < 2:
        return np.full(one.shape[1], np.nan)
    return ((one - one.mean(0)) * (other - other.mean(0))).sum(0) / (len(one) - 1)


def _quantile(n: int) -> float:
    return float(reach(n - 1)) if n > 1 else float("nan")
