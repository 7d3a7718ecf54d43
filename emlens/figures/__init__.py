"""House style and drawing primitives: plain arrays in, matplotlib axes out.

Every primitive takes `ax=None` and returns the axes it drew on. Without an `ax` it makes a figure
of its own that pyplot does not know, and which shows itself once at the end of a notebook cell.
Neither importing this room nor drawing with it changes matplotlib's settings or backend.
"""

from __future__ import annotations

from emlens.figures.bars import dot_intervals, interval_bars
from emlens.figures.heatmap import heatmap
from emlens.figures.labels import mark_points
from emlens.figures.lines import Curve, layer_curves, line_bands
from emlens.figures.paths import path_plot
from emlens.figures.save import save_figure
from emlens.figures.scatter import agreement_plot, score_plot
from emlens.figures.style import COLOURS, colour, house_style, new_axes, new_panels, palette
from emlens.figures.tokens import TokenView, token_view

__all__ = [
    "COLOURS",
    "Curve",
    "TokenView",
    "agreement_plot",
    "colour",
    "dot_intervals",
    "heatmap",
    "house_style",
    "interval_bars",
    "layer_curves",
    "line_bands",
    "mark_points",
    "new_axes",
    "new_panels",
    "palette",
    "path_plot",
    "save_figure",
    "score_plot",
    "token_view",
]
