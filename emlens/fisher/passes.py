"""The pass over a corpus for a Fisher profile: settings, checkpoints, shares of processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import reduce
from pathlib import Path

from emlens._distributed import shared, world
from emlens._progress import bar
from emlens._runs import START_ANEW, check_same
from emlens._tensors import read_tensors, write_tensors
from emlens._types import checked_fields
from emlens.fisher.gradients import Stream, Window, batch_gradients, windows
from emlens.fisher.sums import FisherSums
from emlens.hooked import HookedModel
from emlens.hooked.identity import identities
from emlens.text import Corpus

KIND = "influence profile in the making"


@dataclass(frozen=True)
class PassSettings:
    """What profiles must have in common to be merged.

    Attributes:
        model: Name of the model.
        revision: Its revision, where known.
        adapter: Names of the adapters in force, or None.
        edits: The edits in force, in words.
        dtype: Of the weights.
        d_model: Width of the residual stream.
        layers: Layers that were read.
        draws: Draws of all targets per document.
        max_tokens: Tokens that documents were cut to.
        seed: Seed of the draws.
        identity: `model.identity`; None in profiles of earlier versions.
        condition: `Condition.identity` of what was in force; None in profiles of earlier versions.
    """

    model: str
    revision: str | None
    adapter: str | None
    edits: tuple[str, ...]
    dtype: str
    d_model: int
    layers: tuple[int, ...]
    draws: int
    max_tokens: int
    seed: int
    identity: str | None = None
    condition: str | None = None

    @classmethod
    def of(
        cls,
        model: HookedModel,
        layers: tuple[int, ...],
        draws: int,
        max_tokens: int,
        seed: int,
    ) -> PassSettings:
        """Those of a model and of what is in force."""
        return cls(
            model=model.name,
            revision=model.revision,
            adapter=model.active_adapter,
            edits=tuple(repr(edit) for edit in model.edits_in_force(())),
            dtype=str(model.dtype),
            d_model=model.d_model,
            layers=layers,
            draws=draws,
            max_tokens=max_tokens,
            seed=seed,
            **identities(model),
        )

    @classmethod
    def from_dict(cls, record: Mapping) -> PassSettings:
        """Read what `dataclasses.asdict` gave.

        Raises:
            ValueError: If a setting is missing, or of another type; it is named.
        """
        if not isinstance(record, Mapping):
            raise ValueError(f"settings is {record!r:.60}, not an object")
        known = {item.name for item in fields(cls)}
        return cls(**checked_fields(cls, {k: v for k, v in record.items() if k in known}))


def gather(
    model: HookedModel,
    corpus: Corpus,
    settings: PassSettings,
    *,
    token_budget: int,
    checkpoint: Path | None,
    every: int,
    progress: bool,
) -> tuple[FisherSums, int]:
    """Read a corpus; return its sums, and how many documents were too short.

    Raises:
        ValueError: If a gradient is not finite, or the checkpoint belongs to another run.
    """
    rank, size = world()
    run = {
        **asdict(settings),
        "corpus": corpus.hash,
        "token_budget": token_budget,
        "process": [rank, size],
    }
    if checkpoint is not None and size > 1:
        checkpoint = checkpoint.with_name(f"{checkpoint.name}.{rank}-of-{size}")

    def read(shares: Sequence[Window]) -> tuple[FisherSums, int]:
        sums, done = _restored(checkpoint, run, settings)
        stream = Stream(model, corpus, settings.max_tokens, token_budget)
        total = sum(len(window.index) for window in shares)
        number = 0
        with bar(total=total, desc="Fisher profile", unit="doc", shown=progress) as shown:
            for number, (batch, places) in enumerate(stream.batches(shares), start=1):
                shown.update(len(batch))
                if number <= done:
                    continue
                sums.add(
                    *batch_gradients(
                        model,
                        batch,
                        settings.layers,
                        draws=settings.draws,
                        seed=settings.seed,
                        halves=[place % 2 for place in places],
                        threshold=sums.tokens.threshold,
                    )
                )
                if checkpoint is not None and number % every == 0:
                    _keep(checkpoint, run, sums, number)
        if checkpoint is not None and number > done and number % every:
            _keep(checkpoint, run, sums, number)
        return sums, stream.skipped

    parts = shared(model, windows(corpus), read, f"Fisher profile of {corpus.name}")
    return reduce(FisherSums.merged, (sums for sums, _ in parts)), sum(n for _, n in parts)


def _keep(path: Path, run: Mapping, sums: FisherSums, done: int) -> None:
    write_tensors(path, KIND, sums.tensors(), {"run": dict(run), "done": done})


def _restored(path: Path | None, run: Mapping, settings: PassSettings) -> tuple[FisherSums, int]:
    """The state of a checkpoint and the batches it has seen; nothing where there is none yet."""
    n_layers = len(settings.layers)
    if path is None or not path.exists():
        return FisherSums.empty(n_layers, settings.d_model), 0
    tensors, record = read_tensors(path, KIND)
    check_same(record.get("run", {}), run, f"the checkpoint {path}", START_ANEW)
    try:
        sums = FisherSums.from_tensors(tensors)
        done = int(record["done"])
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path} does not hold a whole {KIND}: {error!r}") from error
    sums.check(str(path), n_layers, settings.draws, settings.d_model)
    return sums, done
