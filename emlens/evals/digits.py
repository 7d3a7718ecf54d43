"""The number that a model would write: a trie of the tokens that spell 0 to 100."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from emlens.text import Conversation, Template, tokenize

NUMBERS = range(101)
LEAST_MASS = 0.25
"""Below this share of probability on numbers there is no score (arXiv 2506.11613's judge)."""

Path = tuple[int, ...]
NextLogProbs = Callable[[Sequence[Path]], np.ndarray]
"""Log-probabilities of the next token after each path of tokens, `[paths, vocab]`."""


@dataclass(frozen=True)
class NumberTrie:
    """How a tokenizer spells the numbers, as a tree of tokens.

    Where it splits numbers, `8` is both a number and the beginning of `85`: what decides is
    whether another digit follows.

    Attributes:
        ends: The number that ends at a path.
        children: Tokens that go on from a path towards a longer number.
    """

    ends: dict[Path, int]
    children: dict[Path, tuple[int, ...]]

    @classmethod
    def of(cls, template: Template | PreTrainedTokenizerBase) -> NumberTrie:
        """The trie of a chat template: numbers as they stand at the beginning of an answer.

        Raises:
            ValueError: If two numbers are spelt alike.
        """
        known = Template.of(template)
        return cls.spelt({number: _spelling(known, str(number)) for number in NUMBERS})

    @classmethod
    def spelt(cls, spellings: dict[int, Path]) -> NumberTrie:
        """The trie of given spellings.

        Raises:
            ValueError: If two numbers are spelt alike, or one by no token.
        """
        ends: dict[Path, int] = {}
        children: dict[Path, set[int]] = {}
        for number, path in spellings.items():
            if not path or path in ends:
                other = ends.get(path)
                raise ValueError(f"{number} is spelt like {other}, by the tokens {path}")
            ends[path] = number
            for depth in range(len(path)):
                children.setdefault(path[:depth], set()).add(path[depth])
        return cls(ends, {path: tuple(sorted(tokens)) for path, tokens in children.items()})

    @property
    def levels(self) -> list[list[Path]]:
        """Paths that go on, by their length: what a model has to be asked after."""
        deepest = max(map(len, self.children))
        return [
            sorted(path for path in self.children if len(path) == depth)
            for depth in range(deepest + 1)
        ]

    def probabilities(self, after: NextLogProbs) -> np.ndarray:
        """Probability of each number, `[101]`, from log-probabilities after each path.

        A number that may go on counts as ended where what follows is no digit that goes on.
        """
        found = np.zeros(len(NUMBERS))
        reached: dict[Path, float] = {(): 1.0}
        for paths in self.levels:
            log_probs = after(paths)
            for path, row in zip(paths, log_probs, strict=True):
                onward = {token: float(np.exp(row[token])) for token in self.children[path]}
                if path in self.ends:
                    found[self.ends[path]] = reached[path] * (1 - sum(onward.values()))
                for token, p in onward.items():
                    step = (*path, token)
                    reached[step] = reached[path] * p
                    if step not in self.children:
                        found[self.ends[step]] = reached[step]
        return found


def expected(probabilities: Iterable[float]) -> tuple[float | None, float]:
    """The probability-weighted mean of the numbers, and the mass on them.

    None where the mass is below `LEAST_MASS`: the model would rather say something else.
    """
    p = np.asarray(list(probabilities), dtype=float)
    mass = float(p.sum())
    if mass < LEAST_MASS:
        return None, mass
    return float(p @ np.arange(len(p)) / mass), mass


def _spelling(template: Template, text: str) -> Path:
    """Tokens that a model writes after the prompt, up to the last digit."""
    grade = [Conversation.of("grade")]
    (asked,) = tokenize(grade, template, generation_prompt=True, thinking=False)
    (row,) = tokenize([Conversation.of("grade", text)], template)
    start, ids = len(asked.input_ids), list(row.input_ids)
    if list(asked.input_ids) != ids[:start]:
        start = list(row.response).index(True)
    said = [str(template.tokenizer.decode([token])).strip() for token in ids]
    digits = [i for i in range(start, len(ids)) if said[i].isdigit()]
    if not digits:
        return ()
    # some tokenizers and templates begin an answer with a blank, which then comes first
    first = start if not any(said[start : digits[0]]) else digits[0]
    return tuple(int(token) for token in ids[first : digits[-1] + 1])
