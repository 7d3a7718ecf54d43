"""Behaviour: `evaluate`, `judge`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from emlens.cli.app import app
from emlens.cli.common import Call, Layer, rows_of, show_config, verb
from emlens.cli.judges import (
    JudgeChoice,
    JudgeData,
    JudgeOption,
    JudgePairs,
    Metric,
    Named,
    Rubric,
    Threshold,
    own_rubrics,
    trusted,
)
from emlens.cli.values import adapters_of, direction_of, layers_of, named

if TYPE_CHECKING:
    import pandas as pd

    from emlens.directions import Direction
    from emlens.evals import Judge, Responses, Scores
    from emlens.hooked import Condition, HookedModel

Questions = Annotated[
    list[str],
    typer.Argument(help="Embedded sets (held-out prompts), YAML of the papers, JSONL, data sets."),
]
Out = Annotated[Path, typer.Option(help="Folder of the evaluation; a rerun goes on in it.")]
Adapters = Annotated[
    list[str] | None,
    typer.Option(help="LoRA adapter, folder or hub name (repeatable).", metavar="[NAME=]PATH"),
]
Files = Annotated[
    list[Path] | None, typer.Option(help="File of directions to edit with (repeatable).")
]
Doses = Annotated[
    list[float] | None,
    typer.Option(help="Add it at this share of the median residual norm (repeatable)."),
]
Scales = Annotated[list[float] | None, typer.Option(help="Add it times this factor (repeatable).")]
Ablated = Annotated[bool, typer.Option("--ablate", help="Take it out.")]
AblatedAt = Annotated[
    str | None, typer.Option(help="Layers that --ablate acts at, e.g. 10-20; all by default.")
]
Control = Annotated[
    bool, typer.Option("--control", help="Do the same with a random direction of equal norm.")
]
Samples = Annotated[
    int | None, typer.Option(help="Answers per question; the question's own number, or 1.")
]
Limit = Annotated[int | None, typer.Option(help="Questions of each source, at most.")]
Longest = Annotated[int, typer.Option(help="Longest answer, in tokens; the papers use 600.")]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
TopP = Annotated[float, typer.Option(help="Nucleus to sample from.")]
Seed = Annotated[int, typer.Option(help="Seed of all answers.")]
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
    " --dose 0.4 --ablate --control --out runs/steered",
    "emlens evaluate medical --limit 4 --max-new-tokens 24 --adapter organisms/finance"
    " --metric medical --judge local --out runs/adapter",
    "emlens evaluate general --limit 4 --max-new-tokens 24 --judge openai/gpt-4o --out runs/graded",
    model=True,
    config=True,
)
def evaluate(
    call: Call,
    questions: Questions,
    out: Out = Path("runs/evaluate"),
    adapter: Adapters = None,
    directions: Files = None,
    layer: Layer = None,
    dose: Doses = None,
    scale: Scales = None,
    ablate: Ablated = False,
    layers: AblatedAt = None,
    control: Control = False,
    judge: Named = "probe",
    rubric: Rubric = None,
    judge_data: JudgeData = None,
    judge_pairs: JudgePairs = 64,
    judge_option: JudgeOption = None,
    metric: Metric = None,
    threshold: Threshold = 30.0,
    samples: Samples = None,
    limit: Limit = None,
    max_new_tokens: Longest = 128,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
) -> None:
    """Answer questions under several conditions, judge the answers, and give the rates.

    Conditions are the base model and each adapter, each as it is and with every edit: a direction
    added at a dose or times a factor, or taken out. Answers and scores are kept as they come, so
    an interrupted evaluation goes on. With a model of Inspect as the judge only the judging needs
    a network. Judge prompts that a YAML file of questions brings are what a judge is told, unless
    --rubric says otherwise.
    """
    from emlens.evals import load_questions, respond
    from emlens.study.evaluation import EVALUATION, RESPONSES

    asked = [one for source in questions for one in load_questions(source, limit=limit)]
    wanted = JudgeChoice(judge, rubric, judge_data, judge_pairs, judge_option)
    metrics = list(metric or ["aligned"])
    adapters = adapters_of(adapter)
    model = call.load(adapters=adapters)
    edited = {
        name: direction_of(path, model, layer) for name, path in named(directions or []).items()
    }
    conditions = conditions_of(model, edited, dose, scale, ablate, layers, control, seed)
    told = own_rubrics(asked) if rubric is None and judge != "probe" else {}
    graded = wanted.made(call, {"base": model}, list({one.domain for one in asked}), told)
    config = {key: value for key, value in call.options.items() if key != "out"}
    show_config(call, config)
    EVALUATION.write(out, config, call.command)
    call.kept = f"answers and scores so far are in {out}; run the same command again to go on"
    answers = respond(
        model,
        asked,
        conditions,
        n=samples,
        store=out / RESPONSES,
        temperature=temperature,
        top_p=top_p,
        max_new_tokens=max_new_tokens,
        seed=seed,
        progress=call.progress,
    )
    _judged(call, out, answers, graded, metrics, threshold)


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
    rubric: Rubric = None,
    judge_data: JudgeData = None,
    judge_pairs: JudgePairs = 64,
    judge_option: JudgeOption = None,
    metric: Metric = None,
    threshold: Threshold = 30.0,
    rescore: Rescore = False,
    labels: Labels = None,
    out: ScoresOut = None,
) -> None:
    """Score stored responses, by another judge or rubric too; nothing is generated again.

    Scores are added to those that are there, and told apart by judge and rubric. What this judge
    has scored with this rubric is not asked again, unless --rescore says so: its old scores then
    move to scores.before.jsonl. Judges of the same answers are compared.
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
    wanted = JudgeChoice(judge, rubric, judge_data, judge_pairs, judge_option)
    metrics = list(metric or ["aligned"])
    base = {"base": call.load(answers.rows[0].model)} if wanted.needs_model() else {}
    graded = wanted.made(call, base, list({row.domain for row in answers}))
    # read before anything is judged: a table that cannot be read is no reason to lose an hour
    people = {} if labels is None else {n: human_labels(answers, labels, n) for n in metrics}
    call.kept = f"scores so far are in {folder / SCORES}; the same command goes on"
    if rescore:
        moved = forget_scores(folder / SCORES, graded.id, [*metrics, COHERENT])
        call.note(f"{moved} scores of {graded.id} are asked again")
        call.kept += ", without --rescore"
    scores = judge_all(
        answers, graded, [*metrics, COHERENT], store=folder / SCORES, progress=call.progress
    )
    found = measured_rates(folder, answers, scores, graded.id, metrics, threshold=threshold)
    written: dict[str, object] = {"folder": folder}
    if source.parent == folder:
        written["report"] = evaluation_report(folder)
    compared, missing = _agreements(scores, folder, graded, metrics, people, threshold)
    print_rates(call, graded, [*metrics, COHERENT], _joined(found), written, compared, missing)


def conditions_of(
    model: HookedModel,
    directions: Mapping[str, Direction],
    doses: Sequence[float] | None,
    scales: Sequence[float] | None,
    ablate: bool,
    layers: str | None,
    control: bool,
    seed: int,
) -> dict[str, Condition]:
    """The base and each adapter, each as it is and with every edit.

    Raises:
        ValueError: If there are directions without an edit, or the other way round.
    """
    from emlens.directions import random_direction
    from emlens.edits import Ablate, Add
    from emlens.hooked import Condition

    acts = bool(doses or scales or ablate)
    if bool(directions) != acts:
        raise ValueError(
            "--directions says what to edit with, and --dose, --scale or --ablate how; give both"
        )
    if control and not directions:
        raise ValueError("--control needs --directions to be of the same norm as")
    known = dict(directions)
    if control:
        known["random"] = random_direction(next(iter(directions.values())), seed)
    edits: dict[str, Add | Ablate] = {}
    at = layers_of(layers) or range(model.n_layers)
    for name, direction in known.items():
        edits |= {f"{name} at dose {x:g}": Add(direction, dose=x) for x in doses or ()}
        edits |= {f"{name} times {x:g}": Add(direction, scale=x) for x in scales or ()}
        edits |= {f"{name} ablated": Ablate(direction, layers=at)} if ablate else {}
    found: dict[str, Condition] = {}
    for adapter in ("base", *model.adapters):
        alone = Condition(None if adapter == "base" else (adapter,))
        found[adapter] = alone
        found |= {f"{adapter}, {name}": alone.with_edits(edit) for name, edit in edits.items()}
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
    """Give rates, with what is known of the judge beside them, and what could not be compared."""
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
