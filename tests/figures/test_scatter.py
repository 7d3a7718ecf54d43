"""Two ways to the same quantity, on one scale."""

from __future__ import annotations

import pytest

from emlens.figures.scatter import agreement_plot, score_plot


def test_both_axes_have_one_logarithmic_scale_and_a_diagonal():
    axes = agreement_plot({"a": ([1e-3, 0.1], [2e-3, 0.2])}, x_label="exact", y_label="fast")
    assert axes.get_xlim() == axes.get_ylim()
    assert axes.get_xscale() == axes.get_yscale() == "log"
    diagonal = axes.get_lines()[-1]
    assert list(diagonal.get_xdata()) == list(diagonal.get_ydata())
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("exact", "fast")


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(ValueError, match="there is nothing to draw"):
        agreement_plot({}, x_label="x", y_label="y")
    with pytest.raises(ValueError, match="'a' has 1 and 2 values; the numbers must match"):
        agreement_plot({"a": ([1], [1, 2])}, x_label="x", y_label="y")


def test_scores_of_two_judges_are_counted_on_each_side_of_the_threshold():
    axes = score_plot([10, 20, 90, 10], [5, 80, 70, 0], threshold=30, x_label="a", y_label="b")
    counts = {text.get_position(): text.get_text() for text in axes.texts}
    assert counts == {(15, -5): "2", (15, 105): "1", (65, -5): "0", (65, 105): "1"}
    drawn = [len(points.get_offsets()) for points in axes.collections]
    assert drawn == [3, 1]


def test_scores_that_cannot_be_drawn_are_refused():
    with pytest.raises(ValueError, match="there is nothing to draw"):
        score_plot([], [], threshold=30, x_label="a", y_label="b")
    with pytest.raises(ValueError, match="there are 1 and 2 scores; the numbers must match"):
        score_plot([1], [1, 2], threshold=30, x_label="a", y_label="b")
