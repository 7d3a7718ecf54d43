"""The judges by the names that `evaluate` and `judge` take."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from emlens._arguments import Limits, whole
from emlens._registry import JUDGES
from emlens.cli.common import Call
from emlens.cli.values import settings_from

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
JudgeOption = Annotated[
    list[str] | None,
    typer.Option(
        help="rubric=FILE (YAML, by metric); of the probe, data=SET,SET and pairs=64 of each; else "
        "of Inspect's get_model, e.g. base_url=http://localhost:8000/v1 (repeatable).",
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


Ready = Callable[["HookedModel | None"], "Judge"]
"""A judge of which all is checked; it is given the base model if it reads with that."""


@dataclass(frozen=True, slots=True)
class JudgeChoice:
    """A requested judge: `--judge`, and `--judge-option` by name."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def ready(
        self, call: Call, domains: Sequence[str], told: Mapping[str, str] | None = None
    ) -> Ready:
        """Check all that can be checked without a model of emlens.

        Args:
            call: The call.
            domains: Domains that are judged.
            told: Rubrics in the questions, by metric; a `rubric` option takes precedence.

        Raises:
            ValueError: If there is no such judge, or something does not go with it.
        """
        kind, _, other = self.name.partition(":")
        if "/" in self.name and kind != "local":
            made = self._of_inspect(told)
            return lambda _: made
        if kind not in JUDGES or (kind == "probe" and other):
            raise ValueError(
                f"unknown judge {self.name!r}; choose {', '.join(JUDGES)}, local:MODEL, or a model "
                "of Inspect by provider and name, e.g. openai/gpt-4o"
            )
        make = JUDGES[kind](self, domains=domains, told=told, progress=call.progress)
        return make if not other else lambda _: make(_other(call, other))

    def needs_model(self) -> bool:
        """Whether it reads with the base model."""
        return self.name in JUDGES

    def only(self, *known: str) -> Mapping[str, Any]:
        """The options, of which there are no others.

        Raises:
            ValueError: If there are.
        """
        strange = sorted(set(self.options) - set(known))
        if strange:
            raise ValueError(
                f"the judge {self.name!r} takes no --judge-option {strange[0]}; it takes "
                f"{' and '.join(known)}"
            )
        return self.options

    def rubrics(self, told: Mapping[str, str] | None) -> dict[str, str]:
        """Rubrics by metric."""
        from emlens.evals.rubrics import RUBRICS

        if "rubric" not in self.options:
            return {**RUBRICS, **(told or {})}
        from emlens.study.folder import read_config

        path = self.options["rubric"]
        given = read_config(Path(str(path)))
        for metric, text in given.items():
            if not isinstance(text, str) or "{answer}" not in text:
                raise ValueError(
                    f"{path}: the rubric {metric!r} must be text with a place for {{answer}}"
                )
        return {**RUBRICS, **given}

    def _of_inspect(self, told: Mapping[str, str] | None) -> Judge:
        from emlens.evals import LogProbJudge

        options = {name: value for name, value in self.options.items() if name != "rubric"}
        config = options.pop("config", None)
        made = LogProbJudge(self.name, self.rubrics(told), config=config, model_args=options)
        made.check()
        return made


def probe_judge(
    choice: JudgeChoice, *, domains: Sequence[str], progress: bool, **_: object
) -> Ready:
    """A probe on the model, fitted to pairs of domains that are not judged.

    Raises:
        ValueError: If the pairs are of a domain that is judged.
    """
    import emlens
    from emlens.evals import ProbeJudge

    options = choice.only("data", "pairs")
    named = options.get("data") or [name for name in ADVICE if name not in domains]
    sets = named.split(",") if isinstance(named, str) else named
    most = whole("pairs", options.get("pairs", 64), Limits(least=5))
    pairs = [pair for name in sets for pair in emlens.load_pairs(name)[:most]]
    shared = ", ".join(sorted({pair.domain for pair in pairs} & set(domains)))
    if shared:
        raise ValueError(
            f"the probe would be fitted to the domain that it judges ({shared}); give other "
            "pairs with --judge-option data=SET"
        )
    return lambda model: ProbeJudge(cast("HookedModel", model), pairs, progress=progress)


def local_judge(choice: JudgeChoice, *, told: Mapping[str, str] | None, **_: object) -> Ready:
    """The model itself, asked with rubrics."""
    from emlens.evals import LocalJudge

    choice.only("rubric")
    rubrics = choice.rubrics(told)
    return lambda model: LocalJudge(cast("HookedModel", model), rubrics)


def own_rubrics(questions: Sequence[Question]) -> dict[str, str]:
    """The judge prompts in the questions, which must be the same for all of them.

    Raises:
        ValueError: If they differ: one rubric judges all answers of a run.
    """
    found: dict[str, str] = {}
    for metric in dict.fromkeys(name for one in questions for name in one.rubrics):
        texts = {one.rubrics.get(metric) for one in questions}
        if len(texts) > 1:
            raise ValueError(
                f"the questions bring different judge prompts for {metric!r}; evaluate them one "
                "file at a time, or give one with --judge-option rubric=FILE"
            )
        found[metric] = str(texts.pop())
    return found


def trusted(judge: Judge, metrics: Sequence[str]) -> dict[str, str]:
    """What a judge reports about its own reliability, by metric."""
    trust = getattr(judge, "trust", {})
    return {metric: str(trust[metric]) for metric in metrics if metric in trust}


def _other(call: Call, name: str) -> HookedModel:
    import emlens

    return emlens.load(name, **call.placed)


def judge_choice(name: str, items: Sequence[str] | None) -> JudgeChoice:
    """A judge from `--judge` and `--judge-option`."""
    for item in items or ():
        if _SECRET.search(item.partition("=")[0]) or re.search(r"//[^/]*@", item):
            # the command is written into the run folder
            raise typer.BadParameter(
                f"--judge-option {item.partition('=')[0]}: keys do not belong on a command line; "
                "set the environment variable of the provider, e.g. OPENAI_API_KEY"
            )
    return JudgeChoice(name, settings_from(items, "--judge-option"))
