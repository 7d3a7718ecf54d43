"""How far a monitor of one domain carries to others, beside a classifier of words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Unpack

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from emlens._door import guarded
from emlens._results import Result
from emlens.directions import Directions, mean_diff
from emlens.directions.probes import classifier
from emlens.hooked import HookedModel, ReadOptions
from emlens.hooked.sites import SiteName
from emlens.text import Conversation, Pair, split_pairs
from emlens.watch.projections import readout_of
from emlens.watch.roc import auroc_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class TransferAuroc(Result):
    """AUROC on held-out pairs of each domain, of a projection and of words, by source domain.

    Attributes:
        domains: Names of the domains, `[d]`: rows are those that were fitted to, columns those
            that are judged.
        layers: Layer of each source's direction, `[d]`.
        projection: AUROC of the projection, `[d, d]`.
        low: Lower end of its 95% interval over prompts, `[d, d]`.
        high: Upper end, `[d, d]`.
        words: AUROC of a bag of words on the same pairs, `[d, d]`.
        words_low: Lower end of its interval, `[d, d]`.
        words_high: Upper end, `[d, d]`.
        n_train: Pairs fitted to in each domain, `[d]`.
        n_test: Held-out pairs of each domain, `[d]`.
    """

    HOLDS_ENDS = True
    AXES = {
        "layers": "domains",
        "n_train": "domains",
        "n_test": "domains",
    }

    domains: tuple[str, ...]
    layers: tuple[int, ...]
    projection: Float[np.ndarray, "domains domains"]
    low: Float[np.ndarray, "domains domains"]
    high: Float[np.ndarray, "domains domains"]
    words: Float[np.ndarray, "domains domains"]
    words_low: Float[np.ndarray, "domains domains"]
    words_high: Float[np.ndarray, "domains domains"]
    n_train: tuple[int, ...]
    n_test: tuple[int, ...]

    def table(self) -> pd.DataFrame:
        """One row per source and target domain."""
        rows = []
        for i, source in enumerate(self.domains):
            for j, target in enumerate(self.domains):
                rows.append(
                    {
                        "from": source,
                        "to": target,
                        "layer": self.layers[i],
                        "AUROC, projection": float(self.projection[i, j]),
                        "low": float(self.low[i, j]),
                        "high": float(self.high[i, j]),
                        "AUROC, bag of words": float(self.words[i, j]),
                        "words low": float(self.words_low[i, j]),
                        "words high": float(self.words_high[i, j]),
                        "training pairs": self.n_train[i],
                        "held-out pairs": self.n_test[j],
                    }
                )
        return pd.DataFrame(rows)

    def plot(self, ax: Axes | None = None) -> Axes | list[Axes]:
        """Both matrices, side by side, or that of the projection on `ax`; white is chance.

        Returns the axes: a list of two where none are given.
        """
        from emlens.figures import heatmap
        from emlens.figures.style import new_panels

        axes = new_panels(2, width=10.0, height=4.2) if ax is None else [ax]
        panels = {"projection": self.projection, "bag of words": self.words}
        for panel, (title, values) in zip(axes, panels.items(), strict=False):
            heatmap(
                values,
                self.domains,
                self.domains,
                limits=(0.0, 1.0),
                value_label="AUROC on held-out pairs",
                x_label="judged",
                y_label="fitted to",
                title=title,
                ax=panel,
            )
        return axes if ax is None else ax


@guarded
def transfer_auroc(
    model: HookedModel,
    pairs: Mapping[str, Sequence[Pair]],
    *,
    layer: int | None = None,
    site: SiteName = "resid_post",
    held_out: float = 0.4,
    seed: int = 0,
    **options: Unpack[ReadOptions],
) -> TransferAuroc:
    """Extract a direction from each domain, and tell the answers of every domain apart with it.

    Each direction is the mean difference, misaligned minus aligned, of the training pairs of its
    domain, at the layer at which it does best on folds of those alone. Beside it stands what
    needs no model: logistic regression on the words and word pairs (tf-idf, scikit-learn) of the
    same training answers. Both are judged on the same held-out pairs.

    Args:
        model: The model to read.
        pairs: Pairs by domain; those of one domain have different ids.
        layer: Read all directions at this layer instead.
        site: Where in the block.
        held_out: Share of the pairs of each domain that is held out.
        seed: Seed of the splits.
        **options: See `ReadOptions`.

    Raises:
        ValueError: If there are no domains, or a domain has too few pairs to split.
    """
    if not pairs:
        raise ValueError("there are no domains; give {domain: pairs}")
    split = {name: _split(name, of_name, held_out, seed) for name, of_name in pairs.items()}
    directions: dict[str, Directions] = {}
    for name, (train, _) in split.items():
        found = mean_diff(
            model,
            [pair.conversation("misaligned") for pair in train],
            [pair.conversation("aligned") for pair in train],
            site=site,
            layers="all" if layer is None else layer,
            seed=seed,
            **options,
        )
        directions[name] = found[max(found, key=lambda at, one=found: one.auroc.get(at, 0.5))]
    judged = [_both_sides(test) for _, test in split.values()]
    texts = [item for items, _ in judged for item in items]
    columns = readout_of(model, directions, texts, **options)
    values, _ = columns.read(model, texts, **options)
    ends = np.cumsum([len(items) for items, _ in judged])[:-1]
    parts = np.split(values, ends)
    words = [_bag_of_words(train) for train, _ in split.values()]
    matrices = [
        _matrices([[part[:, i] for part in parts] for i in range(len(split))], judged),
        _matrices([[judge(items) for items, _ in judged] for judge in words], judged),
    ]
    return TransferAuroc(
        tuple(split),
        columns.layers,
        *matrices[0],
        *matrices[1],
        n_train=tuple(len(train) for train, _ in split.values()),
        n_test=tuple(len(test) for _, test in split.values()),
    )


def _split(
    name: str, pairs: Sequence[Pair], held_out: float, seed: int
) -> tuple[tuple[Pair, ...], tuple[Pair, ...]]:
    """Training and held-out pairs that share no prompt."""
    prompts = {pair.prompt: pair for pair in reversed(pairs)}
    parts = split_pairs(list(prompts.values()), validation=0, test=held_out, seed=seed)
    if len(parts.train) < 2 or not parts.test:
        raise ValueError(
            f"domain {name!r} has {len(prompts)} different prompts, which leaves "
            f"{len(parts.train)} to fit to and {len(parts.test)} held out; give more pairs"
        )
    return parts.train, parts.test


def _both_sides(pairs: Sequence[Pair]) -> tuple[list[Conversation], Bool[np.ndarray, " n"]]:
    """Aligned answers, then misaligned ones in the same order."""
    items = [pair.conversation(side) for side in ("aligned", "misaligned") for pair in pairs]
    return items, np.arange(len(items)) >= len(pairs)


def _bag_of_words(
    train: Sequence[Pair],
) -> Callable[[Sequence[Conversation]], Float[np.ndarray, " n"]]:
    from sklearn.feature_extraction.text import TfidfVectorizer

    items, truth = _both_sides(train)
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    fitted = classifier("logistic", 10.0, vectorizer)
    fitted.fit([item.response for item in items], truth)
    return lambda items: fitted.decision_function([item.response for item in items])


def _matrices(
    scores: Sequence[Sequence[Float[np.ndarray, " n"]]],
    judged: Sequence[tuple[list[Conversation], Bool[np.ndarray, " n"]]],
) -> list[np.ndarray]:
    """AUROC, and the ends of its interval, of every row's scores on every judged set."""
    cells = [
        [
            auroc_interval(of_target, truth, np.arange(len(truth)) % (len(truth) // 2))
            for of_target, (_, truth) in zip(of_source, judged, strict=True)
        ]
        for of_source in scores
    ]
    return [
        np.array([[getattr(cell, end) for cell in row] for row in cells])
        for end in ("estimate", "low", "high")
    ]
