"""The report: one HTML file that reads like a short paper and needs nothing beside itself."""

from __future__ import annotations

import base64
import json
import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from numbers import Integral, Real
from pathlib import Path

import pandas as pd

from emlens._files import atomic_write
from emlens._reading import expanded, read_bytes, read_text

IMAGES = {".png": "image/png", ".svg": "image/svg+xml"}


@dataclass(frozen=True, slots=True)
class FigureItem:
    """A figure on disk, and what its reader has to know.

    Attributes:
        path: PNG or SVG file; its bytes go into the report.
        caption: What it shows.
        reading: How to read it.
        alt: For readers who do not see it; the caption if empty.
    """

    path: Path
    caption: str
    reading: str = ""
    alt: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    """A table: a data frame (its index is not shown) or one mapping per row.

    Attributes:
        data: The rows; units belong in the names of the columns.
        caption: What it holds.
        digits: Decimals of numbers that are not integers.
    """

    data: pd.DataFrame | Sequence[Mapping[str, object]]
    caption: str = ""
    digits: int = 3


@dataclass(frozen=True, slots=True)
class Answers:
    """What several models, or one under several edits, said to the same prompt.

    Attributes:
        prompt: The prompt.
        responses: The answers by who gave them, in the order to show.
        note: A remark under them.
    """

    prompt: str
    responses: Mapping[str, str]
    note: str = ""


@dataclass(frozen=True, slots=True)
class Section:
    """One result: figures, what is found, how to read it, and what it does not show.

    Attributes:
        heading: Heading, also in the table of contents.
        text: Paragraphs, parted by blank lines; `code` between backticks.
        figures: Figures, in order.
        finding: The result in a sentence, with its interval.
        caveat: What the result does not show.
        tables: Tables, in order.
        answers: Generated answers side by side.
    """

    heading: str
    text: str = ""
    figures: tuple[FigureItem, ...] = ()
    finding: str | None = None
    caveat: str | None = None
    tables: tuple[Table, ...] = ()
    answers: tuple[Answers, ...] = ()


@dataclass(frozen=True, slots=True)
class Report:
    """A whole report.

    Attributes:
        title: Title.
        question: The question, in a paragraph.
        method: The method, in two lines.
        findings: The findings, one sentence each.
        sections: The results.
        settings: Settings of the run; nested ones are shown as `outer.inner`.
        versions: Versions of what was used.
        notice: Shown in a box above everything, e.g. that answers are wrong on purpose.
    """

    title: str
    question: str
    method: str
    findings: tuple[str, ...] = ()
    sections: tuple[Section, ...] = ()
    settings: Mapping[str, object] = field(default_factory=dict)
    versions: Mapping[str, object] = field(default_factory=dict)
    notice: str | None = None


def write_report(report: Report, path: str | Path) -> Path:
    """Write the report as one HTML file; atomic.

    Raises:
        FileNotFoundError: If the file of a figure is missing.
        ValueError: If a figure is neither PNG nor SVG.
    """
    path = expanded(path)
    atomic_write(path, render_report(report))
    return path


def render_report(report: Report) -> str:
    """The report as one HTML page: styles and images inside, no scripts, everything escaped.

    Raises:
        FileNotFoundError: If the file of a figure is missing.
        ValueError: If a figure is neither PNG nor SVG.
    """
    numbers = _Numbers()
    parts = [(section.heading, _section(section, numbers)) for section in report.sections]
    tails = {"Settings": report.settings, "Versions": report.versions}
    parts += [(name, _settings(values)) for name, values in tails.items() if values]
    headings = [heading for heading, _ in parts]
    anchors = _anchors(headings)
    body = [
        f'<section id="{anchor}">\n<h2>{escape(heading)}</h2>\n{content}\n</section>'
        for anchor, (heading, content) in zip(anchors, parts, strict=True)
    ]
    style = read_text(Path(__file__).with_name("report.css"))
    return _PAGE.format(
        title=escape(report.title),
        style=style,
        contents=_contents(headings, anchors),
        head=_head(report),
        body="\n".join(body),
    )


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
</head>
<body>
<header>
{head}
</header>
{contents}
<main>
{body}
</main>
</body>
</html>
"""


@dataclass(slots=True)
class _Numbers:
    """How many figures and tables there are so far."""

    figures: int = 0
    tables: int = 0


def _anchors(headings: Sequence[str]) -> list[str]:
    """A readable anchor for every heading, no two alike."""
    anchors: list[str] = []
    for heading in headings:
        stem = "s-" + (re.sub(r"[^a-z0-9]+", "-", heading.lower()).strip("-") or "section")
        anchor, again = stem, 2
        while anchor in anchors:
            anchor, again = f"{stem}-{again}", again + 1
        anchors.append(anchor)
    return anchors


def _contents(headings: Sequence[str], anchors: Sequence[str]) -> str:
    items = "".join(
        f'<li><a href="#{anchor}">{escape(heading)}</a></li>'
        for heading, anchor in zip(headings, anchors, strict=True)
    )
    return f'<nav aria-label="Contents"><span class="label">Contents</span><ol>{items}</ol></nav>'


def _head(report: Report) -> str:
    notice = f'<aside class="notice">{_prose(report.notice)}</aside>' if report.notice else ""
    question, method = (
        _prose(report.question, "question"),
        _prose(report.method, "method", "Method"),
    )
    items = "".join(f"<li>{_prose(finding)}</li>" for finding in report.findings)
    findings = f'<div class="findings"><h2>Findings</h2><ol>{items}</ol></div>' if items else ""
    return f"<h1>{escape(report.title)}</h1>{notice}{question}{method}{findings}"


def _section(section: Section, numbers: _Numbers) -> str:
    parts = [_prose(section.text)]
    parts += [_figure(figure, section.heading, numbers) for figure in section.figures]
    parts.append(_prose(section.finding or "", "finding", "Finding"))
    parts += [_table(table, numbers) for table in section.tables]
    parts += [_answers(answers) for answers in section.answers]
    parts.append(_prose(section.caveat or "", "caveat", "Caveat"))
    return "\n".join(part for part in parts if part)


def _prose(text: str, kind: str = "", label: str = "") -> str:
    """Escaped paragraphs; what stands between backticks becomes code."""
    paragraphs = [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]
    opening = f'<p class="{kind}">' if kind else "<p>"
    first = f'<span class="label">{escape(label)}</span> ' if label else ""
    return "\n".join(
        f"{opening}{first if place == 0 else ''}{_marked(part)}</p>"
        for place, part in enumerate(paragraphs)
    )


def _marked(text: str) -> str:
    """Escaped, code between backticks, and numbers that no line breaks: minus signs, intervals."""
    parts = re.split(r"`([^`\n]+)`", text)
    parts[::2] = [_INTERVAL.sub(",\u00a0", _MINUS.sub("\u2212", part)) for part in parts[::2]]
    parts = [escape(part) for part in parts]
    parts[1::2] = [f"<code>{part}</code>" for part in parts[1::2]]
    return "".join(parts)


_MINUS = re.compile(r"(?<!\w)-(?=\d)")
_INTERVAL = re.compile(r"(?<=\d),\s(?=[+\u2212]?[\d.]+\])")


def _figure(figure: FigureItem, heading: str, numbers: _Numbers) -> str:
    path = expanded(figure.path)
    kind = IMAGES.get(path.suffix.lower())
    if kind is None:
        raise ValueError(f"figure {path} of section {heading!r} is neither PNG nor SVG")
    if not path.is_file():
        raise FileNotFoundError(
            f"figure {path} of section {heading!r} does not exist; draw it again and then write "
            "the report"
        )
    numbers.figures += 1
    data = read_bytes(path)
    source = f"data:{kind};base64,{base64.b64encode(data).decode()}"
    caption = f"<b>Figure {numbers.figures}.</b> {_marked(figure.caption)}"
    return (
        f'<figure><img src="{source}" alt="{escape(figure.alt or figure.caption)}"{_size(data)}>'
        f"<figcaption><p>{caption}</p>{_prose(figure.reading, '', 'How to read it')}</figcaption>"
        "</figure>"
    )


def _size(png: bytes) -> str:
    """Width and height of a PNG in CSS pixels, by the dots per inch that it names."""
    if not png.startswith(b"\x89PNG\r\n\x1a\n"):
        return ""
    width, height = struct.unpack(">II", png[16:24])
    place = png.find(b"pHYs", 0, max(png.find(b"IDAT"), 0))
    per_metre, unit = struct.unpack(">I4xB", png[place + 4 : place + 13]) if place > 0 else (0, 0)
    scale = 96 / (per_metre * 0.0254) if per_metre and unit == 1 else 1.0
    return f' width="{round(width * scale)}" height="{round(height * scale)}"'


def _table(table: Table, numbers: _Numbers) -> str:
    data = table.data
    frame = data if isinstance(data, pd.DataFrame) else pd.DataFrame(list(data))
    numbers.tables += 1
    names = [str(name) for name in frame.columns]
    columns = [frame.iloc[:, place].tolist() for place in range(len(names))]
    classes = [' class="number"' if _is_numeric(column) else "" for column in columns]
    head = "".join(
        f'<th scope="col"{kind}>{escape(name)}</th>'
        for name, kind in zip(names, classes, strict=True)
    )
    rows = "".join(
        "<tr>"
        + "".join(
            f"<td{kind}>{escape(_cell(value, table.digits))}</td>"
            for value, kind in zip(row, classes, strict=True)
        )
        + "</tr>"
        for row in zip(*columns, strict=True)
    )
    caption = f"<b>Table {numbers.tables}.</b> {_marked(table.caption)}"
    return (
        f'<figure><figcaption>{caption}</figcaption><div class="scroll" tabindex="0"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div></figure>"
    )


def _is_numeric(values: Sequence[object]) -> bool:
    filled = [value for value in values if not _is_missing(value)]
    return bool(filled) and all(
        isinstance(value, Real) and not isinstance(value, bool) for value in filled
    )


def _is_missing(value: object) -> bool:
    return value is None or value is pd.NA or (isinstance(value, Real) and math.isnan(value))


def _cell(value: object, digits: int) -> str:
    if _is_missing(value):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Integral):
        return f"{int(value)}".replace("-", "−")
    if isinstance(value, Real):
        number = float(value)
        small = 0 < abs(number) < 10**-digits or (math.isfinite(number) and abs(number) >= 1e6)
        return (f"{number:.2g}" if small else f"{number:.{digits}f}").replace("-", "−")
    return str(value)


def _answers(answers: Answers) -> str:
    cards = "".join(
        f'<div class="card"><div class="label">{escape(name)}</div>{_answer(text)}</div>'
        for name, text in answers.responses.items()
    )
    kind = "cards two" if len(answers.responses) in (2, 4) else "cards"
    return (
        f'<div class="answers"><p><span class="label">Prompt</span> '
        f'<span class="prompt">{escape(answers.prompt)}</span></p><div class="{kind}">{cards}</div>'
        f"{_prose(answers.note, 'caveat')}</div>"
    )


def _answer(text: str) -> str:
    if not text.strip():
        return '<p class="answer empty">(no text)</p>'
    return f'<p class="answer">{escape(text.strip())}</p>'


def _settings(values: Mapping[str, object]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(text)}</td></tr>'
        for name, text in _flat(values)
    )
    return f'<div class="scroll settings" tabindex="0"><table><tbody>{rows}</tbody></table></div>'


def _flat(values: Mapping[str, object], outer: str = "") -> list[tuple[str, str]]:
    pairs: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            pairs += _flat(value, f"{outer}{name}.")
        elif isinstance(value, list | tuple):
            pairs.append((f"{outer}{name}", json.dumps(value, default=str, ensure_ascii=False)))
        else:
            pairs.append((f"{outer}{name}", str(value)))
    return pairs
