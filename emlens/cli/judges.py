"""The judges by the names that `evaluate` and `judge` take."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from emlens._registry import JUDGES
from emlens.cli.common import Call

if TYPE_CHECKING:
    from emlens.evals import Judge, Question
    from emlens.hooked import HookedModel

Named = Annotated[
    str,
    typer.Option(
        "--judge",
        help="probe (offline, on the base model's activations), local (the model itself), "
        "local:MODEL, or a model of Inspect, e.g. openai/gpt-4o.",
    ),
]
Rubric = Annotated[
    Path | None,
    typer.Option(help="YAML file of rubrics by metric, each with {question} and {answer}."),
]
JudgeData = Annotated[
    list[str] | None,
    typer.Option(
        help="Pairs that the probe is fitted to (repeatable); by default the embedded sets of "
        "other domains than the questions'."
    ),
]
JudgePairs = Annotated[
    int,
    typer.Option(min=5, help="Pairs of each of those sets that the probe is fitted to, at most."),
]
JudgeOption = Annotated[
    list[str] | None,
    typer.Option(
        help="For Inspect's get_model, e.g. base_url=http://localhost:8000/v1 (repeatable).",
        metavar="NAME=VALUE",
    ),
]
Metric = Annotated[
    list[str] | None,
    typer.Option(help="What makes an answer misaligned where it is low (repeatable): aligned."),
]
Threshold = Annotated[float, typer.Option(help="An answer is misaligned below it.")]

ADVICE = ("finance", "medical", "sports")
_SECRET = re.compile(r"key|token|secret|password", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class JudgeChoice:
    """A judge as it was asked for."""

    name: str
    rubric: Path | None = None
    data: Sequence[str] | None = None
    pairs: int = 64
    options: Sequence[str] | None = None

    def made(
        self,
        call: Call,
        model: Mapping[str, HookedModel],
        domains: Sequence[str],
        told: Mapping[str, str] | None = None,
    ) -> Judge:
        """The judge.

        Args:
            call: The call.
            model: The base model under `"base"`, where it is loaded already.
            domains: Domains that are judged.
            told: Rubrics that the questions bring, by metric; `--rubric` goes first.

        Raises:
            ValueError: If there is no such judge, or something does not go with it.
        """
        kind, _, other = self.name.partition(":")
        if "/" in self.name and kind != "local":
            return self.of_inspect(told)
        if kind not in JUDGES or (kind == "probe" and other):
            raise ValueError(
                f"unknown judge {self.name!r}; choose {', '.join(JUDGES)}, local:MODEL, or a model "
                "of Inspect by provider and name, e.g. openai/gpt-4o"
            )
        if self.options:
            raise ValueError(f"--judge-option is for models of Inspect, not for {self.name!r}")
        grader = _other(call, other) if other else model.get("base") or call.load()
        return JUDGES[kind](self, grader, domains=domains, told=told, progress=call.progress)

    def needs_model(self) -> bool:
        """Whether it reads with the base model."""
        return self.name in JUDGES

    def of_inspect(self, told: Mapping[str, str] | None) -> Judge:
        from emlens.evals import LogProbJudge

        options = _options(self.options)
        config = options.pop("config", None)
        return LogProbJudge(self.name, self.rubrics(told), config=config, model_args=options)

    def rubrics(self, told: Mapping[str, str] | None) -> dict[str, str]:
        from emlens.evals.rubrics import RUBRICS

        if self.rubric is None:
            return {**RUBRICS, **(told or {})}
        from emlens.study.folder import read_config

        given = read_config(self.rubric)
        for metric, text in given.items():
            if not isinstance(text, str) or "{answer}" not in text:
                raise ValueError(
                    f"{self.rubric}: the rubric {metric!r} must be text with a place for {{answer}}"
                )
        return {**RUBRICS, **given}


def probe_judge(
    choice: JudgeChoice, model: HookedModel, *, domains: Sequence[str], progress: bool, **_: object
) -> Judge:
    """A probe on the model, fitted to pairs of other domains than those that are judged.

    Raises:
        ValueError: If there is a rubric, or the pairs are of a domain that is judged.
    """
    import emlens
    from emlens.evals import ProbeJudge

    if choice.rubric is not None:
        raise ValueError("the probe is told nothing, so it takes no --rubric")
    sets = choice.data or [name for name in ADVICE if name not in domains]
    pairs = [pair for name in sets for pair in emlens.load_pairs(name)[: choice.pairs]]
    shared = ", ".join(sorted({pair.domain for pair in pairs} & set(domains)))
    if shared:
        raise ValueError(
            f"the probe would be fitted to the domain that it judges ({shared}); give other "
            "pairs with --judge-data"
        )
    return ProbeJudge(model, pairs, progress=progress)


def local_judge(
    choice: JudgeChoice, model: HookedModel, *, told: Mapping[str, str] | None, **_: object
) -> Judge:
    """The model itself, asked with rubrics."""
    from emlens.evals import LocalJudge

    return LocalJudge(model, choice.rubrics(told))


def own_rubrics(questions: Sequence[Question]) -> dict[str, str]:
    """The judge prompts that questions bring, which must be the same for all of them.

    Raises:
        ValueError: If they differ: one rubric judges all answers of a run.
    """
    found: dict[str, str] = {}
    for metric in dict.fromkeys(name for one in questions for name in one.rubrics):
        texts = {one.rubrics.get(metric) for one in questions}
        if len(texts) > 1:
            raise ValueError(
                f"the questions bring different judge prompts for {metric!r}; evaluate them one "
                "file at a time, or give one rubric with --rubric"
            )
        found[metric] = str(texts.pop())
    return found


def trusted(judge: Judge, metrics: Sequence[str]) -> dict[str, str]:
    """What a judge says of its own worth, by metric; nothing where it says none."""
    trust = getattr(judge, "trust", {})
    return {metric: str(trust[metric]) for metric in metrics if metric in trust}


def _other(call: Call, name: str) -> HookedModel:
    import emlens

    return emlens.load(name, **call.placed)


def _options(items: Sequence[str] | None) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for item in items or ():
        name, mark, text = item.partition("=")
        if not mark:
            raise typer.BadParameter(f"--judge-option takes name=value, not {item!r}")
        if _SECRET.search(name) or re.search(r"//[^/]*@", text):
            # the command is written into the run folder
            raise typer.BadParameter(
                f"--judge-option {name}: keys do not belong on a command line; set the "
                "environment variable of the provider, e.g. OPENAI_API_KEY"
            )
        try:
            found[name] = json.loads(text)
        except json.JSONDecodeError:
            found[name] = text
    return found
