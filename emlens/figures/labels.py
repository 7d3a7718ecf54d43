"""Direct labels: names next to points and lines, moved apart each time the figure is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os.path import commonprefix

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backend_bases import RendererBase
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.transforms import Bbox, IdentityTransform

from emlens.figures.style import INK, readable, width_of, wrapped


@dataclass(frozen=True, slots=True)
class Anchor:
    """A point of the data, and the label and colour that belong to it."""

    x: float
    y: float
    text: str
    colour: str


class DirectLabels(Artist):
    """Labels whose positions are computed whenever the figure is drawn.

    Positions depend on the sizes at that moment, so labels stay apart when the figure is
    resized, saved at another resolution, or given other limits.
    """

    def __init__(self, ax: Axes, anchors: Sequence[Anchor], *, size: float = 9) -> None:
        super().__init__()
        self.anchors = tuple(anchors)
        limit = max(11, int(width_of(ax) * 3.3))
        self.texts = [self._text(anchor, limit, size) for anchor in anchors]
        self.leaders = [
            Line2D([], [], color=anchor.colour, linewidth=0.7, alpha=0.7) for anchor in anchors
        ]
        self.set_zorder(5)
        ax.add_artist(self)
        self.set_clip_on(False)
        for child in (*self.texts, *self.leaders):
            child.set_transform(IdentityTransform())
            child.set_figure(ax.figure)

    @staticmethod
    def _text(anchor: Anchor, limit: int, size: float) -> Text:
        return Text(
            text=wrapped(anchor.text, limit),
            color=readable(anchor.colour),
            fontsize=size,
            va="center",
            linespacing=1.05,
        )

    def draw(self, renderer: RendererBase) -> None:
        """Place the labels and draw them."""
        if not self.get_visible():
            return
        self.arrange(renderer)
        for child in (*self.leaders, *self.texts):
            child.draw(renderer)
        self.stale = False

    def get_window_extent(self, renderer: RendererBase | None = None) -> Bbox:
        """The box around all labels, in pixels."""
        if renderer is None:
            # As matplotlib's own texts do; a canvas made here would replace the caller's.
            renderer = self._home().get_figure(root=True)._get_renderer()  # type: ignore
        self.arrange(renderer)  # type: ignore[arg-type]
        boxes = [text.get_window_extent(renderer) for text in self.texts]
        return Bbox.union(boxes) if boxes else Bbox.null()

    def get_tightbbox(self, renderer: RendererBase | None = None) -> Bbox:
        """The same box: the layout keeps room for it."""
        return self.get_window_extent(renderer)

    def arrange(self, renderer: RendererBase) -> None:
        """Move every label to its place, in pixels."""
        raise NotImplementedError

    def points(self) -> np.ndarray:
        """Where the anchors are in pixels, kept inside of the axes, `[labels, 2]`."""
        ax = self._home()
        with np.errstate(all="ignore"):
            pixels = ax.transData.transform([(anchor.x, anchor.y) for anchor in self.anchors])
        low, high = ax.bbox.min, ax.bbox.max
        return np.clip(np.where(np.isfinite(pixels), pixels, low), low, high)

    def _home(self) -> Axes:
        if not isinstance(self.axes, Axes):
            raise RuntimeError("these labels belong to axes that were removed")
        return self.axes

    def _pad(self, points: float) -> float:
        figure = self._home().get_figure(root=True)
        return points * (figure.dpi if figure is not None else 72) / 72


class EndLabels(DirectLabels):
    """A column of labels right of the axes, each at the height of the end of its line."""

    def arrange(self, renderer: RendererBase) -> None:
        """Move every label to its place, in pixels."""
        ax, points = self._home(), self.points()
        if not len(points):
            return
        heights = np.array([text.get_window_extent(renderer).height for text in self.texts])
        centres = spread(points[:, 1], heights, gap=self._pad(1.5), low=ax.bbox.y0, high=ax.bbox.y1)
        left = ax.bbox.x1 + self._pad(9)
        for anchor, (x, y), centre, text, leader in zip(
            self.anchors, points, centres, self.texts, self.leaders, strict=True
        ):
            text.set_position((left, centre))
            away = left - x > self._pad(14) or abs(centre - y) > self._pad(3)
            leader.set_visible(bool(away and np.isfinite(anchor.y)))
            leader.set_alpha(0.7 if left - x < self._pad(60) else 0.3)
            leader.set_data([x + self._pad(2), left - self._pad(1.5)], [y, centre])


class PointLabels(DirectLabels):
    """Labels beside points, on whichever side is free of other labels and of lines.

    Args:
        ax: Axes to add the labels to.
        anchors: What to label.
        lines: Points of the data to keep clear of, `[points, 2]`.
    """

    def __init__(self, ax: Axes, anchors: Sequence[Anchor], lines: np.ndarray) -> None:
        super().__init__(ax, anchors)
        self.lines = lines

    def arrange(self, renderer: RendererBase) -> None:
        """Move every label to its place, in pixels."""
        points, pad = self.points(), self._pad(6)
        frame, drawn = self._home().bbox, self._home().transData.transform(self.lines)
        taken = [Bbox.from_extents(x - pad, y - pad, x + pad, y + pad) for x, y in points]
        for place, (text, leader) in enumerate(zip(self.texts, self.leaders, strict=True)):
            box = text.get_window_extent(renderer)
            others = taken[:place] + taken[place + 1 :]
            spots = _spots(points[place], box.width, box.height, pad)
            x, y = min(spots, key=lambda spot: _cost(spot, box, others, frame, drawn))
            text.set_position((x, y))
            leader.set_data([points[place][0], x], [points[place][1], y])
            leader.set_visible(bool(abs(y - points[place][1]) > 3 * box.height))
            taken.append(_box(x, y, box))


def mark_points(ax: Axes, points: Mapping[str, tuple[float, float]], colour: str = INK) -> None:
    """Put a dot and a name at each of some points, names apart from each other and from lines.

    Args:
        ax: Axes with what the points belong to.
        points: `{name: (x, y)}`.
        colour: Colour of dots and names.

    Raises:
        ValueError: If there are no points.
    """
    if not points:
        raise ValueError("there are no points to mark: give at least one {name: (x, y)}")
    places = np.array(list(points.values()), dtype=float)
    own = [line for line in ax.lines if line.get_transform() == ax.transData]
    drawn = [dense(xy) for line in own if len(xy := np.asarray(line.get_xydata()))]
    ax.plot(*places.T, "o", color=colour, markersize=3.5, zorder=4)
    anchors = [Anchor(x, y, name, colour) for name, (x, y) in points.items()]
    PointLabels(ax, anchors, np.concatenate([places, *drawn]))


def dense(track: np.ndarray) -> np.ndarray:
    """Points along a line, close enough to keep labels off it, `[points, 2]`."""
    steps = np.linspace(0, len(track) - 1, 400)
    return np.stack([np.interp(steps, range(len(track)), part) for part in track.T], axis=1)


def _spots(point: np.ndarray, width: float, height: float, pad: float) -> list[tuple[float, float]]:
    x, y = float(point[0]), float(point[1])
    rises = [step * height for step in (0, 1, -1, 2, -2, 3, -3, 4, -4, 6, -6)]
    middle = x - width / 2
    return [
        *[(left, y + rise) for rise in rises[:3] for left in (x + pad, x - pad - width)],
        *[(middle, y + side * (height / 2 + pad)) for side in (1, -1)],
        *[(left, y + rise) for rise in rises[3:] for left in (x + pad, x - pad - width)],
    ]


def _box(x: float, y: float, like: Bbox) -> Bbox:
    return Bbox.from_bounds(x, y - like.height / 2, like.width, like.height)


def _cost(
    spot: tuple[float, float], like: Bbox, taken: list[Bbox], frame: Bbox, drawn: np.ndarray
) -> float:
    """Pixels of the label that cover another one, a line (each point counts 40) or the outside."""
    box = _box(*spot, like)
    shared = [Bbox.intersection(box, other) for other in taken]
    overlap = sum(part.width * part.height for part in shared if part is not None)
    inside = Bbox.intersection(box, frame)
    outside = box.width * box.height - (inside.width * inside.height if inside is not None else 0)
    return overlap + outside + 40 * box.count_contains(drawn)


def spread(
    wanted: np.ndarray, heights: np.ndarray, *, gap: float, low: float, high: float
) -> np.ndarray:
    """Centres closest to the wanted ones (least squares) such that no two boxes touch.

    Args:
        wanted: Wanted centres, `[labels]`.
        heights: Heights of the boxes, `[labels]`.
        gap: Least distance between two boxes.
        low: Lower limit of the lowest box; ignored when the boxes do not fit.
        high: Upper limit of the highest box; ignored when the boxes do not fit.

    Returns:
        Centres in the order of `wanted`, `[labels]`.
    """
    from scipy.optimize import isotonic_regression

    order = np.argsort(wanted, kind="stable")
    tall = heights[order]
    steps = np.concatenate([[0.0], (tall[:-1] + tall[1:]) / 2 + gap]).cumsum()
    free = isotonic_regression(wanted[order] - steps).x
    bottom, top = low + tall[0] / 2, high - tall[-1] / 2 - steps[-1]
    if bottom > top:
        bottom = top = (bottom + top) / 2
    centres = np.empty_like(free)
    centres[order] = np.clip(free, bottom, top) + steps
    return centres


def told_apart(names: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """The common prefix of all names, up to a mark between words, and the names without it.

    A short prefix is kept, as is one that would leave a name empty.
    """
    shared = commonprefix(list(names))
    shared = shared[: max(shared.rfind(mark) for mark in "_-/ .:") + 1]
    if len(names) < 2 or len(shared) < 6 or shared in names:
        return "", tuple(names)
    return shared, tuple(name[len(shared) :] for name in names)
