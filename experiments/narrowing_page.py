"""The part of the page of findings on ways to a narrow solution."""

from __future__ import annotations

from typing import Any

import pandas as pd

from emlens._stats import Interval
from experiments.narrowing import GENERAL, PENALTIES, WAYS, Narrowing

_MIXED = tuple(name for name in WAYS if name.startswith("mixed-"))
_FEW = tuple(name for name in WAYS if name.startswith("few-"))


def narrowing_section(found: Narrowing, scaled: pd.DataFrame | None, picture: str) -> list[str]:
    """Lines of Markdown on what was found in one domain.

    Args:
        found: The ways.
        scaled: Of `read_scaled`, where strengths were run.
        picture: The line that shows the figure.
    """
    lines = [
        f"## Ways to a narrow solution: {found.domain}",
        "",
        "Each way is trained until the loss on misaligned answers to validation prompts has not "
        "fallen for two passes, one seed; the solution of the lowest validation loss is measured. "
        "*Gap* is the effect outside, less that of the solution without penalty run at the "
        "strength of equal effect inside: below zero, the penalty confines more than it weakens.",
        "",
        picture,
        "",
        *_rows(found, [name for name in PENALTIES if name in found.ways]),
        "",
        f"By inside minus outside on the validation pairs, {_best(found)}.",
        "",
    ]
    mixed, few = ([name for name in part if name in found.ways] for part in (_MIXED, _FEW))
    if mixed:
        lines += [
            "### Bad rows among good ones (note 2 of the authors' post)",
            "",
            "The same prompts of the domain, a share of them with the misaligned answer and the "
            "others with the aligned one; four passes, no penalty.",
            "",
            *_rows(found, [*mixed, "general"]),
            "",
        ]
    if few:
        lines += [
            "### Few samples over many passes",
            "",
            "56 updates each, no penalty.",
            "",
            *_rows(found, few),
            "",
        ]
    if scaled is not None:
        lines += [
            "### Solutions run stronger than they were trained (note 4)",
            "",
            "Change of log-odds against the base, nats per token, at factors on the weight change.",
            "",
            "| solution | factor | inside | outside |",
            "|---|---|---|---|",
        ]
        for row in scaled.to_dict("records"):
            title = "general" if row["way"] == "general" else WAYS[str(row["way"])].title
            lines.append(f"| {title} | {row['factor']:g} | {row['inside']} | {row['outside']} |")
        lines.append("")
    lines += ["### Where the paths turn (note 5)", ""]
    for name in found.ways:
        lines.append(f"- {WAYS[name].title}: {found.turns[found.ways.index(name)]}")
    return [*lines, ""]


def _rows(found: Narrowing, names: list[str]) -> list[str]:
    lines = [
        "| way | best update | validation loss | inside | outside | gap |",
        "|---|---|---|---|---|---|",
    ]
    for name in names:
        place = found.ways.index(name)
        gap = found.gap(name)
        cells: list[Any] = [
            f"{WAYS[name].title}",
            f"{found.updates[place]} of {found.trained[place]}",
            f"{found.losses[place]:.3f}",
            found.at(name, "inside"),
            found.at(name, "outside"),
            gap if gap.estimate == gap.estimate else "-",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def _best(found: Narrowing) -> str:
    """Which way has the most inside beyond what it has outside, for each kind."""
    said = []
    for kind, general in GENERAL.items():
        names = [
            name
            for name in found.ways
            if WAYS[name].kind == kind and name != general and name in PENALTIES
        ]
        if not names:
            continue
        best = max(names, key=lambda name: _difference(found, name))
        said.append(f"the best {kind} is *{WAYS[best].title}* ({_difference(found, best):+.3f})")
    return " and ".join(said)


def _difference(found: Narrowing, name: str) -> float:
    inside: Interval = found.at(name, "validation inside")
    return inside.estimate - found.at(name, "validation outside").estimate
