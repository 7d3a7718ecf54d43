"""Influence: what a direction does to next-token prediction on pre-training text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from emlens._results import Result
from emlens._stats import Interval, bootstrap_ratio
from emlens.directions import Direction, random_direction
from emlens.directions import residual_norm as measure_residual_norm
from emlens.edits import Add
from emlens.hooked import Edit, HookedModel
from emlens.measures.grids import named
from emlens.measures.scoring import row_influence
from emlens.text import Corpus

DOSES = (0.05, 0.1, 0.2, 0.4)
RANDOM = "random"


@dataclass(frozen=True)
class Influence(Result):
    """KL and change of next-token loss on a corpus when a direction is added.

    Attributes:
        directions: Names of the directions, then those of the random controls.
        constructions: How each was made.
        doses: Shares of the median residual norm of the corpus, `[m]`.
        norms: The same as norms, units of the residual stream, per direction `[m]`.
        kl: Summed `KL(base || edited)` in nats, `[directions, m, documents]`.
        losses: Summed next-token loss in nats, `[directions, m, documents]`.
        base: Summed loss of the model without any direction, `[documents]`.
        counts: Predicted tokens per document; 0 for one shorter than two tokens.
        documents: Their ids.
        corpus: Name of the corpus.
        controls: Names of the random controls of equal norm.
        seed: Seed of the bootstrap over documents.
    """

    directions: tuple[str, ...]
    constructions: dict[str, str]
    doses: tuple[float, ...]
    norms: dict[str, tuple[float, ...]]
    kl: tuple[tuple[tuple[float, ...], ...], ...]
    losses: tuple[tuple[tuple[float, ...], ...], ...]
    base: tuple[float, ...]
    counts: tuple[float, ...]
    documents: tuple[str, ...]
    corpus: str
    controls: tuple[str, ...]
    seed: int = 0

    def divergence(self, direction: str, dose: float) -> Interval:
        """Mean KL in nats per token, with its interval over documents."""
        return self._ratio(self._kl(direction)[self._place(dose)])

    def loss_change(self, direction: str, dose: float) -> Interval:
        """Mean change of next-token loss in nats per token, with its interval."""
        return self._ratio(self._losses(direction)[self._place(dose)] - np.asarray(self.base))

    def difference(self, first: str, second: str, dose: float) -> Interval:
        """Paired difference of KL, `first - second`, in nats per token."""
        place = self._place(dose)
        return self._ratio(self._kl(first)[place] - self._kl(second)[place])

    def table(self) -> pd.DataFrame:
        """One row per direction and dose; the random controls are averaged into one."""
        rows = []
        for name in self._shown():
            norms = self.norms[self.controls[0] if name == RANDOM else name]
            for dose, norm in zip(self.doses, norms, strict=True):
                kl, change = self.divergence(name, dose), self.loss_change(name, dose)
                rows.append(
                    {
                        "direction": name,
                        "dose": dose,
                        "norm": norm,
                        "KL [nats/token]": kl.estimate,
                        "KL low": kl.low,
                        "KL high": kl.high,
                        "loss change [nats/token]": change.estimate,
                        "change low": change.low,
                        "change high": change.high,
                    }
                )
        return pd.DataFrame(rows)

    def plot(self, ax=None):
        """KL against dose, with bands over documents."""
        from emlens.figures import line_bands

        curves = {}
        for name, part in self.table().groupby("direction", sort=False):
            y, low, high = (part[c].to_numpy() for c in ("KL [nats/token]", "KL low", "KL high"))
            curves[str(name)] = (np.asarray(self.doses), y, low, high)
        return line_bands(
            curves,
            x_label="dose [share of median residual norm]",
            y_label=f"KL(base || edited) on {self.corpus} [nats/token]",
            ax=ax,
        )

    def _shown(self) -> list[str]:
        named_ones = [name for name in self.directions if name not in self.controls]
        return [*named_ones, RANDOM] if self.controls else named_ones

    def _kl(self, direction: str) -> np.ndarray:
        return self._values(self.kl, direction)

    def _losses(self, direction: str) -> np.ndarray:
        return self._values(self.losses, direction)

    def _values(self, values: Sequence, direction: str) -> np.ndarray:
        names = self.controls if direction == RANDOM and self.controls else (direction,)
        missing = [name for name in names if name not in self.directions]
        if missing:
            raise KeyError(f"no direction {missing[0]!r}; there are {', '.join(self._shown())}")
        return np.mean([values[self.directions.index(name)] for name in names], axis=0)

    def _ratio(self, sums: np.ndarray) -> Interval:
        return bootstrap_ratio(sums, self.counts, seed=self.seed)

    def _place(self, dose: float) -> int:
        return int(np.argmin(np.abs(np.asarray(self.doses) - dose)))


def influence(
    model: HookedModel,
    corpus: Corpus,
    directions: Mapping[str, Direction],
    *,
    doses: Sequence[float] = DOSES,
    controls: int = 3,
    max_tokens: int = 128,
    token_budget: int = 1024,
    seed: int = 0,
    progress: bool = False,
) -> Influence:
    """Add each direction at each dose and measure KL and next-token loss on pre-training text.

    The exact method: one forward pass above the layer per direction and dose, the prefix below
    shared (arXiv 2602.07852, Fig. 6, there against the parameter norm). All predicted tokens
    count; padding never does.

    Args:
        model: The model.
        corpus: Raw text, e.g. `emlens.corpus("python-docs")`.
        directions: Named directions; each is added at its own site and layer.
        doses: Norms as shares of the median residual norm of a layer, measured on the corpus.
            A negative dose turns the directions round.
        controls: Random directions of equal norm at the first direction's place.
        max_tokens: Tokens that a document is cut to.
        token_budget: Padded tokens of a batch.
        seed: Seed of the controls and of the bootstrap over documents.
        progress: Show a progress bar.

    Raises:
        ValueError: If the corpus is empty, or a direction is zero.
    """
    named(directions)
    if not len(corpus):
        raise ValueError(f"corpus {corpus.name!r} has no documents")
    first = next(iter(directions.values()))
    random = {f"{RANDOM} {i}": random_direction(first, seed + i) for i in range(controls)}
    every = {**directions, **random}
    batches = model.batches(corpus, token_budget=token_budget, max_tokens=max_tokens)
    sizes = _sizes(model, corpus, every, max_tokens, token_budget)
    conditions: dict[str, list[Edit]] = {
        f"{name} {dose}": [Add(d.scaled_to(dose * sizes[d.site, d.layer]))]
        for name, d in every.items()
        for dose in doses
    }
    losses, kl, base, counts = row_influence(model, batches, conditions, progress=progress)

    return Influence(
        directions=tuple(every),
        constructions={name: d.provenance.construction for name, d in every.items()},
        doses=tuple(float(dose) for dose in doses),
        norms={
            name: tuple(abs(x) * sizes[d.site, d.layer] for x in doses) for name, d in every.items()
        },
        kl=_gathered(kl, every, doses),
        losses=_gathered(losses, every, doses),
        base=tuple(base.tolist()),
        counts=tuple(counts.tolist()),
        documents=tuple(document.id for document in corpus.documents),
        corpus=corpus.name,
        controls=tuple(random),
        seed=seed,
    )


def _gathered(
    values: Mapping[str, np.ndarray], names: Iterable[str], doses: Sequence[float]
) -> tuple[tuple[tuple[float, ...], ...], ...]:
    """Per-document values by direction and dose."""
    return tuple(tuple(tuple(values[f"{n} {x}"].tolist()) for x in doses) for n in names)


def _sizes(
    model: HookedModel,
    corpus: Corpus,
    directions: Mapping[str, Direction],
    max_tokens: int,
    token_budget: int,
) -> dict[tuple[str, int], float]:
    """Median residual norm on the corpus at every place a direction is added."""
    places: dict = {}
    for direction in directions.values():
        places.setdefault(direction.site, set()).add(direction.layer)
    return {
        (site, layer): size
        for site, layers in places.items()
        for layer, size in measure_residual_norm(
            model,
            corpus,
            layers,
            site=site,
            max_tokens=max_tokens,
            token_budget=token_budget,
        ).items()
    }
