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
        colours: Colours by name, instead of the house colours.

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
    inside: ArrayLike,
    outside: ArrayLike,
    labels: Sequence[str],
    *,
    shades: Sequence[str],
    crossed: Sequence[int] | None = None,
    others: Mapping[str, ArrayLike] | None = None,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Effects outside of a domain against those inside, along a path, with their intervals.

    On the dotted diagonal an effect is as large outside as inside; on the line at zero it is
    confined.

    Args:
        inside: Changes of log-odds inside in nats per token with the ends of their intervals,
            `[n, 3]`.
        outside: The same outside.
        labels: A name for each point, `[n]`; an empty one is not drawn.
        shades: Colour of each point, `[n]`.
        crossed: Points whose intervals are drawn; all of them by default.
        others: What is compared with the path, as dashed lines by name, each `[points, 2]`.
        title: Title above the axes.
        ax: Axes to draw on; a figure of its own if not given.

    Returns:
        The axes.
    """
    ax = new_axes(height=4.4) if ax is None else ax
    x, y = np.asarray(inside, dtype=float), np.asarray(outside, dtype=float)
    track = np.stack([x[:, 0], y[:, 0]], axis=1)
    ax.plot(*track.T, color=MUTED, linewidth=1.3, zorder=3)
    drawn = [dense(track)]
    for i, (point, shade) in enumerate(zip(track, shades, strict=True)):
        ax.plot(*point, color=shade, marker="o", markersize=6.5, markeredgecolor=PAPER, zorder=4)
        if crossed is None or i in crossed:
            for line in (
                np.stack([x[i, 1:], y[i, [0, 0]]], axis=1),
                np.stack([x[i, [0, 0]], y[i, 1:]], axis=1),
            ):
                ax.plot(*line.T, color=shade, linewidth=1.1, alpha=0.5, zorder=2)
                drawn.append(dense(line)[::2])
    anchors = [
        Anchor(float(point[0]), float(point[1]), text, shade)
        for point, text, shade in zip(track, labels, shades, strict=True)
        if text
    ]
    for name, points in (others or {}).items():
        line = _track(name, points)
        dashes = {"color": MUTED, "linewidth": 1.2, "linestyle": (0, (4, 2))}
        ax.plot(*line.T, label=name, zorder=2, **dashes)
        drawn.append(dense(line))
    for line in (ax.axhline, ax.axvline):
        line(0, color=MUTED, linewidth=0.9, zorder=1)
    ax.margins(0.08)
    dots = {"color": MUTED, "linewidth": 1.2, "linestyle": (0, (1, 2))}
    ax.axline((0, 0), slope=1, label="outside = inside", zorder=1, **dots)
    ax.legend(loc="best")
    dress(
        ax,
        x_label="change of log-odds inside [nats/token]",
        y_label="change of log-odds outside [nats/token]",
        title=title,
        grid="both",
    )
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
