"""Checks and conversions of plain arguments: numbers, texts, choices, paths."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Callable, Iterator, Sequence, Set, ValuesView
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Limits:
    """The range of a number; open and closed ends may be mixed."""

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None

    def hold(self, value: float) -> bool:
        return (
            (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        words = ("at least", "above", "at most", "below")
        ends = dict(zip(words, (self.least, self.above, self.most, self.below), strict=True))
        return " and ".join(f"{word} {end:g}" for word, end in ends.items() if end is not None)


ANY = Limits()
COUNT = Limits(least=1)
NOT_NEGATIVE = Limits(least=0)
POSITIVE = Limits(above=0)
SHARE = Limits(least=0, most=1)
PART = Limits(above=0, below=1)
SCORE = Limits(least=0, most=100)

_COUNTS = """
epochs batch_size accumulate patience record_every checkpoint_every max_new_tokens max_tokens
token_budget batch_tokens max_rows documents document_tokens n draws check keep block answer_tokens
best least at_once trials records components rank k runs seeds noise_seeds train_pairs kl_pairs
test_pairs outside_pairs inside_pairs measure_pairs questions limit samples d_model n_layers n_vocab
lags
"""
_NOT_NEGATIVE = """
warmup weight_decay skip_first min_characters prefix_budget log_prob_budget sample_bytes budget
controls randoms temperature factors norms displacements weights min_move tolerance floor
paraphrase hits
"""
_POSITIVE = "lr clip alpha regularisation kl_weight low high"
_SCORES = "threshold coherence misaligned_below aligned_above coherent_above above"

LIMITS: dict[str, Limits] = {
    **dict.fromkeys(_COUNTS.split(), COUNT),
    **dict.fromkeys(_NOT_NEGATIVE.split(), NOT_NEGATIVE),
    **dict.fromkeys(_POSITIVE.split(), POSITIVE),
    **dict.fromkeys(_SCORES.split(), SCORE),
    **dict.fromkeys(("flag_share", "held_out", "level"), PART),
    **dict.fromkeys(("epsilon", "epsilons"), SHARE),
    "max_false_alarms": Limits(least=0, below=1),
    "seed": NOT_NEGATIVE,
    "share": Limits(least=0, below=1),
    "top_p": Limits(above=0, most=1),
}
"""What a number of this name may be, wherever it is asked for."""


def shown(value: object) -> str:
    """A short text of a value for error messages."""
    value = _scalar(value)
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        text = repr(value)
        return text if len(text) <= 60 else f"{text[:57]}..."
    name = type(value).__name__
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple) and shape:
        return f"{a_or_an(name)} of shape {list(shape)}"
    if isinstance(value, (Real, complex)) or shape == ():
        return str(value)
    if isinstance(value, (list, tuple, set, frozenset)):
        kinds = ", ".join(dict.fromkeys(type(item).__name__ for item in value))
        return f"{a_or_an(name)} of {kinds or 'nothing'}"
    return a_or_an(name)


def listed(words: Sequence[str]) -> str:
    """Words joined as in a sentence: a, b or c."""
    return f"{', '.join(words[:-1])} or {words[-1]}" if len(words) > 1 else words[0]


def a_or_an(name: str) -> str:
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


def _refused(name: str, accepted: str, value: object, limits: Limits = ANY) -> str:
    more = f" {limits}".replace(" at", ", at", 1).replace(" above", ", above", 1)
    more = more if str(limits) else ""
    return f"{name} must be {accepted}{more}, not {shown(value)}"


def _scalar(value: Any) -> Any:
    """What an array or a tensor of no dimension holds; other things as they are."""
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return value.item()
    return value


def _real(name: str, value: Any, accepted: str, limits: Limits) -> Any:
    given = _scalar(value)
    if isinstance(given, bool) or not isinstance(given, Real):
        raise TypeError(_refused(name, accepted, value, limits))
    return given


def whole(name: str, value: Any, limits: Limits = ANY) -> int:
    """Return a whole number as an int; those of NumPy and tensors are converted.

    Raises:
        TypeError: If it is no number.
        ValueError: If it is not whole, or outside of the limits.
    """
    given = _real(name, value, "a whole number", limits)
    if not isinstance(given, Integral):
        raise ValueError(_refused(name, "a whole number", value, limits))
    plain = operator.index(given)
    if not limits.hold(plain):
        raise ValueError(f"{name} must be {limits}, not {shown(plain)}")
    if abs(plain) >= 2**63:
        raise ValueError(f"{name} must be below 2**63, not {shown(plain)}")
    return plain


def number(name: str, value: Any, limits: Limits = ANY) -> float:
    """Return a finite number as a float; whole numbers stay ints.

    Raises:
        TypeError: If it is no number.
        ValueError: If it is not finite, or outside of the limits.
    """
    given = _real(name, value, "a number", limits)
    try:
        plain = operator.index(given) if isinstance(given, Integral) else float(given)
        finite = math.isfinite(plain)
    except OverflowError:
        plain, finite = 0.0, False
    if not finite:
        raise ValueError(_refused(name, "a finite number", value, limits))
    if not limits.hold(plain):
        raise ValueError(f"{name} must be {limits}, not {shown(plain)}")
    return plain


def is_list(value: object) -> bool:
    """Whether a value is a list of items; text, dicts and zero-dimensional arrays are not.

    Neither are objects that iterate over something else, such as directions over layers.
    """
    array = hasattr(value, "tolist") and getattr(value, "shape", None) != ()
    plain = isinstance(value, (str, bytes))
    return array or (isinstance(value, (Sequence, Set, Iterator, ValuesView)) and not plain)


def _several(
    one: Callable[[str, Any, Limits], Any], name: str, values: Any, limits: Limits = ANY
) -> tuple:
    accepted = "whole numbers" if one is whole else "numbers"
    given = _scalar(values)
    if isinstance(given, Real) and not isinstance(given, bool):
        given = [given]
    if not is_list(given):
        raise TypeError(f"{name} must be a list of {accepted}, not {shown(values)}")
    found = list(given)
    if not found:
        raise ValueError(f"no {name} were given; give at least one")
    return tuple(one(f"{name}[{i}]", value, limits) for i, value in enumerate(found))


def wholes(name: str, values: Any, limits: Limits = ANY) -> tuple[int, ...]:
    """Return whole numbers; a single one becomes a list.

    Raises:
        TypeError: If it is not a list of numbers.
        ValueError: If there are none, or one is not whole or outside of the limits.
    """
    return _several(whole, name, values, limits)


def numbers(name: str, values: Any, limits: Limits = ANY) -> tuple[float, ...]:
    """Return finite numbers; a single one becomes a list.

    Raises:
        TypeError: If it is not a list of numbers.
        ValueError: If there are none, or one is not finite or outside of the limits.
    """
    return _several(number, name, values, limits)


def text(name: str, value: Any) -> str:
    """Return a text.

    Raises:
        TypeError: If it is none.
        ValueError: If it holds half of a surrogate pair.
    """
    if not isinstance(value, str):
        raise TypeError(f"{name} must be text, not {shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} holds half of a surrogate pair (character {error.start}), which no tokenizer "
            "reads; remove it"
        ) from None
    return value


def texts(name: str, values: Any) -> tuple[str, ...]:
    """Return texts; a single one becomes a list.

    Raises:
        TypeError: If it is not a list of texts.
        ValueError: If there are none.
    """
    if isinstance(values, str):
        return (text(name, values),)
    if not is_list(values):
        raise TypeError(f"{name} must be a list of texts, not {shown(values)}")
    found = tuple(values)
    if not found:
        raise ValueError(f"no {name} were given; give at least one")
    return tuple(text(f"{name}[{i}]", value) for i, value in enumerate(found))


def choice(choices: tuple, name: str, value: Any) -> Any:
    """Return one of some names.

    Raises:
        ValueError: If it is none of them; they are listed.
        TypeError: If it is no text.
    """
    names = listed([repr(one) for one in choices])
    if not isinstance(value, str):
        raise TypeError(f"{name} must be {names}, not {shown(value)}")
    if value not in choices:
        raise ValueError(f"unknown {name} {shown(value)}; choose {names}")
    return value


def flag(name: str, value: Any) -> bool:
    """Return True or False.

    Raises:
        TypeError: If it is neither.
    """
    given = _scalar(value)
    if not isinstance(given, bool) and not (isinstance(given, int) and given in (0, 1)):
        raise TypeError(f"{name} must be True or False, not {shown(value)}")
    return bool(given)


def path(name: str, value: Any) -> str | Path:
    """Return the name of a file or folder.

    Raises:
        TypeError: If it is none.
        ValueError: If no file can be called so.
    """
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{name} must be a path, not {shown(value)}")
    written = os.fspath(value)
    try:
        possible = written and b"\0" not in os.fsencode(written)
    except UnicodeEncodeError:
        possible = False
    if not possible:
        raise ValueError(f"{name} must be a path, and no file can be called {shown(written)}")
    return value if isinstance(value, str) else Path(value)
