"""Inspect, where it is installed."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from torch import Tensor

from emlens.hooked.identity import digest_of
from emlens.text.thinking import CLOSE, OPEN

if TYPE_CHECKING:
    from inspect_ai.model import ChatMessage, Model

    from emlens.evals.responses import Response

T = TypeVar("T")

EXTRA = "needs Inspect, which is not installed; run: pip install 'emlens[evals]'"

_STRICT = ("anyio.abc", "anyio.streams.file", "anyio.streams.tls")
"""Modules that refuse to be imported while every object has an attribute more than usual."""

_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None


def need_inspect(what: str) -> None:
    """Say what to install where Inspect is missing.

    Raises:
        ImportError: If it is; the extra is named.
    """
    with _without_save():
        try:
            import inspect_ai  # noqa: F401
        except ImportError as error:
            raise ImportError(f"{what} {EXTRA}") from error
        for name in _STRICT:
            import_module(name)


@contextmanager
def _without_save() -> Iterator[None]:
    """Take off the `save` that nnsight puts on every object, for the time of an import."""
    nnsight: Any = sys.modules.get("nnsight")
    if nnsight is None or not hasattr(object, "save"):
        yield
        return
    mounting = import_module("nnsight._c")
    mounting.unmount("save")
    try:
        yield
    finally:
        mounting.mount(nnsight.save, "save")


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end, also where an event loop is running already (Jupyter).

    All coroutines share one loop in a thread of its own, for clients keep their connections with
    the loop they were first used in.
    """
    global _loop
    with _lock:
        if _loop is None:
            _loop = asyncio.new_event_loop()
            threading.Thread(target=_loop.run_forever, daemon=True).start()
    future = asyncio.run_coroutine_threadsafe(coroutine, _loop)
    try:
        return future.result()
    finally:
        # an interrupted call asks for nothing more
        future.cancel()


class InspectModel:
    """A model that Inspect reaches, made at first use in the loop that its clients live in.

    Args:
        model: Name of a model as Inspect has it, or a model of Inspect.
        config: Settings of Inspect's `GenerateConfig`.
        model_args: Arguments of Inspect's `get_model`, keys among them.
        at_once: Requests under way at the same time.

    Raises:
        ValueError: If `at_once` is not positive.
    """

    def __init__(
        self,
        model: str | Model,
        config: Mapping[str, Any] | None,
        model_args: Mapping[str, Any] | None,
        at_once: int,
    ) -> None:
        if at_once < 1:
            raise ValueError(f"at_once must be at least 1 request, not {at_once}")
        self.name, self.at_once = str(model), at_once
        self._given, self._config, self._options = model, dict(config or {}), dict(model_args or {})
        self._model: Model | None = None

    @property
    def identity(self) -> str:
        """What is asked, by name, address and settings, payloads in full; keys are left out.

        An address may come from the environment, as `OPENAI_BASE_URL`, and a model of Inspect has
        its own address and settings.
        """
        config, options = self._config, self._options
        if not isinstance(self._given, str):
            config = self._given.config.model_dump(exclude_none=True)
            options = {"base_url": self._given.api.base_url, **self._given.model_args}
        plain = {k: _content(v) for k, v in options.items() if "key" not in k and v is not None}
        asked = [self.name, plain, {k: _content(v) for k, v in config.items()}]
        address = {} if "base_url" in plain else _addresses(self.name)
        return digest_of([*asked, address] if address else asked)

    async def each(
        self, rows: Iterable[Response], ask: Callable[[Model, Response], Awaitable[T]], kept: str
    ) -> list[T]:
        """What is asked for each response, in their order; the first failure ends the rest.

        Args:
            rows: The responses.
            ask: Asks the model about one.
            kept: What the error says of work that is done.

        Raises:
            ConnectionError: If a reply cannot be had, after Inspect's retries.
        """
        from inspect_ai.model import GenerateConfig, get_model

        if self._model is None:
            if isinstance(self._given, str):
                config = GenerateConfig(**self._config)
                self._model = get_model(self._given, config=config, **self._options)
            else:
                self._model = self._given
        model, free = self._model, asyncio.Semaphore(self.at_once)

        async def one(row: Response) -> T:
            async with free:
                try:
                    return await ask(model, row)
                except ImportError:
                    raise
                except Exception as error:
                    raise ConnectionError(self._failure(row, error, kept)) from None

        tasks = [asyncio.ensure_future(one(row)) for row in rows]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()

    def _failure(self, row: Response, error: Exception, kept: str) -> str:
        # Inspect's retries wrap what went wrong the last time
        last = getattr(error, "last_attempt", None)
        cause = last.exception() if last is not None and last.failed else None
        error = cause if isinstance(cause, Exception) else error
        said = f"{type(error).__name__}: {error}"
        for secret in _secrets(self._options):
            said = said.replace(secret, "***")
        about = f"{row.question} ({row.condition})"
        return (
            f"inspect/{self.name} gave no reply for {about}: {said[:300]}; "
            f"{kept} is kept in the store, run the same call again to resume"
        )


def _content(value: Any) -> Any:
    """What `digest_of` tells apart: text cuts long tensors short."""
    if isinstance(value, Mapping):
        return {str(name): _content(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_content(one) for one in value]
    if isinstance(value, (Tensor, np.ndarray)):
        return value
    if hasattr(value, "model_dump"):
        return _content(value.model_dump())
    return str(value)


def _addresses(name: str) -> dict[str, str]:
    """Addresses that the environment gives the provider of a model, by variable."""
    parts = [part.upper().replace("-", "_") for part in name.split("/")[:-1]]
    asked = [f"{part}_BASE_URL" for part in (*parts, "INSPECT_EVAL_MODEL")]
    return {one: os.environ[one] for one in asked if os.environ.get(one)}


def _secrets(options: Mapping[str, Any]) -> list[str]:
    """Keys that a provider's error may repeat."""
    named = ("KEY", "TOKEN", "SECRET")
    found = [value for name, value in os.environ.items() if name.upper().endswith(named)]
    given = [options.get("api_key")]
    return [value for value in (*found, *given) if isinstance(value, str) and len(value) >= 6]


def said(message: ChatMessage) -> str:
    """What a message says, its reasoning as `<think>...</think>` before it.

    Raises:
        ValueError: If it holds more than text and reasoning.
    """
    parts = [] if isinstance(message.content, str) else message.content
    more = sorted({part.type for part in parts} - {"text", "reasoning"})
    if more:
        raise ValueError(
            f"a message of the role {message.role} holds {', '.join(more)}; emlens models read and "
            "write text alone"
        )
    thoughts = [part.reasoning.strip() for part in parts if part.type == "reasoning"]
    thought = "\n".join(filter(None, thoughts))
    return f"{OPEN}\n{thought}\n{CLOSE}\n\n{message.text}" if thought else message.text
