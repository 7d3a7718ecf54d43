"""A hooked model as a model of Inspect: `emlens/<config.yaml>`, or `emlens/<name>`."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import anyio
from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessage,
    ChatMessageAssistant,
    ChatMessageTool,
    Content,
    ContentReasoning,
    ContentText,
    GenerateConfig,
    ModelAPI,
    ModelOutput,
    ModelUsage,
)
from inspect_ai.tool import ToolChoice, ToolInfo

from emlens.evals._inspect import said
from emlens.evals.inspect.batcher import Batcher
from emlens.evals.inspect.config import ModelConfig
from emlens.hooked import Condition, HookedModel
from emlens.hooked.condition import ConditionLike, condition_of
from emlens.hooked.generation import Answer, Sampling, answer
from emlens.text import Conversation
from emlens.text.conversation import Message
from emlens.text.thinking import parted

LONGEST = 600
"""Tokens of an answer where the task does not say (the papers' number)."""
EPOCH: ContextVar[int | None] = ContextVar("emlens_epoch", default=None)
"""Which of the answers to a question is asked for, where the task says so."""
MOST = 32
"""Requests that are answered together, unless `max_connections` says otherwise."""

_NEUTRAL = {"frequency_penalty": 0, "presence_penalty": 0, "num_choices": 1}
_UNKNOWN = ("top_k", "logit_bias", *_NEUTRAL)
# Hooks and the acting adapter are the model's, which several providers may share, each in a
# thread of its own.
_generating = threading.Lock()
_waiting = 0.01


@dataclass(frozen=True)
class _Request:
    conversation: Conversation
    max_tokens: int
    temperature: float
    top_p: float
    seed: int

    @property
    def kind(self) -> tuple:
        return self.max_tokens, self.temperature, self.top_p


class EmlensAPI(ModelAPI):
    """Answers with a steered, ablated or adapted model; concurrent requests share a batch.

    Without a condition the model answers as it was brought; `Condition()` is its base.

    An answer that the messages end with is gone on with; what comes back is what follows it. What
    a model thinks comes back as reasoning, and reasoning that is handed in stands before its
    answer as `<think>...</think>`.

    The same messages asked again, as in another epoch, draw from other random numbers: each
    answer's seed is made of Inspect's `seed` (0 by default), the messages, and the epoch; tasks
    that are not emlens' do not tell it, and how often the messages were asked before takes its
    place. An answer therefore depends neither on what it was batched with nor on the
    order in which samples came.

    Raises:
        FileNotFoundError, ValueError: As `ModelConfig.read` and `ModelConfig.load`.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig | None = None,
        *,
        model: HookedModel | None = None,
        condition: ConditionLike = None,
        **model_args: Any,
    ) -> None:
        config = config or GenerateConfig()
        super().__init__(model_name, base_url, api_key, [], config)
        if model_args:
            raise ValueError(
                f"emlens models take no {', '.join(model_args)}; write it into the YAML file"
            )
        self.batch_tokens = 4096
        if model is None:
            settings = ModelConfig.read(model_name)
            model, condition = settings.load()
            self.batch_tokens = settings.batch_tokens
        self.model, self.condition = model, _condition(model, condition)
        self._asked: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._batcher: Batcher[_Request, Answer] = Batcher(
            self._answer, lambda request: request.kind, config.max_connections or MOST
        )

    @property
    def batches(self) -> Sequence[int]:
        """Answers in each batch so far."""
        return tuple(self._batcher.batches)

    async def generate(
        self,
        input: list[ChatMessage],
        tools: list[ToolInfo],
        tool_choice: ToolChoice,
        config: GenerateConfig,
    ) -> ModelOutput:
        """Answer one conversation, together with those that are asked at the same time.

        Raises:
            ValueError: If tools are asked for, a setting that emlens does not have, or a message
                holds more than text.
        """
        if tools:
            raise ValueError("emlens models call no tools; use a task without tools")
        asked = [n for n in _UNKNOWN if getattr(config, n) not in (None, _NEUTRAL.get(n))]
        if asked:
            raise ValueError(f"emlens models have no {', '.join(asked)}; leave it out")
        start = time.monotonic()
        request = self._request(input, config)
        future = self._batcher.ask(request)
        try:
            while not future.done():
                await anyio.sleep(_waiting)
        finally:
            future.cancel()
        return self._output(future.result(), config.stop_seqs or [], time.monotonic() - start)

    def max_tokens(self) -> int | None:
        """The longest answer by default."""
        return LONGEST

    def max_connections(self) -> int:
        """Requests that Inspect sends at once: a batch."""
        return MOST

    def collapse_user_messages(self) -> bool:
        """Chat templates want the roles to alternate."""
        return True

    async def aclose(self) -> None:
        """End the thread that generates."""
        await anyio.to_thread.run_sync(self._batcher.close)

    # -- pieces -------------------------------------------------------------------------------

    def _request(self, messages: Sequence[ChatMessage], config: GenerateConfig) -> _Request:
        chat = tuple(map(_message, messages))
        text = json.dumps([config.seed or 0, chat], sort_keys=True)
        which = EPOCH.get()
        if which is None:
            with self._lock:
                which = self._asked[text]
                self._asked[text] += 1
        digest = hashlib.sha256(f"{text}{which}".encode()).hexdigest()
        return _Request(
            Conversation(chat),
            config.max_tokens or LONGEST,
            1.0 if config.temperature is None else config.temperature,
            1.0 if config.top_p is None else config.top_p,
            int(digest[:15], 16),
        )

    def _answer(self, requests: Sequence[_Request]) -> list[Answer]:
        first = requests[0]
        seeds = [request.seed for request in requests]
        sampling = Sampling(first.max_tokens, first.temperature, first.top_p, seeds)
        chats = [request.conversation for request in requests]
        with _generating, self.model.under(self.condition):
            return answer(self.model, chats, (), sampling, self.batch_tokens, True)

    def _output(self, found: Answer, stops: Sequence[str], seconds: float) -> ModelOutput:
        text, stopped = _cut(found.text, stops)
        usage = ModelUsage(
            input_tokens=found.prompt_tokens,
            output_tokens=found.tokens,
            total_tokens=found.prompt_tokens + found.tokens,
        )
        choice = ChatCompletionChoice(
            message=ChatMessageAssistant(
                content=_content(text), model=self.model_name, source="generate"
            ),
            stop_reason="stop" if stopped or found.ended else "max_tokens",
        )
        return ModelOutput(model=self.model_name, choices=[choice], usage=usage, time=seconds)


def _message(one: ChatMessage) -> Message:
    found = Message(role=one.role, content=said(one))
    if isinstance(one, ChatMessageAssistant) and one.tool_calls:
        calls = [(call.id, call.function, call.arguments) for call in one.tool_calls]
        found["tool_calls"] = [
            {"id": key, "type": "function", "function": {"name": name, "arguments": given}}
            for key, name, given in calls
        ]
    if isinstance(one, ChatMessageTool) and one.tool_call_id:
        found["tool_call_id"] = one.tool_call_id
    return found


def _content(text: str) -> str | list[Content]:
    """An answer as Inspect has it: what it thinks is reasoning."""
    thought, rest = parted(text)
    if not thought:
        return rest
    return [ContentReasoning(reasoning=thought), ContentText(text=rest)]


def _condition(model: HookedModel, given: ConditionLike) -> Condition:
    """What the answers are given under: the model as it was brought, where nothing is said."""
    return Condition(model.adapters_in_force) if given is None else condition_of(model, given)


def _cut(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """Up to the first of the stop strings."""
    places = [place for stop in stops if stop and (place := text.find(stop)) >= 0]
    return (text[: min(places)], True) if places else (text, False)
