"""The look at pages in a browser: what is wrong with a page is found, what is right is let pass."""

from __future__ import annotations

import base64
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.support.browser import MISSING, WIDTHS, complaints, find_browser, look

ROOT = Path(__file__).parent.parent
PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width"><title>x</title>
<link rel="icon" href="data:,"></head><body>{}</body></html>"""


def png(width: int = 8) -> str:
    """A picture as an address."""
    with io.BytesIO() as file:
        Image.new("RGB", (width, 8), "navy").save(file, "PNG")
        return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


@pytest.fixture
def seen(chromium, tmp_path):
    """Complaints about a page with a body."""

    def write(body: str) -> list[str]:
        path = tmp_path / "page.html"
        path.write_text(PAGE.format(body), encoding="utf-8")
        return complaints(chromium, path)

    return write


@pytest.mark.parametrize(
    ("body", "complaint", "widths"),
    [
        ('<img src="gone.png" alt="x">', "image missing", WIDTHS),
        ('<img src="data:image/png;base64,AAAA" alt="x">', "image missing", WIDTHS),
        ('<p style="height:9000px"><img loading="lazy" src="gone.png">', "image missing", WIDTHS),
        ('<div style="width:900px">wide</div>', "sticks out", (400,)),
        ("<table><tr>" + "<td>unbreakable</td>" * 12 + "</tr></table>", "sticks out", (400,)),
        ('<p style="margin-left:1290px">a</p>', "sticks out", WIDTHS),
        ("<script>undefinedFunction()</script>", "undefinedFunction is not defined", WIDTHS),
        ("<script>setTimeout(() => {throw Error('late')}, 50)</script>", "late", WIDTHS),
        ("<script>Promise.reject(Error('kept'))</script>", "kept", WIDTHS),
        ('<script src="https://example.org/a.js"></script>', "loads from outside", WIDTHS),
        (
            '<meta http-equiv="Content-Security-Policy" content="script-src \'none\'">'
            "<script>1</script>",
            "Content Security Policy",
            WIDTHS,
        ),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_what_is_wrong_with_a_page_is_found_at_the_widths_where_it_is(
    seen, body, complaint, widths
):
    found = [what for what in seen(body) if complaint in what]
    assert {int(what.partition(" ")[0]) for what in found} == set(widths)


def test_a_page_on_which_nothing_is_wrong_is_let_pass(seen):
    wide = '<div style="overflow-x:auto"><div style="width:3000px">scrolls</div></div>'
    image = f'<img src="{png(3000)}" alt="x" style="max-width:100%">'
    assert seen(f"{wide}{image}<script>document.title = 'y'</script>") == []


def test_a_screenshot_shows_the_whole_page_at_its_width(chromium, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(PAGE.format('<p style="height:2000px;background:navy">a'), encoding="utf-8")
    for width in WIDTHS:
        found = look(chromium, path, width)
        with Image.open(io.BytesIO(found.screenshot)) as shot:
            assert shot.width == width
            assert shot.height > 2000
            assert shot.convert("RGB").getpixel((width // 2, 1500)) == (0, 0, 128)
        assert found.text == "a"


def test_a_named_browser_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setenv("EMLENS_BROWSER", "/nowhere/chrome")
    with pytest.raises(FileNotFoundError, match="EMLENS_BROWSER is '/nowhere/chrome'"):
        find_browser()


def test_a_browser_is_taken_from_the_variable_then_the_driver_then_the_path(monkeypatch, tmp_path):
    named, own, found = (tmp_path / name for name in ("named", "own", "chromium"))
    for path in (named, own, found):
        path.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("EMLENS_BROWSER", str(named))
    assert find_browser(str(own)) == str(named)
    monkeypatch.delenv("EMLENS_BROWSER")
    assert find_browser(str(own)) == str(own)
    assert find_browser(str(tmp_path / "not fetched")) == str(found)
    found.unlink()
    assert find_browser() is None


@pytest.mark.parametrize(("ci", "word"), [("", "1 skipped"), ("true", "1 error")])
def test_without_a_browser_the_look_is_skipped_with_a_word_and_fails_in_ci(tmp_path, ci, word):
    (tmp_path / "test_it.py").write_text("def test_it(chromium):\n    pass\n")
    (tmp_path / "conftest.py").write_text("from tests.support.browser import chromium\n")
    environment = {**os.environ, "PATH": "", "PLAYWRIGHT_BROWSERS_PATH": str(tmp_path)}
    environment |= {"CI": ci, "PYTHONPATH": str(ROOT), "EMLENS_BROWSER": ""}
    program = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "-p"]
    program += ["no:xdist", tmp_path]
    done = subprocess.run(
        program, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert word in done.stdout, done.stdout + done.stderr
    assert MISSING[:40] in done.stdout
