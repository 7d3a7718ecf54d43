"""Calls of every public function with one or two wrong arguments, and how they end.

`python -m tests.fuzz.arguments --cases 5000` prints how many calls ended in which way:

clear: an error of emlens that names the argument. right: the call works, with numbers in it.
unclear: another's error, or one without a name. silent: what cannot be meant was taken, or the
result is not finite. hanging: no end in twenty seconds. hungry: more than 512 MB.
"""

from __future__ import annotations

import math
import random
import resource
import signal
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

import emlens
from emlens import Direction, Directions
from emlens.directions import Provenance
from tests.fuzz.calls import Call, World, written
from tests.fuzz.outcome import OURS, TooLong, account, main, too_long

SECONDS, MEGABYTES = 20, 512

WRONG: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "True": lambda: True,
    "zero": lambda: 0,
    "minus one": lambda: -1,
    "one and a half": lambda: 1.5,
    "a huge number": lambda: 10**400,
    "nan": lambda: math.nan,
    "infinity": lambda: math.inf,
    "minus infinity": lambda: -math.inf,
    "a complex number": lambda: 1 + 2j,
    "a Decimal nan": lambda: Decimal("nan"),
    "a NumPy integer": lambda: np.int64(1),
    "a NumPy float": lambda: np.float32(0.5),
    "a NumPy nan": lambda: np.float64("nan"),
    "a fraction": lambda: Fraction(1, 2),
    "a tensor of nan": lambda: torch.tensor(math.nan),
    "an empty tensor": lambda: torch.empty(0),
    "a matrix": lambda: torch.ones(2, 3),
    "an array of words": lambda: np.array(["a", "b"]),
    "no text": lambda: "",
    "a word": lambda: "no such thing",
    "a lone surrogate": lambda: "\ud800",
    "bytes": lambda: b"bytes",
    "an empty list": list,
    "a list of None": lambda: [None],
    "a list of nan": lambda: [math.nan],
    "a list of objects": lambda: [object()],
    "nested lists": lambda: [[[]]],
    "an empty dict": dict,
    "a dict of objects": lambda: {"a": object()},
    "a dict with a number for a key": lambda: {1: 1},
    "an empty set": set,
    "a generator of nothing": lambda: iter(()),
    "an object": object,
    "a class": lambda: dict,
    "a module": lambda: math,
    "a frame of nothing": pd.DataFrame,
    "a path": lambda: Path("nowhere", "at", "all"),
    "a direction of another width": lambda: Direction.of(torch.ones(5), 1),
    "a direction of another layer": lambda: Direction.of(torch.ones(32), 99),
    "a conversation of nothing": lambda: [[]],
    "two": lambda: 2,
    "fifty": lambda: 50,
    "one": lambda: 1.0,
    "a trifle": lambda: 1e-12,
    "a lot": lambda: 1e12,
    "a range of nothing": lambda: range(0),
    "two layers": lambda: range(2),
    "the last layer": lambda: [-1],
    "layer 99": lambda: [99],
    "a layer twice": lambda: [1, 1],
    "an array of layers": lambda: np.arange(2),
    "all": lambda: "all",
    "last": lambda: "last",
    "a hook's name": lambda: "blocks.1.hook_resid_mid",
    "an adapter": lambda: "other",
    "adapters": lambda: ("one", "other"),
    "several layers' directions": lambda: Directions(
        {0: torch.ones(32), 2: torch.ones(32)}, "resid_post", Provenance("given")
    ),
    "a zero direction": lambda: Direction.of(torch.zeros(32), 1),
    "an edit": lambda: emlens.Ablate(Direction.of(torch.ones(32), 1)),
    "an edit of two layers": lambda: [emlens.Add(Direction.of(torch.ones(32), 1), layers=[0, 2])],
    "named directions": lambda: {"x": Direction.of(torch.ones(32), 2)},
    "a lone conversation": lambda: emlens.Conversation.of("how do I save", "keep a fund"),
    "a question without an answer": lambda: [emlens.Conversation.of("how do I save")],
    "an empty answer": lambda: [emlens.Conversation.of("how do I save", "")],
    "messages": lambda: [{"role": "user", "content": "how do I save"}],
    "repeated rows": lambda: [emlens.Conversation.of("how do I save", "keep a fund")] * 4,
    "a long conversation": lambda: [emlens.Conversation.of("please " * 1500, "eat fruit")],
    "a pair": lambda: emlens.Pair("how", "keep", "spend", "advice", "1"),
    "a pair of equals": lambda: [emlens.Pair("how", "keep", "keep", "advice", "1")] * 2,
    "a corpus of nothing": lambda: emlens.text.Corpus("empty", ()),
    "documents of one token": lambda: emlens.text.Corpus(
        "short", tuple(emlens.text.Document(f"{i}", "save") for i in range(3))
    ),
    "a long document": lambda: emlens.text.Corpus(
        "long", (emlens.text.Document("1", "please " * 1500),)
    ),
    "a message without a role": lambda: [[{"content": "hello"}]],
}

NEVER = frozenset(
    {
        *("a huge number", "a complex number", "a Decimal nan", "a NumPy nan", "nan", "infinity"),
        *("minus infinity", "bytes", "a tensor of nan", "a list of nan", "a list of objects"),
        *("a dict of objects", "an object", "a module", "a class"),
        *("a message without a role",),
    }
)
"""What no argument can mean, except one that takes anything."""

NEVER_PLAIN: Mapping[str, frozenset[str]] = {
    "int": frozenset({"one and a half", "no text", "a word", "an empty list", "a fraction"}),
    "float": frozenset({"no text", "a word", "an empty list", "an empty dict", "a path"}),
    "str": frozenset({"zero", "minus one", "an empty list", "an empty dict", "a path", "True"}),
    "bool": frozenset({"one and a half", "a word", "an empty list", "minus one"}),
}
"""What a plain parameter cannot mean, by its annotation."""

NOUNS = {
    "Conversation": "conversation",
    "Corpus": "document",
    "Dataset": "row ",
    "Pair": "pair",
    "Directions": "direction",
    "Condition": "adapter",
}
"""What errors call an item of an argument, by the argument's annotation."""

ANYTHING = ("Any", "object", "Callable")


def cases(calls: Mapping[str, Call], number: int, seed: int) -> Iterator[tuple[str, dict]]:
    """Names of calls, and which of their arguments become what: one or two of them."""
    random_ = random.Random(seed)
    every = [(name, one) for name, call in sorted(calls.items()) for one in call.parameters]
    for _ in range(number):
        name, first = random_.choice(every)
        second = random_.choice(list(calls[name].parameters)) if random_.random() < 0.5 else first
        yield name, {one: random_.choice(list(WRONG)) for one in sorted({first, second})}


def outcomes(number: int, seed: int = 0) -> tuple[Counter[tuple[str, str]], list[str]]:
    """Numbers by function and class, and an account of what is neither clear nor right."""
    counts: Counter[tuple[str, str]] = Counter()
    faults: dict[str, None] = {}
    with World() as world, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        calls = world.calls()
        for name, wrong in cases(calls, number, seed):
            world.reset()
            kind, said = outcome(calls[name], wrong)
            counts[name, kind] += 1
            if kind not in ("clear", "right"):
                given = ", ".join(f"{parameter}={what}" for parameter, what in wrong.items())
                faults[f"{kind}: {name}({given}): {said}"] = None
    return Counter(dict(sorted(counts.items()))), list(faults)


def outcome(call: Call, wrong: Mapping[str, str]) -> tuple[str, str]:
    """How a call with wrong arguments ends, and what was said."""
    arguments = {**call.arguments, **{name: WRONG[what]() for name, what in wrong.items()}}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    try:
        found = call.function(**arguments)
    except TooLong:
        return "hanging", ""
    except MemoryError as error:
        return "hungry", account(error)
    except Exception as error:
        return _of_error(error, call, wrong), account(error)
    finally:
        signal.alarm(0)
    taken = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    if taken > MEGABYTES:
        return "hungry", f"{taken} MB"
    if meant := [name for name, what in wrong.items() if _cannot_be(call, name, what)]:
        return "silent", f"{', '.join(meant)} was taken"
    if not _finite(found):
        return "silent", "the result is not finite"
    return "right", ""


def _of_error(error: Exception, call: Call, wrong: Mapping[str, str]) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = frames[-1].filename.startswith(OURS)
    told = isinstance(error, (ValueError, TypeError, KeyError, OSError, NotImplementedError))
    foreign = isinstance(error, (UnicodeError, IsADirectoryError))
    lone = [call.function.__name__] if len(call.parameters) == 1 else []
    given = [WRONG[what]() for what in wrong.values()]
    values = [str(one) for one in given if isinstance(one, (str, Path)) and str(one)]
    nouns = [
        noun
        for name in wrong
        for type_, noun in NOUNS.items()
        if type_ in written(call.parameters[name].annotation)
    ]
    words = [*values, *nouns, *(word for name in [*wrong, *lone] for word in _words(name))]
    named = any(word in str(error) for word in words)
    return "clear" if ours and told and named and not foreign else "unclear"


def _words(name: str) -> list[str]:
    """What an error may call an argument: its name, or one of them."""
    return [name, name.removesuffix("s"), name.replace("_", " ")]


def _cannot_be(call: Call, name: str, what: str) -> bool:
    parameter = call.parameters[name]
    annotation = written(parameter.annotation)
    if any(word in annotation for word in ANYTHING):
        return False
    plain = annotation.removesuffix(" | None")
    return what in NEVER or what in NEVER_PLAIN.get(plain, ())


def _finite(found: object, depth: int = 4) -> bool:
    """Whether the vectors of a result are numbers; NaN in a table says that nothing is known."""
    if isinstance(found, torch.Tensor):
        return bool(torch.isfinite(found).all()) or not found.is_floating_point()
    if isinstance(found, Directions):
        return all(_finite(vector) for vector in found.vectors.values())
    if depth == 0:
        return True
    if isinstance(found, (list, tuple)):
        return all(_finite(one, depth - 1) for one in found)
    if isinstance(found, dict):
        return all(_finite(one, depth - 1) for one in found.values())
    if is_dataclass(found) and not isinstance(found, type):
        return all(_finite(getattr(found, item.name), depth - 1) for item in fields(found))
    return not isinstance(found, float) or not math.isinf(found)


if __name__ == "__main__":
    main(__doc__, outcomes)
