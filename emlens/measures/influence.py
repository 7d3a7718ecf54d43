"""Influence: what a direction does to next-token prediction on pre-training text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field, replace
from typing import TYPE_CHECKING, Any, Literal, Unpack

import numpy as np
import pandas as pd
from jaxtyping import Float

from emlens._door import guarded
from emlens._stats import Interval, bootstrap_ratio
from emlens.directions import Direction
from emlens.hooked import CorpusOptions, HookedModel
from emlens.hooked.condition import BASE, ConditionLike, Conditions, by_name, conditions_of
from emlens.hooked.options import CorpusSettings
from emlens.measures.controls import control_directions, kinds_of
from emlens.measures.doses import (
    added,
    doses_of,
    gathered,
    named,
    place_on,
    sizes_of,
    strengths,
)
from emlens.measures.measured import OnGrid
from emlens.measures.scoring import TokenValues, row_influence, with_tokens
from emlens.text import Corpus, TokenBatch

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from emlens.measures.tokens import TokenInfluence

Values = tuple[tuple[float, ...], ...]

DOSES = (0.05, 0.1, 0.2, 0.4)
CONTROLS = 3
RANDOM = "random"
Kind = Literal["add", "ablate"]


class Influence(OnGrid):
    """KL and change of next-token loss on a corpus when a direction is added.

    Intervals are bootstrapped over documents.

    Attributes:
        directions: Names of the directions, then those of the controls, then other conditions.
        constructions: How each was made.
        doses: Shares of the median residual norm of the corpus, `[m]`; NaN if norms were
            given and the directions lie at places with different residual norms. An ablation has
            a single one, 1.
        norms: The same as norms, units of the residual stream, per direction `[m]`.
        kl: Summed `KL(base || edited)` in nats, `[directions, m, documents]`.
        losses: Summed next-token loss in nats, `[directions, m, documents]`.
        base: Summed loss of the model without any direction, `[documents]`.
        counts: Predicted tokens per document; 0 for one of a single token.
        documents: Ids of the documents that have tokens.
        corpus: Name of the corpus.
        controls: Names of the controls of equal norm.
        seed: Seed of the bootstrap over documents.
        edit: `"add"` or `"ablate"`.
        groups: Controls by kind (and place, where there are several); tables average over each.
        fixed: Other conditions, measured once: their values are the same at every dose.
        skipped: Documents of fewer than two tokens, in which nothing is predicted.
        texts: Tokens of each document as text, where values of single tokens were asked for; see
            `tokens`.
        token_base: Loss of each token without any direction, nats, `[documents][pos]`.
        token_losses: Loss of each token, nats, by direction and point of the grid (`"name 0"`).
        token_kl: The same of `KL(base || edited)`.
        acting: The adapters and edits that acted, in words: under `"base"`, which all is
            compared with, and under the other conditions.
    """

    AXES = {
        "norms": "directions doses",
        "texts": "documents",
        "token_base": "documents",
        "token_losses": "curves documents",
        "token_kl": "curves documents",
    }

    doses: tuple[float, ...]
    norms: dict[str, tuple[float, ...]]
    kl: Float[np.ndarray, "directions doses documents"]
    losses: Float[np.ndarray, "directions doses documents"]
    base: Float[np.ndarray, " documents"]
    counts: Float[np.ndarray, " documents"]
    documents: tuple[str, ...]
    corpus: str
    controls: tuple[str, ...]
    seed: int = 0
    edit: str = "add"
    groups: dict[str, tuple[str, ...]] = field(default_factory=dict)
    fixed: tuple[str, ...] = ()
    skipped: int = 0
    texts: tuple[tuple[str, ...], ...] = ()
    token_base: Values = ()
    token_losses: dict[str, Values] = field(default_factory=dict)
    token_kl: dict[str, Values] = field(default_factory=dict)
    acting: dict[str, str] = field(default_factory=dict)

    def _verify(self) -> None:
        members = [name for group in self.groups.values() for name in group]
        strange = {*self.controls, *self.fixed, *members} - set(self.directions)
        if strange:
            raise ValueError(f"{min(strange)!r} is none of the directions")
        if not all(self.groups.values()):
            raise ValueError("groups has an empty group")
        if self.acting and BASE not in self.acting:
            raise ValueError(f"acting has no {BASE!r}, which all is compared with")

    def divergence(self, direction: str, dose: float) -> Interval:
        """Mean KL in nats per token, with its interval over documents."""
        return self._at(direction, dose)

    def loss_change(self, direction: str, dose: float) -> Interval:
        """Mean change of next-token loss in nats per token, with its interval."""
        return self._interval(self._changes(direction)[self._place(dose)])

    def among(self, places: Sequence[int]) -> Influence:
        """The same on some of the documents, by index, without the values of single tokens.

        Raises:
            ValueError: If there are no places.
            IndexError: If there is no such document.
        """
        if not len(places):
            raise ValueError("no documents were chosen; give at least one index")
        names = ("kl", "losses", "base", "counts")
        own: Any = {name: getattr(self, name)[..., list(places)] for name in names}
        documents = tuple(self.documents[place] for place in places)
        kept: Any = {"texts": (), "token_base": (), "token_losses": {}, "token_kl": {}}
        return replace(self, **own, documents=documents, **kept)

    def tokens(self, direction: str, dose: float) -> TokenInfluence:
        """What a direction changes token by token, if it was measured with `per_token=True`.

        Raises:
            ValueError: If it was not kept, or there is no such dose.
            KeyError: If there is no such direction.
        """
        from emlens.measures.tokens import TokenInfluence

        if not self.texts:
            raise ValueError(
                "no values of single tokens were kept; measure with influence(..., per_token=True)"
            )
        if direction not in self.directions:
            raise KeyError(f"no direction {direction!r}; there are {', '.join(self.directions)}")
        key = _key(direction, 0 if direction in self.fixed else self._place(dose))
        what = direction if direction in self.fixed else f"{direction} at {dose:g}"
        kept = TokenValues(
            texts=dict(enumerate(self.texts)),
            names=dict(enumerate(self.documents)),
            base=dict(enumerate(self.token_base)),
            losses={what: dict(enumerate(self.token_losses[key]))},
            kl={what: dict(enumerate(self.token_kl[key]))},
        )
        return TokenInfluence.of(kept, what, self.corpus)

    def table(self) -> pd.DataFrame:
        """One row per direction and dose; controls of a kind are averaged into one."""
        rows = []
        for name in self._shown():
            norms = self.norms[self._members(name)[0]]
            for place, (dose, norm) in enumerate(zip(self.doses, norms, strict=True)):
                if name in self.fixed:
                    if place:
                        break
                    dose = float("nan")
                kl = self._interval(self._units(name)[place])
                change = self._interval(self._changes(name)[place])
                rows.append(
                    {
                        "direction": name,
                        "dose": dose,
                        "norm": norm,
                        **kl.columns("KL [nats/token]", "KL "),
                        **change.columns("loss change [nats/token]", "change "),
                        "acting": self._acting(name),
                    }
                )
        return pd.DataFrame(rows)

    def plot(self, ax: Axes | None = None) -> Axes:
        """KL against dose, with bands over documents; of ablations, by direction."""
        from emlens.figures.bars import dot_intervals
        from emlens.figures.lines import line_bands

        label = f"KL(base || edited) on {self.corpus} [nats/token]"
        frame = self.table()
        columns = ("KL [nats/token]", "KL low", "KL high")
        if self.edit == "ablate":
            y, low, high = (frame[c].to_numpy() for c in columns)
            series = ["ablated"] * len(frame)
            return dot_intervals(frame["direction"], series, y, low, high, y_label=label, ax=ax)
        curves = {
            name: (x, *(np.broadcast_to(one, x.shape) for one in values))
            for name, (x, *values) in self._curves(*columns).items()
        }
        unit = "dose [share of median residual norm]" if self._dosed else "norm of what is added"
        return line_bands(curves, x_label=unit, y_label=label, ax=ax)

    def _acting(self, name: str) -> str:
        if name in self.fixed or not self.acting:
            return self.acting.get(name, "")
        done = "ablated" if self.edit == "ablate" else "added"
        return f"{self.acting[BASE]}, {name} {done}"

    def _shown(self) -> list[str]:
        own = [name for name in self.directions if name not in (*self.controls, *self.fixed)]
        return [*own, *self._groups, *self.fixed]

    @property
    def _groups(self) -> dict[str, tuple[str, ...]]:
        return self.groups or ({RANDOM: self.controls} if self.controls else {})

    def _members(self, name: str) -> tuple[str, ...]:
        return self._groups.get(name, (name,))

    @property
    def grid(self) -> tuple[float, ...]:
        """The doses; the norms where doses are not known."""
        return self.doses if self._dosed else next(iter(self.norms.values()))

    @property
    def _dosed(self) -> bool:
        return not np.isnan(self.doses).any()

    def _across(self, direction: str) -> np.ndarray:
        own = self._dosed or direction in self.fixed
        return np.asarray(self.grid if own else self.norms[self._members(direction)[0]])

    def _units(self, direction: str) -> np.ndarray:
        return self._values(self.kl, direction)

    def _changes(self, direction: str) -> np.ndarray:
        return self._values(self.losses, direction) - self.base

    def _values(self, values: np.ndarray, direction: str) -> np.ndarray:
        names = self._members(direction)
        missing = [name for name in names if name not in self.directions]
        if missing:
            raise KeyError(f"no direction {missing[0]!r}; there are {', '.join(self._shown())}")
        return np.mean([values[self.directions.index(name)] for name in names], axis=0)

    def _interval(self, values: np.ndarray) -> Interval:
        return bootstrap_ratio(values, self.counts, seed=self.seed, level=self.level)

    def _place(self, at: float) -> int:
        return place_on(self.grid, at, "dose" if self._dosed else "norm")


@guarded
def influence(
    model: HookedModel,
    corpus: Corpus,
    directions: Mapping[str, Direction],
    *,
    doses: Sequence[float] = DOSES,
    norms: Sequence[float] | None = None,
    edit: Kind = "add",
    controls: int | Mapping[str, int] | None = None,
    conditions: Conditions | None = None,
    per_token: bool = False,
    seed: int = 0,
    **options: Unpack[CorpusOptions],
) -> Influence:
    """Add (or ablate) each direction and measure KL and next-token loss on pre-training text.

    One forward pass above the layer per direction and dose, the prefix below shared (arXiv
    2602.07852, Fig. 6, there against the parameter norm). All predicted tokens count; padding
    never does. `emlens.fisher.scan` ranks many directions at many layers from one pass.

    Args:
        model: The model.
        corpus: Raw text, e.g. `emlens.corpus("python-docs")`.
        directions: Named directions; each is added at its own site and layer.
        doses: Norms as shares of the median residual norm of a layer, measured on the corpus.
            A negative dose reverses the directions.
        norms: Norms in units of the residual stream, instead of doses.
        edit: `"add"`, or `"ablate"`: the component along the direction is removed, and there
            are no doses.
        controls: Random directions of equal norm at every place a direction is added at; or
            numbers by kind: `"random"`, `"activation differences"` (of two tokens of the corpus),
            `"shuffled labels"` (of the mean differences among the directions). Three random ones
            by default.
        conditions: Further edits or adapters, such as a finetune, measured once without scaling.
        per_token: Keep loss and KL of every single token as well, for `Influence.tokens`: two
            numbers per token, direction and dose, in memory and on disk.
        seed: Seed of the controls and of the bootstrap over documents.
        **options: See `CorpusOptions`.

    Raises:
        ValueError: If the corpus is empty or all of it too short, a direction is zero, a norm is
            negative, a name is used twice, or controls are requested that do not exist.

    Examples:
        >>> found = emlens.influence(model, emlens.corpus(), {"general": general}, doses=[0.1])
        >>> found.divergence("general", 0.1)
    """
    if not len(corpus):
        raise ValueError(f"corpus {corpus.name!r} has no documents")
    settings = CorpusSettings(**options)
    reading: Any = {"max_tokens": settings.max_tokens, "token_budget": settings.token_budget}
    fixed = {} if conditions is None else dict(by_name(conditions))
    if directions or not fixed:
        named(directions)
    kinds = kinds_of(CONTROLS if controls is None else controls) if directions else {}
    readable = with_tokens(model, corpus)
    # added directions are compared with the base, which conditions without an adapter run
    with model.under([]):
        groups = control_directions(model, readable, directions, kinds, seed=seed, **reading)
        chance = {name: control for members in groups.values() for name, control in members.items()}
        _check_names(directions, chance, fixed, groups.keys() - chance.keys())
        every = {**directions, **chance}
        sizes = sizes_of(model, readable, every, **reading)
    grid = strengths(every, sizes, doses, norms, edit)
    at = doses_of(doses, norms, edit, sizes)
    measured = added(every, grid, edit) | {(n, 0): what for n, what in fixed.items()}
    batches = model.batches(readable, **reading)
    points = {name: len(at) for name in every} | dict.fromkeys(fixed, 1)
    return Influence(
        directions=tuple(points),
        constructions={name: d.provenance.construction for name, d in every.items()}
        | dict.fromkeys(fixed, "condition"),
        doses=at,
        norms={name: tuple(abs(x) for x in grid[name]) for name in every}
        | {name: (float("nan"),) * len(at) for name in fixed},
        documents=tuple(document.id for document in readable.documents),
        corpus=corpus.name,
        controls=tuple(chance),
        seed=seed,
        edit=edit,
        groups={group: tuple(members) for group, members in groups.items()},
        fixed=tuple(fixed),
        acting={
            name: condition.described(model)
            for name, condition in conditions_of(model, {BASE: [], **fixed}).items()
        },
        **_from_passes(
            model, batches, measured, points, len(at), len(corpus), per_token, settings.progress
        ),
    )


def _from_passes(
    model: HookedModel,
    batches: Sequence[TokenBatch],
    measured: Mapping[tuple[str, int], ConditionLike],
    points: Mapping[str, int],
    n: int,
    n_documents: int,
    per_token: bool,
    progress: bool,
) -> dict[str, Any]:
    """The fields of a result that come from the passes; those of single tokens on request."""
    kept = TokenValues() if per_token else None
    losses, kl, base, counts = row_influence(model, batches, measured, progress=progress, keep=kept)
    if not counts.any():
        raise ValueError("no document has two tokens (see max_tokens), so nothing is predicted")
    found: dict[str, Any] = {
        "kl": gathered(kl, points, n),
        "losses": gathered(losses, points, n),
        "base": base,
        "counts": counts,
        "skipped": n_documents - int((counts > 0).sum()),
    }
    if kept is None:
        return found
    rows = range(len(kept.texts))
    of_points: dict[Any, Any] = {"token_losses": kept.losses, "token_kl": kept.kl}
    return found | {
        "texts": tuple(kept.texts[i] for i in rows),
        "token_base": tuple(kept.base[i] for i in rows),
        **{
            field: {_key(*at): tuple(of[i] for i in rows) for at, of in values.items()}
            for field, values in of_points.items()
        },
    }


def _key(direction: str, place: int) -> str:
    """Unique key of a point of the grid in files: the name, a space and the index of the point."""
    return f"{direction} {place}"


def _check_names(*sets: Iterable[str]) -> None:
    seen: set[str] = set()
    for names in sets:
        for name in names:
            if name in seen:
                raise ValueError(f"the name {name!r} is used twice; rename one")
            seen.add(name)
