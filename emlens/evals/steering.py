"""Steering: behaviour over layers and doses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from emlens._door import guarded
from emlens._results import Result
from emlens.directions import Directions, random_direction
from emlens.directions.fits import check_fits
from emlens.edits import Add
from emlens.evals.behaviour import Behaviour, judge_title
from emlens.hooked import HookedModel
from emlens.hooked.condition import BASE, ConditionLike

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

MOST = 6
"""The most layers that are drawn."""


class SteeringSweep(Result):
    """Behaviour when a direction is added, over layers and doses, beside a random control.

    Attributes:
        rows: `layer`, `dose`, `value`, `low`, `high` (change against the base), `coherent`, and
            `random`, `random low`, `random high`, `random coherent` (the same for a random
            direction of equal norm); `acting`, the adapters and edits that acted.
        what: What the effect is, with its unit.
        floor: Coherent share below which a dose does not count.
        judged_by: Who judged; empty for no judge.
        coherent_base: Share of coherent answers without steering; NaN where nothing was generated.
    """

    HOLDS_ENDS = True

    rows: tuple[dict, ...]
    what: str
    floor: float
    judged_by: str = ""
    coherent_base: float = float("nan")

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

    def plot(self, ax: Axes | None = None) -> Axes | list[Axes]:
        """Effect against dose from 0, a panel per layer (up to six), each with its random control.

        Where answers were generated, the share of coherent ones stands below. On `ax` the effect
        at the layer with the best one is drawn alone.
        """
        from emlens.figures.style import new_panels, share_y

        layers = list(dict.fromkeys(row["layer"] for row in self.rows))[:MOST]
        if ax is not None:
            best = self.best["layer"] if self.best else layers[0]
            return self._effect(best, ax, last=True)
        judged = any(np.isfinite(row["coherent"]) for row in self.rows)
        n, rows = len(layers), 1 + judged
        axes = new_panels(n, rows, width=max(6.6, 2.3 * n + 1.6), height=0.5 + 2.7 * rows)
        for place, layer in enumerate(layers):
            self._effect(layer, axes[place], last=place == n - 1)
            if judged:
                self._coherence(layer, axes[n + place], last=place == n - 1)
        share_y(axes[:n])
        for place, panel in enumerate(axes):
            if place % n:
                panel.set_ylabel("")
                panel.tick_params(labelleft=False)
            if place < n * (rows - 1):
                panel.set_xlabel("")
        figure = axes[0].get_figure(root=True)
        if figure is not None and self.judged_by:
            title = str(judge_title(self.judged_by))
            figure.suptitle(title, x=0.01, ha="left", fontsize=10)
        return axes

    def _effect(self, layer: int, ax: Axes, *, last: bool) -> Axes:
        zero = (0.0, 0.0, 0.0)
        parts = {"direction": ("value", "low", "high")}
        parts["random"] = ("random", "random low", "random high")
        label = f"change of {self.what}".replace(" [", "\n[")
        return self._panel(layer, {k: (v, zero) for k, v in parts.items()}, label, 0.0, ax, last)

    def _coherence(self, layer: int, ax: Axes, *, last: bool) -> Axes:
        base = (100 * self.coherent_base,)
        parts = {"direction": (("coherent",), base), "random": (("random coherent",), base)}
        label = "coherent answers [%]"
        floor = (100 * self.floor, "floor")
        drawn = self._panel(layer, parts, label, floor if last else floor[0], ax, last, 100)
        drawn.set_ylim(-4, 104)
        drawn.set_title("", loc="left")
        return drawn

    def _panel(
        self,
        layer: int,
        parts: dict[str, tuple[tuple[str, ...], tuple[float, ...]]],
        y_label: str,
        reference: float | tuple[float, str],
        ax: Axes,
        last: bool,
        factor: float = 1.0,
    ) -> Axes:
        from emlens.figures.lines import line_bands

        own = sorted((r for r in self.rows if r["layer"] == layer), key=lambda row: row["dose"])
        x = np.array([0.0, *(row["dose"] for row in own)])
        curves = {
            name: (
                x,
                *(
                    np.array([start, *(factor * row.get(key, np.nan) for row in own)])
                    for key, start in zip(keys, zero, strict=True)
                ),
            )
            for name, (keys, zero) in parts.items()
        }
        return line_bands(
            curves,
            x_label="dose [share of median\nresidual norm]",
            y_label=y_label,
            title=f"layer {layer}",
            reference=reference,
            named=last,
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
    coherent = dict(zip(effect.conditions, effect.coherent, strict=True))
    rows = []
    for layer in wanted:
        for dose in doses:
            change = effect.change(f"{layer} {dose}")
            beside = effect.change(f"random {layer} {dose}")
            rows.append(
                {
                    "layer": layer,
                    "dose": float(dose),
                    "value": change.estimate,
                    "low": change.low,
                    "high": change.high,
                    "coherent": coherent[f"{layer} {dose}"],
                    "random": beside.estimate,
                    "random low": beside.low,
                    "random high": beside.high,
                    "random coherent": coherent[f"random {layer} {dose}"],
                    "acting": effect.acting.get(f"{layer} {dose}", ""),
                }
            )
    return SteeringSweep(tuple(rows), effect.what, floor, effect.judged_by, coherent[BASE])
