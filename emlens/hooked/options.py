"""Options that functions share: each group is documented once, with its defaults in one place.

A group has two halves: a `TypedDict`, which a verb takes as `**options: Unpack[...]`, and the
frozen dataclass of the same fields, which holds the defaults.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

from emlens.text import TokenMask


class BatchOptions(TypedDict, total=False):
    """How texts are batched.

    Attributes:
        token_budget: Padded tokens per batch; 2048 unless the function says otherwise.
        progress: Show a progress bar in a terminal or a notebook; on by default.
    """

    token_budget: int
    progress: bool


class ReadOptions(BatchOptions, total=False):
    """How conversations are read; includes `BatchOptions`.

    Attributes:
        tokens: Tokens that count; those of the answers (`"response"`) by default.
    """

    tokens: TokenMask


class CorpusOptions(BatchOptions, total=False):
    """How raw text is read; includes `BatchOptions`, with a `token_budget` of 1024 by default.

    Attributes:
        max_tokens: Documents are cut to this many tokens; 128 by default.
    """

    max_tokens: int


class SamplingOptions(TypedDict, total=False):
    """How answers are drawn.

    Attributes:
        max_new_tokens: Longest answer, in tokens; 128 unless the function says otherwise.
        temperature: 0 is greedy; 1 by default, as in the papers.
        top_p: Nucleus to sample from; 1 by default, as in the papers.
    """

    max_new_tokens: int
    temperature: float
    top_p: float


@dataclass(frozen=True, kw_only=True)
class BatchSettings:
    """Defaults of `BatchOptions`."""

    token_budget: int = 2048
    progress: bool = True


@dataclass(frozen=True, kw_only=True)
class ReadSettings(BatchSettings):
    """Defaults of `ReadOptions`."""

    tokens: TokenMask = "response"


@dataclass(frozen=True, kw_only=True)
class CorpusSettings(BatchSettings):
    """Defaults of `CorpusOptions`."""

    token_budget: int = 1024
    max_tokens: int = 128
