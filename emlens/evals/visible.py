"""The number a judge would write, from the few log-probabilities that a provider shows."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from emlens.evals.digits import LEAST_MASS

_DIGITS = re.compile(r"[0-9]{1,3}")
Shown = Sequence[Mapping[str, float]]
"""Probability of each visible token, for every token that was written."""


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

        None where less than `emlens.evals.digits.LEAST_MASS` of the probability is on numbers, or
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
