"""Two measurements of the same quantity, plotted against each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from emlens.figures.style import COLOURS, MARKED, MUTED, RULE, dress, house_style, new_axes, palette


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
            raise ValueError(f"{name!r} has {len(x)} and {len(y)} values; the numbers must match")
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


@house_style()
def score_plot(
    x: Sequence[float],
    y: Sequence[float],
    *,
    threshold: float,
    x_label: str,
    y_label: str,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Scores of the same answers by two judges, 0 to 100, with counts on each side of a threshold.

    Args:
        x: Scores of the first, `[n]`.
        y: Scores of the second, `[n]`.
        threshold: Below it a score is low.
        x_label: Name of the first judge.
        y_label: Name of the second.
        title: Title above the axes.
        ax: Axes to draw on.

    Raises:
        ValueError: If there is nothing to draw, or lengths differ.
    """
    if not len(x):
        raise ValueError("there is nothing to draw; give at least one score of each")
    if len(x) != len(y):
        raise ValueError(f"there are {len(x)} and {len(y)} scores; the numbers must match")
    drawn = new_axes(width=5.0, height=4.4) if ax is None else ax
    for line in (drawn.axvline, drawn.axhline):
        line(threshold, color=RULE, linewidth=1.2, zorder=1)
    low_x, low_y = np.asarray(x) < threshold, np.asarray(y) < threshold
    agree = low_x == low_y
    for chosen, colour, marker in ((agree, COLOURS["base"], "o"), (~agree, MARKED, "X")):
        drawn.scatter(
            np.asarray(x)[chosen],
            np.asarray(y)[chosen],
            s=30,
            marker=marker,
            color=colour,
            alpha=0.7,
            linewidths=0,
            clip_on=False,
            zorder=3,
        )
    for side_x, place_x in ((low_x, threshold / 2), (~low_x, (100 + threshold) / 2)):
        for side_y, place_y in ((low_y, -5), (~low_y, 105)):
            count = int((side_x & side_y).sum())
            drawn.text(place_x, place_y, str(count), ha="center", va="center", color=MUTED)
    drawn.set_xlim(-1, 101)
    drawn.set_ylim(-11, 111)
    ticks = (0, 25, 50, 75, 100)
    drawn.set_xticks(ticks)
    drawn.set_yticks(ticks)
    dress(drawn, x_label=x_label, y_label=y_label, title=title, grid=None)
    return drawn
