"""An evaluation's folder: responses, scores, rates, and a report made of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from emlens._files import atomic_write
from emlens._reading import expanded, read_text
from emlens._stats import Interval
from emlens._store import Store, text_of
from emlens.directions.provenance import package_versions
from emlens.evals import Rates, Responses, Scores, rates
from emlens.evals.rates import ALIGNED
from emlens.evals.scores import judge_name
from emlens.figures import house_style, save_figure
from emlens.study.folder import AGAIN, CONFIG, RunFolder, read_config
from emlens.study.page import NOTICE
from emlens.study.report import Answers, FigureItem, Finding, Report, Section, Table, write_report

RESPONSES, SCORES, REPORT = "responses.sqlite", "scores.sqlite", "report.html"
COHERENT = "coherent"
SHOWN = 6
"""Questions whose answers the report shows."""

EVALUATION = RunFolder(
    title="Answers under several conditions, and how they were judged (emlens evaluate)",
    files={
        REPORT: "the rates and some answers; one file, works offline",
        RESPONSES: "every answer, never made twice; `emlens export` writes JSON Lines",
        SCORES: "every score, with its judge and the hash of the rubric",
        "rates/": "rates with intervals by metric and judge, JSON",
        "figures/": "the same as pictures, PNG and SVG",
    },
    resume=AGAIN,
    load=(
        "from emlens.evals import Responses, Scores, rates",
        f'answers, scores = Responses.load("{RESPONSES}"), Scores.load("{SCORES}")',
        "answers.side_by_side()",
        "rates(answers, scores, judge=scores.judges[-1]).table()",
    ),
)


def measured_rates(
    folder: str | Path,
    responses: Responses,
    scores: Scores,
    judge: str,
    metrics: Sequence[str],
    *,
    threshold: float = ALIGNED,
) -> dict[str, Rates]:
    """Rates by metric, written with their figures into the folder of an evaluation.

    Args:
        folder: The folder.
        responses: The responses.
        scores: Their scores.
        judge: Id of the judge.
        metrics: What makes an answer misaligned where it is low.
        threshold: An answer is misaligned below it.

    Raises:
        ValueError: If the judge gave none of the answers a score for a metric.
    """
    import matplotlib.pyplot as plt

    for metric in (*metrics, COHERENT):
        rows = [one for one in scores.rows if (one.judge, one.metric) == (judge, metric)]
        if rows and all(one.score is None for one in rows):
            why = next((one.note for one in rows if one.note), "it gave no reason")
            raise ValueError(
                f"{judge} scored none of {len(rows)} answers for {metric!r}: {why}; try another "
                "judge (emlens judge)"
            )

    folder, found = expanded(folder), {}
    for metric in metrics:
        found[metric] = rates(responses, scores, metric=metric, judge=judge, threshold=threshold)
        name = _file(metric, judge)
        (folder / "rates").mkdir(parents=True, exist_ok=True)
        found[metric].save(folder / "rates" / f"{name}.json")
        with house_style():
            axes = found[metric].plot()
            save_figure(axes, folder / "figures" / name)
            plt.close(axes.get_figure(root=True))
    return found


def evaluation_report(folder: str | Path) -> Path:
    """Write the report of an evaluation from the files in its folder.

    Raises:
        FileNotFoundError: If there are no responses, or no scores yet.
        ValueError: If the store of responses is empty.
    """
    folder = expanded(folder)
    responses, scores = answers_in(stored(folder / RESPONSES)), scores_in(folder)
    sections, findings = [], []
    for path in sorted((folder / "rates").glob("*.json")):
        found = Rates.load(path)
        metric = path.stem.partition("-")[0]
        findings += [_sentence(found, name, metric) for name in found.conditions]
        sections.append(_judged(folder, found, scores, metric, path.stem))
    sections.append(
        Section(
            "What was answered",
            "The first answer to some of the questions under each condition.",
            answers=_answers(responses),
        )
    )
    config = read_config(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    n = len({row.question_id for row in responses})
    report = Report(
        title=f"Answers of {responses.rows[0].model}",
        question="How often are the answers misaligned, under each condition?",
        method=f"{len(responses)} answers to {n} questions under {len(responses.conditions)} "
        "conditions, each answer with a seed of its own that the conditions share. Rates are "
        "shares of the answers that have both scores; 95% intervals by bootstrap over questions.",
        findings=tuple(map(Finding, findings)),
        sections=tuple(sections),
        settings=config,
        versions=package_versions(),
        notice=NOTICE,
    )
    return write_report(report, folder / REPORT)


def answers_in(path: Path) -> Responses:
    """The answers in a store.

    Raises:
        FileNotFoundError: If there is no such store.
        ValueError: If there are none in it yet.
    """
    found = Responses.load(path)
    if not len(found):
        raise ValueError(f"{path} holds no answers yet; run emlens evaluate on it first")
    return found


def stored(path: Path) -> Path:
    """A store, or the one of an earlier version (JSON Lines) where only that is there."""
    old = path.with_suffix(".jsonl")
    return old if old.is_file() and not path.exists() else path


def scores_in(folder: Path) -> Scores:
    """All scores in the folder of an evaluation, those of an earlier version included.

    Raises:
        FileNotFoundError: If there are none.
    """
    path = folder / SCORES
    old = path.with_suffix(".jsonl")
    before = Scores.load(old).rows if old.is_file() else ()
    now = Scores.load(path).rows if path.exists() or not before else ()
    return Scores((*before, *now), path)


def forget_scores(path: str | Path, judge: str, metrics: Sequence[str]) -> int:
    """Move a judge's scores of some metrics out of a store, into `<name>.before.jsonl` beside it.

    Returns:
        How many were moved.
    """
    path = expanded(path)
    if not path.exists():
        return 0
    scores = Scores.load(path).rows
    moved = [row for row in scores if row.judge == judge and row.metric in metrics]
    if moved:
        before = path.with_name(f"{path.stem}.before.jsonl")
        old = read_text(before) if before.is_file() else ""
        atomic_write(before, old + "".join(f"{text_of(asdict(row))}\n" for row in moved))
        Store(path, "scores").remove(row.key for row in moved)
    return len(moved)


def _judged(folder: Path, found: Rates, scores: Scores, metric: str, name: str) -> Section:
    rows = [row for row in scores.rows if row.judge == found.judge and row.metric == metric]
    modes = ", ".join(dict.fromkeys(row.mode for row in rows))
    notes = dict.fromkeys(row.note for row in rows if row.mode == "classifier" and row.score)
    figure = FigureItem(
        folder / "figures" / f"{name}.png",
        f"Misaligned and coherent answers by domain, {metric}.",
        "Share of the answers that have both scores, with 95% intervals over questions.",
    )
    return Section(
        f"{metric.capitalize()}, judged by {judge_name(found.judge)}",
        f"Scores come from {modes or 'no score'} of {found.judge}. An answer is misaligned below "
        f"{found.threshold:g} and coherent above {found.coherence:g}.",
        figures=(figure,) if figure.path.is_file() else (),
        caveat=f"The judge: {'; '.join(notes)}." if notes else None,
        tables=(Table(found.table(), "Rates", digits=1),),
    )


def _sentence(found: Rates, condition: str, metric: str) -> str:
    rate, missing = found.misaligned(condition), found.unscored(condition)
    if missing == 1:
        return f"{condition}: no answer has a score for {metric} ({judge_name(found.judge)})."
    share = Interval(100 * rate.estimate, 100 * rate.low, 100 * rate.high)
    return (
        f"{condition}: {share:.1f} % misaligned by {metric}, "
        f"{100 * missing:.0f}% without a score ({judge_name(found.judge)})."
    )


def _answers(responses: Responses) -> tuple[Answers, ...]:
    by_question: dict[str, dict[str, str]] = {}
    prompts: dict[str, str] = {}
    for row in responses:
        if row.sample == 0:
            by_question.setdefault(row.question, {})[row.condition] = row.text
            prompts[row.question] = row.prompt
    chosen = list(by_question)[:SHOWN]
    return tuple(Answers(prompts[name], by_question[name]) for name in chosen)


def _file(metric: str, judge: str) -> str:
    return f"{metric}-{re.sub(r'[^A-Za-z0-9.]+', '_', judge)}"
