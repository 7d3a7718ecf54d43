"""Paths of a vector through training, in the plane of two components."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import ArrayLike

from emlens.figures.labels import Anchor, PointLabels, dense
from emlens.figures.style import INK, PAPER, dress, house_style, new_axes, palette


@house_style()
def path_plot(
    paths: Mapping[str, ArrayLike],
    *,
    x_label: str = "first component",
    y_label: str = "second component",
    title: str | None = None,
    ax: Axes | None = None,
    colours: Mapping[str, str] | None = None,
) -> Axes:
    """Trajectories in two dimensions: hollow circle at the start, full dot at the named end.

    Args:
        paths: `{name: points}`, points in order of training, `[steps, 2]`.
        x_label: What the x axis shows, e.g. with its share of the variance.
        y_label: What the y axis shows.
        title: Title above the axes.
        ax: Axes to draw on; a figure of its own if not given.
        colours: Colours by name, in place of the house's.

    Returns:
        The axes, with one scale for both directions.

    Raises:
        ValueError: If there are no paths, or one is not `[steps, 2]` with a finite point.
    """
    if not paths:
        raise ValueError("there are no paths to draw: give at least one {name: [steps, 2]}")
    tracks = {name: _track(name, points) for name, points in paths.items()}
    ax = new_axes(height=4.6) if ax is None else ax
    shades = {**palette(paths), **(colours or {})}
    anchors = []
    for name, track in tracks.items():
        _draw(ax, track, shades[name])
        anchors.append(Anchor(float(track[-1, 0]), float(track[-1, 1]), name, shades[name]))
    starts = np.array([track[0] for track in tracks.values()])
    if len(tracks) == 1 or np.ptp(starts, axis=0).max() <= 1e-6 * (np.abs(starts).max() + 1):
        anchors.append(Anchor(float(starts[0, 0]), float(starts[0, 1]), "start", INK))
    ax.margins(0.12)
    ax.set_aspect("equal", adjustable="datalim")
    dress(ax, x_label=x_label, y_label=y_label, title=title, grid="both")
    PointLabels(ax, anchors, np.concatenate([dense(track) for track in tracks.values()]))
    return ax


def _track(name: str, points: ArrayLike) -> np.ndarray:
    track = np.asarray(points, dtype=float)
    if track.ndim != 2 or track.shape[1] != 2:
        raise ValueError(f"path {name!r} has shape {track.shape}, not [steps, 2]")
    track = track[np.isfinite(track).all(axis=1)]
    if not len(track):
        raise ValueError(f"path {name!r} has no finite point")
    return track


def _draw(ax: Axes, track: np.ndarray, shade: str) -> None:
    ax.plot(*track.T, color=shade, linewidth=1.5, marker=".", markersize=3, zorder=3)
    ax.plot(*track[0], color=shade, marker="o", markersize=6, markerfacecolor=PAPER, zorder=4)
    ax.plot(*track[-1], color=shade, marker="o", markersize=7, zorder=4, markeredgecolor=PAPER)
