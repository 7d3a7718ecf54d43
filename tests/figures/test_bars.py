from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from emlens.figures import COLOURS
from emlens.figures.bars import bar_list, dot_intervals

TABLE = pd.DataFrame(
    {
        "domain": ["finance", "finance", "medical"],
        "condition": ["general", "narrow", "narrow"],
        "log-odds": [0.2, 0.1, np.nan],
        "low": [0.1, 0.0, np.nan],
        "high": [0.3, 0.2, np.nan],
    }
)
COLUMNS = {
    "group": "domain",
    "series": "condition",
    "value": "log-odds",
    "low": "low",
    "high": "high",
}


def dots(table: pd.DataFrame, **options):
    return dot_intervals(*(table[name] for name in COLUMNS.values()), y_label="nats", **options)


def ends_of(ax) -> list[tuple[float, float]]:
    lines = [path.vertices[:, 1] for part in ax.collections for path in part.get_paths()]
    return [tuple(line) for line in lines if len(line) and np.isfinite(line).all()]


def test_points_and_their_intervals_stand_in_the_order_of_the_table():
    ax = dots(TABLE)
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["finance", "medical"]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["general", "narrow"]
    assert ax.get_ylabel() == "nats"
    assert sorted(ends_of(ax)) == [(0.0, 0.2), (0.1, 0.3)]
    ax.figure.draw_without_rendering()


def test_there_is_a_line_at_zero_unless_it_is_not_wanted():
    def flat(ax):
        return [line for line in ax.lines if list(line.get_ydata()) == [0.0, 0.0]]

    assert len(flat(dots(TABLE))) == 1
    assert not flat(dots(TABLE, zero=None))


def test_an_estimate_outside_of_its_interval_is_drawn_as_given():
    ax = dot_intervals(["a"], ["b"], [5.0], [0.0], [1.0], y_label="nats")
    assert ends_of(ax) == [(0.0, 1.0)]
    assert ax.get_legend() is None


def test_bars_stand_on_zero():
    heights = [bar.get_height() for bar in dots(TABLE, bars=True).patches]
    assert [round(height, 3) for height in heights if np.isfinite(height)] == [0.2, 0.1]


def test_eight_long_named_series_in_six_groups_survive():
    groups = np.repeat([f"group with a long name {i}" for i in range(6)], 8)
    series = [f"condition with quite a long name {i}" for i in range(8)] * 6
    values = np.linspace(-1, 1, 48)
    ax = dot_intervals(groups, series, values, values - 1, values + 1, y_label="nats")
    ax.figure.draw_without_rendering()
    boxes = [tick.get_window_extent() for tick in ax.get_xticklabels()]
    assert all(left.x1 <= right.x1 for left, right in zip(boxes, boxes[1:], strict=False))


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(ValueError, match="group 'finance' has series 'general' more than once"):
        dots(pd.concat([TABLE, TABLE]))
    with pytest.raises(ValueError, match="there are no estimates"):
        dots(TABLE[:0])
    with pytest.raises(ValueError, match="one entry per estimate"):
        dot_intervals(["a"], ["b"], [1.0, 2.0], [0.0], [1.0], y_label="nats")


def test_without_series_each_group_has_the_hue_of_its_name():
    ax = dot_intervals(["general", "layer 5"], None, [1, 2], [0, 1], [2, 3], y_label="nats")
    shades = [line.get_color() for line in ax.lines if len(line.get_xdata()) == 1]
    assert shades == [COLOURS["general"], COLOURS["base"]]
    assert ends_of(ax) == [(0, 2), (1, 3)]
    assert ax.get_legend() is None


def test_a_list_of_bars_reads_from_top_to_bottom_and_says_its_values():
    ax = bar_list(["first", "second", "second"], [2.0, -1.0, 0.5], x_label="logit [SD]")
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["first", "second", "second"]
    assert [bar.get_width() for bar in ax.patches] == [2.0, -1.0, 0.5]
    assert [text.get_text() for text in ax.texts] == ["2.0", "−1.0", "0.5"]
    low, high = ax.get_ylim()
    assert low > high
    with pytest.raises(ValueError, match=r"got 1 names and values of shape \(2,\)"):
        bar_list(["a"], [1.0, 2.0], x_label="x")
