"""Estimates with their intervals, by group and series: as points or as bars."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import ArrayLike

from emlens.figures.style import (
    COLOURS,
    INK,
    PAPER,
    RULE,
    dress,
    house_style,
    kind_of,
    new_axes,
    palette,
    shortened,
    width_of,
    wrapped,
)

if TYPE_CHECKING:
    pass

MARKERS = {"o": 6.5, "s": 6, "D": 5.8, "^": 7.5, "v": 7.5, "P": 8, "X": 8, "*": 11}
"""Markers and their sizes in points, in the order of the series."""

SLANTED = 20
"""Characters per line of a slanted name."""


@house_style()
def dot_intervals(
    groups: Iterable[object],
    series: Iterable[object] | None,
    values: ArrayLike,
    low: ArrayLike,
    high: ArrayLike,
    *,
    y_label: str,
    x_label: str = "",
    title: str | None = None,
    ax: Axes | None = None,
    zero: float | None = 0.0,
    bars: bool = False,
    colours: Mapping[str, str] | None = None,
) -> Axes:
    """Estimates with intervals, by group and within it by series, and a line at zero.

    The five sequences are parallel, with one entry per estimate, like the columns of a tidy table.
    Groups and series are drawn in the order in which they first appear.

    Args:
        groups: Group of each estimate, e.g. its domain, `[n]`.
        series: Series of each estimate, e.g. its condition, `[n]`; None for one estimate per
            group, drawn in the colour of the group's name where that has a fixed one.
        values: Estimates, `[n]`; NaN leaves the place empty.
        low: Lower ends of the intervals, `[n]`; NaN draws no interval.
        high: Upper ends of the intervals, `[n]`.
        y_label: What is estimated, with its unit.
        x_label: What the groups are.
        title: Title above the axes.
        ax: Axes to draw on; a figure of its own if not given.
        zero: Position of the reference line; `None` for no line.
        bars: Whether to draw bars from `zero` instead of points.
        colours: Colours by series, instead of the house colours.

    Returns:
        The axes.

    Raises:
        ValueError: If there is nothing to draw, lengths differ, or a group and series come twice.

    Examples:
        >>> dot_intervals(
        ...     ["finance", "medical"], ["general", "general"], [0.20, 0.09], [0.15, 0.04],
        ...     [0.25, 0.14], y_label="log-odds (nats per token)",
        ... )  # doctest: +SKIP
    """
    names = list(groups)
    alone = series is None
    given = [""] * len(names) if series is None else series
    rows, columns, grids = _grids(names, given, (values, low, high))
    ax = new_axes() if ax is None else ax
    dress(ax, x_label=x_label, y_label=y_label, title=title)
    step = 0.8 / max(len(columns), 3)
    shades = {**palette(columns), **(colours or {})}
    if alone:
        each = [COLOURS[kind_of(name) or "base"] for name in rows]
        drawn = [(0.0, 0, row, "", each[row]) for row in range(len(rows))]
    else:
        middle = (len(columns) - 1) / 2
        drawn = [
            ((place - middle) * step, place, slice(None), name, shades[name])
            for place, name in enumerate(columns)
        ]
    for shift, place, chosen, name, shade in drawn:
        x = np.atleast_1d(np.arange(len(rows))[chosen] + shift)
        middle, start, end = (np.atleast_1d(grid[chosen, place]) for grid in grids)
        if bars:
            base = zero or 0.0
            width = 0.86 * step
            ax.bar(x, middle - base, width, base, color=shade, label=name)
        else:
            _dots(ax, x, middle, shade, place, name, crowd=len(rows) * len(columns))
        line = {"color": INK, "linewidth": 1.1} if bars else {"color": shade, "lw": 2.0}
        ax.vlines(x, start, end, zorder=3, **line)
    if zero is not None:
        ax.axhline(zero, color=INK, linewidth=0.9, zorder=2)
    _finish(ax, rows, len(columns))
    return ax


@house_style()
def bar_list(
    names: Sequence[str],
    values: ArrayLike,
    *,
    x_label: str,
    title: str | None = None,
    shade: str = COLOURS["base"],
    ax: Axes | None = None,
) -> Axes:
    """A list of names from top to bottom, each with a bar from zero and its value.

    Args:
        names: Names of the bars, `[n]`; the same one may come twice.
        values: Their lengths, `[n]`.
        x_label: What the bars show, with its unit.
        title: Title above the axes.
        shade: Colour of the bars.
        ax: Axes to draw on; a figure of its own if not given.

    Returns:
        The axes.

    Raises:
        ValueError: If there is nothing to draw, or lengths differ.
    """
    lengths = np.asarray(values, dtype=float)
    if not len(names) or lengths.shape != (len(names),):
        raise ValueError(
            f"a list of bars needs a value per name; got {len(names)} names and values of shape "
            f"{lengths.shape}"
        )
    ax = new_axes(height=0.9 + 0.3 * len(names)) if ax is None else ax
    dress(ax, x_label=x_label, y_label="", title=title, grid="x")
    places = np.arange(len(names))
    ax.barh(places, lengths, 0.72, color=shade, zorder=3)
    for place, value in zip(places, lengths, strict=True):
        ax.annotate(
            f"{value:.1f}".replace("-", "\N{MINUS SIGN}"),
            (value, place),
            xytext=(3 if value >= 0 else -3, 0),
            textcoords="offset points",
            ha="left" if value >= 0 else "right",
            va="center",
            fontsize=8,
            color=INK,
        )
    ax.axvline(0, color=INK, linewidth=0.9, zorder=4)
    ax.set_yticks(places, [shortened(name, 24) for name in names])
    if (lengths <= 0).all():
        ax.yaxis.tick_right()
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.margins(x=0.16)
    return ax


def _grids(
    groups: Iterable[object], series: Iterable[object], parts: Sequence[ArrayLike]
) -> tuple[list[str], list[str], np.ndarray]:
    """Names of groups and series, and the parts as `[part, groups, series]`, NaN where absent."""
    pairs = [([str(name) for name in names]) for names in (groups, series)]
    arrays = [np.asarray(part, dtype=float) for part in parts]
    lengths = [len(names) for names in pairs] + [array.size for array in arrays]
    if len(set(lengths)) != 1 or any(array.ndim != 1 for array in arrays):
        shapes = [array.shape for array in arrays]
        raise ValueError(
            f"groups ({lengths[0]}), series ({lengths[1]}), values, low and high {shapes} must "
            "have one entry per estimate"
        )
    if not lengths[0]:
        raise ValueError("there are no estimates to draw")
    rows, columns = (list(dict.fromkeys(names)) for names in pairs)
    grids = np.full((len(parts), len(rows), len(columns)), np.nan)
    seen: set[tuple[str, str]] = set()
    for place, (group, name) in enumerate(zip(*pairs, strict=True)):
        if (group, name) in seen:
            raise ValueError(f"group {group!r} has series {name!r} more than once")
        seen.add((group, name))
        grids[:, rows.index(group), columns.index(name)] = [array[place] for array in arrays]
    return rows, columns, grids


def _dots(
    ax: Axes, x: np.ndarray, values: np.ndarray, shade: str, place: int, name: str, *, crowd: int
) -> None:
    marker = list(MARKERS)[place % len(MARKERS)]
    fit = min(1.0, 0.6 * width_of(ax) * 72 / (10 * crowd))
    ax.plot(
        x,
        values,
        linestyle="none",
        color=shade,
        marker=marker,
        markersize=MARKERS[marker] * max(fit, 0.65),
        markeredgecolor=PAPER,
        markeredgewidth=0.7,
        zorder=4,
        label=name,
    )


def _finish(ax: Axes, groups: Sequence[str], n_series: int) -> None:
    room = (0.6 if n_series > 1 else 0.82) * width_of(ax) / len(groups)
    flat = max(len(word) for name in groups for word in name.split() or [""]) * 0.085 <= room
    limit = max(6, int(room * 12)) if flat else SLANTED
    ax.set_xticks(range(len(groups)), [wrapped(name, limit) for name in groups])
    ax.tick_params(axis="x", length=0)
    if not flat:
        ax.tick_params(axis="x", labelrotation=40)
        for label in ax.get_xticklabels():
            label.set(ha="right", rotation_mode="anchor")
    ax.spines["bottom"].set_visible(False)
    ax.set_xlim(-0.5, len(groups) - 0.5)
    for edge in range(1, len(groups)):
        ax.axvline(edge - 0.5, color=RULE, linewidth=0.7, zorder=0)
    if n_series > 1:
        handles, names = ax.get_legend_handles_labels()
        limit = max(11, int(width_of(ax) * 3.3))
        ax.legend(
            handles[-n_series:],
            [wrapped(name, limit) for name in names[-n_series:]],
            loc="upper left",
            bbox_to_anchor=(1.01, 1.0),
            borderaxespad=0.0,
            handlelength=1.0,
            handletextpad=0.6,
            labelspacing=0.55,
        )
