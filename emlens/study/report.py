"""The report: one HTML file that reads like a short paper and needs nothing beside itself."""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from io import BytesIO
from itertools import count
from numbers import Integral, Real
from pathlib import Path

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup
from PIL import Image

from emlens._files import atomic_write
from emlens._reading import expanded, read_bytes, read_text

_HERE = Path(__file__).parent
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
        folded: Whether the reader has to open it.
    """

    data: pd.DataFrame | Sequence[Mapping[str, object]]
    caption: str = ""
    digits: int = 3
    folded: bool = False


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
class Finding:
    """A claim, what the numbers say of it, and the numbers.

    Attributes:
        text: The numbers, in sentences.
        claim: The claim, in plain words; may be empty.
        verdict: What the numbers say of the claim.
    """

    text: str
    claim: str = ""
    verdict: str = ""

    def __str__(self) -> str:
        return f"{self.claim}: {self.verdict}. {self.text}" if self.claim else self.text


@dataclass(frozen=True, slots=True)
class Report:
    """A whole report.

    Attributes:
        title: Title.
        question: The question, in a paragraph.
        method: The method, in two lines.
        findings: The findings.
        limits: What the findings do not show.
        sections: The results.
        settings: Settings of the run; nested ones are shown as `outer.inner`.
        versions: Versions of what was used.
        notice: Shown in a box above everything, e.g. that answers are wrong on purpose.
    """

    title: str
    question: str
    method: str
    findings: tuple[Finding, ...] = ()
    limits: str = ""
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
    tails = {"Settings": report.settings, "Versions": report.versions}
    tails = {name: values for name, values in tails.items() if values}
    headings = [*(section.heading for section in report.sections), *tails]
    anchors = _anchors(headings)
    n = len(report.sections)
    return _template().render(
        report=report,
        style=Markup(read_text(_HERE / "report.css")),
        contents=list(zip(anchors, headings, strict=True)),
        sections=_sections(report.sections, anchors[:n]),
        tails=[
            {"anchor": anchor, "heading": name, "rows": _flat(values)}
            for anchor, (name, values) in zip(anchors[n:], tails.items(), strict=True)
        ],
    )


def _sections(sections: Sequence[Section], anchors: Sequence[str]) -> list[dict[str, object]]:
    figures, tables = count(1), count(1)
    return [
        {
            "anchor": anchor,
            "heading": one.heading,
            "text": one.text,
            "figures": [_figure(item, one.heading, next(figures)) for item in one.figures],
            "finding": one.finding,
            "tables": [_table(item, next(tables)) for item in one.tables],
            "answers": one.answers,
            "caveat": one.caveat,
        }
        for anchor, one in zip(anchors, sections, strict=True)
    ]


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined
    )
    environment.filters |= {"paragraphs": _paragraphs, "marked": _marked}
    return environment.get_template("report.html.jinja")


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


def _paragraphs(text: str) -> list[str]:
    return [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]


def _marked(text: str) -> Markup:
    """Escaped, code between backticks, and numbers that no line breaks: minus signs, intervals."""
    parts = re.split(r"`([^`\n]+)`", text)
    parts[::2] = [_INTERVAL.sub(",\u00a0", _MINUS.sub("\u2212", part)) for part in parts[::2]]
    parts[1::2] = [Markup("<code>{}</code>").format(part) for part in parts[1::2]]
    return Markup("").join(parts)


_MINUS = re.compile(r"(?<!\w)-(?=\d)")
_INTERVAL = re.compile(r"(?<=\d),\s(?=[+\u2212]?[\d.]+\])")


def _figure(figure: FigureItem, heading: str, number: int) -> dict[str, object]:
    path = expanded(figure.path)
    kind = IMAGES.get(path.suffix.lower())
    if kind is None:
        raise ValueError(f"figure {path} of section {heading!r} is neither PNG nor SVG")
    if not path.is_file():
        raise FileNotFoundError(
            f"figure {path} of section {heading!r} does not exist; draw it again and then write "
            "the report"
        )
    data = read_bytes(path)
    return {
        "number": number,
        "source": f"data:{kind};base64,{base64.b64encode(data).decode()}",
        "size": _size(data) if path.suffix.lower() == ".png" else None,
        "caption": figure.caption,
        "reading": figure.reading,
        "alt": figure.alt or figure.caption,
    }


def _size(png: bytes) -> tuple[int, int]:
    """Width and height of a PNG in CSS pixels, by the dots per inch that it names."""
    with Image.open(BytesIO(png)) as image:
        dots = image.info.get("dpi", (96, 96))
        width, height = (round(n * 96 / d) for n, d in zip(image.size, dots, strict=True))
    return width, height


def _table(table: Table, number: int) -> dict[str, object]:
    data = table.data
    frame = data if isinstance(data, pd.DataFrame) else pd.DataFrame(list(data))
    columns = [frame.iloc[:, place].tolist() for place in range(frame.shape[1])]
    return {
        "number": number,
        "caption": table.caption,
        "folded": table.folded,
        "columns": [
            {"name": str(name), "numeric": _is_numeric(column)}
            for name, column in zip(frame.columns, columns, strict=True)
        ],
        "rows": [[_cell(v, table.digits) for v in row] for row in zip(*columns, strict=True)],
    }


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
