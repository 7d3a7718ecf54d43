"""Several processes: each reads its share of the batches, and all hold the same result.

`torchrun` and `accelerate launch` start them. In a plain process everything here is the identity.
"""

from __future__ import annotations

import atexit
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from textwrap import shorten
from typing import Any, NoReturn, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

TIMEOUT = timedelta(hours=2)
"""How long one process waits for the others before it gives up."""

# What torchrun and accelerate launch tell a process about the others.
_LAUNCH = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Kinds of error that keep their kind on the way to another process.
_KINDS = (ValueError, TypeError)

_is_alone: ContextVar[bool] = ContextVar("is_alone", default=False)
_groups: dict[str, Any] = {}


class Batch(Protocol):
    """What a share is made of: rows of tokens, padded to one length."""

    @property
    def input_ids(self) -> Tensor: ...
    @property
    def index(self) -> tuple[int, ...]: ...


class Model(Protocol):
    """What reads the batches."""

    name: str

    @property
    def module(self) -> nn.Module: ...
    @property
    def active_adapter(self) -> str | None: ...


T = TypeVar("T")
B = TypeVar("B", bound=Batch)


@dataclass(frozen=True, slots=True)
class _Failure:
    """An error that is sent to the other processes."""

    kind: type[Exception]
    message: str

    @classmethod
    def of(cls, error: Exception) -> _Failure:
        for kind in _KINDS:
            if isinstance(error, kind):
                return cls(kind, str(error))
        plain = type(error) is RuntimeError
        return cls(RuntimeError, str(error) if plain else f"{type(error).__name__}: {error}")


# -- who is there -----------------------------------------------------------------------------


def world() -> tuple[int, int]:
    """The rank of this process, and how many processes share the work: `(0, 1)` for a plain one.

    The first call in a process launched with others joins them.
    """
    if _is_alone.get() or not _joined():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def leads() -> bool:
    """Whether this process is the one that shows progress; does not join the others."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return not _launched() or int(os.environ["RANK"]) == 0


@contextmanager
def alone() -> Iterator[None]:
    """Do not share work inside the block: this process does all of it and waits for no other."""
    token = _is_alone.set(True)
    try:
        yield
    finally:
        _is_alone.reset(token)


# -- what they do together --------------------------------------------------------------------


def shared(
    model: Model, batches: Sequence[B], read: Callable[[Sequence[B]], T], what: str
) -> list[T]:
    """Run `read` on this process's share of the batches; return what every process got.

    If the weights of the model are spread over the processes, all of them run every batch together,
    and each returns its own results.

    Args:
        model: The model that `read` runs.
        batches: All the batches, the same in every process.
        read: Takes batches, possibly none; its result is pickled and must be on the CPU.
        what: What is read, for errors.

    Returns:
        What `read` returned, in the order of ranks; a single item in a plain process.

    Raises:
        ValueError: If the processes do not read the same.
        Exception: An error of `read` in any process is raised in all, with its rank.
    """
    rank, size = world()
    if size == 1 or _is_spread(model.module):
        return [read(batches)]
    _check_same(model, batches, what)
    cause: Exception | None = None
    try:
        got: T | _Failure = read(share(batches))
    except Exception as error:
        cause, got = error, _Failure.of(error)
    results: list[T] = []
    for place, part in enumerate(gathered(got)):
        if isinstance(part, _Failure):
            _raise(part, place, cause if place == rank else None)
        results.append(part)
    return results


def share(batches: Sequence[B]) -> list[B]:
    """The batches of this process, in their order: disjoint shares, even in padded tokens."""
    rank, size = world()
    costs = [batch.input_ids.numel() for batch in batches]
    loads = [0] * size
    mine = []
    for place in sorted(range(len(batches)), key=lambda place: -costs[place]):
        taker = loads.index(min(loads))
        loads[taker] += costs[place]
        if taker == rank:
            mine.append(place)
    return [batches[place] for place in sorted(mine)]


def gathered(value: T) -> list[T]:
    """The values of all processes, in the order of ranks; they are pickled and must be on the CPU.

    Raises:
        RuntimeError: If another process has ended, or does not come within `TIMEOUT`.
    """
    rank, size = world()
    if size == 1:
        return [value]
    values: list[Any] = [None] * size
    try:
        dist.all_gather_object(values, value, group=_group())
    except RuntimeError as error:
        raise RuntimeError(
            f"rank {rank} timed out waiting for the other processes: one of them has ended, or did "
            "not make this call; its own error says more"
        ) from error
    return values


def _raise(failure: _Failure, rank: int, cause: Exception | None) -> NoReturn:
    raise failure.kind(f"rank {rank}: {failure.message}") from cause


def _check_same(model: Model, batches: Sequence[Batch], what: str) -> None:
    """Refuse processes that read different things, whose sums would be meaningless."""
    tokens = hashlib.sha256()
    for batch in batches:
        tokens.update(f"{tuple(batch.input_ids.shape)} {batch.index}".encode())
        tokens.update(batch.input_ids.cpu().contiguous().numpy().tobytes())
    # one number of each weight: a folder's name may be that of several models
    firsts = [w.detach()[(0,) * w.ndim] for w in model.module.parameters() if w.numel()]
    numbers = [float(first) for first in firsts if not first.is_meta]
    weights = hashlib.sha256(repr(numbers).encode())
    size = sum(batch.input_ids.numel() for batch in batches)
    mine = (
        f"{shorten(what, 120)} with {model.name}, adapter {model.active_adapter}, "
        f"weights {weights.hexdigest()[:8]}, on {len(batches)} batches of {size} padded tokens "
        f"{tokens.hexdigest()[:8]}"
    )
    found = gathered((what, mine))
    if len(set(found)) > 1:
        listed = "; ".join(f"rank {rank}: {shown}" for rank, (_, shown) in enumerate(found))
        raise ValueError(
            f"the processes do not read the same ({listed}). Each takes its own share, so give "
            "all of them the same model and all of the data; where they have work of their own, "
            "start them with python, not with torchrun or accelerate launch"
        )


def _is_spread(module: nn.Module) -> bool:
    """Whether the weights lie in pieces in several processes (tensor parallel, FSDP)."""
    from torch.distributed.tensor import DTensor

    if (getattr(module, "_tp_size", None) or 1) > 1:
        return True
    return any(isinstance(weight, DTensor) for weight in module.parameters())


# -- joining ----------------------------------------------------------------------------------


def _launched() -> bool:
    return all(name in os.environ for name in _LAUNCH) and int(os.environ["WORLD_SIZE"]) > 1


def _joined() -> bool:
    if not dist.is_available():
        return False
    if not dist.is_initialized() and _launched():
        _join()
    return dist.is_initialized()


def _join() -> None:
    backend = "gloo"
    if torch.cuda.is_available() and dist.is_nccl_available():
        # emlens itself needs gloo alone; what else the script trains wants nccl
        backend = "cpu:gloo,cuda:nccl"
        local = int(os.environ.get("LOCAL_RANK", 0))
        if local < torch.cuda.device_count():
            torch.cuda.set_device(local)
    dist.init_process_group(backend, timeout=TIMEOUT)
    atexit.register(_leave)


def _group() -> Any:
    """An own process group for objects, on the CPU whatever the default backend."""
    if _groups.get("default") is not dist.group.WORLD:
        if not _groups:
            atexit.register(_leave_ours)
        _groups["ours"] = dist.new_group(backend="gloo", timeout=TIMEOUT)
        _groups["default"] = dist.group.WORLD
    return _groups["ours"]


# A gloo group that is still referred to when the interpreter ends may abort the process.


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _leave_ours() -> None:
    ours, default = _groups.get("ours"), _groups.get("default")
    _groups.clear()
    if ours is not None and dist.is_initialized() and default is dist.group.WORLD:
        dist.destroy_process_group(ours)
