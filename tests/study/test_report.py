from __future__ import annotations

import re
import struct
import zlib
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

from emlens.study.report import (
    Answers,
    FigureItem,
    Finding,
    Report,
    Section,
    Table,
    render_report,
    write_report,
)
from tests.support.browser import WIDTHS, look

NASTY = "<script>alert('x')</script><img src=http://evil.example/x onerror=alert(1)> & \"more\""
VOID = {"meta", "link", "img", "br", "hr"}


def png(width: int = 4, height: int = 2, per_metre: int = 7874) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    rows = b"".join(b"\0" + b"\xff" * 3 * width for _ in range(height))
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"pHYs", struct.pack(">IIB", per_metre, per_metre, 1))
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


class Page(HTMLParser):
    """Tags, attributes and text of a page; `balanced` when every tag is closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.stack: list[str] = []
        self.balanced = True
        self.words = ""
        self.feed(page)
        self.close()
        self.balanced &= not self.stack

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag):
        self.balanced &= bool(self.stack) and self.stack.pop() == tag

    def handle_data(self, data):
        self.words += data

    def values(self, name: str) -> list[str]:
        return [attrs[name] or "" for _, attrs in self.tags if name in attrs]


@pytest.fixture
def figure(tmp_path) -> FigureItem:
    path = tmp_path / "kl.png"
    path.write_bytes(png(200, 100))
    return FigureItem(path, "KL against dose.", reading="Lower is gentler.", alt="KL curves")


def report(**parts) -> Report:
    fields = {"title": "A study", "question": "Is it so?", "method": "We `look`.", **parts}
    return Report(**fields)


def full(figure: FigureItem) -> Report:
    frame = pd.DataFrame({"domain": [NASTY, "medical"], "log-odds": [-0.25, np.nan], "n": [12, 3]})
    return report(
        title=NASTY,
        findings=(Finding(f"It is. {NASTY}", "A claim", "not seen"), Finding("Twice.")),
        notice=NASTY,
        sections=(
            Section(
                "Influence",
                "First.\n\nSecond.",
                (figure,),
                "KL is 0.1 [0.05, 0.2] nats.",
                "One model.",
                (Table(frame, NASTY), Table([{"a <b>": True}, {"a <b>": None}])),
            ),
            Section("Influence", answers=(Answers(NASTY, {NASTY: NASTY, "empty": " "}, NASTY),)),
            Section("<&>"),
        ),
        settings={"train": {"layer": 15, "kl": {"weight": 1.0}}, NASTY: [NASTY]},
        versions={"emlens": "0.1.0"},
    )


def test_the_parts_stand_in_the_order_of_a_paper(figure):
    words = Page(render_report(full(figure))).words
    wanted = ["Is it so?", "We look.", "It is.", "Contents", "First.", "Second.", "Figure 1."]
    wanted += ["Lower is gentler.", "KL is 0.1 [0.05,\u00a00.2] nats.", "Table 1.", "Table 2."]
    wanted += ["One model.", "Prompt", "(no text)", "train.kl.weight", "emlens"]
    places = [words.index(part) for part in wanted]
    assert places == sorted(places)


def test_the_page_is_well_formed_and_every_anchor_resolves(figure):
    page = Page(render_report(full(figure)))
    assert page.balanced
    ids, links = page.values("id"), [link for link in page.values("href") if link != "data:,"]
    assert len(ids) == len(set(ids)) == len(links) == 5
    assert links == [f"#{name}" for name in ids]
    assert ids[:2] == ["s-influence", "s-influence-2"]


def test_nothing_is_loaded_from_elsewhere_and_nothing_runs(figure):
    text = render_report(full(figure))
    page = Page(text)
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "iframe", "object", "embed", "base", "form"}
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    assert all(value.startswith("data:") for value in page.values("src"))
    style = text[text.index("<style>") : text.index("</style>")]
    assert not re.search(r"url\(|@import|https?:", style)
    assert "default-src 'none'" in text


def test_text_that_looks_like_html_is_shown_as_text(figure):
    text = render_report(full(figure))
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(&#39;x&#39;)" in text
    assert Page(text).words.count("<script>alert('x')</script>") >= 9


def test_a_png_is_shown_at_its_size_in_print(figure):
    page = Page(render_report(report(sections=(Section("One", figures=(figure,)),))))
    (image,) = [attrs for tag, attrs in page.tags if tag == "img"]
    assert (image["width"], image["height"], image["alt"]) == ("96", "48", "KL curves")
    assert (image["src"] or "").startswith("data:image/png;base64,")


def test_an_svg_goes_in_as_an_image(tmp_path):
    path = tmp_path / "kl.svg"
    path.write_text("<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>")
    text = render_report(report(sections=(Section("One", figures=(FigureItem(path, "KL"),)),)))
    assert "data:image/svg+xml;base64," in text
    assert "<svg" not in text


def test_a_missing_figure_is_named_with_its_section(tmp_path):
    missing = Section("Influence", figures=(FigureItem(tmp_path / "kl.png", "KL"),))
    with pytest.raises(FileNotFoundError, match=r"kl\.png of section 'Influence' does not exist"):
        write_report(report(sections=(missing,)), tmp_path / "report.html")
    assert not list(tmp_path.iterdir())


def test_a_figure_of_another_kind_is_refused(tmp_path):
    wrong = Section("Influence", figures=(FigureItem(tmp_path / "kl.pdf", "KL"),))
    with pytest.raises(ValueError, match="neither PNG nor SVG"):
        render_report(report(sections=(wrong,)))


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.12345, "0.123"),
        (-0.5, "−0.500"),
        (0.0004, "0.0004"),
        (0.0, "0.000"),
        (float("nan"), "–"),
        (float("inf"), "inf"),
        (None, "–"),
        (np.int64(-7), "−7"),
        (np.float32(0.25), "0.250"),
        (True, "yes"),
        (np.bool_(False), "no"),
        ("finance", "finance"),
    ],
)
def test_cells_are_written_for_readers(value, shown):
    text = render_report(report(sections=(Section("One", tables=(Table([{"x": value}]),)),)))
    assert re.search(r"<td[^>]*>([^<]*)</td>", text).group(1) == shown


def test_signs_and_intervals_in_prose_are_not_broken_and_code_is_left_alone():
    finding = (
        "KL moves by -0.25 [-0.30, -0.20] at layers 3-5: `a - b [-1, 2]`; general - x, 2506-1."
    )
    text = render_report(report(sections=(Section("One", finding=finding),)))
    assert "by −0.25 [−0.30,\u00a0−0.20] at layers 3-5: <code>a - b [-1, 2]</code>" in text
    assert "general - x, 2506-1." in text


def test_numbers_are_set_right_and_words_left():
    frame = pd.DataFrame({"name": ["a"], "loss": [0.5], "flag": [True]})
    text = render_report(report(sections=(Section("One", tables=(Table(frame),)),)))
    assert re.findall(r'<th scope="col"( class="number")?>', text) == ["", ' class="number"', ""]


@pytest.mark.parametrize("dark", [False, True])
def test_a_report_with_all_there_can_be_is_right_in_a_browser(chromium, figure, tmp_path, dark):
    wide = pd.DataFrame({f"a column with a long name {i}": [i / 7] for i in range(12)})
    unbreakable = Answers("w" * 300, {"base": "v" * 400, "other": "<img src=x onerror=alert(1)>"})
    parts = full(figure)
    more = Section("H" * 80, "p" * 500, tables=(Table(wide),), answers=(unbreakable,))
    path = write_report(replace(parts, sections=(*parts.sections, more)), tmp_path / "r.html")
    for width in WIDTHS:
        seen = look(chromium, path, width, dark=dark)
        assert seen.complaints == []
        assert "a column with a long name 11" in seen.text


def test_an_empty_report_is_a_page():
    page = Page(render_report(report()))
    assert page.balanced
    assert "Settings" not in page.words


def test_writing_is_whole_and_reproducible(tmp_path, figure):
    first = write_report(full(figure), tmp_path / "out" / "report.html")
    text = first.read_bytes()
    assert write_report(full(figure), first).read_bytes() == text
    assert text.decode() == render_report(full(figure))
    assert [path.name for path in first.parent.iterdir()] == ["report.html"]
