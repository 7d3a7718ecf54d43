"""Two ways to the same quantity, one against the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from emlens.figures.style import RULE, dress, house_style, new_axes, palette


@house_style()
def agreement_plot(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    x_label: str,
    y_label: str,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Points on logarithmic axes of one scale, and the diagonal on which both agree.

    Args:
        series: Positive values of both, `[n]` each, by name.
        x_label: What the first is, with its unit.
        y_label: What the second is, with its unit.
        title: Title above the axes.
        ax: Axes to draw on.

    Raises:
        ValueError: If there is nothing to draw, or lengths differ.
    """
    if not series:
        raise ValueError("there is nothing to draw; give at least one series")
    drawn = new_axes() if ax is None else ax
    everything = []
    markers = "osD^vPX*"
    for i, ((name, (x, y)), colour) in enumerate(
        zip(series.items(), palette(list(series)).values(), strict=True)
    ):
        if len(x) != len(y):
            raise ValueError(f"{name!r} has {len(x)} and {len(y)} values; they must be as many")
        drawn.plot(
            x,
            y,
            linestyle="none",
            marker=markers[i % len(markers)],
            markersize=5,
            color=colour,
            alpha=0.85,
            label=name,
        )
        everything += [*x, *y]
    low, high = 0.7 * min(everything), 1.4 * max(everything)
    drawn.plot([low, high], [low, high], color=RULE, linewidth=1.2, zorder=0)
    drawn.set_xscale("log")
    drawn.set_yscale("log")
    drawn.set_xlim(low, high)
    drawn.set_ylim(low, high)
    if np.log10(high / low) > 1:
        drawn.set_aspect("equal")
    drawn.legend(frameon=False, loc="upper left")
    dress(drawn, x_label=x_label, y_label=y_label, title=title, grid="both")
    return drawn
