"""How far a direction can be trusted: what chance gives, and what held-out data says."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from emlens.directions.counting import Weighting
from emlens.directions.reader import Reading, Sample
from emlens.text import Conversation
from emlens.text.conversation import content_hash

Groups = tuple[list[str], list[str]]
"""Which conversations belong together, by side: those with one key are never split."""

DRAWS = 16
"""Shuffles of the labels behind the null of a mean difference."""
FOLDS = 5
"""Folds of the held-out AUROC."""


def prompts_of(conversations: Sequence[Conversation]) -> list[str]:
    """A key per conversation, the same for two answers to one prompt."""
    return [
        content_hash([Conversation(tuple(item.messages[:-1]) or item.messages)])
        for item in conversations
    ]


def shuffled_differences(
    readings: Sequence[Reading], weighting: Weighting, seed: int, draws: int = DRAWS
) -> Float[Tensor, "draws layers d_model"] | None:
    """Mean differences with the labels dealt out anew over the sampled conversations of each side.

    Within a side a label says nothing, so what is drawn is the noise that would be there without
    any difference, as large as it is with these two sides. Labels dealt out over both sides would
    mix in the difference itself, and of a small and a large side give to each the spread of the
    other. Of each conversation the mean of its side is taken off, so that the draws have the
    covariance of the error whatever the weights, and they are scaled by `sqrt(sampled / all)`, so
    that they are as large as those of the whole sets.

    Args:
        readings: The two sides; or one of paired differences, whose labels are their signs.
        weighting: As they were read.
        seed: Seed of the labels.
        draws: How many.

    Returns:
        None where a side has but one conversation: nothing is known of its noise.
    """
    generator = np.random.default_rng([seed, 2])
    found = []
    for reading in readings:
        weights, n = _weights([reading.sample], weighting), len(reading.sample.counts)
        if n < 2:
            return None
        shares = weights / weights.sum()
        dealt = torch.from_numpy(generator.choice([-1.0, 1.0], size=(draws, n))) * shares
        contrasts = dealt - dealt.sum(1, keepdim=True) * shares
        scale = (n / (n - 1) * n / reading.moments.n) ** 0.5
        found.append(_weighted(contrasts * scale, [reading.sample]))
    return torch.stack(found).sum(0)


def held_out_auroc(
    positive: Reading,
    negative: Reading,
    groups: Groups,
    weighting: Weighting,
    seed: int,
    folds: int = FOLDS,
) -> list[float] | None:
    """AUROC of the projection on conversations that the direction was not made from, per layer.

    Cross-fitted over the sampled conversations; answers to one prompt stay in one fold. None
    where there are too few prompts for the folds.
    """
    samples = positive.sample, negative.sample
    labels, weights = _labels(samples), _weights(samples, weighting)
    keys = sampled_groups(positive, negative, groups)
    fold = fold_of(keys, folds, seed)
    if len(set(keys)) < 2 * folds:
        return None
    tests = [fold == number for number in range(folds)]
    for test in tests:
        if any(not side.any() or side.all() for side in (labels[test], labels[~test])):
            return None
    contrasts = torch.stack([_contrast(labels, weights * ~test) for test in tests])
    axes = _weighted(contrasts, samples).permute(1, 2, 0)
    along = torch.cat([sample.means @ axes for sample in samples], dim=1).cpu().numpy()
    areas = [auroc(along[:, test, i], labels[test].numpy()) for i, test in enumerate(tests)]
    return np.mean(areas, axis=0).tolist()


def auroc(
    scores: Float[np.ndarray, "layers n"], truth: Bool[np.ndarray, " n"]
) -> Float[np.ndarray, " layers"]:
    """Area under the ROC curve of each row of scores; both classes have to be there."""
    from scipy.stats import rankdata

    n, hits = len(truth), int(truth.sum())
    ranks = rankdata(scores, axis=-1)[:, truth].sum(-1)
    return (ranks - hits * (hits + 1) / 2) / (hits * (n - hits))


def sampled_groups(positive: Reading, negative: Reading, groups: Groups) -> list[str]:
    """The group of each sampled conversation, the positive ones first."""
    return [
        of_side[int(place)]
        for reading, of_side in zip((positive, negative), groups, strict=True)
        for place in reading.sample.places
    ]


def fold_of(keys: Sequence[str], folds: int, seed: int) -> Int[Tensor, " n"]:
    """A fold per item; items with one key share a fold."""
    unique = sorted(set(keys))
    order = np.random.default_rng([seed, 3]).permutation(len(unique))
    number = {key: int(place) % folds for key, place in zip(unique, order, strict=True)}
    return torch.tensor([number[key] for key in keys])


def _labels(samples: Sequence[Sample]) -> Bool[Tensor, " n"]:
    """True for the first sample."""
    sizes = [len(sample.counts) for sample in samples]
    return torch.arange(sum(sizes)) < sizes[0]


def _weights(samples: Sequence[Sample], weighting: Weighting) -> Float[Tensor, " n"]:
    counts = torch.cat([sample.counts for sample in samples])
    return counts if weighting == "token" else torch.ones_like(counts)


def _weighted(
    contrasts: Float[Tensor, "k n"], samples: Sequence[Sample]
) -> Float[Tensor, "k layers d_model"]:
    """Weighted sums of the sampled means; never all samples in one tensor, which are large."""
    parts = contrasts.float().split([len(sample.counts) for sample in samples], dim=1)
    # a batch of products: one product would copy the sample to bring its axes together
    sums = [
        part.to(sample.means.device).expand(len(sample.means), -1, -1) @ sample.means
        for part, sample in zip(parts, samples, strict=True)
    ]
    return torch.stack(sums).sum(0).transpose(0, 1)


def _contrast(labels: Tensor, weights: Tensor) -> Float[Tensor, " n"]:
    """Weights whose sum over means is the difference of the two weighted means."""
    first, second = weights * labels, weights * ~labels
    return first / first.sum() - second / second.sum()
