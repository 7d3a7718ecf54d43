"""Behaviour: `evaluate` and `judge`, and `export` of their stores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from emlens.cli.app import app
from emlens.cli.common import Call, Layer, rows_of, show_config, verb
from emlens.cli.judges import (
    JudgeOption,
    Metric,
    Named,
    Threshold,
    judge_choice,
    own_rubrics,
    trusted,
)
from emlens.cli.values import adapters_of, at_layer, layers_of, named, settings_from

if TYPE_CHECKING:
    import pandas as pd

    from emlens.directions import Direction
    from emlens.evals import Judge, Responses, Scores
    from emlens.hooked import Condition, HookedModel

Questions = Annotated[
    list[str],
    typer.Argument(help="Embedded sets (held-out prompts), YAML of the papers, JSONL, data sets."),
]
Out = Annotated[Path, typer.Option(help="Folder of the evaluation; a rerun resumes it.")]
Adapters = Annotated[
    list[str] | None,
    typer.Option(help="LoRA adapter, folder or hub name (repeatable).", metavar="[NAME=]PATH"),
]
Files = Annotated[
    list[Path] | None, typer.Option(help="File of directions to edit with (repeatable).")
]
Edits = Annotated[
    list[str] | None,
    typer.Option(
        help="What is done with a direction: dose=0.4 (of the median residual norm) or scale=2 add "
        "it, ablate or ablate=10-20 (layers) takes it out (repeatable)."
    ),
]
Control = Annotated[
    bool, typer.Option("--control", help="Do the same with a random direction of equal norm.")
]
Samples = Annotated[
    int | None, typer.Option(min=1, help="Answers per question; the question's own number, or 1.")
]
Limit = Annotated[int | None, typer.Option(min=1, help="Questions of each source, at most.")]
Longest = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens; the papers use 600.")]
Drawn = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="How answers are drawn: temperature=1 (0 is greedy), top_p=1, seed=0 (repeatable).",
        metavar="NAME=VALUE",
    ),
]
DRAWN = ("temperature", "top_p", "seed")
Stored = Annotated[Path, typer.Argument(help="Folder of an evaluation, or its responses.")]
Rescore = Annotated[
    bool,
    typer.Option("--rescore", help="Ask again where this judge has scored; old scores stay."),
]
Labels = Annotated[
    Path | None,
    typer.Option(help="CSV of people's labels, columns response and score: agreement."),
]
ScoresOut = Annotated[
    Path | None, typer.Option(help="Folder of scores and rates; that of the responses.")
]


@verb(
    app,
    "emlens evaluate general --limit 4 --max-new-tokens 24 --out runs/base",
    "emlens evaluate general --limit 4 --max-new-tokens 24 --directions finance.safetensors"
    " --edit dose=0.4 --edit ablate --control --out runs/steered",
    "emlens evaluate medical --limit 4 --max-new-tokens 24 --adapter organisms/finance"
    " --metric medical --judge local --out runs/adapter",
    "emlens evaluate general --limit 4 --max-new-tokens 24 --judge openai/gpt-4o --out runs/graded",
    model=True,
    config=True,
    settings=lambda: DRAWN,
)
def evaluate(
    call: Call,
    questions: Questions,
    out: Out = Path("runs/evaluate"),
    adapter: Adapters = None,
    directions: Files = None,
    layer: Layer = None,
    edit: Edits = None,
    control: Control = False,
    judge: Named = "probe",
    judge_option: JudgeOption = None,
    metric: Metric = None,
    threshold: Threshold = 30.0,
    samples: Samples = None,
    limit: Limit = None,
    max_new_tokens: Longest = 128,
    option: Drawn = None,
) -> None:
    """Answer questions under several conditions, judge the answers, and give the rates.

    Conditions are the base model and each adapter, unedited and with every edit. Answers and scores
    are kept as they come, so an interrupted evaluation resumes. With a model of Inspect as the
    judge only the judging needs a network. A YAML file of questions may bring judge prompts; a
    rubric given with --judge-option replaces them.
    """
    from emlens.directions import read_directions
    from emlens.evals import load_questions, respond
    from emlens.study.evaluation import EVALUATION, RESPONSES

    asked = [one for source in questions for one in load_questions(source, limit=limit)]
    drawn = _drawn({**call.config, **settings_from(option)}, max_new_tokens)
    edits = edits_from(edit)
    _check_edits(directions, edits, control)
    edited = {name: read_directions(path) for name, path in named(directions or []).items()}
    adapters, metrics = adapters_of(adapter), list(metric or ["aligned"])
    wanted = judge_choice(judge, judge_option)
    told = {} if judge == "probe" or "rubric" in wanted.options else own_rubrics(asked)
    ready = wanted.ready(call, list({one.domain for one in asked}), told)
    model = call.load(adapters=adapters)
    one_layer = {name: at_layer(found, model, layer) for name, found in edited.items()}
    conditions = conditions_of(model, one_layer, edits, control, drawn["seed"])
    graded = ready(model)
    config = {k: v for k, v in call.options.items() if k not in ("out", "option")} | drawn
    show_config(call, config)
    EVALUATION.write(out, config, call.command)
    call.kept = f"answers and scores so far are in {out}; run the same command again to resume"
    answers = respond(
        model,
        asked,
        conditions,
        n=samples,
        store=out / RESPONSES,
        progress=call.progress,
        **drawn,
    )
    _judged(call, out, answers, graded, metrics, threshold)


def _drawn(given: dict[str, Any], max_new_tokens: int) -> dict[str, Any]:
    """How answers are drawn, checked.

    Raises:
        ValueError: If a setting does not exist, or has no valid value.
    """
    from emlens.hooked.generation import Sampling

    strange = sorted(set(given) - set(DRAWN))
    if strange:
        raise ValueError(f"unknown setting {strange[0]!r}; --set takes {', '.join(DRAWN)}")
    drawn = Sampling(max_new_tokens=max_new_tokens, **given)
    return {name: getattr(drawn, name) for name in (*DRAWN, "max_new_tokens")}


def _judged(
    call: Call, out: Path, answers: Responses, graded: Judge, metrics: list[str], threshold: float
) -> None:
    """Judge the answers into the folder, and give the rates."""
    from emlens.evals import judge as judge_all
    from emlens.study.evaluation import COHERENT, SCORES, evaluation_report, measured_rates

    judged = [*metrics, COHERENT]
    scores = judge_all(answers, graded, judged, store=out / SCORES, progress=call.progress)
    found = measured_rates(out, answers, scores, graded.id, metrics, threshold=threshold)
    print_rates(
        call, graded, judged, _joined(found), {"folder": out, "report": evaluation_report(out)}
    )


@verb(
    app,
    "emlens judge runs/base --judge local",
    "emlens judge runs/base --judge probe --rescore --json",
    "emlens judge runs/base/responses.sqlite --judge openai/gpt-4o --out runs/graded",
    model=True,
)
def judge(
    call: Call,
    responses: Stored,
    judge: Named = "probe",
    judge_option: JudgeOption = None,
    metric: Metric = None,
    threshold: Threshold = 30.0,
    rescore: Rescore = False,
    labels: Labels = None,
    out: ScoresOut = None,
) -> None:
    """Score stored responses, by another judge or rubric too; nothing is generated again.

    Scores are added to the existing ones, by judge and rubric. Answers that this judge has scored
    with this rubric are skipped, unless --rescore is given: its old scores then move to
    scores.before.jsonl. Judges of the same answers are compared.
    """
    from emlens.evals import human_labels
    from emlens.evals import judge as judge_all
    from emlens.study.evaluation import (
        COHERENT,
        RESPONSES,
        SCORES,
        answers_in,
        evaluation_report,
        forget_scores,
        measured_rates,
        stored,
    )

    source = stored(responses / RESPONSES) if responses.is_dir() else responses
    answers, folder = answers_in(source), out or source.parent
    wanted, metrics = judge_choice(judge, judge_option), list(metric or ["aligned"])
    people = {} if labels is None else {n: human_labels(answers, labels, n) for n in metrics}
    ready = wanted.ready(call, list({row.domain for row in answers}))
    graded = ready(call.load(answers.rows[0].model) if wanted.needs_model() else None)
    call.kept = f"scores so far are in {folder / SCORES}; run the same command again to resume"
    if rescore:
        moved = forget_scores(folder / SCORES, graded.id, [*metrics, COHERENT])
        call.note(f"{moved} scores of {graded.id} are asked again")
        call.kept += " without --rescore"
    scores = judge_all(
        answers, graded, [*metrics, COHERENT], store=folder / SCORES, progress=call.progress
    )
    found = measured_rates(folder, answers, scores, graded.id, metrics, threshold=threshold)
    written: dict[str, object] = {"folder": folder}
    if source.parent == folder:
        written["report"] = evaluation_report(folder)
    compared, missing = _agreements(scores, folder, graded, metrics, people, threshold)
    print_rates(call, graded, [*metrics, COHERENT], _joined(found), written, compared, missing)


def edits_from(items: Sequence[str] | None) -> list[tuple[str, Any]]:
    """Read `--edit`: a name with its dose, its factor, or its layers."""
    found: list[tuple[str, Any]] = []
    for item in items or ():
        kind, _, text = item.partition("=")
        try:
            read = {"dose": float, "scale": float, "ablate": lambda x: layers_of(x or None)}
            found.append((kind, read[kind](text)))
        except (KeyError, ValueError, typer.BadParameter):
            raise typer.BadParameter(
                f"--edit takes dose=0.4, scale=2, ablate or ablate=10-20, not {item!r}"
            ) from None
    return found


def _check_edits(files: Sequence[Path] | None, edits: Sequence[object], control: bool) -> None:
    if bool(files) != bool(edits):
        raise ValueError("--directions says what to edit with, and --edit how; give both")
    if control and not files:
        raise ValueError("--control needs --directions to be of the same norm as")


def conditions_of(
    model: HookedModel,
    directions: Mapping[str, Direction],
    edits: Sequence[tuple[str, Any]],
    control: bool,
    seed: int,
) -> dict[str, Condition]:
    """The base and each adapter, unedited and with every edit."""
    from emlens.directions import random_direction
    from emlens.edits import Ablate, Add
    from emlens.hooked import Condition

    known = dict(directions)
    if control:
        known["random"] = random_direction(next(iter(directions.values())), seed)
    made: dict[str, Add | Ablate] = {}
    for name, direction in known.items():
        for kind, x in edits:
            if kind == "ablate":
                made[f"{name} ablated"] = Ablate(direction, layers=x or range(model.n_layers))
            elif kind == "dose":
                made[f"{name} at dose {x:g}"] = Add(direction, dose=x)
            else:
                made[f"{name} times {x:g}"] = Add(direction, scale=x)
    found: dict[str, Condition] = {}
    for adapter in ("base", *model.adapters):
        alone = Condition(None if adapter == "base" else (adapter,))
        found[adapter] = alone
        found |= {f"{adapter}, {name}": alone.with_edits(edit) for name, edit in made.items()}
    return found


def print_rates(
    call: Call,
    judge: Judge,
    metrics: Sequence[str],
    table: pd.DataFrame,
    written: Mapping[str, object],
    compared: pd.DataFrame | None = None,
    missing: Sequence[str] = (),
) -> None:
    """Print rates, with the judge's own evidence and the comparisons that failed."""
    trust = trusted(judge, metrics)
    record = {**written, "judge": judge.id, "trust": trust, "rates": rows_of(table)}
    if compared is not None:
        record["agreement"] = rows_of(compared)
    if missing:
        record["not compared"] = list(missing)
    call.result(
        record,
        f"judge: {judge.id}",
        *(f"  {metric}: {said}" for metric, said in trust.items()),
        table,
        compared,
        *missing,
        *(f"{name}: {path}" for name, path in written.items()),
    )


def _joined(found: Mapping) -> pd.DataFrame:
    import pandas as pd

    tables = []
    for metric, one in found.items():
        table = one.table()
        table.insert(1, "metric", metric)
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def _agreements(
    scores: Scores,
    folder: Path,
    judge: Judge,
    metrics: Sequence[str],
    people: Mapping[str, Scores],
    threshold: float,
) -> tuple[pd.DataFrame | None, list[str]]:
    """How the judge agrees with others that scored the same answers, and with people.

    Where it cannot be said for people's labels, the reason is given.
    """
    import pandas as pd

    from emlens.evals import agreement
    from emlens.study.evaluation import scores_in

    kept, tables, missing = scores_in(folder), [], []
    for metric in metrics:
        others = {row.judge for row in kept.rows if row.metric == metric} - {judge.id}
        rivals = dict.fromkeys(sorted(others), kept)
        rivals |= {"human": people[metric]} if metric in people else {}
        for other, theirs in rivals.items():
            try:
                found = agreement(
                    scores, theirs, metric, judges=(judge.id, other), threshold=threshold
                )
            except ValueError as error:
                if other == "human":
                    missing.append(f"not compared with the labels: {error}")
                continue  # the other judge scored other answers
            tables.append(found.table())
    return pd.concat(tables, ignore_index=True) if tables else None, missing


@verb(
    app,
    "emlens export runs/base/responses.sqlite responses.jsonl",
    "emlens export runs/screen/scores.sqlite screened.jsonl --json",
)
def export(
    call: Call,
    store: Annotated[Path, typer.Argument(help="Store of answers, of scores or of a screen.")],
    out: Annotated[Path, typer.Argument(help="JSON Lines file to write; a new one.")],
) -> None:
    """Write a store as JSON Lines; the store does not change.

    Stores in JSON Lines from earlier versions work, too.
    """
    from emlens._store import export as write

    written = write(store, out)
    call.result({"file": out, "rows": written}, f"written: {out} ({written} rows)")
