"""Requests that come one by one, answered together: one batch, one forward pass per token."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Generic, TypeVar

Request = TypeVar("Request")
Reply = TypeVar("Reply")

GATHER = 0.05
"""Seconds without a new request after which a batch is closed."""


@dataclass(frozen=True)
class _Asked(Generic[Request, Reply]):
    request: Request
    future: Future[Reply]


class Batcher(Generic[Request, Reply]):
    """Gathers requests and answers those of a kind together, in a thread of its own.

    Args:
        answer: Answers a batch, in its order.
        kind: Requests with equal kinds may share a batch.
        most: Requests in a batch, at most.
    """

    def __init__(
        self,
        answer: Callable[[Sequence[Request]], Sequence[Reply]],
        kind: Callable[[Request], object],
        most: int,
    ) -> None:
        self._answer, self._kind, self._most = answer, kind, most
        self._waiting: queue.Queue[_Asked[Request, Reply] | None] = queue.Queue()
        self._thread: threading.Thread | None = None
        self.batches: list[int] = []

    def ask(self, request: Request) -> Future[Reply]:
        """The reply to come."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, daemon=True)
            self._thread.start()
        future: Future[Reply] = Future()
        self._waiting.put(_Asked(request, future))
        return future

    def close(self) -> None:
        """End the thread after what is waiting."""
        if self._thread is not None:
            self._waiting.put(None)
            self._thread.join()
            self._thread = None

    def _work(self) -> None:
        while (first := self._waiting.get()) is not None:
            gathered, last = self._gather(first)
            by_kind: dict[object, list[_Asked[Request, Reply]]] = {}
            for one in gathered:
                by_kind.setdefault(self._kind(one.request), []).append(one)
            for group in by_kind.values():
                self._reply(group)
            if last:
                return

    def _gather(self, first: _Asked[Request, Reply]) -> tuple[list[_Asked[Request, Reply]], bool]:
        gathered = [first]
        while len(gathered) < self._most:
            try:
                one = self._waiting.get(timeout=GATHER)
            except queue.Empty:
                break
            if one is None:
                return gathered, True
            gathered.append(one)
        return gathered, False

    def _reply(self, group: Sequence[_Asked[Request, Reply]]) -> None:
        # a request that was given up meanwhile is not answered
        group = [one for one in group if one.future.set_running_or_notify_cancel()]
        if not group:
            return
        self.batches.append(len(group))
        try:
            replies = self._answer([one.request for one in group])
        except BaseException as error:
            for one in group:
                one.future.set_exception(error)
            return
        for one, reply in zip(group, replies, strict=True):
            one.future.set_result(reply)
