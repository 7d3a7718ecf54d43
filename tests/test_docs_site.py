"""The documentation builds, loads nothing from outside, and says what is so."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import get_type_hints

import pytest
from matplotlib.axes import Axes
from pandas import DataFrame

import emlens
from emlens.text import corpus
from tests.support.browser import complaints as seen_wrong
from tests.support.browser import served
from tests.support.data import pairs

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
ROOMS = emlens._ROOMS
LARGEST = 2_500_000
"""Bytes of all pictures of the gallery."""

_FENCED = re.compile(r"```python\n(.*?)```", re.S)
_CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_OUTSIDE = (
    r"<(?:script|img|iframe|source|embed|audio|video)\b[^>]*\ssrc=[\"']?(?:https?:)?//[^>]*>",
    r"<link\b(?=[^>]*\brel=[\"']?(?:stylesheet|preconnect|preload|dns-prefetch|icon))"
    r"[^>]*\bhref=[\"']?(?:https?:)?//[^>]*>",
    r"@import[^;]*//[^;]*;",
    r"url\(\s*[\"']?(?:https?:)?//[^)]*\)",
    r"class=[\"'][^\"']*\bmermaid\b",  # the theme fetches its script where there is a diagram
)


def script(name: str) -> ModuleType:
    """A script of the documentation as a module."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    return script("hooks")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The built site."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", out]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return out


# -- the site -----------------------------------------------------------------------------------


def outside(text: str) -> list[str]:
    """What a page or a style sheet would load from elsewhere."""
    return [found[0][:200] for what in _OUTSIDE for found in re.finditer(what, text)]


@pytest.mark.parametrize(
    "text",
    [
        '<script src="https://cdn.org/a.js"></script>',
        "<img alt='x' src=//cdn.org/a.png>",
        '<link rel="stylesheet" href="https://fonts.org/css?family=Roboto">',
        '<link href="https://fonts.org" rel="preconnect" crossorigin>',
        "@font-face { src: url(https://fonts.org/a.woff2) }",
        '@import "https://fonts.org/a.css";',
        '<pre class="mermaid"><code>',
    ],
)
def test_what_loads_from_outside_is_found(text):
    assert len(outside(text)) == 1


def test_links_and_own_files_are_not_taken_for_loading():
    text = '<a href="https://arxiv.org/abs/1">x</a><img src="a.png"><link rel="icon" href="b.png">'
    assert outside(text + "<style>a { background: url(data:image/png;base64,AA//AA) }") == []


def test_no_page_loads_anything_from_outside(site):
    files = [*site.rglob("*.html"), *site.rglob("*.css")]
    found = {file.name: outside(file.read_text(encoding="utf-8")) for file in files}
    assert len(files) > 20
    assert {name: what for name, what in found.items() if what} == {}


def test_every_public_name_of_every_room_has_its_place_in_the_api(site):
    for room in ROOMS:
        page = (site / "api" / f"{room}.html").read_text(encoding="utf-8")
        names = [f"emlens.{room}.{name}" for name in import_module(f"emlens.{room}").__all__]
        assert [name for name in names if f'id="{name}"' not in page] == []


def test_the_start_page_has_the_program_of_the_readme_and_its_output(site):
    page = (site / "index.html").read_text(encoding="utf-8")
    text = re.sub(r"<[^>]+>", "", page)
    assert 'moved = emlens.directions.edit_diff(model, bad[:12], "doctor"' in text
    assert "doctor, ablated, general questions: " in text
    assert (site / "assets" / "readme" / "log_odds.png").exists()
    assert 'src="assets/readme/log_odds.png"' in page
    assert "<!-- README" not in page


def test_every_tutorial_has_a_page_and_a_line_in_the_list(site):
    listed = (site / "tutorials.html").read_text(encoding="utf-8")
    for source in sorted((ROOT / "tutorials").glob("[0-9]*.py")):
        assert (site / "tutorials" / f"{source.stem}.html").exists()
        assert f'href="tutorials/{source.stem}.html"' in listed
        assert f"<code>{source.name}</code>" in listed


def test_every_page_is_right_in_a_browser(site, chromium):
    both = {"index.html", "gallery.html", "papers.html"}
    wrong = {}
    with served(site) as address:
        for file in sorted(site.rglob("*.html")):
            name = str(file.relative_to(site))
            if name != "404.html":
                widths = (1280, 400) if name in both else (400,)
                wrong[name] = seen_wrong(chromium, address + name, widths)
    assert len(wrong) > 20
    assert {name: what for name, what in wrong.items() if what} == {}


# Words whose letters are not all on one line, and code that is cut off at the right.
_CUT = """() => {
    const found = [], range = document.createRange();
    for (const code of document.querySelectorAll("article :not(pre) > code, .doc-heading")) {
        const walk = document.createTreeWalker(code, NodeFilter.SHOW_TEXT);
        while (walk.nextNode()) for (const word of walk.currentNode.data.matchAll(/\\w+/g)) {
            range.setStart(walk.currentNode, word.index);
            range.setEnd(walk.currentNode, word.index + word[0].length);
            if (new Set([...range.getClientRects()].map(box => Math.round(box.top))).size > 1)
                found.push(`${word[0]} is broken`);
        }
    }
    for (const code of document.querySelectorAll("article .highlight pre > code"))
        if (code.offsetParent && code.scrollWidth > code.clientWidth + 1)
            found.push(`cut off: ${code.textContent.slice(0, 60)}`);
    return found.slice(0, 5);
}"""


def test_on_a_phone_no_name_is_broken_and_no_code_is_cut_off(site, chromium):
    wrong = {}
    context = chromium.new_context(viewport={"width": 400, "height": 900})
    try:
        page = context.new_page()
        with served(site) as address:
            for file in sorted(site.rglob("*.html")):
                name = str(file.relative_to(site))
                page.goto(address + name, wait_until="load")
                wrong[name] = page.evaluate(_CUT)
    finally:
        context.close()
    assert {name: what for name, what in wrong.items() if what} == {}


# -- quotes -------------------------------------------------------------------------------------


def test_a_quote_that_the_readme_does_not_have_is_refused(hooks):
    assert hooks.quoted("emlens is a Python toolkit") == "emlens is a Python toolkit"
    with pytest.raises(ValueError, match="does not say '12 monkeys' any more"):
        hooks.quoted("12 monkeys")
    with pytest.raises(KeyError, match="the README has no section 'Monkeys'"):
        hooks.readme("Monkeys")


def test_findings_are_taken_from_the_row_and_column_of_their_table(hooks):
    text = (DOCS / "findings.md").read_text(encoding="utf-8")
    after = text.split("## Loss, noise", 1)[1].split("**Vectors**", 1)[1]
    row = next(line for line in after.splitlines() if line.startswith("| sports |"))
    assert hooks.finding("Vectors", "sports", "stability") == row.split("|")[3].strip()
    with pytest.raises(KeyError, match="no 'stability' of 'cooking' under 'Vectors'"):
        hooks.finding("Vectors", "cooking", "stability")


# -- names --------------------------------------------------------------------------------------


def resolved(path: str, names: dict[str, object]) -> object | None:
    """What a dotted path stands for; None if its first part is none of the names.

    Raises:
        AttributeError: If the path leads nowhere.
    """
    first, *rest = path.split(".")
    if first not in names:
        return None
    found = names[first]
    for part in rest:
        if inspect.isclass(found) and part in getattr(found, "__dataclass_fields__", {}):
            return found.__dataclass_fields__[part]
        found = getattr(found, part)
    return found


def known() -> dict[str, object]:
    """emlens, its rooms, and the classes of these by their own names."""
    rooms = {room: import_module(f"emlens.{room}") for room in ROOMS}
    classes = {
        name: getattr(room, name)
        for room in rooms.values()
        for name in room.__all__
        if inspect.isclass(getattr(room, name))
    }
    return {"emlens": emlens, **classes, **rooms}


def complaints(program: str, names: dict[str, object]) -> list[str]:
    """Names that lead nowhere, and calls that do not fit what they call.

    What the program imports or assigns is added to the names, or taken from them.
    """
    found = []
    for node in ast.walk(ast.parse(program)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("emlens"):
            home = import_module(node.module or "")
            for alias in node.names:
                if not hasattr(home, alias.name):
                    found.append(f"from {node.module} import {alias.name}")
                names[alias.asname or alias.name] = getattr(home, alias.name, None)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.pop(node.id, None)
    for node in ast.walk(ast.parse(program)):
        if isinstance(node, ast.Attribute) and re.fullmatch(r"[\w.]+", ast.unparse(node)):
            try:
                resolved(ast.unparse(node), names)
            except AttributeError as error:
                found.append(f"{ast.unparse(node)}: {error}")
        elif isinstance(node, ast.Call):
            found += _misfit(node, names)
    return found


def _misfit(call: ast.Call, names: dict[str, object]) -> list[str]:
    """Why a call does not fit the signature of what it calls; `...` stands for any arguments."""
    path = ast.unparse(call.func)
    if not re.fullmatch(r"[\w.]+", path):
        return []
    try:
        target = resolved(path, names)
    except AttributeError:
        return []
    if not callable(target) or any(isinstance(part, ast.Starred) for part in call.args):
        return []
    some = [part for part in call.args if not isinstance(part, ast.Constant) or part.value != ...]
    signature = inspect.signature(target)
    taken = set(signature.parameters)
    for one in signature.parameters.values():
        if one.kind is one.VAR_KEYWORD and str(one.annotation).startswith("Unpack["):
            group = str(one.annotation).removeprefix("Unpack[").removesuffix("]")
            options = getattr(inspect.unwrap(target), "__globals__", {}).get(group)
            taken |= set(get_type_hints(options)) if options is not None else set()
            wrong = [part.arg for part in call.keywords if part.arg and part.arg not in taken]
            if wrong and options is not None:
                return [f"{ast.unparse(call)}: got an unexpected keyword argument {wrong[0]!r}"]
    hidden = len(some) < len(call.args) or any(part.arg is None for part in call.keywords)
    bind = signature.bind_partial if hidden or not call.args else signature.bind
    try:
        bind(*some, **{part.arg: None for part in call.keywords if part.arg is not None})
    except TypeError as error:
        return [f"{ast.unparse(call)}: {error}"]
    return []


@pytest.mark.parametrize(
    ("program", "complaint"),
    [
        ("emlens.lod('x')", "emlens.lod: module 'emlens' has no attribute 'lod'"),
        ("watch.Monitor.fitt(model)", "fitt"),
        ("from emlens.evals import rate", "from emlens.evals import rate"),
        ("emlens.log_odds(model, pairs, pear=1)", "unexpected keyword argument 'pear'"),
        ("training.mixed(bad, good, 0.5)", "too many positional arguments"),
        ("from emlens.training import mixed\nmixed(bad, good, rate=1)", "unexpected keyword"),
    ],
)
def test_a_name_or_a_call_that_is_wrong_is_found(program, complaint):
    assert any(complaint in found for found in complaints(program, known()))


@pytest.mark.parametrize(
    "program",
    [
        "directions = emlens.mean_diff(model, bad, good)\ndirections.save('x')",
        "emlens.train_vector(..., kl=...)",
        "Directions.norms\nTrajectory.descent_cosines",
        "numpy.array([1], kind=2)",
    ],
)
def test_what_is_right_or_not_ours_is_let_pass(program):
    assert complaints(program, known()) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_names_and_calls_on_a_page_are_those_of_the_package(page):
    text, names, found = page.read_text(encoding="utf-8"), known(), []
    for program in _FENCED.findall(text):
        compile(program, page.name, "exec")
        found += complaints(program, names)
    for code in _CODE.findall(_FENCED.sub("", text)):
        try:
            ast.parse(code)
        except SyntaxError:
            continue
        if not code.endswith((".md", ".py", ".json", ".pt", ".safetensors")):
            found += complaints(code, known())
    assert found == []


# -- the gallery --------------------------------------------------------------------------------

SMALL = {
    "LAYER = 15": "LAYER = 1",
    "N = 16": "N = 6",
    '"misaligned", 40': '"misaligned", 6',
    "range(12, 19)": "range(3)",
    "range(12, 18)": "range(3)",
    "layer=18": "layer=1",
    "[5, 15, 25]": "[0, 2]",
}
NO_RESULTS = {
    *("AdapterScalars", "ProbeJudge", "Responses", "Scores", "StudyResult", "TopDirections"),
}
"""Data, directions and judges, which have a table but no figure of their own."""


def drawing() -> dict[str, tuple[type, str]]:
    """Every public method that draws, by its name."""
    classes = {thing for thing in known().values() if inspect.isclass(thing)}
    return {
        f"{kind.__name__}.{name}": (kind, name)
        for kind in classes
        for name in dir(kind)
        if name.split("_")[0] in ("plot", "heatmap") and callable(getattr(kind, name))
    }


def noted(full: str, plain: Callable, drawn: dict[str, object]) -> Callable:
    """The same method, which writes down what it was called of."""

    def method(self, *args, **options):
        drawn[full] = self
        return plain(self, *args, **options)

    return method


@pytest.fixture(scope="module")
def gallery_run(hooked_llama, tmp_path_factory):
    """Pictures of the gallery, drawn with a tiny model, and what each method drew of."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        return _gallery(hooked_llama, monkeypatch, tmp_path_factory.mktemp("gallery"))


def _gallery(hooked_llama, monkeypatch, folder) -> tuple[dict[str, Axes], dict[str, object], int]:
    gallery = script("gallery")
    page = gallery.PAGE.read_text(encoding="utf-8")
    for real, small in SMALL.items():
        assert real in page
        page = page.replace(real, small)
    few, text = {}, corpus(documents=6)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(emlens, "load", lambda name: hooked_llama)
    monkeypatch.setattr(emlens, "corpus", lambda **_: text)
    monkeypatch.setattr(emlens, "load_pairs", lambda name: few.setdefault(name, pairs(60, name)))
    drawn: dict[str, object] = {}
    for full, (kind, name) in drawing().items():
        monkeypatch.setattr(kind, name, noted(full, getattr(kind, name), drawn))
    return dict(gallery.run(page)), drawn, page.count("](assets/gallery/")


def test_the_gallery_runs_and_draws_every_figure_there_is(gallery_run):
    pictures, drawn, named = gallery_run
    assert all(isinstance(axes, Axes) for axes in pictures.values())
    assert set(drawing()) - set(drawn) == set()
    assert len(pictures) == named


def test_every_result_shows_itself_as_figure_and_as_table(gallery_run):
    _, drawn, _ = gallery_run
    results = {type(result).__name__: result for result in drawn.values()}
    assert len(results) > 25
    for name, result in results.items():
        assert "ax" in inspect.signature(type(result).plot).parameters, name
        assert "<table" in result._repr_html_(), name
        frame = result.table()
        assert isinstance(frame, DataFrame) and len(frame), name


def test_every_public_class_with_a_table_is_a_result_that_draws_or_is_no_result():
    kinds = [thing for thing in known().values() if inspect.isclass(thing)]
    tables = {kind.__name__ for kind in kinds if hasattr(kind, "table")}
    drawn = {name.partition(".")[0] for name in drawing()}
    assert {kind.__name__ for kind in kinds if hasattr(kind, "table")} <= {
        kind.__name__ for kind in kinds if hasattr(kind, "_repr_html_")
    }
    assert tables - drawn == NO_RESULTS
    for full, (kind, name) in drawing().items():
        parameters = inspect.signature(getattr(kind, name)).parameters
        assert parameters["ax"].default is None, full


def test_the_pictures_of_the_gallery_are_there_and_small():
    named = set(re.findall(r"\]\((assets/gallery/\S+\.png)\)", (DOCS / "gallery.md").read_text()))
    there = {str(file.relative_to(DOCS)) for file in (DOCS / "assets" / "gallery").glob("*")}
    assert named == there
    assert sum((DOCS / name).stat().st_size for name in there) < LARGEST


def test_a_picture_below_a_block_that_draws_nothing_is_refused():
    page = "```python\nx = 1\nx\n```\n\n![Nothing](assets/gallery/x.png)\n"
    with pytest.raises(TypeError, match="a picture stands below blocks that end in axes"):
        list(script("gallery").run(page))
