"""Rows that stand in a set more than once: they count as independent, and are not."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from emlens.text.conversation import Conversation, Pair, content_hash


def repeats(items: Sequence[Conversation] | Sequence[Pair]) -> int:
    """How many of the items say what one before them says; ids and domains do not count."""
    return len(items) - len({_content(item) for item in items})


def warn_of_repeats(items: Sequence[Conversation] | Sequence[Pair], what: str) -> None:
    """Warn, once for a set, of items that are in it more than once."""
    count = repeats(items)
    if count:
        warnings.warn(
            f"{count} of {len(items)} {what} repeat another one, word for word: each counts as "
            "independent, so intervals are too narrow and split-half cosines too high; leave the "
            "copies out",
            stacklevel=4,
        )


@contextmanager
def repeats_told() -> Iterator[None]:
    """Say no more of repeated rows inside the block: they have been warned of."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"\d+ of \d+ .* repeat another one")
        yield


def _content(item: Conversation | Pair) -> str | tuple[str, ...]:
    if isinstance(item, Pair):
        return item.prompt, item.aligned, item.misaligned
    return content_hash([item])
