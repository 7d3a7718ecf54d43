"""Lines with their intervals as bands and their names at their ends."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, MaxNLocator
from numpy.typing import ArrayLike

from emlens.figures.labels import Anchor, EndLabels
from emlens.figures.style import (
    INK,
    MUTED,
    Panels,
    dress,
    house_style,
    kind_of,
    new_axes,
    new_panels,
    palette,
    share_y,
)

Curve: TypeAlias = Sequence[ArrayLike | None]
"""`(x, y)` or `(x, y, low, high)`; arrays of one length, NaN where there is no value."""

Scale: TypeAlias = Literal["linear", "log", "symlog"]

FEW = 14
"""The most points of a line that are marked."""

PANELS = 3
"""The most differences that have a panel each."""


@dataclass(frozen=True, slots=True)
class _Line:
    name: str
    x: np.ndarray
    y: np.ndarray
    low: np.ndarray | None
    high: np.ndarray | None


@house_style()
def line_bands(
    curves: Mapping[str, Curve],
    *,
    x_label: str,
    y_label: str,
    title: str | None = None,
    ax: Axes | None = None,
    reference: float | tuple[float, str] | None = None,
    null: tuple[ArrayLike, ArrayLike] | None = None,
    x_scale: Scale = "linear",
    y_scale: Scale = "linear",
    colours: Mapping[str, str] | None = None,
    named: bool = True,
) -> Axes:
    """Curves with their intervals as bands, each named at its end.

    Args:
        curves: `{name: (x, y)}` or `{name: (x, y, low, high)}`.
        x_label: What the x axis shows, with its unit.
        y_label: What the y axis shows, with its unit.
        title: Title above the axes.
        ax: Axes to draw on; a figure of its own if not given.
        reference: A horizontal line, with a name of its own if a pair.
        null: `(low, high)` of what chance alone gives: numbers, or one value per x of the first
            curve. Drawn as a grey band, named "chance".
        x_scale: Scale of the x axis.
        y_scale: Scale of the y axis.
        colours: Colours by name, instead of the house colours.
        named: Whether to write the names; panels side by side need them once.

    Returns:
        The axes.

    Raises:
        ValueError: If there are no curves, or the arrays of one differ in length.

    Examples:
        >>> line_bands(
        ...     {"general": ([0, 1, 2], [2.1, 1.7, 1.6], [2.0, 1.6, 1.5], [2.2, 1.8, 1.7])},
        ...     x_label="norm of the vector", y_label="loss (nats per token)",
        ... )  # doctest: +SKIP
    """
    lines = _read(curves)
    ax = new_axes() if ax is None else ax
    ax.set_xscale(x_scale)
    ax.set_yscale(y_scale)
    shades = {**palette(curves), **(colours or {})}
    anchors = [_draw(ax, line, shades[line.name]) for line in lines]
    if null is not None:
        anchors.append(_draw_null(ax, lines[0].x, null))
    if reference is not None:
        anchors += _draw_reference(ax, reference)
    dress(ax, x_label=x_label, y_label=y_label, title=title)
    if x_scale == "linear" and all(_whole(line.x) for line in lines):
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if named:
        EndLabels(ax, anchors)
    return ax


def layer_curves(
    curves: Mapping[str, Curve],
    *,
    y_label: str = "cosine similarity",
    x_label: str = "layer",
    title: str | None = None,
    null: tuple[ArrayLike, ArrayLike] | None = None,
    ax: Axes | None = None,
    colours: Mapping[str, str] | None = None,
) -> Axes:
    """One value per layer, with zero marked and the null band behind.

    Args:
        curves: `{name: (layers, values)}` or `{name: (layers, values, low, high)}`.
        y_label: What is shown, with its unit.
        x_label: What the x axis counts.
        title: Title above the axes.
        null: `(low, high)` of what chance alone gives, numbers or one value per layer.
        ax: Axes to draw on; a figure of its own if not given.
        colours: Colours by name, instead of the house colours.

    Returns:
        The axes.

    Raises:
        ValueError: If there are no curves, or the arrays of one differ in length.
    """
    return line_bands(
        curves,
        x_label=x_label,
        y_label=y_label,
        title=title,
        ax=ax,
        null=null,
        reference=0.0,
        colours=colours,
    )


def panels_of_curves(
    curves: Mapping[str, Curve],
    *,
    y_label: str,
    x_label: str = "layer",
    title: str | None = None,
    null: tuple[ArrayLike, ArrayLike] | None = None,
) -> list[Axes]:
    """One value per layer as `layer_curves`, each curve in a panel of its own, on equal scales.

    Args:
        curves: `{name: (layers, values, low, high)}`; bands of several would cover each other.
        y_label: What is shown, with its unit.
        x_label: What the x axes count.
        title: Title above all panels.
        null: `(low, high)` of what chance alone gives, numbers or one value per layer.

    Returns:
        The axes, one per curve.
    """
    columns = min(3, len(curves))
    rows = -(-len(curves) // columns)
    every = new_panels(columns, rows, width=2.7 * columns + 1.0, height=0.6 + 2.5 * rows)
    axes, spare = Panels(every[: len(curves)]), every[len(curves) :]
    grey = "" if null is None else "\n(grey: chance)"
    for panel in spare:
        panel.remove()
    for place, (panel, (name, curve)) in enumerate(zip(axes, curves.items(), strict=True)):
        layers = np.asarray(curve[0], dtype=float)
        line_bands(
            {name: curve},
            colours=palette(curves),
            x_label=x_label if place >= len(curves) - columns else "",
            y_label=f"{y_label}{grey}" if place % columns == 0 else "",
            title=name,
            null=null,
            reference=0.0,
            named=False,
            ax=panel,
        )
        panel.tick_params(labelleft=place % columns == 0)
        panel.set_xlim(layers.min(), layers.max())
    share_y(axes)
    figure = axes[0].get_figure(root=True)
    if title and figure is not None:
        figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    return axes


@house_style()
def paired_curves(
    curves: Mapping[str, Curve],
    gaps: Mapping[str, Curve],
    *,
    x_label: str,
    y_label: str,
    gap_label: str,
    bands: bool = False,
    gap_reference: float = 0.0,
    gap_scale: Scale = "linear",
    ax: Axes | None = None,
    **options: Any,
) -> Axes | list[Axes]:
    """Curves above, and how far each is from one of them below, with paired intervals.

    Where curves share what they were measured on, their bands say little of their differences:
    the band of a difference is the one to read.

    Args:
        curves: `{name: (x, y, low, high)}`.
        gaps: The same of what lies between each curve and a common one: differences or ratios.
        x_label: What both x axes show, with its unit.
        y_label: What is shown above, with its unit.
        gap_label: What is shown below, with its unit.
        bands: Whether to draw the bands of the curves as well as those of the differences.
        gap_reference: What stands for no difference.
        gap_scale: Scale of the differences.
        ax: Axes to draw the curves alone on, with their bands.
        **options: See `line_bands`; for the curves.

    Returns:
        All axes, the curves first, then one for each difference, or one for more than three; those
        of the curves alone with `ax`, or without differences.

    Raises:
        ValueError: As `line_bands`.
    """
    labels = {"x_label": x_label, "y_label": y_label, **options}
    if ax is not None or not gaps:
        return line_bands(curves, ax=ax, **labels)
    # bands of a few differences would cover each other; many share a panel all the same
    parts = [{name: gap} for name, gap in gaps.items()] if len(gaps) <= PANELS else [gaps]
    axes = new_panels(1, 1 + len(parts), height=2.8 + 2.2 * len(parts))
    shown = curves if bands else {name: curve[:2] for name, curve in curves.items()}
    line_bands(shown, ax=axes[0], **labels)
    shades = palette(curves)
    for panel, part in zip(axes[1:], parts, strict=True):
        line_bands(
            part,
            x_label=x_label,
            y_label=gap_label,
            reference=gap_reference,
            x_scale=options.get("x_scale", "linear"),
            y_scale=gap_scale,
            colours={name: shades[name] for name in part},
            ax=panel,
        )
        if gap_scale == "log":
            _plain_numbers(panel)
        panel.sharex(axes[0])
    for panel in axes[:-1]:
        panel.set_xlabel("")
        panel.tick_params(labelbottom=False)
    return axes


def _plain_numbers(ax: Axes) -> None:
    """Write 0.5 and 2 at a logarithmic axis, as far as there is room for them."""
    ax.yaxis.set_major_formatter("{x:g}")
    low, high = ax.get_ylim()
    if high < 500 * low:
        places = [1, 2, 5] if high > 5 * low else range(1, 10)
        ax.yaxis.set_minor_locator(LogLocator(subs=places))
        ax.yaxis.set_minor_formatter("{x:g}")


@house_style()
def many_curves(
    x: Sequence[float],
    values: np.ndarray,
    groups: Mapping[str, Sequence[int]],
    *,
    noun: str,
    y_label: str,
    x_label: str = "layer",
    title: str | None = None,
    null: tuple[ArrayLike, ArrayLike] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Many curves in grey with their median, and groups of curves in colour with their medians.

    Args:
        x: What all curves run along, `[x]`.
        values: The curves, `[curves, x]`; NaN where one has no value.
        groups: Names, and the rows of the curves that each names.
        noun: What the curves are.
        y_label: What is shown, with its unit.
        x_label: What the x axis counts.
        title: Title above the axes.
        null: `(low, high)` of what chance alone gives, numbers or one value per x.
        ax: Axes to draw on; a figure of its own if not given.

    Returns:
        The axes.
    """
    ax = new_axes() if ax is None else ax
    at = np.asarray(x, dtype=float)
    marker = "o" if len(at) == 1 else None
    thin = {"linewidth": 0.6, "alpha": float(np.clip(12 / len(values), 0.1, 0.5)), "zorder": 2}
    ax.plot(at, values.T, color=MUTED, marker=marker, markersize=3, **thin)
    shades = palette(groups)
    anchors = []
    for name, rows in groups.items():
        ax.plot(at, values[list(rows)].T, color=shades[name], linewidth=0.7, alpha=0.45, zorder=3)
    said = {f"median of {len(values)} {noun}": (range(len(values)), INK)}
    for name, (rows, shade) in {**{n: (groups[n], shades[n]) for n in groups}, **said}.items():
        with warnings.catch_warnings(action="ignore", category=RuntimeWarning):
            middle = np.nanmedian(values[list(rows)], axis=0)
        ax.plot(at, middle, color=shade, linewidth=2, marker=marker, zorder=4)
        last = np.flatnonzero(np.isfinite(middle))[-1:]
        anchors += [Anchor(float(at[i]), float(middle[i]), name, shade) for i in last]
    if null is not None:
        anchors.append(_draw_null(ax, at, null))
    _draw_reference(ax, 0.0)
    dress(ax, x_label=x_label, y_label=y_label, title=title)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    EndLabels(ax, anchors)
    return ax


def _whole(x: np.ndarray) -> bool:
    """Whether these are counts, such as layers or updates."""
    finite = x[np.isfinite(x)]
    return bool(len(finite)) and bool((finite == np.round(finite)).all())


def _read(curves: Mapping[str, Curve]) -> list[_Line]:
    if not curves:
        raise ValueError("there are no curves to draw: give at least one {name: (x, y)}")
    return [_read_one(name, curve) for name, curve in curves.items()]


def _read_one(name: str, curve: Curve) -> _Line:
    if len(curve) not in (2, 4):
        raise ValueError(f"curve {name!r} has {len(curve)} parts; give (x, y) or (x, y, low, high)")
    x, y, low, high = [*curve, None, None][:4]
    if x is None or y is None or (low is None) != (high is None):
        raise ValueError(f"curve {name!r} needs x and y, and both of low and high or neither")
    parts = [np.asarray(part, dtype=float) for part in (x, y, low, high) if part is not None]
    shapes = [part.shape for part in parts]
    if len(set(shapes)) != 1 or parts[0].ndim != 1:
        raise ValueError(f"the arrays of curve {name!r} must have one length, not {shapes}")
    return _Line(name, parts[0], parts[1], *(parts[2:] or (None, None)))


def _draw(ax: Axes, line: _Line, shade: str) -> Anchor:
    seen = np.flatnonzero(np.isfinite(line.x) & np.isfinite(line.y))
    if not len(seen):
        return Anchor(np.nan, np.nan, f"{line.name} (no values)", MUTED)
    alone = _alone(line.y)
    ax.plot(line.x[alone], line.y[alone], color=shade, marker="o", markersize=4, linestyle="none")
    marker = "o" if len(line.x) <= FEW else None
    dashes = (0, (4, 1.6)) if kind_of(line.name) in ("random", "shuffled") else "solid"
    ax.plot(line.x, line.y, color=shade, marker=marker, markersize=3.5, linestyle=dashes, zorder=3)
    if line.low is not None and line.high is not None:
        ax.fill_between(line.x, line.low, line.high, color=shade, alpha=0.18, linewidth=0, zorder=2)
        ax.vlines(line.x[alone], line.low[alone], line.high[alone], color=shade, linewidth=1.4)
    last = seen[np.argmax(line.x[seen])]
    return Anchor(float(line.x[last]), float(line.y[last]), line.name, shade)


def _alone(values: np.ndarray) -> np.ndarray:
    """Which finite values have no finite neighbour, so that neither line nor band shows them."""
    finite = np.concatenate([[False], np.isfinite(values), [False]])
    return finite[1:-1] & ~finite[:-2] & ~finite[2:]


def _draw_null(ax: Axes, x: np.ndarray, null: tuple[ArrayLike, ArrayLike]) -> Anchor:
    low, high = (np.asarray(bound, dtype=float) for bound in null)
    style = {"color": MUTED, "alpha": 0.16, "linewidth": 0, "zorder": 1, "label": "null band"}
    if low.ndim == high.ndim == 0 or len(x) == 1:
        ax.axhspan(low.item(), high.item(), **style)
    else:
        low, high = np.broadcast_to(low, x.shape), np.broadcast_to(high, x.shape)
        ax.fill_between(x, low, high, **style)
    middle = (low.flat[-1] + high.flat[-1]) / 2
    return Anchor(float(np.nanmax(x)), float(middle), "chance", MUTED)


def _draw_reference(ax: Axes, reference: float | tuple[float, str]) -> list[Anchor]:
    value, name = reference if isinstance(reference, tuple) else (reference, "")
    ax.axhline(value, color=INK if name else MUTED, linewidth=0.9, linestyle=(0, (1, 2)), zorder=1)
    return [Anchor(ax.get_xlim()[1], value, name, INK)] if name else []
