from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from emlens.figures.labels import DirectLabels, EndLabels, PointLabels, mark_points, spread
from emlens.figures.lines import line_bands
from emlens.figures.paths import path_plot
from emlens.figures.style import new_axes


def labels_of(ax) -> DirectLabels:
    return next(child for child in ax.get_children() if isinstance(child, DirectLabels))


def boxes_of(ax):
    canvas = FigureCanvasAgg(ax.figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    return [text.get_window_extent(renderer) for text in labels_of(ax).texts]


def assert_apart(boxes):
    assert not [pair for pair in combinations(boxes, 2) if pair[0].overlaps(pair[1])]


LONG = "a name of a direction that goes on and on, with its seed and its adapter"
NAMES = ["general", "narrow", "random", "mean-diff", "probe", "LoRA B", LONG, "base"]


@pytest.mark.parametrize("width", [3.3, 6.6])
def test_names_of_lines_that_end_together_do_not_overlap(width):
    curves = {name: ([0, 1, 2], [1, 2, 3 + 0.001 * i]) for i, name in enumerate(NAMES)}
    ax = line_bands(curves, x_label="x", y_label="y", ax=new_axes(width=width, height=3.6))
    boxes = boxes_of(ax)
    assert_apart(boxes)
    assert all(box.x0 > ax.bbox.x1 for box in boxes)
    assert all(box.x1 <= ax.figure.bbox.x1 + 1 for box in boxes)


def test_names_stay_apart_when_the_axes_change_after_drawing():
    ax = line_bands(
        {"general": ([0, 1], [1, 1]), "narrow": ([0, 1], [1, 9])}, x_label="x", y_label="y"
    )
    assert_apart(boxes_of(ax))
    ax.set_ylim(-1e4, 1e4)
    ax.figure.set_size_inches(4, 2)
    assert_apart(boxes_of(ax))


def test_a_name_stands_at_the_height_of_the_last_value():
    ax = line_bands({"general": ([2, 1, 0], [5.0, 1.0, 0.0])}, x_label="x", y_label="y")
    (box,) = boxes_of(ax)
    wanted = ax.transData.transform((2, 5.0))[1]
    assert (box.y0 + box.y1) / 2 == pytest.approx(wanted, abs=3)


def test_names_of_paths_that_end_together_do_not_overlap():
    path = np.array([[0, 0], [1, 0.5], [2, 2]])
    ax = path_plot({name: path * (1 + 0.001 * i) for i, name in enumerate(NAMES[:4])})
    assert_apart(boxes_of(ax))


def test_names_of_points_in_a_heap_do_not_overlap_each_other_or_the_dots():
    ax = line_bands({"path": ([0, 1], [0, 1])}, x_label="x", y_label="y")
    heap = {f"{10 * i}": (0.5 + 0.01 * i, 0.5 + 0.002 * i) for i in range(6)}
    mark_points(ax, heap)
    (labels,) = [part for part in ax.get_children() if isinstance(part, PointLabels)]
    canvas = FigureCanvasAgg(ax.figure)
    canvas.draw()
    boxes = [text.get_window_extent(canvas.get_renderer()) for text in labels.texts]
    assert_apart(boxes)
    dots = ax.transData.transform(list(heap.values()))
    assert not [box for box in boxes for x, y in dots if box.contains(x, y)]
    with pytest.raises(ValueError, match="there are no points to mark"):
        mark_points(ax, {})


def test_spread_moves_boxes_no_further_than_needed():
    wanted = np.array([10.0, 10.0, 50.0])
    centres = spread(wanted, np.full(3, 4.0), gap=1.0, low=0, high=100)
    np.testing.assert_allclose(centres, [7.5, 12.5, 50.0])


def test_spread_keeps_boxes_inside_while_they_fit():
    centres = spread(np.array([0.0, 0.0]), np.array([4.0, 4.0]), gap=0, low=0, high=100)
    np.testing.assert_allclose(centres, [2.0, 6.0])
    squeezed = spread(np.zeros(30), np.full(30, 4.0), gap=0, low=0, high=10)
    assert np.diff(squeezed).min() >= 4.0 - 1e-9


def test_labels_know_the_box_around_them_without_a_renderer():
    ax = line_bands({"general": ([0, 1], [1, 2])}, x_label="x", y_label="y")
    assert isinstance(labels_of(ax), EndLabels)
    assert labels_of(ax).get_window_extent().width > 10
