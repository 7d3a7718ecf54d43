from __future__ import annotations

import subprocess
import sys

import matplotlib as mpl
import pytest
from matplotlib import colors

from emlens.figures import colour, house_style, palette
from emlens.figures.lines import line_bands
from emlens.figures.style import COLOURS, SPARE, new_axes, new_panels, readable, wrapped


def test_drawing_leaves_the_settings_and_the_backend_as_they_were():
    before = dict(mpl.rcParams)
    line_bands({"general": ([0, 1], [1, 2])}, x_label="x", y_label="y").figure.canvas.draw()
    assert dict(mpl.rcParams) == before


def test_house_style_ends_with_its_block():
    before = mpl.rcParams["axes.spines.top"]
    with pytest.raises(KeyError), house_style():
        assert mpl.rcParams["axes.spines.top"] is False
        raise KeyError
    assert mpl.rcParams["axes.spines.top"] == before


def test_neither_import_nor_drawing_touches_pyplot():
    code = (
        "import sys, emlens\n"
        "assert 'matplotlib' not in sys.modules\n"
        "import emlens.figures as f\n"
        "f.heatmap([[1.0]], ['a'], ['b']).figure.draw_without_rendering()\n"
        "from emlens.figures.lines import line_bands\n"
        "line_bands({'a': ([1], [1])}, x_label='x', y_label='y')._repr_png_()\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_name_has_one_colour_however_it_is_written():
    assert colour("mean-diff") == colour("Mean_diff") == COLOURS["mean-diff"]
    assert colour("something else") == colour("something else") in SPARE


def test_fixed_and_spare_colours_are_all_different():
    assert len({*COLOURS.values(), *SPARE}) == len(COLOURS) + len(SPARE)


def test_a_palette_gives_different_colours_while_there_are_some():
    names = ["general", "narrow", *(f"other {place}" for place in range(len(SPARE)))]
    chosen = palette(names)
    assert list(chosen) == names
    assert len(set(chosen.values())) == len(names)
    assert chosen["general"] == COLOURS["general"]


@pytest.mark.parametrize("shade", [*COLOURS.values(), *SPARE])
def test_names_in_a_colour_can_be_read_on_white(shade):
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
        for c in colors.to_rgb(readable(shade))
    ]
    luminance = sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    assert 1.05 / (luminance + 0.05) >= 4.49


def test_wrapping_keeps_ordinary_words_whole():
    assert wrapped("finance (trained)", 5) == "finance\n(trained)"
    assert max(map(len, wrapped("x" * 50, 8).split("\n"))) <= 14


def test_a_figure_shows_itself_as_an_opaque_png():
    data, size = new_axes(width=3, height=2)._repr_png_()
    assert data.startswith(b"\x89PNG")
    assert size["width"] == pytest.approx(300, abs=40)
    assert new_axes().figure.get_facecolor() == (1, 1, 1, 1)


def test_panels_share_one_figure():
    panels = new_panels(3, 2)
    assert len(panels) == 6
    assert len({id(ax.figure) for ax in panels}) == 1


def test_a_solution_has_its_hue_under_every_condition():
    assert colour("general, own direction ablated") == COLOURS["general"]
    assert colour("random, layer 5") == colour("random 0") == COLOURS["random"]
    assert colour("general adapter") == COLOURS["general"]
    assert colour("general vs narrow") not in COLOURS.values()
    assert colour("generally") not in COLOURS.values()


def test_two_conditions_of_a_solution_have_two_shades_of_its_hue():
    whole, half, other = palette(["general", "general, half", "narrow"]).values()
    assert (whole, other) == (COLOURS["general"], COLOURS["narrow"])
    hues = [colors.rgb_to_hsv(colors.to_rgb(shade))[0] for shade in (whole, half)]
    assert hues[0] == pytest.approx(hues[1], abs=0.02) and whole != half


def test_panels_show_their_figure_once_in_a_notebook():
    panels = new_panels(2, width=4, height=2)
    data, size = panels._repr_png_()
    assert data.startswith(b"\x89PNG") and size["width"] > size["height"]
