from __future__ import annotations

import pytest
from matplotlib.figure import Figure

from emlens.figures import heatmap, save_figure
from emlens.figures.bars import dot_intervals
from emlens.figures.lines import line_bands


def draw():
    return line_bands(
        {"general": ([0, 1, 2], [1, 2, 4], [0, 1, 3], [2, 3, 5]), "base": ([0, 2], [1, 1])},
        x_label="dose",
        y_label="KL (nats per token)",
        reference=(1.5, "adapter"),
    )


def test_both_files_are_written_and_their_text_is_text(tmp_path):
    png, svg = save_figure(draw(), tmp_path / "new" / "influence.v1")
    assert (png.name, svg.name) == ("influence.v1.png", "influence.v1.svg")
    assert png.read_bytes().startswith(b"\x89PNG")
    assert ">KL (nats per token)</text>" in svg.read_text()
    assert "<dc:date>" not in svg.read_text()
    assert sorted(path.name for path in png.parent.iterdir()) == [png.name, svg.name]


@pytest.mark.parametrize(
    "make",
    [
        draw,
        lambda: heatmap([[0.0, 1.0]], ["a"], ["b", "c"], null_band=0.1),
        lambda: dot_intervals(["a", "a"], ["b", "c"], [1, 2], [0, 1], [2, 3], y_label="nats"),
    ],
)
def test_the_same_figure_gives_the_same_bytes(tmp_path, make):
    first = [path.read_bytes() for path in save_figure(make(), tmp_path / "first")]
    again = [path.read_bytes() for path in save_figure(make().figure, tmp_path / "again.png")]
    assert first == again


def test_a_failure_leaves_the_old_files_and_no_rubbish(tmp_path, monkeypatch):
    before = [path.read_bytes() for path in save_figure(draw(), tmp_path / "kept")]

    def fail(self, stream, **options):
        stream.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="no space left"):
        save_figure(draw(), tmp_path / "kept")
    assert [path.read_bytes() for path in sorted(tmp_path.iterdir())] == before


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_a_picture_whose_end_is_missing_does_not_replace_the_old_one(tmp_path, monkeypatch, kind):
    before = [path.read_bytes() for path in save_figure(draw(), tmp_path / "kept")]
    plain = Figure.savefig

    def cut(self, path, *, format, **options):
        plain(self, path, format=format, **options)
        if format == kind:
            path.write_bytes(path.read_bytes()[:-20])

    monkeypatch.setattr(Figure, "savefig", cut)
    with pytest.raises(OSError, match=rf"kept\.{kind} was not written completely.*the end of the"):
        save_figure(draw(), tmp_path / "kept")
    assert [path.read_bytes() for path in sorted(tmp_path.iterdir())] == before


def test_axes_without_a_figure_are_refused(tmp_path):
    ax = draw()
    ax.remove()
    with pytest.raises(ValueError, match="removed from their figure"):
        save_figure(ax, tmp_path / "gone")
