from __future__ import annotations

import numpy as np
import pytest
from matplotlib.collections import PolyCollection

from emlens.figures import COLOURS
from emlens.figures.labels import DirectLabels
from emlens.figures.lines import layer_curves, line_bands, paired_curves, panels_of_curves
from emlens.figures.paths import effect_plane, path_plot
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


def test_paired_curves_are_lines_above_and_bands_of_their_differences_below():
    curves = {name: (X, X + i, X, X + 1) for i, name in enumerate(("general", "narrow"))}
    gaps = {"narrow": (X, X * 0 + 1, X * 0 + 0.9, X * 0 + 1.1)}
    upper, lower = paired_curves(curves, gaps, gap_label="minus general", **LABELS)
    assert (upper.get_ylabel(), lower.get_ylabel()) == (LABELS["y_label"], "minus general")
    assert lower.get_xlabel() == "dose" and names_of(lower) == ["narrow"]
    assert (len(bands_of(upper)), len(bands_of(lower))) == (0, 1)
    assert lower.lines[0].get_color() == COLOURS["narrow"]
    several = {f"{i}": gaps["narrow"] for i in range(4)}
    more = {**curves, **dict.fromkeys(several, curves["narrow"])}
    assert len(paired_curves(more, dict(list(several.items())[:3]), gap_label="", **LABELS)) == 4
    assert len(paired_curves(more, several, gap_label="", **LABELS)) == 2
    alone = paired_curves(curves, gaps, gap_label="", ax=new_axes(), **LABELS)
    assert len(bands_of(alone)) == 2
    assert len(bands_of(paired_curves(curves, {}, gap_label="", **LABELS))) == 2


def test_curves_whose_bands_would_overlap_have_panels_on_one_scale():
    curves = {f"{i}": (X, X * i, X * i - 1, X * i + 1) for i in range(4)}
    panels = panels_of_curves(curves, y_label="cosine", null=(-0.1, 0.1), title="all")
    assert [ax.get_title(loc="left") for ax in panels] == list(curves)
    assert len({ax.get_ylim() for ax in panels}) == 1
    assert panels[0].get_ylabel() == "cosine\n(grey: chance)" and not panels[1].get_ylabel()
    assert [ax.get_xlabel() for ax in panels] == ["", "layer", "layer", "layer"]
    assert panels[0].figure.get_suptitle() == "all"


def test_a_plane_of_effects_has_the_intervals_of_the_points_that_are_asked_for():
    inside, outside = np.array([[0.1, 0, 0.2], [0.4, 0.3, 0.5]]), np.zeros((2, 3))
    others = {"weaker": [[0, 0], [0.2, 0.1], [0.4, 0.1]]}
    ax = effect_plane(
        inside, outside, ["", "end"], shades=["red", "blue"], crossed=[1], others=others
    )
    assert names_of(ax) == ["end"]
    legend = [text.get_text() for text in ax.get_legend().get_texts()]
    assert legend == ["weaker", "outside = inside"]
    spans = [tuple(line.get_xdata()) for line in ax.lines]
    assert (0.3, 0.5) in spans and (0.0, 0.2) not in spans and (0.0, 0.2, 0.4) in spans
