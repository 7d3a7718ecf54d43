"""Directions that are fitted to means of single conversations: probes and principal components."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Unpack

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from emlens.directions.build import difference, provenance, read_sides
from emlens.directions.direction import Directions
from emlens.directions.evidence import FOLDS, Groups, fold_of, prompts_of, sampled_groups
from emlens.directions.provenance import Provenance
from emlens.directions.reader import FITTED_BYTES, Counting, Reader, Reading, ReadOptions
from emlens.hooked import HookedModel, Layers, SiteName
from emlens.text import Conversation

ProbeKind = Literal["logistic", "lda"]
Construction = Literal["mean-diff", "logistic probe", "LDA probe", "PCA of differences"]
"""The constructions that share one pass over two sets of conversations."""

CONSTRUCTIONS: tuple[Construction, ...] = (
    "mean-diff",
    "logistic probe",
    "LDA probe",
    "PCA of differences",
)
QUICK: tuple[Construction, ...] = ("mean-diff", "logistic probe", "PCA of differences")
"""Those that take next to no time beyond the pass."""


def probe(
    model: HookedModel,
    positive: Sequence[Conversation],
    negative: Sequence[Conversation],
    *,
    kind: ProbeKind = "logistic",
    regularisation: float = 1.0,
    site: SiteName = "resid_post",
    layers: Layers = "all",
    **options: Unpack[ReadOptions],
) -> Directions:
    """Return the direction by which a linear classifier tells two sets apart, at every layer.

    Fitted to the mean activation of each conversation, scaled within each fold; the direction is
    that of the classifier on all conversations, in the units of the residual stream, as long as
    the distance between the two sides along it.

    Args:
        model: The model to read.
        positive: The side that the direction points to.
        negative: The other.
        kind: `"logistic"` regression or linear discriminant analysis (`"lda"`, shrunk), both of
            scikit-learn.
        regularisation: Of the logistic regression: scikit-learn's `C`.
        site: Where in each block.
        layers: Layers to read.
        **options: As in `mean_diff`. Beyond `sample_bytes` (here 2 GiB unless given) a random
            sample of conversations is fitted.

    Returns:
        Directions with the held-out AUROC, and the held-out accuracy under
        `provenance.settings`; answers to one prompt are never on both sides of a split.

    Raises:
        ValueError: If there are too few prompts for five folds, or as `mean_diff`.
    """
    if kind not in ("logistic", "lda"):
        raise ValueError(f"unknown probe {kind!r}; choose 'logistic' or 'lda'")
    counting = Counting(**{"sample_bytes": FITTED_BYTES, **options})
    reader, readings = read_sides(model, positive, negative, site, layers, counting)
    name = "logistic probe" if kind == "logistic" else "LDA probe"
    made = provenance(name, model, counting, positive=positive, negative=negative)
    groups = prompts_of(positive), prompts_of(negative)
    return _probed(reader, readings, made, groups, kind, regularisation)


def pca(
    model: HookedModel,
    positive: Sequence[Conversation],
    negative: Sequence[Conversation],
    *,
    site: SiteName = "resid_post",
    layers: Layers = "all",
    **options: Unpack[ReadOptions],
) -> Directions:
    """Return the first principal component of the paired differences, uncentred, at every layer.

    Centring would take the mean difference out, which is what is looked for. The sign is that of
    the mean difference, and the length that of its projection. A nuisance that varies more than
    the difference is large comes first here, and not in `mean_diff`.

    Args:
        model: The model to read.
        positive: One answer per pair.
        negative: The other answer of each pair, in the same order.
        site: Where in each block.
        layers: Layers to read.
        **options: As in `mean_diff`.

    Returns:
        Directions, with the share of the squared differences that lies along each under
        `provenance.settings`.

    Raises:
        ValueError: If the sides differ in number, or as `mean_diff`.
    """
    if len(positive) != len(negative):
        raise ValueError(
            f"pca takes pairs in one order, but there are {len(positive)} positive and "
            f"{len(negative)} negative conversations"
        )
    counting = Counting(**{"sample_bytes": FITTED_BYTES, **options})
    reader, readings = read_sides(model, positive, negative, site, layers, counting)
    made = provenance("PCA of differences", model, counting, positive=positive, negative=negative)
    return _component(reader, readings, made)


def extract_all(
    model: HookedModel,
    positive: Sequence[Conversation],
    negative: Sequence[Conversation],
    *,
    constructions: Sequence[Construction] = QUICK,
    regularisation: float = 1.0,
    site: SiteName = "resid_post",
    layers: Layers = "all",
    **options: Unpack[ReadOptions],
) -> dict[str, Directions]:
    """Build several constructions from one pass over the same two sets.

    Args:
        model: The model to read.
        positive: The side that the directions point to; for PCA, in the order of `negative`.
        negative: The other.
        constructions: Which to build; LDA, whose cost grows with `d_model ** 3` in every fold of
            every layer, only if it is named.
        regularisation: See `probe`.
        site: Where in each block.
        layers: Layers to read.
        **options: As in `mean_diff`.

    Returns:
        Directions by construction; each is what its own function returns.

    Raises:
        ValueError: If a construction is unknown, or as its own function.
    """
    for name in constructions:
        if name not in CONSTRUCTIONS:
            raise ValueError(f"unknown construction {name!r}; choose {', '.join(CONSTRUCTIONS)}")
    if "PCA of differences" in constructions and len(positive) != len(negative):
        raise ValueError(
            f"PCA takes pairs, but there are {len(positive)} positive and {len(negative)} negative "
            "conversations; leave it out of constructions="
        )
    counting = Counting(**{"sample_bytes": FITTED_BYTES, **options})
    reader, readings = read_sides(model, positive, negative, site, layers, counting)
    groups = prompts_of(positive), prompts_of(negative)
    found: dict[str, Directions] = {}
    for name in constructions:
        made = provenance(name, model, counting, positive=positive, negative=negative)
        if name == "mean-diff":
            found[name] = difference(reader, *readings, made, groups)
        elif name == "PCA of differences":
            found[name] = _component(reader, readings, made)
        else:
            kind = "lda" if name == "LDA probe" else "logistic"
            found[name] = _probed(reader, readings, made, groups, kind, regularisation)
    return found


def _probed(
    reader: Reader,
    readings: tuple[Reading, Reading],
    made: Provenance,
    groups: Groups,
    kind: ProbeKind,
    regularisation: float,
) -> Directions:
    from sklearn.metrics import roc_auc_score

    means, truth = _labelled(readings)
    keys = sampled_groups(*readings, groups)
    fold = fold_of(keys, FOLDS, reader.counting.seed).numpy()
    _check_folds(fold, truth, len(set(keys)))
    vectors, auroc, accuracy = {}, {}, {}
    for place, layer in enumerate(reader.layers):
        values = means[place].double().numpy()
        areas, right = [], np.zeros(len(truth), dtype=bool)
        for test in (fold == number for number in range(FOLDS)):
            fitted = _classifier(kind, regularisation).fit(values[~test], truth[~test])
            scores = fitted.decision_function(values[test])
            right[test] = (scores > 0) == truth[test]
            # one fold's scores are not on the scale of another's
            areas.append(roc_auc_score(truth[test], scores))
        auroc[layer] = float(np.mean(areas))
        accuracy[layer] = float(right.mean())
        whole = _classifier(kind, regularisation).fit(values, truth)
        vectors[layer] = _in_units(whole, values, truth)
    made.settings["probe"] = {"folds": FOLDS, "held-out accuracy": accuracy, "C": regularisation}
    return _like_a_difference(reader, readings, made, vectors, auroc)


def _classifier(kind: ProbeKind, regularisation: float):
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if kind == "lda":
        model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto")
    else:
        model = LogisticRegression(C=regularisation, max_iter=1000)
    return make_pipeline(StandardScaler(), model)


def _in_units(fitted, values: np.ndarray, truth: np.ndarray) -> Tensor:
    """The classifier's normal, unscaled, as long as the distance of the class means along it."""
    scaler, classifier = fitted[0], fitted[1]
    normal = classifier.coef_[0] / np.where(scaler.scale_ > 0, scaler.scale_, 1.0)
    normal /= np.linalg.norm(normal)
    distance = (values[truth].mean(0) - values[~truth].mean(0)) @ normal
    return torch.from_numpy(normal * abs(distance))


def _component(reader: Reader, readings: tuple[Reading, Reading], made: Provenance) -> Directions:
    first, second = (reading.sample for reading in readings)
    both = set(first.places.tolist()) & set(second.places.tolist())
    chosen = [
        torch.tensor([place in both for place in sample.places.tolist()])
        for sample in (first, second)
    ]
    pairs = first.means[:, chosen[0]] - second.means[:, chosen[1]]
    vectors, shares = {}, {}
    for place, layer in enumerate(reader.layers):
        _, sizes, axes = torch.linalg.svd(pairs[place].double(), full_matrices=False)
        along = float(pairs[place].double().mean(0) @ axes[0])
        # a component without a mean has no sign, and no length of its own: that of one pair
        vectors[layer] = axes[0] * (along or float(sizes[0]) / len(pairs[place]) ** 0.5)
        shares[layer] = float(sizes[0] ** 2 / (sizes**2).sum())
    made.settings["share of squared differences"] = shares
    return _like_a_difference(reader, readings, made, vectors)


def _like_a_difference(
    reader: Reader,
    readings: tuple[Reading, Reading],
    made: Provenance,
    vectors: dict[int, Float[Tensor, " d_model"]],
    auroc: dict[int, float] | None = None,
) -> Directions:
    sides = [reading.moments.mean for reading in readings]
    return Directions(
        vectors,
        reader.site,
        made,
        residual_norms={layer: reader.median_norm(layer) for layer in reader.layers},
        means={layer: (sides[0][i] + sides[1][i]) / 2 for i, layer in enumerate(reader.layers)},
        auroc=auroc,
    )


def _labelled(readings: tuple[Reading, Reading]) -> tuple[Tensor, np.ndarray]:
    first, second = (reading.sample.means for reading in readings)
    truth = np.zeros(first.shape[1] + second.shape[1], dtype=bool)
    truth[: first.shape[1]] = True
    return torch.cat([first, second], dim=1), truth


def _check_folds(fold: np.ndarray, truth: np.ndarray, n_prompts: int) -> None:
    for number in range(FOLDS):
        inside, outside = truth[fold == number], truth[fold != number]
        if inside.all() or outside.all() or not inside.any() or not outside.any():
            raise ValueError(
                f"a probe is checked on {FOLDS} folds with both sides in each; {n_prompts} prompts "
                "are too few for that"
            )
