"""Transfer: the direction of one organism, ablated in another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from emlens._door import guarded
from emlens._results import Result
from emlens._stats import Interval
from emlens.directions import Directions, random_direction
from emlens.edits import Ablate
from emlens.evals.behaviour import Behaviour, answer_columns
from emlens.evals.tables import NO_EFFECT, NOT_SCORED, ORGANISM, averaged, single_layer, triple
from emlens.hooked import Condition, HookedModel
from emlens.hooked.condition import BASE, Conditions, by_name, conditions_of

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

NONE = np.zeros((0, 0))


class Transfer(Result):
    """What is left of each organism when the direction of another is ablated in it.

    Attributes:
        organisms: Names of the organisms, the rows.
        directions: Names of the directions, the columns.
        whole: Effect of each organism, with its interval.
        left: Effect left, `[organisms][directions]`, with intervals.
        removed: Share of the effect that is removed, percent, likewise; NaN where the organism's
            effect is not clear of zero.
        what: What the effect of each organism is, with its unit.
        coherent: Share of coherent answers, `[organisms][directions]`; NaN for an organism
            without generated answers, empty if there are none at all.
        judged_by: Who judged the answers of each organism; empty for no judge.
        acting: The adapters and edits that acted, `[organisms][directions]`, in words.
    """

    HOLDS_ENDS = True
    AXES = {
        "what": "organisms",
    }

    organisms: tuple[str, ...]
    directions: tuple[str, ...]
    whole: Float[np.ndarray, "organisms 3"]
    left: Float[np.ndarray, "organisms directions 3"]
    removed: Float[np.ndarray, "organisms directions 3"]
    what: tuple[str, ...]
    coherent: Float[np.ndarray, "organisms directions"] = field(default_factory=lambda: NONE)
    judged_by: tuple[str, ...] = ()
    acting: tuple[tuple[str, ...], ...] = ()

    def table(self) -> pd.DataFrame:
        """One row per organism and direction.

        Where organisms were measured in different ways, a column says how each was; where answers
        were generated, the coherent ones and the judge stand beside. The share
        removed is blank, with the reason, where the organism's effect is not clear of zero.
        """
        import pandas as pd

        rows, ways = [], list(dict.fromkeys(self.what))
        units = {way[way.rfind("[") :] if way.endswith("]") else "" for way in ways}
        unit = units.pop() if len(units) == 1 else "[as measured]"
        shown = ways[0] if len(ways) == 1 else unit
        for i, organism in enumerate(self.organisms):
            for j, direction in enumerate(self.directions):
                left, removed = Interval(*self.left[i, j]), Interval(*self.removed[i, j])
                measured = {"measured": self.what[i]} if len(ways) > 1 else {}
                rows.append(
                    {
                        "organism": organism,
                        "direction from": direction,
                        **measured,
                        f"before, change of {shown}": self.whole[i, 0],
                        **left.columns(f"after, change of {shown}"),
                        "removed [%]": removed.estimate,
                        "removed low [%]": removed.low,
                        "removed high [%]": removed.high,
                        **answer_columns(
                            self.coherent[i, j] if self.coherent.size else float("nan"),
                            self.judged_by[i] if self.judged_by else "",
                        ),
                        "acting": self.acting[i][j] if self.acting else "",
                    }
                )
        frame = pd.DataFrame(rows)
        blank = frame["removed [%]"].isna()
        clear = np.repeat(
            [low > 0 or high < 0 for _, low, high in self.whole], len(self.directions)
        )
        why = np.where(clear, NOT_SCORED, NO_EFFECT)
        return frame.assign(note=np.where(blank, why, "")) if bool(blank.any()) else frame

    def plot(self, ax: Axes | None = None) -> Axes:
        """Share of the effect that is removed, percent, as a heat map with intervals.

        Above it stands the lowest share of coherent answers, where answers were generated.
        Rows of organisms whose effect is not clear of zero stay blank. The colours reach to the
        largest value; zero is white.
        """
        from emlens.figures import heatmap

        known = self.coherent[np.isfinite(self.coherent)]
        most = float(np.nanmax(np.abs(self.removed[..., 0]), initial=100.0))
        return heatmap(
            self.removed,
            self.organisms,
            self.directions,
            value_label="effect removed [%]",
            x_label="direction from",
            y_label="organism",
            title=f"{known.min():.0%} or more of the answers are coherent" if len(known) else None,
            limits=(-most, most),
            digits=0,
            ax=ax,
        )


@guarded
def transfer_table(
    model: HookedModel,
    behaviours: Mapping[str, Behaviour] | Behaviour,
    organisms: Conditions,
    directions: Mapping[str, Directions],
    *,
    layer: int | None = None,
    randoms: int = 2,
    seed: int = 0,
) -> Transfer:
    """Ablate the direction of each organism in every other, at all layers.

    Args:
        model: The model.
        behaviours: How behaviour is measured, for all organisms alike or for each.
        organisms: What makes each misaligned.
        directions: A direction for each, or others; a random control is added.
        layer: The layer whose direction is ablated everywhere; the middle one by default.
        randoms: Random directions, averaged in one column.
        seed: Seed of the random directions.

    Raises:
        ValueError: If there are no organisms or directions, an organism has no behaviour, or a
            direction has the name of something that is measured beside it.
    """
    named = by_name(organisms, "organisms")
    if not named or not directions:
        raise ValueError("a transfer table needs at least one organism and one direction")
    reserved = {BASE, ORGANISM, "random", *(f"random {i}" for i in range(randoms))}
    taken = sorted(reserved & set(directions))
    if taken:
        raise ValueError(
            f"a direction cannot be called {taken[0]!r}, which is measured beside it; rename it"
        )
    chosen = {name: single_layer(value, layer) for name, value in directions.items()}
    first = next(iter(chosen.values()))
    chance = [random_direction(first, seed + i) for i in range(randoms)]
    where = range(model.n_layers)
    whole, left, removed, what, coherent, judges, acting = [], [], [], [], [], [], []
    for name, organism in conditions_of(model, named).items():
        behaviour = behaviours if not isinstance(behaviours, Mapping) else behaviours.get(name)
        if behaviour is None:
            raise ValueError(f"no behaviour was given for organism {name!r}")
        conditions: dict[str, Condition] = {BASE: Condition(), ORGANISM: organism}
        every = {**chosen, **{f"random {i}": x for i, x in enumerate(chance)}}
        for label, direction in every.items():
            conditions[label] = organism.with_edits(Ablate(direction, layers=where))
        effect = behaviour.measure(model, conditions)
        if chance:
            names = tuple(f"random {i}" for i in range(randoms))
            effect = averaged(effect, "random", names)
        columns = [*chosen, *(["random"] if chance else [])]
        whole.append(triple(effect.change(ORGANISM, BASE)))
        left.append(tuple(triple(effect.change(label, BASE)) for label in columns))
        removed.append(tuple(_removed(effect.share(label, ORGANISM, BASE)) for label in columns))
        what.append(effect.what)
        shares = dict(zip(effect.conditions, effect.coherent, strict=True))
        coherent.append(tuple(shares[label] for label in columns))
        judges.append(effect.judged_by)
        acting.append(tuple(effect.acting.get(label, "") for label in columns))
    columns = (*chosen, *(("random",) if chance else ()))
    generated = coherent if np.isfinite(coherent).any() else []
    return Transfer(
        tuple(map(str, named)),
        columns,
        np.array(whole),
        np.array(left),
        np.array(removed),
        tuple(what),
        np.array(generated),
        tuple(judges),
        tuple(acting),
    )


def _removed(left: Interval) -> tuple[float, float, float]:
    return 100 - left.estimate, 100 - left.high, 100 - left.low
