"""Directions fitted to the means of conversations: probes and principal components."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Unpack

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from emlens._door import guarded
from emlens._registry import CONSTRUCTIONS
from emlens.directions.build import difference, provenance, read_sides
from emlens.directions.counting import Counting, CountingOptions
from emlens.directions.direction import Directions
from emlens.directions.held_out import FOLDS, Groups, fold_of, prompts_of, sampled_groups
from emlens.directions.probes import classifier, out_of_fold, unscaled
from emlens.directions.provenance import Provenance
from emlens.directions.reader import FITTED_BYTES, Reader, Reading
from emlens.directions.sides import both_sides
from emlens.directions.vectors import Evidence, cosine
from emlens.hooked import HookedModel
from emlens.hooked.sites import Layers, SiteName
from emlens.text import Conversation, Pair

ProbeKind = Literal["logistic", "lda"]
QUICK = ("mean-diff", "logistic probe", "PCA of differences")
"""Constructions that take next to no time beyond the pass."""


@dataclass(frozen=True)
class Construction:
    """A construction that shares one pass over two sets; `emlens._registry` lists them.

    Attributes:
        build: Takes the reader, both readings, the provenance, the prompts of both sides and the
            regularisation; returns the directions.
        paired: Whether the conversations of both sides belong together, one by one.
    """

    build: Callable[[Reader, tuple[Reading, Reading], Provenance, Groups, float], Directions]
    paired: bool = False


@guarded
def probe(
    model: HookedModel,
    positive: Sequence[Conversation] | Sequence[Pair],
    negative: Sequence[Conversation] | None = None,
    *,
    kind: ProbeKind = "logistic",
    regularisation: float = 1.0,
    site: SiteName = "resid_post",
    layers: Layers = "all",
    **options: Unpack[CountingOptions],
) -> Directions:
    """Return the direction of a linear classifier between two sets, at every layer.

    Fitted to the mean activation of each conversation, scaled within each fold. The direction is
    that of the classifier on all conversations, in units of the residual stream; its norm is the
    distance between the two sides along it.

    Args:
        model: The model to read.
        positive: The side that the direction points to; or pairs, as in `mean_diff`.
        negative: The other side; not with pairs.
        kind: `"logistic"` regression or linear discriminant analysis (`"lda"`, with shrinkage),
            from scikit-learn.
        regularisation: `C` of scikit-learn's logistic regression.
        site: Where in each block.
        layers: Layers to read.
        **options: See `CountingOptions`. Beyond `sample_bytes` (2 GiB by default here), a random
            sample of conversations is used.

    Returns:
        Directions with the held-out AUROC and accuracy (of five folds), and the cosine of the
        probes of two halves of the data; answers to one prompt are never on both sides of a split.

    Raises:
        ValueError: If there are too few prompts for five folds, the sides are the same at a
            layer, or as `mean_diff`.
    """
    positive, negative = both_sides(positive, negative)
    if kind not in ("logistic", "lda"):
        raise ValueError(f"unknown probe {kind!r}; choose 'logistic' or 'lda'")
    counting = Counting(**{"sample_bytes": FITTED_BYTES, **options})
    reader, readings = read_sides(model, positive, negative, site, layers, counting)
    name = "logistic probe" if kind == "logistic" else "LDA probe"
    made = provenance(name, model, counting, positive=positive, negative=negative)
    groups = prompts_of(positive), prompts_of(negative)
    return _probed(reader, readings, made, groups, regularisation, kind)


@guarded
def pca(
    model: HookedModel,
    positive: Sequence[Conversation] | Sequence[Pair],
    negative: Sequence[Conversation] | None = None,
    *,
    site: SiteName = "resid_post",
    layers: Layers = "all",
    **options: Unpack[CountingOptions],
) -> Directions:
    """Return the first principal component of the paired differences, uncentred, at every layer.

    Centring would remove the mean difference, which is the signal. The sign is that of the mean
    difference, and the norm that of its projection. Unlike `mean_diff`, this can pick up a nuisance
    whose variance exceeds the difference.

    Args:
        model: The model to read.
        positive: One answer per pair; or the pairs, as in `mean_diff`.
        negative: The other answer of each pair, in the same order; not with pairs.
        site: Where in each block.
        layers: Layers to read.
        **options: See `CountingOptions`.

    Returns:
        Directions with the share of the squared differences that lies along each, the AUROC of the
        projection on held-out pairs, and the cosine of the components of two halves of the pairs.
        There are no shuffled labels: the axis does not depend on the signs of the pairs.

    Raises:
        ValueError: If the sides differ in number, are the same at a layer, or as `mean_diff`.
    """
    positive, negative = both_sides(positive, negative)
    if len(positive) != len(negative):
        raise ValueError(
            f"pca takes pairs in one order, but there are {len(positive)} positive and "
            f"{len(negative)} negative conversations"
        )
    counting = Counting(**{"sample_bytes": FITTED_BYTES, **options})
    reader, readings = read_sides(model, positive, negative, site, layers, counting)
    made = provenance("PCA of differences", model, counting, positive=positive, negative=negative)
    return _component(reader, readings, made, prompts_of(positive))


@guarded
def extract_all(
    model: HookedModel,
    positive: Sequence[Conversation] | Sequence[Pair],
    negative: Sequence[Conversation] | None = None,
    *,
    constructions: Collection[str] = QUICK,
    regularisation: float = 1.0,
    site: SiteName = "resid_post",
    layers: Layers = "all",
    **options: Unpack[CountingOptions],
) -> dict[str, Directions]:
    """Build several constructions from one pass over the same two sets.

    Args:
        model: The model to read.
        positive: The side that the directions point to; for PCA, in the order of `negative`. Or
            pairs, as in `mean_diff`.
        negative: The other; not with pairs.
        constructions: Which to build; LDA only if named, as its cost grows with `d_model ** 3` in
            every fold of every layer.
        regularisation: See `probe`.
        site: Where in each block.
        layers: Layers to read.
        **options: See `CountingOptions`.

    Returns:
        Directions by construction, as the separate functions return them.

    Raises:
        ValueError: If a construction is unknown, or as its own function.
    """
    positive, negative = both_sides(positive, negative)
    chosen: dict[str, Construction] = {name: CONSTRUCTIONS[name] for name in constructions}
    paired = [name for name, one in chosen.items() if one.paired]
    if paired and len(positive) != len(negative):
        raise ValueError(
            f"{paired[0]} takes pairs, but there are {len(positive)} positive and {len(negative)} "
            "negative conversations; leave it out of constructions="
        )
    counting = Counting(**{"sample_bytes": FITTED_BYTES, **options})
    reader, readings = read_sides(model, positive, negative, site, layers, counting)
    groups = prompts_of(positive), prompts_of(negative)
    found: dict[str, Directions] = {}
    for name, one in chosen.items():
        made = provenance(name, model, counting, positive=positive, negative=negative)
        found[name] = one.build(reader, readings, made, groups, regularisation)
    return found


def _probed(
    reader: Reader,
    readings: tuple[Reading, Reading],
    made: Provenance,
    groups: Groups,
    regularisation: float,
    kind: ProbeKind = "logistic",
) -> Directions:
    means, truth = _labelled(readings)
    keys = sampled_groups(*readings, groups)
    fold, half = _splits(keys, reader.counting.seed)
    _check_folds(fold, truth, len(set(keys)))
    vectors, auroc, accuracy, agree = {}, {}, {}, {}
    for place, layer in enumerate(reader.layers):
        values = means[place].double().numpy()
        _check_apart(values[truth], values[~truth], layer)

        def fit(rows: np.ndarray, values: np.ndarray = values) -> Any:
            return classifier(kind, regularisation).fit(values[rows], truth[rows])

        def normal(rows: np.ndarray, values: np.ndarray = values) -> Tensor:
            return _in_units(fit(rows), values[rows], truth[rows])

        auroc[layer], accuracy[layer] = _held_out(fit, values, truth, fold)
        vectors[layer] = normal(np.ones_like(truth))
        if all(0 < truth[part].sum() < part.sum() for part in (half, ~half)):
            agree[layer] = cosine(normal(half), normal(~half))
    settings = {"folds": FOLDS}
    record = settings if kind == "lda" else {**settings, "C": regularisation}
    made = made.with_settings({"probe": record})
    measured = {"held-out accuracy": accuracy}
    return _like_a_difference(reader, readings, made, vectors, auroc, agree, measured)


def _held_out(
    fit: Callable[[np.ndarray], Any], values: np.ndarray, truth: np.ndarray, fold: np.ndarray
) -> tuple[float, float]:
    """AUROC, averaged over folds, and accuracy of classifiers on what they were not fitted to."""
    from sklearn.metrics import roc_auc_score

    areas, right = [], np.zeros(len(truth), dtype=bool)
    for test, fitted in out_of_fold(fit, fold):
        scores = fitted.decision_function(values[test])
        right[test] = (scores > 0) == truth[test]
        # one fold's scores are not on the scale of another's
        areas.append(roc_auc_score(truth[test], scores))
    return float(np.mean(areas)), float(right.mean())


def _in_units(fitted, values: np.ndarray, truth: np.ndarray) -> Tensor:
    """The classifier's normal, unscaled, as long as the distance of the class means along it."""
    normal = unscaled(fitted)[0]
    normal /= np.linalg.norm(normal)
    distance = (values[truth].mean(0) - values[~truth].mean(0)) @ normal
    return torch.from_numpy(normal * abs(distance))


def _component(
    reader: Reader, readings: tuple[Reading, Reading], made: Provenance, prompts: Sequence[str]
) -> Directions:
    samples = [reading.sample for reading in readings]
    both = sorted(set(samples[0].places.tolist()) & set(samples[1].places.tolist()))
    rows = [torch.searchsorted(sample.places, torch.tensor(both)) for sample in samples]
    keys = [prompts[int(place)] for place in both]
    fold, half = _splits(keys, reader.counting.seed)
    enough = len(set(keys)) >= 2 * FOLDS
    everything = np.ones(len(both), dtype=bool)
    vectors, shares, auroc, agree = {}, {}, {}, {}
    for place, layer in enumerate(reader.layers):
        values = [
            sample.means[place, own].double().numpy()
            for sample, own in zip(samples, rows, strict=True)
        ]
        _check_apart(values[0], values[1], layer)
        pairs = values[0] - values[1]
        axis, square = _first_axis(pairs, everything)
        # a component without a mean has no sign, and no length of its own: that of one pair
        length = float(pairs.mean(0) @ axis) or (square / len(pairs)) ** 0.5
        vectors[layer] = torch.from_numpy(axis * length)
        shares[layer] = square / float((pairs**2).sum())
        if enough:
            auroc[layer] = _held_out_pairs(values, fold)
            halves = [torch.from_numpy(_first_axis(pairs, part)[0]) for part in (half, ~half)]
            agree[layer] = cosine(*halves)
    measured = {"share of squared differences": shares}
    return _like_a_difference(reader, readings, made, vectors, auroc, agree, measured)


def _held_out_pairs(sides: Sequence[np.ndarray], fold: np.ndarray) -> float:
    """AUROC along the components of the other folds, averaged over folds."""
    from sklearn.metrics import roc_auc_score

    areas = []
    pairs = sides[0] - sides[1]
    for test, (axis, _) in out_of_fold(lambda rows: _first_axis(pairs, rows), fold):
        scores = np.concatenate([side[test] @ axis for side in sides])
        areas.append(roc_auc_score(np.arange(len(scores)) < test.sum(), scores))
    return float(np.mean(areas))


def _first_axis(pairs: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, float]:
    """First axis of some pairs, uncentred, with the sign of their mean; and its squared size."""
    from scipy.linalg import eigh

    chosen = pairs[rows]
    n, width = chosen.shape
    wide = n < width
    product = chosen @ chosen.T if wide else chosen.T @ chosen
    last = len(product) - 1
    sizes, axes = eigh(product, subset_by_index=(last, last))
    axis = chosen.T @ axes[:, 0] if wide else axes[:, 0]
    axis = axis / max(np.linalg.norm(axis), 1e-300)
    return axis * (1 if chosen.mean(0) @ axis >= 0 else -1), float(sizes[0])


def _like_a_difference(
    reader: Reader,
    readings: tuple[Reading, Reading],
    made: Provenance,
    vectors: dict[int, Float[Tensor, " d_model"]],
    auroc: dict[int, float],
    split_half: dict[int, float],
    measured: dict[str, dict[int, float]],
) -> Directions:
    sides = [reading.moments.mean for reading in readings]
    known = Evidence(
        residual_norms=reader.median_norms(),
        means={layer: (sides[0][i] + sides[1][i]) / 2 for i, layer in enumerate(reader.layers)},
        auroc=auroc,
        split_half=split_half,
        measured=measured,
    )
    return Directions(vectors, reader.site, made, known)


def _labelled(readings: tuple[Reading, Reading]) -> tuple[Tensor, np.ndarray]:
    first, second = (reading.sample.means for reading in readings)
    truth = np.zeros(first.shape[1] + second.shape[1], dtype=bool)
    truth[: first.shape[1]] = True
    return torch.cat([first, second], dim=1), truth


def _splits(keys: Sequence[str], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The fold of each item, `[n]`, and whether it is in the first half, `[n]`."""
    return fold_of(keys, FOLDS, seed).numpy(), fold_of(keys, 2, seed).numpy() == 0


def _check_apart(first: np.ndarray, second: np.ndarray, layer: int) -> None:
    means = first.mean(0), second.mean(0)
    # beyond what rounding makes of one text in two batches
    if not (abs(means[0] - means[1]) > 1e-5 * (abs(means[0]) + abs(means[1]))).any():
        raise ValueError(
            f"the means of the two sides are the same at layer {layer}, so there is nothing to "
            "tell apart; what comes before the answer, as by tokens='last', is the same on both "
            "sides where the prompts are"
        )


def _check_folds(fold: np.ndarray, truth: np.ndarray, n_prompts: int) -> None:
    for number in range(FOLDS):
        inside, outside = truth[fold == number], truth[fold != number]
        if inside.all() or outside.all() or not inside.any() or not outside.any():
            raise ValueError(
                f"a probe is checked on {FOLDS} folds with positive and negative prompts in each; "
                f"{n_prompts} prompts are too few for that"
            )


MEAN_DIFF = Construction(
    lambda reader, readings, made, groups, _: difference(reader, *readings, made, groups)
)
LOGISTIC = Construction(_probed)
LDA = Construction(partial(_probed, kind="lda"))
PCA = Construction(
    lambda reader, readings, made, groups, _: _component(reader, readings, made, groups[0]),
    paired=True,
)
