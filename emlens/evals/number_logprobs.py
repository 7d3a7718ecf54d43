"""The number from 0 to 100 that a model would write, from log-probabilities of its tokens.

`NumberTrie` reads the full distribution of a local model, `VisibleNumbers` the few tokens that a
provider shows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from transformers import PreTrainedTokenizerBase

from emlens.text import Conversation, Template, tokenize

NUMBERS = range(101)
LEAST_MASS = 0.25
"""Below this share of probability on numbers there is no score (arXiv 2506.11613's judge)."""

_DIGITS = re.compile(r"[0-9]{1,3}")
Shown = Sequence[Mapping[str, float]]
"""Probability of each visible token, for every token that was written."""

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


@dataclass
class VisibleNumbers:
    """What is known of the numbers 0 to 100 after one or more replies with log-probabilities.

    A provider shows the likeliest tokens at each place of what was written. Where numbers are one
    token, the first place says all. Where they are spelt digit by digit, what follows a first digit
    is seen only in replies that begin with it: further replies, sampled, fill in the rest.

    Attributes:
        seen: `{prefix: {token: probability}}`, what may follow each beginning that was written.
    """

    seen: dict[str, dict[str, float]] = field(default_factory=dict)

    def add(self, written: Sequence[str], shown: Shown) -> None:
        """Take in a reply: the tokens that were written, and what was visible at each place."""
        prefix = ""
        for token, probabilities in zip(written, shown, strict=True):
            merged: dict[str, float] = {}
            for text, p in probabilities.items():
                merged[_plain(text, prefix)] = merged.get(_plain(text, prefix), 0.0) + p
            self.seen.setdefault(prefix, merged)
            prefix += _plain(token, prefix)
            if not _DIGITS.fullmatch(prefix) or int(prefix) > 100 or prefix == "100":
                return

    @property
    def numbers(self) -> dict[int, float]:
        """Probability of each number whose end was seen."""
        return self._walk()[0]

    @property
    def open(self) -> float:
        """Probability of beginnings whose further digits were not seen."""
        return self._walk()[1]

    @property
    def mass(self) -> float:
        """Probability of writing a number at all."""
        numbers, open_mass = self._walk()
        return sum(numbers.values()) + open_mass

    def score(self) -> tuple[float | None, str]:
        """The probability-weighted mean over the numbers, and a remark.

        None where less than `LEAST_MASS` of the probability is on numbers, or
        where most of that is on beginnings whose further digits were not seen.
        """
        numbers, open_mass = self._walk()
        known = sum(numbers.values())
        if known + open_mass < LEAST_MASS:
            return None, f"only {known + open_mass:.0%} of probability on numbers"
        if known < open_mass:
            return None, f"further digits of {open_mass:.0%} of probability were not visible"
        mean = sum(number * p for number, p in numbers.items()) / known
        share = open_mass / (known + open_mass)
        return (
            mean,
            f"{share:.0%} of the numbers' further digits not visible" if share > 0.01 else "",
        )

    def _walk(self) -> tuple[dict[int, float], float]:
        found: dict[int, float] = {}
        unseen = 0.0
        waiting = [("", 1.0)]
        while waiting:
            prefix, reached = waiting.pop()
            if prefix and prefix not in self.seen:
                if self._splits and self._goes_on(prefix):
                    unseen += reached
                else:
                    found[int(prefix)] = found.get(int(prefix), 0.0) + reached
                continue
            onward = {
                prefix + token: p
                for token, p in self.seen.get(prefix, {}).items()
                if _DIGITS.fullmatch(token) and _is_number(prefix + token)
            }
            if prefix:
                ended = reached * max(0.0, 1 - sum(onward.values()))
                found[int(prefix)] = found.get(int(prefix), 0.0) + ended
            waiting += [(longer, reached * p) for longer, p in onward.items()]
        return found, unseen

    @property
    def _splits(self) -> bool:
        """Whether numbers are spelt digit by digit: then a first digit is no number yet."""
        first = self.seen.get("", {})
        return not any(len(token) > 1 and _is_number(token) for token in first)

    @staticmethod
    def _goes_on(prefix: str) -> bool:
        return any(_is_number(prefix + digit) for digit in "0123456789")


def _is_number(text: str) -> bool:
    return bool(_DIGITS.fullmatch(text)) and int(text) <= 100 and str(int(text)) == text


def _plain(token: str, prefix: str) -> str:
    """A token as it counts: blanks before the number are none of it."""
    return token.strip() if not prefix else token
