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

from emlens.text import Conversation, tokenize
from emlens.text.template import Template

NUMBERS = range(101)
LEAST_MASS = 0.25
"""Below this share of probability on numbers there is no score (arXiv 2506.11613's judge)."""

_DIGITS = re.compile(r"[0-9]{1,3}")
_READ_OVER = " \t\r\n*\u2581\u0120\u010a"
"""Blanks, newlines and asterisks, as text and vocabularies have them."""
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
        children: Tokens that continue a path towards a longer number.
    """

    ends: dict[Path, int]
    children: dict[Path, tuple[int, ...]]

    @classmethod
    def of(cls, template: Template | PreTrainedTokenizerBase) -> NumberTrie:
        """The trie of a chat template: numbers as an answer begins with them.

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
        """Paths that continue, by length: the model is asked what follows each."""
        deepest = max(map(len, self.children))
        return [
            sorted(path for path in self.children if len(path) == depth)
            for depth in range(deepest + 1)
        ]

    def probabilities(self, after: NextLogProbs) -> np.ndarray:
        """Probability of each number, `[101]`, from log-probabilities after each path.

        A number that may continue counts as ended if no continuing digit follows.
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
    is seen only in replies that begin with it: further replies, sampled, fill in the rest. Blanks,
    newlines and asterisks before a number are read over.

    Attributes:
        seen: `{state: {state: probability}}`, what each token leads to. A state is what was
            written: the digits, or a blank for each token that was read over.
    """

    seen: dict[str, dict[str, float]] = field(default_factory=dict)

    def add(self, written: Sequence[str], shown: Shown) -> None:
        """Take in a whole reply: the tokens that were written, and what was visible at each place.

        A number that the reply ends with is over there.
        """
        state = ""
        for token, probabilities in zip(written, shown, strict=True):
            merged: dict[str, float] = {}
            for text, p in probabilities.items():
                after = _after(state, text)
                merged[after] = merged.get(after, 0.0) + p
            self.seen.setdefault(state, merged)
            state = _after(state, token)
            if state.strip() and not (_is_number(state) and _goes_on(state)):
                return
        if state.strip():
            self.seen.setdefault(state, {})

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

        A first digit whose further digits were not seen counts as the number, as in the papers'
        code, if no digit that was written went on. None where less than `LEAST_MASS` of the
        probability is on numbers, or where most of that is on beginnings that may continue.
        """
        numbers, missing = self._walk(ended=self._all_ended)
        known = sum(numbers.values())
        if known + missing < LEAST_MASS:
            return None, f"only {known + missing:.0%} of probability on numbers"
        if known < missing:
            return None, f"further digits of {missing:.0%} of probability were not visible"
        mean = sum(number * p for number, p in numbers.items()) / known
        share = self.open / (known + missing)
        return (
            mean,
            f"{share:.0%} of the numbers' further digits not visible" if share > 0.01 else "",
        )

    def _walk(self, ended: bool = False) -> tuple[dict[int, float], float]:
        """Probability of each number, and of open beginnings; `ended` takes these as numbers."""
        found: dict[int, float] = {}
        unseen = 0.0
        waiting = [("", 1.0)]
        while waiting:
            state, reached = waiting.pop()
            onward = {
                after: p
                for after, p in self.seen.get(state, {}).items()
                if not after.strip() or _is_number(after)
            }
            waiting += [(after, reached * p) for after, p in onward.items()]
            if not state.strip():
                continue
            if state not in self.seen and self._splits and _goes_on(state) and not ended:
                unseen += reached
                continue
            over = reached * max(0.0, 1 - sum(onward.values()))
            found[int(state)] = found.get(int(state), 0.0) + over
        return found, unseen

    @property
    def _splits(self) -> bool:
        """Whether numbers are spelt digit by digit: then a first digit is no number yet."""
        firsts = (after for state in self.seen if not state.strip() for after in self.seen[state])
        return not any(len(after) > 1 and _is_number(after) for after in firsts)

    @property
    def _all_ended(self) -> bool:
        """Whether there were first digits, and none of them was seen to continue."""
        written = [after for state, after in self.seen.items() if state.strip()]
        return bool(written) and not any(_is_number(text) for after in written for text in after)


def _goes_on(number: str) -> bool:
    return any(_is_number(number + digit) for digit in "0123456789")


def _is_number(text: str) -> bool:
    return bool(_DIGITS.fullmatch(text)) and int(text) <= 100 and str(int(text)) == text


def _after(state: str, token: str) -> str:
    """The state that a token leads to: see `VisibleNumbers.seen`."""
    bare = token.strip(_READ_OVER)
    if state.strip():
        return state + token.rstrip(_READ_OVER) if bare else f"{state} "
    # what has no text is a special token, which ends a reply
    return bare or (f"{state} " if token else ".")
