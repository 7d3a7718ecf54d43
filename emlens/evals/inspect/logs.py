"""Logs of Inspect as responses and scores of emlens: rates, paired differences, other judges."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emlens._reading import readable
from emlens.evals._inspect import said
from emlens.evals.responses import Response, Responses, content_key
from emlens.evals.scores import Score, Scores, Verdict, score_of

if TYPE_CHECKING:
    from inspect_ai.log import EvalLog, EvalSample


def read_log(path: str | Path, condition: str | None = None) -> tuple[Responses, Scores]:
    """Answers and grades of an Inspect log of `emlens/free_form` or `emlens/domain`.

    Logs of several models become conditions of one table: add their rows together.

    Args:
        path: A `.eval` or `.json` log.
        condition: What the answers are called; the model's name by default.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the log is not of these tasks, or has no finished sample.

    Examples:
        >>> answers, scores = read_log("logs/steered.eval", "steered")
        >>> emlens.evals.rates(answers, scores)
    """
    from inspect_ai.log import read_eval_log

    path = readable(path, "no log {}")
    try:
        log = read_eval_log(str(path))
    except Exception as error:  # of damaged logs Inspect raises anything
        said = str(error).partition("\n")[0][:300]
        raise ValueError(f"{path} is not a readable log of Inspect ({said})") from error
    rows, scores = [], []
    for sample in log.samples or []:
        grades = _grades(sample)
        if grades is None:
            continue
        row = _response(log, sample, condition or log.eval.model)
        rows.append(row)
        scores += _scores(row, grades)
    if not rows:
        raise ValueError(
            f"{path} holds no graded sample of emlens/free_form or emlens/domain "
            f"(its task is {log.eval.task}, its status {log.status})"
        )
    return Responses(tuple(rows)), Scores(tuple(scores))


def _grades(sample: EvalSample) -> dict[str, Any] | None:
    for score in (sample.scores or {}).values():
        if score.metadata and {"measure", "score", "coherent", "judge"} <= set(score.metadata):
            return score.metadata
    return None


def _response(log: EvalLog, sample: EvalSample, condition: str) -> Response:
    about = sample.metadata
    config = log.eval.model_generate_config.merge(log.plan.config)
    sampling = {
        "temperature": _number(config.temperature, 1.0),
        "top_p": _number(config.top_p, 1.0),
        "max_new_tokens": _number(config.max_tokens, 0.0),
    }
    asked: Sequence[Any] = sample.input if not isinstance(sample.input, str) else ()
    system = next((one.text for one in asked if one.role == "system"), None)
    text = said(sample.output.message) if sample.output.choices else ""
    return Response(
        key=content_key(log.eval.run_id, log.eval.model, sample.id, sample.epoch, text),
        question_id=str(about.get("question", sample.id)),
        question=str(sample.id),
        prompt=str(about.get("prompt", "")),
        system=system,
        domain=str(about.get("domain", "general")),
        variant=str(about.get("variant", "plain")),
        condition=condition,
        sample=sample.epoch - 1,
        seed=0,
        text=text,
        model=log.eval.model,
        sampling=sampling,
    )


def _scores(row: Response, grades: dict[str, Any]) -> list[Score]:
    found = []
    for metric, value in ((grades["measure"], grades["score"]), ("coherent", grades["coherent"])):
        verdict = Verdict(value, grades["modes"][metric], grades["notes"][metric])
        found.append(score_of(row, metric, grades["judge"], grades["rubrics"][metric], verdict))
    return found


def _number(value: float | None, default: float) -> float:
    return default if value is None else float(value)
