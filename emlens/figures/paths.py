"""Paths through training: in the plane of two components, or of effects inside and outside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import ArrayLike

from emlens.figures.labels import Anchor, PointLabels, dense
from emlens.figures.style import INK, MUTED, PAPER, dress, house_style, new_axes, palette


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


@house_style()
def effect_plane(
    paths: Mapping[str, tuple[ArrayLike, ArrayLike]],
    *,
    labels: Mapping[str, Sequence[str]] | None = None,
    crossed: Mapping[str, Sequence[int]] | None = None,
    x_label: str,
    y_label: str,
    title: str | None = None,
    ax: Axes | None = None,
    colours: Mapping[str, str] | None = None,
) -> Axes:
    """Effects outside of a domain against those inside, along paths, with their intervals.

    On the dotted diagonal an effect is as large outside as inside; on the line at zero it is
    confined.

    Args:
        paths: `{name: (inside, outside)}`, each `[n, 3]`: estimates and the ends of intervals.
        labels: A name for each point of a path, `[n]`; an empty one is not drawn.
        crossed: Points whose intervals are drawn, for each path; all of them by default.
        x_label: What is inside, with its unit.
        y_label: What is outside, with its unit.
        title: Title above the axes.
        ax: Axes to draw on; a figure of its own if not given.
        colours: Colours by name, in place of the house's.

    Returns:
        The axes, with one scale for both directions.
    """
    ax = new_axes(height=4.8) if ax is None else ax
    shades, anchors, drawn = {**palette(paths), **(colours or {})}, [], []
    for name, sides in paths.items():
        inside, outside = (np.asarray(side, dtype=float) for side in sides)
        track, shade = np.stack([inside[:, 0], outside[:, 0]], axis=1), shades[name]
        ax.plot(*track.T, color=shade, linewidth=1.5, marker="o", markersize=4.5, zorder=3)
        ax.plot(*track[0], color=shade, marker="o", markersize=7, markerfacecolor=PAPER, zorder=4)
        for i in (crossed or {}).get(name, range(len(track))):
            thin = {"color": shade, "linewidth": 1.0, "alpha": 0.55, "zorder": 2}
            ax.plot(inside[i, 1:], outside[i, [0, 0]], **thin)
            ax.plot(inside[i, [0, 0]], outside[i, 1:], **thin)
        said = (labels or {}).get(name, [""] * (len(track) - 1) + [name])
        anchors += [
            Anchor(float(x), float(y), text, shade)
            for (x, y), text in zip(track, said, strict=True)
            if text
        ]
        drawn.append(dense(track))
    for line in (ax.axhline, ax.axvline):
        line(0, color=MUTED, linewidth=0.9, zorder=1)
    ax.margins(0.08)
    ax.set_aspect("equal", adjustable="datalim")
    ax.axline((0, 0), slope=1, color=MUTED, linewidth=0.9, linestyle=(0, (1, 2)), zorder=1)
    dress(ax, x_label=x_label, y_label=y_label, title=title, grid="both")
    PointLabels(ax, anchors, np.concatenate(drawn))
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
