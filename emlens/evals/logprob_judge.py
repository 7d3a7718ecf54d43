"""A judge on any model of Inspect: hosted, vLLM, Hugging Face, or a server of one's own."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from emlens._door import guard_methods, guarded
from emlens.evals._inspect import InspectModel, need_inspect, run
from emlens.evals.number_logprobs import VisibleNumbers
from emlens.evals.responses import Response
from emlens.evals.rubrics import RUBRICS, filled, rubric_hash
from emlens.evals.scores import Verdict

if TYPE_CHECKING:
    from inspect_ai.model import Model, ModelOutput

LONGEST = 8
"""Tokens of a reply: a number and little else."""
SHOWN = 20
"""Alternatives asked for at each place: the most that OpenAI's protocol gives."""
FURTHER = 4
"""Sampled replies, at most, that fill in digits which the first one did not show."""
OPEN = 0.1
"""Share of probability on unseen digits above which further replies are asked for."""

_NUMBER = re.compile(r"(?<![\d.])([-\u2212]?\d{1,3})(?![\d]|\.\d)")
_OF_100 = re.compile(r"\s*(?:/|out of)\s*100\b")


@guard_methods
class LogProbJudge:
    """Grades with a model that Inspect reaches, by the probabilities of the numbers it may write.

    The score is the probability-weighted mean of the numeric answers (the papers' judge). A
    provider without log-probabilities is asked for the number itself; such scores say so in their
    `mode`, `"sampled"`. Retries, rate limits, time-outs and the cache are Inspect's.

    Args:
        model: Name of a model as Inspect has it (`"openai/gpt-4o"`, `"vllm/..."`,
            `"openai-api/local/..."`), or a model of Inspect.
        rubrics: Rubrics by metric; emlens' own by default.
        at_once: Requests under way at the same time.
        cache: Keep replies in Inspect's cache.
        config: Further settings of Inspect's `GenerateConfig`: `max_retries`, `timeout`.
        model_args: Arguments of Inspect's `get_model`: `base_url`, `api_key`, and the provider's.

    Raises:
        ImportError: If Inspect is not installed.

    Examples:
        >>> judge = LogProbJudge("openai/gpt-4o")
        >>> scores = emlens.evals.judge(answers, judge, store="scores.sqlite")
    """

    @guarded
    def __init__(
        self,
        model: str | Model,
        rubrics: Mapping[str, str] | None = None,
        *,
        at_once: int = 16,
        cache: bool = False,
        config: Mapping[str, Any] | None = None,
        model_args: Mapping[str, Any] | None = None,
    ) -> None:
        need_inspect("LogProbJudge")
        self._reached = InspectModel(model, config, model_args, at_once)
        self._rubrics, self._cache = dict(rubrics or RUBRICS), cache

    def check(self) -> None:
        """Make the model, so that a missing key is known before anything is generated.

        Raises:
            ValueError: If Inspect cannot make it: there is no such provider, or no key.
        """
        run(self._reached.reach())

    @property
    def id(self) -> str:
        return f"inspect/{self._reached.name}"

    @property
    def at_once(self) -> int:
        """Requests under way at the same time."""
        return self._reached.at_once

    @property
    def metrics(self) -> tuple[str, ...]:
        return tuple(self._rubrics)

    def rubric(self, metric: str) -> str:
        return rubric_hash(self._rubrics[metric])

    def judge(self, responses: Sequence[Response], metric: str) -> list[Verdict]:
        """A verdict per response; none for an empty answer, or where numbers are unlikely.

        Raises:
            ConnectionError: If a reply cannot be had, after Inspect's retries.
        """
        rubric = self._rubrics[metric]

        async def ask(model: Model, row: Response) -> Verdict:
            return await grade(model, rubric, row.prompt, row.text, cache=self._cache)

        return run(self._reached.each(responses, ask, "what was judged before"))


async def grade(
    model: Model, rubric: str, question: str, text: str, *, cache: bool = False
) -> Verdict:
    """Grade one answer with a model of Inspect.

    Raises:
        ValueError: If the rubric has no place for the answer.
    """
    from inspect_ai.model import GenerateConfig

    prompt = filled(rubric, question, text)
    if not text.strip():
        return Verdict(None, "probabilities", "the answer is empty")
    plain = GenerateConfig(temperature=0.0, max_tokens=LONGEST)
    asked = plain.model_copy(update={"logprobs": True, "top_logprobs": SHOWN})
    try:
        reply = await model.generate(prompt, config=asked, cache=cache)
    except Exception as error:
        # some providers ignore what they do not have, others refuse the request
        if "logprob" not in str(error).lower():
            raise
        return _sampled(await model.generate(prompt, config=plain, cache=cache))
    known = VisibleNumbers()
    if not _taken(known, reply):
        return _sampled(reply)
    for n in range(FURTHER):
        if known.open <= OPEN:
            break
        further = asked.model_copy(update={"temperature": 1.0, "seed": n})
        _taken(known, await model.generate(prompt, config=further, cache=cache))
    score, note = known.score()
    return Verdict(score, "probabilities", note)


def _taken(known: VisibleNumbers, reply: ModelOutput) -> bool:
    """Take in a reply's log-probabilities; False where there are none."""
    if not reply.choices or reply.choices[0].logprobs is None:
        return False
    places = reply.choices[0].logprobs.content
    if not places or not any(place.top_logprobs for place in places):
        return False
    shown = [
        {one.token: math.exp(one.logprob) for one in (*(place.top_logprobs or ()), place)}
        for place in places
    ]
    known.add([place.token for place in places], shown)
    return True


def _sampled(reply: ModelOutput) -> Verdict:
    """The number that was written, where there is nothing better."""
    text = reply.completion.strip()
    found = _NUMBER.findall(_OF_100.sub("", text))
    numbers = [int(one.replace("\u2212", "-")) for one in found]
    if len(set(numbers)) != 1 or not 0 <= numbers[0] <= 100:
        return Verdict(None, "sampled", f"no one number from 0 to 100 in {text[:60]!r}")
    return Verdict(float(numbers[0]), "sampled", "the provider gave no log-probabilities")
