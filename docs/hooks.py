"""What mkdocs does beside its own: quotes from other pages, and the tutorials as pages."""

from __future__ import annotations

import base64
import inspect
import re
import sys
from collections.abc import Iterator
from html import escape
from importlib import import_module
from pathlib import Path
from typing import Any

import jupytext
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import emlens

ROOT = Path(__file__).resolve().parent.parent
PICTURES = "assets/readme"
LONGEST = 40
"""Lines of printed output that a page shows."""

_MARKER = re.compile(r"<!-- README: (.+?) -->")
_FINDING = re.compile(r"\{\{ findings: (.+?) / (.+?) / (.+?) \}\}")
_ROOM = re.compile(r"<!-- room: (\w+) -->")
_QUOTE = re.compile(r"\{\{ readme: (.+?) \}\}")
_LIST, _TOP = "<!-- tutorials -->", "<!-- top -->"
_LINK = re.compile(r"\]\(([^)#\s]+)")
_BLOCK = re.compile(r"(<pre\b.*?</pre>)", re.S)
_NAME = re.compile(r"(?<=<code>)[^<]{33,}(?=</code>)")
_SIGN = re.compile(r'<span class="[op]">[^<]*</span>')
_JOINT = re.compile(r"(?<=\w)([./(=])(?=\w)")
WIDE = 110
"""Characters of a line from which on printed output is prose, and is wrapped."""
_INCLUDED = re.compile(r"\b(src|href)=[\"']https?://")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """List the tutorials in the navigation."""
    pages = [f"tutorials/{source.stem}.md" for source in tutorials()]
    config.nav = [
        {"Tutorials": ["tutorials.md", *pages]} if entry == {"Tutorials": "tutorials.md"} else entry
        for entry in config.nav or []
    ]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the README's pictures, and a page with its pictures for each tutorial."""
    for picture in sorted((ROOT / "assets").glob("*.png")):
        place = f"{PICTURES}/{picture.name}"
        files.append(File.generated(config, place, abs_src_path=str(picture)))
    for source in tutorials():
        page, attached = rendered(source)
        files.append(File.generated(config, f"tutorials/{source.stem}.md", content=page))
        for name, content in attached.items():
            files.append(File.generated(config, f"tutorials/{name}", content=content))
        for each in (source, source.with_suffix(".ipynb")):
            if each.exists():
                place = f"tutorials/{each.name}"
                files.append(File.generated(config, place, abs_src_path=str(each)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put in what is marked."""
    markdown = _MARKER.sub(lambda found: readme(found[1]), markdown)
    markdown = _FINDING.sub(lambda found: finding(*found.groups()), markdown)
    markdown = _QUOTE.sub(lambda found: quoted(found[1]), markdown)
    markdown = _ROOM.sub(lambda found: room(found[1]), markdown)
    if _LIST in markdown:
        markdown = markdown.replace(_LIST, "\n".join(map(_listed, tutorials())))
    return markdown.replace(_TOP, top_names()) if _TOP in markdown else markdown


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let long names and code break after a dot, a bracket or a sign, and nowhere else."""
    parts = _BLOCK.split(html)
    parts[::2] = [
        _NAME.sub(lambda name: _JOINT.sub(r"\1<wbr>", name[0]), part) for part in parts[::2]
    ]
    parts[1::2] = [_SIGN.sub(r"\g<0><wbr>", part) for part in parts[1::2]]
    return "".join(parts)


def top_names() -> str:
    """A table of the names of `emlens` itself, each linked to its room."""
    rows = []
    for name in emlens.__all__:
        room, said = emlens._HOMES[name], inspect.getdoc(getattr(emlens, name)) or ""
        first = " ".join(said.split("\n\n")[0].split())
        rows.append(f"| [`emlens.{name}`]({room}.md#emlens.{room}.{name}) | {first} |")
    return "\n".join(["| name | what it is |", "|---|---|", *rows])


def room(name: str) -> str:
    """The docstring of a room, a list of its names, and a directive for each; functions first.

    A function that is called as its file is, as `emlens.text.corpus`, is found in the file, and
    gets the anchor of its public name.
    """
    home = import_module(f"emlens.{name}")
    kinds: dict[str, list[str]] = {"Functions": [], "Classes": [], "Other names": []}
    for public in home.__all__:
        thing = getattr(home, public)
        kind = "Functions" if inspect.isfunction(thing) else "Other names"
        kinds["Classes" if inspect.isclass(thing) else kind].append(public)
    parts = [inspect.getdoc(home) or ""]
    for kind, names in kinds.items():
        if names:
            links = ", ".join(f"[`{public}`](#emlens.{name}.{public})" for public in names)
            parts.append(f"**{kind}**: {links}")
    for public in (public for names in kinds.values() for public in names):
        path, thing = f"emlens.{name}.{public}", getattr(home, public)
        if path in sys.modules and not inspect.ismodule(thing):
            parts.append(f'<a id="{path}"></a>')
            path = f"{thing.__module__}.{public}"
        parts.append(f"::: {path}")
    return "\n\n".join(parts)


# -- the README -------------------------------------------------------------------------------


def readme(title: str) -> str:
    """A section of the README without its heading, its links made those of this site.

    Raises:
        KeyError: If there is no such section.
    """
    parts = re.split(
        r"^#{1,2} (.+)\n", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.M
    )
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    if title not in sections:
        raise KeyError(f"the README has no section {title!r}; it has {', '.join(sections)}")
    return _LINK.sub(lambda found: f"]({_here(found[1])}", sections[title].strip())


def _here(target: str) -> str:
    if target.startswith("assets/"):
        return f"{PICTURES}/{Path(target).name}"
    if target.startswith("tutorials/"):
        return str(Path(target).with_suffix(".md"))
    return target.removeprefix("docs/")


def quoted(words: str) -> str:
    """Words that the README has, too.

    Raises:
        ValueError: If it no longer says so.
    """
    if words not in " ".join((ROOT / "README.md").read_text(encoding="utf-8").split()):
        raise ValueError(f"the README does not say {words!r} any more")
    return words


def finding(kind: str, domain: str, column: str) -> str:
    """A cell of the tables of `findings.md`: under `**kind**`, in the row of the domain.

    Raises:
        KeyError: If no table of that kind has such a row and column.
    """
    page = (ROOT / "docs" / "findings.md").read_text(encoding="utf-8")
    for table in re.findall(rf"^\*\*{kind}\*\*\n\n((?:\|.*\n)+)", page, flags=re.M):
        head, _, *rows = (
            [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()
        )
        for row in rows:
            if row[0] == domain and column in head:
                return row[head.index(column)]
    raise KeyError(f"findings.md has no {column!r} of {domain!r} under {kind!r}")


# -- tutorials --------------------------------------------------------------------------------


def tutorials() -> list[Path]:
    """The sources of the tutorials, in order."""
    return sorted((ROOT / "tutorials").glob("[0-9]*.py"))


def rendered(source: Path) -> tuple[str, dict[str, str | bytes]]:
    """A tutorial as a page, with its outputs where it has been run, and the files of these."""
    notebook = source.with_suffix(".ipynb")
    cells = jupytext.read(notebook if notebook.exists() else source)["cells"]
    attached: dict[str, str | bytes] = {}
    parts = []
    for place, cell in enumerate(cells):
        if cell["cell_type"] == "markdown":
            parts.append(cell["source"])
        elif cell["source"].strip():
            parts.append(f"```python\n{cell['source']}\n```")
            for n, output in enumerate(cell.get("outputs", [])):
                parts += _output(output, f"{source.stem}_{place}_{n}", attached)
    own = [name for name in (source, notebook) if name.exists()]
    links = " and ".join(f"[`{each.name}`]({each.name})" for each in own)
    heading, _, rest = "\n\n".join(parts).partition("\n")
    return f"{heading}\n\n*To run it yourself: {links}.*\n{rest}\n", attached


def _output(output: dict[str, Any], name: str, attached: dict[str, str | bytes]) -> Iterator[str]:
    if output["output_type"] == "stream":
        if output["name"] == "stdout":
            yield _printed(output["text"])
        return
    data = output.get("data", {})
    if "image/png" in data:
        attached[f"{name}.png"] = base64.b64decode(data["image/png"])
        yield f"![Figure]({name}.png)"
    elif "<script" in data.get("text/html", ""):
        attached[f"{name}.html"] = _framed(data["text/html"])
        yield f'<iframe src="{name}.html" title="coloured tokens" class="tokens"></iframe>'
    elif "text/html" in data:
        html = re.sub(r"<style.*?</style>", "", data["text/html"], flags=re.S)
        lines = [line.strip() for line in html.splitlines() if line.strip()]
        yield '<div class="output">' + "\n".join(lines) + "</div>"
    elif "text/plain" in data:
        yield _printed(data["text/plain"])


def _printed(text: str) -> str:
    lines = text.rstrip().splitlines()
    if len(lines) > LONGEST:
        lines = [*lines[:LONGEST], "..."]
    kind = "output prose" if any(len(line) > WIDE for line in lines) else "output"
    return f"<pre class='{kind}'>" + escape("\n".join(lines)) + "</pre>"


def _framed(html: str) -> str:
    if _INCLUDED.search(html):
        raise ValueError("the output of a notebook loads something from outside")
    return f"<!doctype html><html><head><meta charset='utf-8'></head><body>{html}</body></html>"


def _listed(source: Path) -> str:
    """One line of the list: the title, and the first sentence below it."""
    page, _ = rendered(source)
    lines = page.split("\n")
    title = lines[0].lstrip("# ")
    prose = next(part for part in "\n".join(lines[3:]).split("\n\n") if part.strip())
    sentence = re.split(r"(?<=[.!?])\s", " ".join(prose.split()))[0]
    return f"- [{title}](tutorials/{source.stem}.md) (`{source.name}`): {sentence}"
