"""Two ways to the same quantity, on one scale."""

from __future__ import annotations

import pytest

from emlens.figures import agreement_plot


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
    with pytest.raises(ValueError, match="'a' has 1 and 2 values; they must be as many"):
        agreement_plot({"a": ([1], [1, 2])}, x_label="x", y_label="y")
