"""House style and drawing primitives: plain arrays in, matplotlib axes out.

Every primitive takes `ax=None` and returns the axes it drew on. Without an `ax` it makes a new
figure that is not registered with pyplot and is shown once at the end of a notebook cell.
Neither importing this room nor drawing with it changes matplotlib's settings or backend.
"""

from __future__ import annotations

from emlens.figures.heatmap import heatmap
from emlens.figures.save import save_figure
from emlens.figures.style import COLOURS as COLOURS
from emlens.figures.style import colour, house_style, palette

__all__ = [
    "colour",
    "heatmap",
    "house_style",
    "palette",
    "save_figure",
]


def __dir__() -> list[str]:
    return list(__all__)
