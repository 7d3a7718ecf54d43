"""The page of findings: the four asymmetries as tables, with what they say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from emlens._files import atomic_write
from emlens._reading import expanded
from emlens._stats import Interval
from emlens.figures import save_figure
from experiments.asymmetries import CLAIMS, DIGITS, VERDICTS, Asymmetries
from experiments.narrowing import Narrowing
from experiments.narrowing_page import narrowing_section
from experiments.paths import SolutionPaths

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

UNSAID = "cannot be said"

_TRANSFER = (
    ("general inside", "general inside"),
    ("general outside", "general outside"),
    ("narrow inside", "narrow inside"),
    ("narrow outside", "narrow outside"),
    ("benign outside", "benign control outside"),
    ("random outside", "random control outside"),
    ("narrow stays", "narrow beyond matched"),
)
_SETS = ("inside", "outside", "medical")
_MEASURES = ("efficiency", "stability", "influence", "influence, general over random")


def write_findings(
    found: Asymmetries,
    page: str | Path,
    figures: str | Path,
    paths: Sequence[SolutionPaths] = (),
    narrowings: Sequence[tuple[Narrowing, pd.DataFrame | None]] = (),
) -> Path:
    """Write the page of findings in Markdown, and its figures beside it.

    Args:
        found: What the trials say.
        page: The file, e.g. `docs/findings.md`.
        figures: Folder of the figures; linked relative to the page where it lies below it.
        paths: What lies between the solutions, from `read_paths`.
        narrowings: Ways to a narrow solution, from `read_narrowings`.
    """
    page, figures = expanded(page), expanded(figures)
    figures.mkdir(parents=True, exist_ok=True)
    shown = []
    for kind in _kinds(found):
        file = figures / f"asymmetries_{kind}"
        shown.append(_picture(found.plot(kind=kind), file, page, f"Change of log-odds, {kind}s"))
    between = [line for path in paths for line in _between(path, page, figures)]
    for ways, scaled in narrowings:
        file = figures / f"narrowing_{ways.domain}"
        picture = _picture(ways.plot(), file, page, "Ways to a narrow solution")
        between += narrowing_section(ways, scaled, picture)
    page.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(page, "\n".join([*_page(found, shown), *between]).encode())
    return page


def _page(found: Asymmetries, pictures: list[str]) -> list[str]:
    lines = [
        *_intro(found),
        "## What is seen at this size, and what is not",
        "",
        *_in_short(found),
        "",
        "A star marks what does not stand after Holm's correction for the number of all these.",
        "",
        "All of it is measured on given answers, by log-odds, loss and KL; answers that the models "
        "would write themselves are not judged here.",
        "",
        *pictures,
        "",
        "## Does it reach outside of the domain?",
        "",
        "Change of log-odds against the base, nats per token. *Narrow beyond matched* is the "
        "narrow solution's effect outside, less that of the general one run at the strength that "
        "has the same effect inside: below zero, the penalty confines more than it weakens. The "
        "strength is matched again in each resample. The random control is a random vector of the "
        "norm of the general one, or an adapter with the same A and a random B of equal norm in "
        "every module. What the benign control (trained on the aligned answers of the same "
        f"prompts) does outside is style{_controls(found)}.",
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
    lines += _divergences(found)
    lines += [
        "## Against the papers (arXiv 2602.07852)",
        "",
        "*as in the papers*: the interval excludes zero on their side, as it is printed; *the "
        "other way*: on the other; *not seen*: it holds zero; *-*: it cannot be said, as nothing "
        "was gained that could be lost, or no strength of the general solution has the effect of "
        "the narrow one inside. In brackets p, and p by Holm's correction for the "
        f"{len(found.corrected())} cells of the table; a star marks what does not stand after it.",
        "",
        "| kind | domain | " + " | ".join(CLAIMS) + " |",
        "|---|---|" + "---|" * len(CLAIMS),
    ]
    for kind in _kinds(found):
        for domain in _domains(found, kind):
            said = [_cell(found, kind, domain, claim) for claim in CLAIMS]
            lines.append(f"| {kind} | {domain} | " + " | ".join(said) + " |")
    return [*lines, ""]


def _cell(found: Asymmetries, kind: str, domain: str, claim: str) -> str:
    """A verdict with its p, raw and corrected."""
    verdict = found.verdict(kind, domain, claim)
    p = found.corrected().get((kind, domain, claim))
    if not verdict or p is None:
        return verdict or "-"
    return f"{verdict}{_star(found, kind, domain, claim)} (p {_shown(p[0])}, Holm {_shown(p[1])})"


def _star(found: Asymmetries, kind: str, domain: str, claim: str) -> str:
    said = found.verdict(kind, domain, claim) in VERDICTS[:2]
    return "\\*" if said and not found.holds(kind, domain, claim) else ""


def _shown(p: float) -> str:
    return f"{p:.3f}" if p >= 0.0005 else "<0.001"


def _divergences(found: Asymmetries) -> list[str]:
    """The KL of both solutions and the random control on conversations."""
    known = {row["quantity"] for row in found.rows}
    named = [
        (quantity, f"{place}: {name}")
        for place in _SETS
        for name in ("general", "narrow", "random")
        if (quantity := f"KL {place}, {name}") in known
    ]
    if not named:
        return []
    lines = [
        "## Divergence from the base",
        "",
        "KL(base || solution) in nats per token on answers of both kinds to held-out questions: "
        "of the domain, outside of it, and of medicine, whose other questions are in the KL set of "
        "the other domains.",
        "",
    ]
    for kind in _kinds(found):
        lines += [f"**{kind.capitalize()}s**", "", *_table(found, kind, named), ""]
    return lines


def _controls(found: Asymmetries) -> str:
    """With how many seeds the benign control was trained, where it was."""
    counts = {
        f"{row['kind']}s of {row['domain']}": len(row["seeds"])
        for row in found.rows
        if row["quantity"] == "benign outside"
    }
    if not counts:
        return ""
    usual = min(counts.values())
    more = [f"{n} for {name}" for name, n in counts.items() if n != usual]
    seeds = f"{usual} training seed{'' if usual == 1 else 's'}"
    return f"; it is of {seeds}{' (' + ', '.join(more) + ')' if more else ''}"


def _intro(found: Asymmetries) -> list[str]:
    """What was trained, on what, and what the brackets hold."""
    s = found.settings
    numbers = {len(row["seeds"]) for row in found.rows if row["quantity"] == "efficiency"}
    seeds = " to ".join(str(n) for n in sorted({min(numbers), max(numbers)}))
    trainings = f"{seeds} training seed{'' if seeds == '1' else 's'} each"
    return [
        "# General and narrow solutions on a small model",
        "",
        f"Made by `python -m experiments` on {s['model']}: {len(_domains(found))} narrow domains, "
        f"{trainings}, {s['train_pairs']} pairs at most, {s['epochs']} epochs. "
        "Log-odds are of held-out pairs, efficiency and stability of "
        f"{s['measure_pairs']} of the training pairs. Brackets are 95% intervals: pairs, "
        "conversations or documents are resampled together with the training seeds, and those of "
        "stability are t intervals over seeds. `technical` is the second task: technical style, "
        "trained on cooking, outside of it gardening, travel, sports and music; there log-odds "
        "are those of a technical answer against a plain one.",
        "",
        "Adapters are LoRA of rank "
        f"{s['rank']} on `down_proj` of layers {s['adapter_layers'][0]} to "
        f"{s['adapter_layers'][-1]}; vectors are trained in place at layer {s['layer']}. The "
        "narrow solution has a KL penalty on answers of both kinds in other domains, weight "
        + " and ".join(f"{weight:g} ({kind})" for kind, weight in s["kl_weight"])
        + " on nats per token. Settings were chosen on validation pairs of finance.",
        "",
    ]


def _in_short(found: Asymmetries) -> list[str]:
    """A sentence per kind and claim, with the domains."""
    lines = []
    for kind in _kinds(found):
        for claim in CLAIMS:
            said: dict[str, list[str]] = {}
            for domain in _domains(found, kind):
                star = _star(found, kind, domain, claim)
                verdict = found.verdict(kind, domain, claim)
                said.setdefault(verdict, []).append(f"{domain}{star}")
            parts = [
                f"{verdict or UNSAID} for {', '.join(said[verdict])}"
                for verdict in (*VERDICTS, "")
                if verdict in said
            ]
            lines.append(f"- {kind}s, *{claim}*: {'; '.join(parts)}.")
    return lines


def _picture(axes: Axes | list[Axes], file: Path, page: Path, title: str) -> str:
    """Save a figure, and the line that shows it."""
    import matplotlib.pyplot as plt

    link, *_ = save_figure(axes, file)
    first = axes[0] if isinstance(axes, list) else axes
    plt.close(first.get_figure(root=True))
    if link.is_relative_to(page.parent):
        link = link.relative_to(page.parent)
    return f"![{title}]({link.as_posix()})"


def _between(path: SolutionPaths, page: Path, figures: Path) -> list[str]:
    """The section on what lies between the two solutions of a domain."""
    name = path.domain
    lines = [
        f"## Between general and narrow: {name}",
        "",
        "One adapter per weight of the KL, one seed. Inside and outside are changes of log-odds "
        "against the base, nats per token, with 95% intervals over pairs; *beyond* is the effect "
        "outside, less that of the adapter without KL times the ratio of the effects inside: an "
        "extrapolation along a line, not a measured strength.",
        "",
        _picture(path.sweep.plot(), figures / f"tradeoff_{name}", page, "Trade-off"),
        "",
        "| KL weight | inside | outside | beyond | norm |",
        "|---|---|---|---|---|",
    ]
    sweep = path.sweep
    for i, weight in enumerate(sweep.weights):
        cells = [
            str(Interval(*values[i])) for values in (sweep.inside, sweep.outside, sweep.beyond)
        ]
        lines.append(f"| {weight:g} | " + " | ".join(cells) + f" | {sweep.norms[i]:.2f} |")
    lines += [
        "",
        f"{sweep}.",
        "",
        "What becomes of the two: each is trained on, the narrow one without its KL, the general "
        "one with it. The picture shows the paths of `B` in their joint principal components.",
        "",
        _picture(path.trajectory.plot(), figures / f"paths_{name}", page, "Paths"),
        "",
        "Where the local cosine says that they turn (arXiv 2506.11613, section 4):",
        "",
        *(f"- {run}: {path.trajectory.transition(run)}" for run in path.trajectory.steps),
        "",
    ]
    for title, drift in path.drifts.items():
        frame = drift.table()
        lines += [
            f"**{title}**",
            "",
            "| updates | cosine with general | cosine with narrow | inside | outside |",
            "|---|---|---|---|---|",
        ]
        for i, row in enumerate(frame.to_dict("records")):
            cosines = " | ".join(f"{row[f'cosine with {n}']:.2f}" for n in ("general", "narrow"))
            cells = [str(Interval(*side[i])) for side in (drift.inside, drift.outside)]
            lines.append(f"| {drift.steps[i]} | {cosines} | " + " | ".join(cells) + " |")
        lines.append("")
    return lines


def _table(found: Asymmetries, kind: str, columns) -> list[str]:
    lines = [
        "| domain | " + " | ".join(title for _, title in columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for domain in _domains(found, kind):
        cells = []
        for quantity, _ in columns:
            value = found.of(kind, domain, quantity)
            shown = f"+.{DIGITS.get(quantity, DIGITS[''])}f"
            cells.append("-" if value is None else f"{value:{shown}}")
        lines.append(f"| {domain} | " + " | ".join(cells) + " |")
    return lines


def _kinds(found: Asymmetries) -> list[str]:
    return list(dict.fromkeys(row["kind"] for row in found.rows))


def _domains(found: Asymmetries, kind: str | None = None) -> list[str]:
    rows = (row for row in found.rows if kind in (None, row["kind"]))
    return list(dict.fromkeys(row["domain"] for row in rows))
