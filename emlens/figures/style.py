"""House style: colours with a fixed meaning, sizes, and figures without a backend."""

from __future__ import annotations

import io
import re
import textwrap
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import matplotlib as mpl
from matplotlib import colors
from matplotlib.axes import Axes
from matplotlib.figure import Figure

WIDTH, HEIGHT = 6.6, 3.8
"""Size in inches of a figure as wide as the text of a page."""

INK = "#22262B"
MUTED = "#6A727C"
GRID = "#E4E7EA"
RULE = "#C5CAD0"
WASH = "#EEEFF1"
PAPER = "#FFFFFF"

COLOURS: Mapping[str, str] = {
    "base": "#4A525B",
    "random": "#8D969F",
    "shuffled": "#B49C76",
    "general": "#D55E00",
    "narrow": "#0072B2",
    "mean-diff": "#009E73",
    "adapter": "#7B52A3",
    "benign": "#E0A100",
}
"""Fixed colours by name, the same in every figure and distinct with common colour blindness."""

NOT_SOLUTIONS = ("base", "mean-diff", "adapter")
"""Names of colours that may stand beside that of a solution: "general adapter" is general."""

Grid: TypeAlias = Literal["x", "y", "both"] | None

SPARE = ("#CC79A7", "#56B4E9", "#332288", "#882255", "#8FB339", "#1F5A46", "#7A4B2A", "#A78BDA")

MARKED = SPARE[3]
"""Colour of points that a figure marks; it stands for no solution."""

_HOUSE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial", "sans-serif"],
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 9,
    "axes.labelsize": 10,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.edgecolor": MUTED,
    "axes.facecolor": PAPER,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "text.color": INK,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "figure.facecolor": PAPER,
    "figure.edgecolor": PAPER,
    "figure.dpi": 100,
    "savefig.facecolor": PAPER,
    "savefig.transparent": False,
    "hatch.linewidth": 0.6,
    "svg.fonttype": "none",
}


@contextmanager
def house_style() -> Iterator[None]:
    """Draw in the house style inside the block; the caller's settings are restored afterwards.

    Examples:
        >>> with house_style():
        ...     ax = new_axes()
    """
    with mpl.rc_context(_HOUSE):
        yield


def _key(name: str) -> str:
    return name.strip().lower().replace("_", "-").replace(" ", "-")


def _spare(name: str) -> int:
    return zlib.crc32(_key(name).encode()) % len(SPARE)


def colour(name: str) -> str:
    """Colour of a name: its fixed colour, or else a spare one that never changes.

    A name that begins with one that has a fixed colour has that colour: "random, layer 5" is drawn
    as "random". Comparisons, such as "general vs narrow", have a colour of their own.
    """
    return COLOURS.get(kind_of(name) or "") or SPARE[_spare(name)]


def kind_of(name: str) -> str | None:
    """The name with a fixed colour that a name is or begins with; None for none."""
    key = _key(name)
    if key in COLOURS:
        return key
    found = {kind for kind in COLOURS if re.search(rf"(?<![a-z]){kind}(?![a-z])", key)}
    first = next((kind for kind in found if key.startswith(kind)), None)
    compared = re.search(r"-(vs|minus)-", key) or found - {first, *NOT_SOLUTIONS}
    return None if compared else first


def palette(names: Iterable[str]) -> dict[str, str]:
    """A colour for every name of a figure, distinct as long as there are colours left.

    A name keeps `colour(name)` unless an earlier name of the figure has it already. Then it has a
    lighter or darker shade of its kind ("general, half"), or else a spare colour.
    """
    chosen: dict[str, str] = {}
    for name in names:
        wanted = colour(name)
        if wanted in chosen.values() and kind_of(name):
            shades = [_mixed(wanted, PAPER, 0.45), _mixed(wanted, INK, 0.45)]
            wanted = next((shade for shade in shades if shade not in chosen.values()), wanted)
        if wanted in chosen.values():
            first = _spare(name)
            order = SPARE[first:] + SPARE[:first]
            wanted = next((spare for spare in order if spare not in chosen.values()), wanted)
        chosen[name] = wanted
    return chosen


def _mixed(shade: str, other: str, share: float) -> str:
    """A shade with a share of another one in it."""
    (r, g, b), (x, y, z) = colors.to_rgb(shade), colors.to_rgb(other)
    rest = 1 - share
    return colors.to_hex((rest * r + share * x, rest * g + share * y, rest * b + share * z))


def readable(shade: str) -> str:
    """The shade, darkened until text in it has a contrast of 4.5 to white."""
    red, green, blue = colors.to_rgb(shade)
    while (1.05 / (_luminance((red, green, blue)) + 0.05)) < 4.5:
        red, green, blue = red * 0.95, green * 0.95, blue * 0.95
    return colors.to_hex((red, green, blue))


def _luminance(rgb: tuple[float, float, float]) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def shortened(text: str, length: int) -> str:
    """The text on one line, shortened in the middle to at most `length` characters."""
    text = " ".join(text.split())
    half = (length - 1) // 2
    return text if len(text) <= length else f"{text[:half]}…{text[-half:]}"


def wrapped(text: str, width: int) -> str:
    """The text on lines of at most `width` characters; only words longer than 14 are broken."""
    width = max(width, min(14, max((len(word) for word in text.split()), default=1)))
    return "\n".join(
        line for part in text.split("\n") for line in textwrap.wrap(part, width) or [""]
    )


class HouseFigure(Figure):
    """A figure outside of pyplot that a notebook shows when it is the value of a cell."""

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        buffer = io.BytesIO()
        with house_style():
            self.savefig(buffer, format="png", dpi=2 * self.dpi, bbox_inches="tight")
        data = buffer.getvalue()
        width, height = (int.from_bytes(data[start : start + 4], "big") for start in (16, 20))
        return data, {"width": width // 2, "height": height // 2}


class HouseAxes(Axes):
    """Axes that a notebook shows as their figure when they are the value of a cell."""

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        figure = self.get_figure(root=True)
        if not isinstance(figure, HouseFigure):
            raise NotImplementedError
        return figure._repr_png_()


class Panels(list[Axes]):
    """The axes of one figure, which a notebook shows once when they are the value of a cell."""

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        figure = self[0].get_figure(root=True) if self else None
        if not isinstance(figure, HouseFigure):
            raise NotImplementedError
        return figure._repr_png_()


def new_panels(
    columns: int = 1, rows: int = 1, *, width: float = WIDTH, height: float = HEIGHT
) -> Panels:
    """Axes side by side, row by row, in a new figure of `width` x `height` inches."""
    with house_style():
        figure = HouseFigure(figsize=(width, height), layout="constrained")
        return Panels(
            figure.add_subplot(rows, columns, place + 1, axes_class=HouseAxes)
            for place in range(rows * columns)
        )


def share_y(panels: Sequence[Axes]) -> None:
    """Give panels a common y scale that covers everything drawn on any of them."""
    for panel in panels[1:]:
        panel.sharey(panels[0])
    panels[0].autoscale_view(scalex=False)


def new_axes(*, width: float = WIDTH, height: float = HEIGHT) -> Axes:
    """Axes in a new figure of `width` x `height` inches, in the house style."""
    return new_panels(width=width, height=height)[0]


def dress(ax: Axes, *, x_label: str, y_label: str, title: str | None, grid: Grid = "y") -> None:
    """Label axes and give them the house style."""
    ax.set_xlabel(x_label)
    ax.set_ylabel(y_label)
    if title is not None:
        ax.set_title(wrapped(title, max(24, int(width_of(ax) * 11))), loc="left")
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    ax.set_axisbelow(True)
    ax.grid(False)
    if grid is not None:
        ax.grid(True, axis=grid, color=GRID, linewidth=0.8)


def width_of(ax: Axes) -> float:
    """Width of the axes with their share of the margins, in inches."""
    spec = ax.get_subplotspec()
    columns = spec.get_gridspec().ncols if spec is not None else 1
    figure = ax.get_figure(root=True)
    return figure.get_figwidth() / columns if figure is not None else WIDTH
