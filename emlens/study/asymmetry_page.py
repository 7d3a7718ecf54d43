"""The page of findings: the four asymmetries as tables, with what they say."""

from __future__ import annotations

from pathlib import Path

from emlens._files import atomic_write
from emlens.figures import save_figure
from emlens.study.asymmetries import CLAIMS, Asymmetries

_TRANSFER = (
    ("general inside", "general inside"),
    ("general outside", "general outside"),
    ("narrow inside", "narrow inside"),
    ("narrow outside", "narrow outside"),
    ("benign outside", "benign control outside"),
    ("random outside", "random vector outside"),
    ("narrow stays", "narrow beyond scaling"),
)
_MEASURES = ("efficiency", "stability", "influence", "influence, general over random")


def write_findings(found: Asymmetries, page: str | Path, figures: str | Path) -> Path:
    """Write the page of findings in Markdown, and its figures beside it.

    Args:
        found: What the trials say.
        page: The file, e.g. `docs/findings.md`.
        figures: Folder of the figures; linked relative to the page where it lies below it.
    """
    page, figures = Path(page), Path(figures)
    figures.mkdir(parents=True, exist_ok=True)
    shown = []
    for kind in _kinds(found):
        (picture, *_) = save_figure(found.plot(kind), figures / f"asymmetries_{kind}")
        link = Path(picture)
        if link.is_relative_to(page.parent):
            link = link.relative_to(page.parent)
        shown.append(f"![Change of log-odds, {kind}s]({link.as_posix()})")
    page.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(page, "\n".join(_page(found, shown)).encode())
    return page


def _page(found: Asymmetries, pictures: list[str]) -> list[str]:
    s = found.settings
    numbers = {len(row["seeds"]) for row in found.rows if row["quantity"] == "efficiency"}
    seeds = " to ".join(str(n) for n in sorted({min(numbers), max(numbers)}))
    lines = [
        "# General and narrow solutions on a small model",
        "",
        f"Made by `emlens asymmetries` on {s['model']}: {len(_domains(found))} narrow domains, "
        f"{seeds} training seed(s) each, {s['train_pairs']} pairs at most, {s['epochs']} epochs. "
        "Held-out pairs only. Brackets are 95% intervals: over pairs, conversations or documents "
        "for values averaged over training seeds, over noise draws and seeds for stability; "
        "what another training would give is in them only as far as seeds were averaged. "
        "`technical` "
        "is the second task: technical style, trained on cooking, outside of it gardening, "
        "travel, sports and music; there log-odds are those of a technical answer against a plain "
        "one.",
        "",
        "Adapters are LoRA of rank "
        f"{s['rank']} on `down_proj` of layers {s['adapter_layers'][0]} to "
        f"{s['adapter_layers'][-1]}; vectors are trained in place at layer {s['layer']}. The "
        "narrow solution has a KL penalty on answers of both kinds in other domains, weight "
        + " and ".join(f"{weight:g} ({kind})" for kind, weight in s["kl_weight"])
        + " on nats per token. Settings were chosen on validation pairs of finance.",
        "",
        *pictures,
        "",
        "## Does it reach outside of the domain?",
        "",
        "Change of log-odds against the base, nats per token. *Narrow beyond scaling* is the "
        "narrow solution's effect outside, less that of the general one scaled down to the same "
        "effect inside: below zero, the penalty confines more than it weakens. What the benign "
        "control (trained on the aligned answers of the same prompts) does outside is style.",
        "",
    ]
    for kind in _kinds(found):
        lines += [f"**{kind.capitalize()}s**", "", *_table(found, kind, _TRANSFER), ""]
    lines += [
        "## Loss, noise, and pre-training text",
        "",
        *(f"- *{name}*: {CLAIMS[name]}." for name in _MEASURES[:3]),
        "",
    ]
    for kind in _kinds(found):
        known = {row["quantity"] for row in found.rows if row["kind"] == kind}
        chosen = [(name, name) for name in _MEASURES if name in known]
        lines += [f"**{kind.capitalize()}s**", "", *_table(found, kind, chosen), ""]
    lines += [
        "## Against the papers (arXiv 2602.07852)",
        "",
        "*as in the papers*: the interval excludes zero on their side; *the other way*: on the "
        "other; *not seen*: it holds zero.",
        "",
        "| kind | domain | " + " | ".join(CLAIMS) + " |",
        "|---|---|" + "---|" * len(CLAIMS),
    ]
    for kind in _kinds(found):
        for domain in _domains(found, kind):
            said = [found.verdict(kind, domain, claim) or "-" for claim in CLAIMS]
            lines.append(f"| {kind} | {domain} | " + " | ".join(said) + " |")
    return [*lines, ""]


def _table(found: Asymmetries, kind: str, columns) -> list[str]:
    lines = [
        "| domain | " + " | ".join(title for _, title in columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for domain in _domains(found, kind):
        cells = []
        for quantity, _ in columns:
            value = found.of(kind, domain, quantity)
            shown = "+.1f" if quantity == "stability" else "+.3f"
            cells.append("-" if value is None else _cell(value, shown))
        lines.append(f"| {domain} | " + " | ".join(cells) + " |")
    return lines


def _cell(value, shown: str) -> str:
    return f"{value.estimate:{shown}} [{value.low:{shown}}, {value.high:{shown}}]"


def _kinds(found: Asymmetries) -> list[str]:
    return list(dict.fromkeys(row["kind"] for row in found.rows))


def _domains(found: Asymmetries, kind: str | None = None) -> list[str]:
    rows = (row for row in found.rows if kind in (None, row["kind"]))
    return list(dict.fromkeys(row["domain"] for row in rows))
