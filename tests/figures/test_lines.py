from __future__ import annotations

import numpy as np
import pytest
from matplotlib.collections import PolyCollection

from emlens.figures.labels import DirectLabels
from emlens.figures.lines import layer_curves, line_bands
from emlens.figures.paths import path_plot
from emlens.figures.style import new_axes

X = np.linspace(0, 1, 5)
LABELS = {"x_label": "dose", "y_label": "KL (nats per token)"}


def names_of(ax) -> list[str]:
    (labels,) = [child for child in ax.get_children() if isinstance(child, DirectLabels)]
    return [text.get_text() for text in labels.texts]


def bands_of(ax) -> list[PolyCollection]:
    return [part for part in ax.collections if isinstance(part, PolyCollection)]


def test_axes_have_labels_and_every_curve_its_name_and_band():
    ax = line_bands(
        {"general": (X, X, X - 0.1, X + 0.1), "base": (X, X * 0)}, title="Influence", **LABELS
    )
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("dose", "KL (nats per token)")
    assert ax.get_title(loc="left") == "Influence"
    assert names_of(ax) == ["general", "base"]
    (band,) = bands_of(ax)
    assert band.get_paths()[0].vertices[:, 1].min() == pytest.approx(-0.1)
    assert ax.get_legend() is None


def test_it_draws_on_the_axes_that_it_is_given():
    ax = new_axes()
    assert line_bands({"general": (X, X)}, ax=ax, **LABELS) is ax


def test_gaps_single_points_and_empty_curves_survive():
    gap = np.array([1.0, np.nan, 2.0, np.nan, np.nan])
    ax = line_bands(
        {
            "gap": (X, gap, gap - 1, gap + 1),
            "point": ([0.5], [1.0], [0.5], [1.5]),
            "none": (X, X * np.nan),
        },
        **LABELS,
    )
    ax.figure.draw_without_rendering()
    assert names_of(ax) == ["gap", "point", "none (no values)"]


def test_a_log_scale_survives_values_that_are_not_positive():
    ax = line_bands({"a": (X, X, X - 1, X + 1)}, y_scale="log", x_scale="log", **LABELS)
    ax.figure.draw_without_rendering()
    assert ax.get_yscale() == "log"


def test_a_named_reference_is_labelled():
    ax = line_bands({"general": (X, X)}, reference=(0.7, "trained adapter"), **LABELS)
    assert names_of(ax) == ["general", "trained adapter"]


@pytest.mark.parametrize("null", [(-0.1, 0.1), (np.full(5, -0.1), np.full(5, 0.1))])
def test_layers_are_whole_numbers_over_the_null_band(null):
    ax = layer_curves({"general vs narrow": (range(5), X)}, null=null)
    ax.figure.draw_without_rendering()
    assert names_of(ax) == ["general vs narrow", "chance"]
    assert ax.get_xlabel() == "layer"
    assert ax.get_ylabel() == "cosine similarity"
    assert all(float(tick).is_integer() for tick in ax.get_xticks())
    assert "null band" in [part.get_label() for part in [*ax.collections, *ax.patches]]


@pytest.mark.parametrize(
    ("curves", "message"),
    [
        ({}, "there are no curves to draw"),
        ({"a": (X,)}, "curve 'a' has 1 parts"),
        ({"a": (X, X[:3])}, r"arrays of curve 'a' must have one length, not \[\(5,\), \(3,\)\]"),
        ({"a": (X, X, X, None)}, "both of low and high or neither"),
    ],
)
def test_curves_that_cannot_be_drawn_are_refused(curves, message):
    with pytest.raises(ValueError, match=message):
        line_bands(curves, **LABELS)


def test_a_path_marks_its_start_and_names_its_end():
    ax = path_plot({"general": [[0, 0], [1, 1]], "narrow": [[0, 0], [1, -1]]}, x_label="PC 1")
    assert names_of(ax) == ["general", "narrow", "start"]
    assert ax.get_xlabel() == "PC 1"
    assert ax.get_aspect() == 1


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ({}, "there are no paths"),
        ({"a": [1, 2, 3]}, r"path 'a' has shape \(3,\), not \[steps, 2\]"),
        ({"a": [[np.nan, 0]]}, "path 'a' has no finite point"),
    ],
)
def test_paths_that_cannot_be_drawn_are_refused(paths, message):
    with pytest.raises(ValueError, match=message):
        path_plot(paths)
