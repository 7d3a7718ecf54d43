"""Inspect, where it is installed."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, TypeVar

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
    return asyncio.run_coroutine_threadsafe(coroutine, _loop).result()
