"""Steering: behaviour over layers and doses."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import fill
from typing import TYPE_CHECKING

import numpy as np

from emlens._door import guarded
from emlens._results import Result
from emlens.directions import Directions, random_direction
from emlens.directions.fits import check_fits
from emlens.edits import Add
from emlens.evals.behaviour import LABEL, Behaviour, judge_title
from emlens.hooked import HookedModel
from emlens.hooked.condition import BASE, ConditionLike

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


class SteeringSweep(Result):
    """Behaviour when a direction is added, over layers and doses, beside a random control.

    Attributes:
        rows: `layer`, `dose`, `value`, `low`, `high` (change against the base), `coherent`, and
            `random`, `random low`, `random high` (the same for a random direction of equal norm);
            `acting`, the adapters and edits that acted.
        what: What the effect is, with its unit.
        floor: Coherent share below which a dose does not count.
        judged_by: Who judged; empty for no judge.
    """

    HOLDS_ENDS = True

    rows: tuple[dict, ...]
    what: str
    floor: float
    judged_by: str = ""

    @property
    def best(self) -> dict | None:
        """The layer and dose with the largest effect above the floor of coherence."""
        known = [row for row in self.rows if np.isfinite(row["value"])]
        fine = [r for r in known if np.isnan(r["coherent"]) or r["coherent"] >= self.floor]
        return max(fine, key=lambda row: row["value"]) if fine else None

    def table(self) -> pd.DataFrame:
        """One row per layer and dose."""
        import pandas as pd

        frame = pd.DataFrame(self.rows)
        return frame.assign(**{"judged by": self.judged_by}) if self.judged_by else frame

    def plot(self, ax: Axes | None = None) -> Axes:
        """Effect against dose, a curve per layer (up to six), and a random control.

        Of several layers it is the control at the one with the best effect.
        """
        from emlens.figures.lines import line_bands

        curves = {}
        layers = list(dict.fromkeys(row["layer"] for row in self.rows))[:6]
        for layer in layers:
            own = [row for row in self.rows if row["layer"] == layer]
            columns = (np.array([row[k] for row in own]) for k in ("value", "low", "high"))
            curves[f"layer {layer}"] = (np.array([row["dose"] for row in own]), *columns)
        best = self.best["layer"] if self.best else layers[0]
        beside = [row for row in self.rows if row["layer"] == best]
        x = np.array([row["dose"] for row in beside])
        chance = (
            np.array([row[k] for row in beside]) for k in ("random", "random low", "random high")
        )
        curves[f"random, layer {best}" if len(layers) > 1 else "random"] = (x, *chance)
        return line_bands(
            curves,
            x_label="dose [share of median residual norm]",
            y_label=fill(f"change of {self.what}", LABEL),
            title=judge_title(self.judged_by),
            reference=0.0,
            ax=ax,
        )


@guarded
def steering_sweep(
    model: HookedModel,
    behaviour: Behaviour,
    directions: Directions,
    *,
    doses: Sequence[float] = (0.1, 0.2, 0.4),
    layers: Sequence[int] | None = None,
    floor: float = 0.5,
    seed: int = 0,
) -> SteeringSweep:
    """Add a direction at each layer and dose, and a random one of equal norm beside it.

    Args:
        model: The model.
        behaviour: How behaviour is measured.
        directions: One per layer, with residual norms (extracted ones have them).
        doses: Norms as shares of the median residual norm.
        layers: Layers to steer at; all that the directions have by default.
        floor: Coherent share below which `best` does not count a dose.
        seed: Seed of the random directions.

    Raises:
        ValueError: If there are no doses, or a direction knows no residual norm.
    """
    wanted = list(directions.layers if layers is None else layers)
    check_fits(model, directions, "a direction", layers=wanted)
    conditions: dict[str, ConditionLike] = {BASE: []}
    for layer in wanted:
        one = directions[layer]
        chance = random_direction(one, seed + layer)
        for dose in doses:
            conditions[f"{layer} {dose}"] = [Add(one, dose=dose)]
            conditions[f"random {layer} {dose}"] = [Add(chance, dose=dose)]
    effect = behaviour.measure(model, conditions)
    rows = []
    for layer in wanted:
        for dose in doses:
            change = effect.change(f"{layer} {dose}")
            beside = effect.change(f"random {layer} {dose}")
            place = effect.conditions.index(f"{layer} {dose}")
            rows.append(
                {
                    "layer": layer,
                    "dose": float(dose),
                    "value": change.estimate,
                    "low": change.low,
                    "high": change.high,
                    "coherent": effect.coherent[place],
                    "random": beside.estimate,
                    "random low": beside.low,
                    "random high": beside.high,
                    "acting": effect.acting.get(f"{layer} {dose}", ""),
                }
            )
    return SteeringSweep(tuple(rows), effect.what, floor, effect.judged_by)
