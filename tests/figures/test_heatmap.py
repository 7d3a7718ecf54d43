from __future__ import annotations

import io

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PatchCollection

from emlens.figures import heatmap, house_style
from emlens.figures.heatmap import CellText
from emlens.figures.style import new_axes

MATRIX = np.array([[1.0, 0.05, -0.6], [0.05, 1.0, np.nan]])
ROWS, COLS = ["mean-diff", "general"], ["mean-diff", "general", "narrow"]


def cells_of(ax) -> list[CellText]:
    return [child for child in ax.get_children() if isinstance(child, CellText)]


def hatched(ax) -> int:
    return sum(len(p.get_paths()) for p in ax.collections if isinstance(p, PatchCollection))


def test_values_are_printed_and_rows_and_columns_named():
    ax = heatmap(MATRIX, ROWS, COLS)
    ax.figure.draw_without_rendering()
    assert [cell.get_text() for cell in cells_of(ax)] == ["1.00", "0.05", "−0.60"] + [
        "0.05",
        "1.00",
        "–",
    ]
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ROWS
    assert [tick.get_text() for tick in ax.get_xticklabels()] == COLS
    assert ax.images[0].get_clim() == (-1.0, 1.0)


@pytest.mark.parametrize("band", [0.1, (-0.1, 0.1), (np.full((2, 1), -0.1), np.full(3, 0.1))])
def test_cells_that_chance_can_give_are_hatched(band):
    ax = heatmap(MATRIX, ROWS, COLS, null_band=band)
    assert hatched(ax) == 2
    assert "hatched: within chance" in ax.figure.axes[1].get_ylabel()
    assert hatched(heatmap(MATRIX, ROWS, COLS)) == 0


def printed(ax) -> int:
    buffer = io.StringIO()
    with house_style():
        ax.figure.savefig(buffer, format="svg")
    return buffer.getvalue().count(">0.77</text>")


def test_printed_values_fit_their_cells():
    for width in (3.3, 6.6):
        ax = heatmap(0.77 * np.eye(7), list("abcdefg"), list("abcdefg"), ax=new_axes(width=width))
        canvas = FigureCanvasAgg(ax.figure)
        canvas.draw()
        room = np.diff(ax.transData.transform([(0, 0), (1, 0)])[:, 0])[0]
        assert all(
            cell.get_window_extent(canvas.get_renderer()).width <= room for cell in cells_of(ax)
        )
        assert printed(ax) == 7


def test_values_that_could_not_be_read_are_left_out():
    assert printed(heatmap(0.77 * np.eye(7), "abcdefg", "abcdefg", ax=new_axes(width=1.6))) == 0


def test_many_cells_are_not_printed_and_their_names_are_thinned():
    names = [str(place) for place in range(60)]
    ax = heatmap(np.zeros((60, 60)), names, names, limits=None)
    ax.figure.draw_without_rendering()
    assert not cells_of(ax)
    boxes = [tick.get_window_extent() for tick in ax.get_xticklabels()]
    assert all(left.x1 < right.x0 for left, right in zip(boxes, boxes[1:], strict=False))


def test_a_matrix_that_does_not_fit_its_names_is_refused():
    with pytest.raises(ValueError, match=r"shape \(2, 3\) does not fit 1 row labels and 3 column"):
        heatmap(MATRIX, ROWS[:1], COLS)
    with pytest.raises(ValueError, match="does not fit"):
        heatmap(np.zeros((0, 0)), [], [])


def test_white_may_lie_at_another_centre_than_zero():
    ax = heatmap([[0.5, 0.9]], ["a"], ["b", "c"], limits=(0.0, 1.0))
    assert ax.images[0].get_clim() == (0.0, 1.0)
    ax = heatmap([[0.5, 0.9]], ["a"], ["b", "c"], limits=None)
    assert ax.images[0].get_clim() == pytest.approx((-0.9, 0.9))


def test_intervals_stand_below_their_values_and_fit_their_cells():
    ends = np.stack([MATRIX, MATRIX - 0.1, MATRIX + 0.1], axis=2)
    ax = heatmap(ends, ROWS, COLS)
    canvas = FigureCanvasAgg(ax.figure)
    canvas.draw()
    texts = [cell.get_text() for cell in cells_of(ax)]
    assert texts[0] == "1.00\n[0.90, 1.10]" and texts[2] == "−0.60\n[−0.70, −0.50]"
    assert texts[-1] == "–"
    (left, bottom), (right, top) = ax.transData.transform([(0, 0), (1, 1)])
    for cell in cells_of(ax):
        box = cell.get_window_extent(canvas.get_renderer())
        assert box.width <= abs(right - left) and box.height <= abs(top - bottom)
    with pytest.raises(ValueError, match=r"shape \(2, 3, 2\) must hold a value and two ends"):
        heatmap(ends[..., :2], ROWS, COLS)
