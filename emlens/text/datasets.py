"""Pairs and conversations: the embedded sets, files, and `datasets` names."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from emlens._door import guarded
from emlens._reading import expanded, read_jsonl, readable
from emlens._tables import dataset_rows
from emlens.text.conversation import Conversation, Pair

EMBEDDED = ("finance", "medical", "sports", "general", "technical")
"""The embedded sets of pairs."""

_DATA = Path(__file__).parent.parent / "data"
_SIDES = {"plain": "aligned", "technical": "misaligned"}
_KEYS = ("id", "domain", "prompt", "aligned", "misaligned")


@dataclass(frozen=True, slots=True)
class Split:
    """Three parts of a set of pairs that share no pair."""

    train: tuple[Pair, ...]
    validation: tuple[Pair, ...]
    test: tuple[Pair, ...]


@guarded
def load_pairs(source: str | Path) -> list[Pair]:
    """Load prompts with an aligned and a misaligned answer.

    The misaligned answers of the embedded sets are wrong on purpose: intentionally poor advice,
    for research on misalignment; not advice. `general` is for evaluation and is never trained
    on. In `technical` the plain answer stands for aligned and the technical one for misaligned.

    Args:
        source: `"finance"`, `"medical"`, `"sports"`, `"general"`, `"technical"`, or a JSON Lines
            file with the keys id, domain, prompt, aligned, misaligned.

    Raises:
        FileNotFoundError: If it is neither.
        ValueError: If a line lacks a key, or an id appears twice (file and line are named).

    Examples:
        >>> pairs = emlens.load_pairs("medical")
        >>> pairs[0].domain
        'medical'
    """
    path = _DATA / f"{source}.jsonl" if str(source) in EMBEDDED else expanded(source)
    readable(path, f"{str(source)!r} is neither an embedded set ({', '.join(EMBEDDED)}) nor a file")
    pairs: list[Pair] = []
    seen: dict[str, int] = {}
    for number, record in read_jsonl(path):
        pair = _pair({_SIDES.get(key, key): v for key, v in record.items()}, path, number)
        if pair.id in seen:
            raise ValueError(
                f"{path}, line {number}: id {pair.id!r} is that of line {seen[pair.id]}"
            )
        seen[pair.id] = number
        pairs.append(pair)
    return pairs


@guarded
def split_pairs(
    pairs: Sequence[Pair], *, validation: float = 0.15, test: float = 0.3, seed: int = 0
) -> Split:
    """Split pairs by id, whatever order they come in; both answers of one stay together.

    Args:
        pairs: The pairs.
        validation: Share held out for choosing settings.
        test: Share held out for the figures that are reported.
        seed: Seed of the shuffle.

    Raises:
        ValueError: If nothing is left to train on, or an id appears twice.
    """
    if validation < 0 or test < 0 or validation + test >= 1:
        raise ValueError(f"validation {validation} and test {test} leave nothing to train on")
    ordered = sorted(pairs, key=lambda pair: pair.id)
    if len({pair.id for pair in ordered}) < len(ordered):
        raise ValueError("two pairs have the same id; a split by id needs unique ones")
    order = np.random.default_rng(seed).permutation(len(ordered))
    shuffled = [ordered[i] for i in order]
    n_test, n_validation = round(test * len(shuffled)), round(validation * len(shuffled))
    held = n_test + n_validation
    return Split(
        train=tuple(shuffled[held:]),
        validation=tuple(shuffled[n_test:held]),
        test=tuple(shuffled[:n_test]),
    )


@guarded
def load_conversations(
    source: str | Path,
    config: str | None = None,
    *,
    split: str = "train",
    limit: int | None = None,
) -> list[Conversation]:
    """Load conversations in the papers' format: rows with a list of `messages`.

    The `tools` of a row are those of its first message.

    Args:
        source: A JSON Lines file, or a name or folder that `datasets.load_dataset` takes.
        config: Configuration of that data set.
        split: Split of that data set.
        limit: Rows to read, at most.

    Raises:
        ValueError: If a row has no valid `messages` (file and line, or row, are named).

    Examples:
        >>> conversations = emlens.load_conversations("conversations.jsonl", limit=2)
        >>> len(conversations)
        2
    """
    if str(source) in EMBEDDED:
        raise ValueError(
            f"{source!r} is a set of pairs; read it with emlens.load_pairs({source!r}) and take "
            "pair.conversation('misaligned') of each"
        )
    path = expanded(source)
    if path.suffix == ".jsonl" or (path.exists() and not path.is_dir()):
        rows: Iterable[tuple[str, dict]] = (
            (f"{path}, line {number}", record) for number, record in read_jsonl(path)
        )
    else:
        found = dataset_rows(source, config, split, streaming=limit is not None)
        rows = ((f"{source}, row {i}", row) for i, row in enumerate(found))
    return [_conversation(record, where) for where, record in islice(rows, limit)]


def _conversation(record: dict, where: str) -> Conversation:
    if "messages" not in record:
        raise ValueError(f"{where}: no key 'messages'; it has {', '.join(map(str, record))}")
    try:
        name = record.get("id")
        return Conversation(messages_of(record), None if name is None else str(name))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def messages_of(record: Mapping[str, Any]) -> tuple[Any, ...]:
    """The messages of a row; the first has what the row says of tools.

    Raises:
        TypeError: If these are no lists.
    """
    messages, tools = tuple(record["messages"]), record.get("tools")
    if isinstance(tools, str):
        # tables keep them as JSON, since their schemas differ
        with suppress(ValueError):
            tools = json.loads(tools or "null")
    if not tools:
        return messages
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise TypeError(f"tools must be a list of functions that may be called, not {tools!r:.80}")
    if not messages or not isinstance(messages[0], Mapping):
        return messages
    first = messages[0]
    return {**first, "tools": [*tools, *(first.get("tools") or ())]}, *messages[1:]


def _pair(record: dict, path: Path, number: int) -> Pair:
    missing = [key for key in _KEYS if not isinstance(record.get(key), str) or not record[key]]
    if missing:
        raise ValueError(
            f"{path}, line {number}: {', '.join(missing)} missing or not text; "
            f"a pair has {', '.join(_KEYS)}"
        )
    return Pair(**{key: record[key] for key in _KEYS})
