"""Heat maps of signed values, with values within chance marked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backend_bases import RendererBase
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PatchCollection
from matplotlib.colors import LinearSegmentedColormap, Normalize, to_rgb
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from numpy.typing import ArrayLike

from emlens.figures.style import (
    INK,
    MUTED,
    RULE,
    WASH,
    WIDTH,
    dress,
    house_style,
    new_axes,
    shortened,
    width_of,
    wrapped,
)

_STOPS = ["#08437A", "#4A90C4", "#F7F7F5", "#E58A47", "#9C3D00"]
SIGNED = LinearSegmentedColormap.from_list("emlens", _STOPS).with_extremes(bad="#FFFFFF")

NullBand: TypeAlias = float | tuple[ArrayLike, ArrayLike]

PRINTED = 160
"""Largest number of cells whose values are printed."""

FEW, LONGEST = 12, 30
"""Largest number of names that may take several lines, and the longest name otherwise."""

SMALLEST, LARGEST = 5.5, 9.0
"""Font sizes of printed values, in points."""


@house_style()
def heatmap(
    matrix: ArrayLike,
    row_labels: Sequence[str],
    col_labels: Sequence[str],
    *,
    null_band: NullBand | None = None,
    value_label: str = "cosine similarity",
    x_label: str = "",
    y_label: str = "",
    title: str | None = None,
    limits: tuple[float, float] | None = (-1.0, 1.0),
    digits: int = 2,
    blocks: Mapping[str, int] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Signed values as colours: blue below zero, orange above, white at zero.

    Args:
        matrix: Values, `[rows, columns]`, or `[rows, columns, 3]` with the ends of their
            intervals, which are printed below them; NaN cells stay blank.
        row_labels: Names of the rows, top to bottom.
        col_labels: Names of the columns.
        null_band: What chance alone gives: `b` for `(-b, b)`, or `(low, high)`, numbers or
            arrays that broadcast to `[rows, columns]`. Cells inside are hatched.
        value_label: What the colours show, with its unit.
        x_label: What the columns are.
        y_label: What the rows are.
        title: Title above the axes.
        limits: Values of the strongest colours. The value half-way between them is white and
            should stand for no effect, such as zero, or an AUROC of 0.5. If None, zero is white
            and the largest absolute value has the strongest colour.
        digits: Decimals of printed values.
        blocks: Names of groups of rows (and of columns) and the number of rows of each. Lines are
            drawn between the groups, and their names beside them.
        ax: Axes to draw on; a figure of its own if not given.

    Returns:
        The axes; the colour bar is beside them.

    Raises:
        ValueError: If the matrix is empty or does not fit its labels.
    """
    given = np.asarray(matrix, dtype=float)
    values, ends = (given[..., 0], given[..., 1:]) if given.ndim == 3 else (given, None)
    if given.ndim == 3 and given.shape[2] != 3:
        raise ValueError(f"matrix of shape {given.shape} must hold a value and two ends per cell")
    if values.shape != (len(row_labels), len(col_labels)) or not values.size:
        raise ValueError(
            f"matrix of shape {values.shape} does not fit "
            f"{len(row_labels)} row labels and {len(col_labels)} column labels"
        )
    norm = _norm(values, limits)
    if ax is None:
        tall = _height(values.shape, col_labels, 0.34 if ends is None else 0.62)
        ax = new_axes(width=_width(col_labels), height=tall)
    dress(ax, x_label=x_label, y_label=y_label, title=title, grid=None)
    masked = np.ma.masked_invalid(values)
    ax.imshow(masked, cmap=SIGNED, norm=norm, aspect="auto", interpolation="nearest")
    inside = np.zeros(values.shape, dtype=bool)
    if null_band is not None:
        inside = _inside(values, null_band)
        _hatch(ax, inside)
    _ticks(ax, row_labels, col_labels)
    if blocks:
        _blocks(ax, blocks)
    if blocks and _many(blocks):
        ax.set_xlabel(wrapped(_key_of(blocks, x_label), 100), fontsize=7.5)
    if values.size <= PRINTED:
        _print(ax, values, ends, inside, norm, digits)
    _bar(ax, norm, value_label, null_band)
    return ax


def _norm(values: np.ndarray, limits: tuple[float, float] | None) -> Normalize:
    if limits is None:
        finite = np.abs(values[np.isfinite(values)])
        most = float(finite.max()) if finite.size and finite.max() > 0 else 1.0
        limits = -most, most
    return Normalize(*limits)


def _height(shape: tuple[int, ...], col_labels: Sequence[str], each: float) -> float:
    longest = max(len(label) for label in col_labels)
    room = 0.06 * min(longest, 20) if longest > 4 else 0.2
    row = each if shape[0] <= 12 else 0.16
    return float(np.clip(0.9 + room + row * shape[0], 2.2, 7.0))


def _width(col_labels: Sequence[str]) -> float:
    """Wide enough for the names of up to 40 columns; those that are numbers are thinned."""
    named = max(len(label) for label in col_labels) > 3
    return WIDTH * float(np.clip(len(col_labels) / 22, 1.0, 1.8)) if named else WIDTH


def _bounds(null_band: NullBand) -> tuple[np.ndarray, np.ndarray]:
    low, high = null_band if isinstance(null_band, tuple) else (-abs(null_band), abs(null_band))
    return np.asarray(low, dtype=float), np.asarray(high, dtype=float)


def _inside(values: np.ndarray, null_band: NullBand) -> np.ndarray:
    low, high = (np.broadcast_to(bound, values.shape) for bound in _bounds(null_band))
    with np.errstate(invalid="ignore"):
        return (values >= low) & (values <= high)


def _hatch(ax: Axes, inside: np.ndarray) -> None:
    cells = [Rectangle((col - 0.5, row - 0.5), 1, 1) for row, col in np.argwhere(inside)]
    ax.add_collection(
        PatchCollection(cells, facecolor=WASH, edgecolor=RULE, hatch="////", linewidth=0, zorder=2),
        autolim=False,
    )


def _ticks(ax: Axes, row_labels: Sequence[str], col_labels: Sequence[str]) -> None:
    rows, cols = len(row_labels), len(col_labels)
    figure = ax.get_figure(root=True)
    tall = (figure.get_figheight() if figure is not None else 4.0) - 1.2
    each_row = max(1, int(np.ceil(rows * 0.15 / max(tall, 0.5))))
    longest = min(max(len(label) for label in col_labels), LONGEST)
    cell = 0.66 * width_of(ax) / cols
    flat = longest * 0.085 <= cell
    # Short names, such as layer numbers, stay upright and are thinned; long ones are turned.
    upright = flat or longest <= 3
    each_col = max(1, int(np.ceil((longest * 0.1 if upright else 0.17) / cell)))
    limit = min(24, max(9, int(width_of(ax) * 3.6)))
    for axis, count, each, names, room in (
        (ax.yaxis, rows, each_row, row_labels, limit),
        (ax.xaxis, cols, each_col, col_labels, 24),
    ):
        # with many names, each has one line and may be shortened in the middle
        few = count <= FEW
        texts = [wrapped(n, room) if few else shortened(n, LONGEST) for n in names[::each]]
        axis.set_ticks(range(0, count, each), texts)
    if not upright:
        ax.tick_params(axis="x", labelrotation=40)
        for label in ax.get_xticklabels():
            label.set(ha="right", rotation_mode="anchor")
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)


def _many(blocks: Mapping[str, int]) -> bool:
    """Whether there is no room for the names of blocks beside them."""
    return len(blocks) > 4


def _key_of(blocks: Mapping[str, int], inside: str) -> str:
    """Key to the numbers of blocks; no entry is broken over two lines."""
    named = (f"{i}\N{NO-BREAK SPACE}{name}" for i, name in enumerate(blocks, 1))
    return f"{inside} within each block: " + ", ".join(
        one.replace(" ", "\N{NO-BREAK SPACE}").replace("-", "\N{NON-BREAKING HYPHEN}")
        for one in named
    )


def _blocks(ax: Axes, blocks: Mapping[str, int]) -> None:
    edges = np.cumsum([0, *blocks.values()]) - 0.5
    many = _many(blocks)
    for edge in edges[1:-1]:
        ax.axvline(edge, color=INK, linewidth=0.5 if many else 1.0, zorder=4)
        ax.axhline(edge, color=INK, linewidth=0.5 if many else 1.0, zorder=4)
    middles = (edges[:-1] + edges[1:]) / 2
    if many:
        numbers = [str(i) for i in range(1, len(blocks) + 1)]
        size = 9 if len(blocks) <= 15 else 6.5
        ax.set_xticks(middles, numbers, fontsize=size)
        ax.set_yticks(middles, numbers, fontsize=size)
        return
    names = [wrapped(name, 64 // len(blocks)) for name in blocks]
    above, beside = ax.secondary_xaxis("top"), ax.secondary_yaxis("right")
    above.set_xticks(middles, names)
    beside.set_yticks(middles, names, rotation=-90, va="center")
    for axis in (above, beside):
        axis.tick_params(length=0)
        for spine in axis.spines.values():
            spine.set_visible(False)


class CellText(Text):
    """A value in its cell: smaller in small cells, and omitted where it would be unreadable."""

    characters, lines = 5, 1

    def draw(self, renderer: RendererBase) -> None:
        """Fit the size to the cell as it is now, and draw."""
        ax, figure = self.axes, self.get_figure(root=True)
        if ax is None or figure is None:
            return
        (left, bottom), (right, top) = ax.transData.transform([(0, 0), (1, 1)])
        point = figure.dpi / 72
        width, height = abs(right - left) / point, abs(top - bottom) / point
        size = min(LARGEST, width / (0.62 * (self.characters + 0.6)), 0.7 * height / self.lines)
        if size >= SMALLEST:
            self.set_fontsize(size)
            super().draw(renderer)


def _print(
    ax: Axes,
    values: np.ndarray,
    ends: np.ndarray | None,
    inside: np.ndarray,
    norm: Normalize,
    digits: int,
) -> None:
    for (row, col), value in np.ndenumerate(values):
        shade = MUTED if inside[row, col] or not np.isfinite(value) else _ink_on(value, norm)
        text = f"{value:.{digits}f}" if np.isfinite(value) else "–"
        if ends is not None and np.isfinite([value, *ends[row, col]]).all():
            low, high = ends[row, col]
            text += f"\n[{low:.{digits}f}, {high:.{digits}f}]"
        text = text.replace("-", "−")
        cell = CellText(col, row, text, ha="center", va="center", color=shade, zorder=3)
        cell.characters = (
            max(digits + 3, *map(len, text.split("\n"))) if ends is not None else (digits + 3)
        )
        cell.lines = 1 if ends is None else 2
        cell.set_in_layout(False)
        ax.add_artist(cell)


def _ink_on(value: float, norm: Normalize) -> str:
    red, green, blue = to_rgb(SIGNED(norm(value)))
    return INK if 0.3 * red + 0.59 * green + 0.11 * blue > 0.55 else "#FFFFFF"


def _bar(ax: Axes, norm: Normalize, value_label: str, null_band: NullBand | None) -> None:
    figure = ax.figure
    bar = figure.colorbar(ScalarMappable(norm, SIGNED), ax=ax, fraction=0.05, pad=0.025, aspect=18)
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.ax.tick_params(length=0)
    if null_band is not None:
        value_label += "\nhatched: within chance"
        low, high = _bounds(null_band)
        if low.ndim == high.ndim == 0:
            bar.ax.axhspan(
                float(low),
                float(high),
                facecolor=WASH,
                edgecolor=RULE,
                hatch="//////",
                linewidth=0,
            )
    bar.set_label(value_label)
