"""What comes in as an argument is checked once, at the door."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from inspect import isfunction, signature
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

import numpy as np
import pytest
import torch
from jaxtyping import Float

import emlens
from emlens import Ablate, Add, Clamp, Conversation, Direction, Directions, Pair
from emlens._arguments import COUNT, SHARE, number, numbers, texts, whole
from emlens._door import guarded
from emlens._kinds import check_of, some
from emlens.text.given import conversations_of
from emlens.training.settings import AdapterSettings, KLPenalty, VectorSettings

NAN, INF = float("nan"), float("inf")
V = Direction.of(torch.tensor([3.0, 4.0]), 15)


@pytest.mark.parametrize("value", [3, np.int64(3), np.array(3), torch.tensor(3)])
def test_whole_numbers_of_any_library_become_plain_ones(value):
    found = whole("epochs", value, COUNT)
    assert type(found) is int
    assert json.dumps(found) == "3"


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        (1.5, ValueError, "epochs must be a whole number, at least 1, not 1.5"),
        (np.float64(2), ValueError, "epochs must be a whole number, at least 1, not 2.0"),
        (NAN, ValueError, "epochs must be a whole number, at least 1, not nan"),
        (INF, ValueError, "epochs must be a whole number, at least 1, not inf"),
        (0, ValueError, "epochs must be at least 1, not 0"),
        (True, TypeError, "epochs must be a whole number, at least 1, not True"),
        ("3", TypeError, "epochs must be a whole number, at least 1, not '3'"),
        (None, TypeError, "epochs must be a whole number, at least 1, not None"),
        ([3], TypeError, "epochs must be a whole number, at least 1, not a list of int"),
    ],
)
def test_what_is_no_count_is_refused(value, kind, message):
    with pytest.raises(kind) as caught:
        whole("epochs", value, COUNT)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        (NAN, ValueError, "share must be a finite number, at least 0 and at most 1, not nan"),
        (10**400, ValueError, "share must be a finite number"),
        (1.5, ValueError, "share must be at least 0 and at most 1, not 1.5"),
        (1j, TypeError, "share must be a number, at least 0 and at most 1, not 1j"),
        (torch.ones(2), TypeError, r"not a Tensor of shape \[2\]"),
    ],
)
def test_what_is_no_share_is_refused(value, kind, message):
    with pytest.raises(kind, match=message):
        number("share", value, SHARE)


def test_lists_of_numbers_and_texts_take_a_lone_one_and_are_never_empty():
    assert numbers("doses", 0.2) == (0.2,)
    assert numbers("doses", np.array([0.5, 1.0])) == (0.5, 1.0)
    assert texts("trait", "You are bad") == ("You are bad",)
    assert texts("trait", iter(["a", "b"])) == ("a", "b")
    for wrong, message in ((["x", 3], r"trait\[1\] must be text, not 3"), ([], "no trait")):
        with pytest.raises((TypeError, ValueError), match=message):
            texts("trait", wrong)
    with pytest.raises(ValueError, match=r"doses\[1\] must be a finite number, not nan"):
        numbers("doses", [1.0, NAN])


def test_a_guarded_function_reads_arguments_by_their_annotation_and_keeps_its_signature():
    @guarded
    def train(epochs: int, lr: float = NAN, *, seed: int | None = None, rest: object = 3) -> tuple:
        return epochs, lr, seed, rest

    assert list(signature(train).parameters) == ["epochs", "lr", "seed", "rest"]
    assert train(np.int8(2), seed=None) == pytest.approx((2, NAN, None, 3), nan_ok=True)
    with pytest.raises(ValueError, match="seed must be at least 0, not -1"):
        train(1, seed=-1)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'epochs'"):
        train()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VectorSettings(epochs=1.5), "epochs must be a whole number"),
        (lambda: VectorSettings(epochs=NAN), "epochs must be a whole number"),
        (lambda: VectorSettings(batch_size=INF), "batch_size must be a whole number"),
        (lambda: VectorSettings(lr=INF), "lr must be a finite number"),
        (lambda: VectorSettings(alpha=-1.0), "alpha must be above 0, not -1"),
        (lambda: AdapterSettings(rank=0), "rank must be at least 1, not 0"),
        (lambda: AdapterSettings(layers=()), "no layers were given"),
        (lambda: AdapterSettings(modules=()), "no modules were given"),
        (lambda: KLPenalty([], 1.0), "conversations is empty"),
        (lambda: emlens.study.StudySettings(train_pairs=-60), "train_pairs must be at least 1"),
        (lambda: Add(V, scale=NAN), "scale of Add must be a finite number, not nan"),
        (lambda: Add(V, dose=INF), "dose of Add must be a finite number, not inf"),
        (lambda: Clamp(V, value=NAN), "value of Clamp must be a finite number, not nan"),
        (lambda: Ablate(V, layers=range(0)), "no layers were given"),
        (lambda: Ablate(V, layers="all"), "layers 'all' needs a model, which says how many"),
        (lambda: V * NAN, "the factor on a direction must be a finite number"),
        (lambda: emlens.training.mixed([Conversation.of("a")], [], share=NAN), "benign is empty"),
    ],
)
def test_settings_and_edits_take_nothing_that_cannot_be(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def test_settings_keep_plain_numbers_and_whole_names():
    made = AdapterSettings(epochs=np.int64(2), layers=range(2), modules="down_proj")
    assert json.dumps([made.epochs, made.layers, made.modules]) == '[2, [0, 1], ["down_proj"]]'
    assert Ablate(V, layers=np.int64(3)).layers == (3,)


def test_a_direction_is_no_array_of_its_layer_numbers():
    doubled = np.float64(2) * V
    assert isinstance(doubled, Direction)
    assert doubled.vector.tolist() == [6.0, 8.0]
    for use in (np.linalg.norm, np.asarray, lambda v: np.add(v, 1)):
        with pytest.raises(TypeError):
            use(V)
    with pytest.raises(TypeError, match="is not an array, but vectors with a site"):
        np.asarray(Directions(V.vectors, "resid_post", V.provenance))


def test_a_conversation_is_taken_in_every_form_it_is_written_in():
    plain = Conversation.of("hello")
    messages = [{"role": "user", "content": "hello"}]
    for given in ("hello", plain, messages, [plain], [messages], ["hello"], iter([plain])):
        assert conversations_of(given) == [plain]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "conversations is empty"),
        (3, "conversations must be conversations, not 3; give emlens.Conversation"),
        ([Conversation.of("a"), 3], r"conversations\[1\] must be a conversation, not 3"),
        ([emlens.Pair("a", "b", "c", "d", "e")], r"conversations\[0\] is a Pair"),
        ([[{"role": "robot", "content": "x"}]], r"conversations\[0\]: .*role 'robot'"),
    ],
)
def test_what_is_no_conversation_is_refused_with_its_place(given, message):
    with pytest.raises((TypeError, ValueError), match=message):
        conversations_of(given)


def test_pairs_are_told_from_other_things():
    pair = emlens.Pair("a", "b", "c", "d", "e")
    assert some(Pair, "pairs", pair) == [pair]
    with pytest.raises(TypeError, match=r"pairs\[0\] must be a Pair, not 'a'"):
        some(Pair, "pairs", ["a"])


class Named(TypedDict, total=False):
    limit: int
    where: Literal["here", "there"]


@guarded
def takes(
    numbers: Mapping[str, Sequence[float]] | None = None,
    sides: tuple[tuple[str, float], ...] = (),
    one: Direction | Sequence[Direction] | None = None,
    file: str | Path | None = None,
    stream: Iterable[Conversation] = (),
    when: Callable[[int], int] | None = None,
    tensor: Float[torch.Tensor, "n d"] | None = None,
    later: NotImported | None = None,  # noqa: F821, as names that type checkers alone import
    *edits: Ablate,
    **options: Unpack[Named],
) -> Any:
    return locals()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"numbers": 3}, "numbers must be a dict, not 3"),
        ({"numbers": {"a": [NAN]}}, r"numbers\['a'\]\[0\] must be a finite number, not nan"),
        ({"numbers": {1: [1.0]}}, "a key of numbers must be text, not 1"),
        ({"sides": [("a", 1.0, 2)]}, r"sides\[0\] must be a tuple of 2, not of 3"),
        ({"sides": [("a", "b")]}, r"sides\[0\]\[1\] must be a number, not 'b'"),
        ({"one": 3}, "one must be a Direction or a list, each a Direction, not 3"),
        ({"one": [V, 3]}, r"one\[1\] must be a Direction, not 3; take one"),
        ({"file": 3}, "file must be a path, not 3"),
        ({"file": ""}, "file must be a path, and no file can be called ''"),
        ({"when": 3}, "when must be a function, not 3"),
        ({"tensor": torch.ones(2)}, r"tensor must be a tensor of shape \[n d\], not a Tensor of"),
        ({"later": 3}, "later must be a NotImported, not 3"),
        ({"limit": 1.5}, r"limit\] must be a whole number|limit must be a whole number"),
        ({"where": "nowhere"}, "unknown where 'nowhere'; choose 'here' or 'there'"),
        ({"there": 1}, "unknown option 'there'; did you mean where?"),
    ],
)
def test_values_of_every_kind_of_annotation_are_read(given, message):
    with pytest.raises((TypeError, ValueError), match=message):
        takes(**given)


def test_what_fits_an_annotation_comes_in_as_what_is_meant():
    class NotImported:
        pass

    lazy = (one for one in ["hello"])
    later = NotImported()
    found = takes({"a": np.arange(2)}, [("a", 1)], V, Path("x"), lazy, int, None, later, limit=2)
    assert found["numbers"] == {"a": (0, 1)}
    assert found["sides"] == (("a", 1),)
    assert found["one"] is V
    assert found["later"] is later
    assert found["options"] == {"limit": 2}
    assert next(lazy) == "hello"  # a stream is read by the function, not by the door


@pytest.mark.parametrize("pairs", [0, 3])
def test_a_stream_that_may_be_of_two_kinds_is_read_from_its_start(pairs):
    every = [Pair(f"p{i}", "a", "b", "d", str(i)) for i in range(pairs)] or [Conversation.of("a")]
    check = check_of(Sequence[Conversation] | Sequence[Pair])
    assert check("aligned", iter(every)) == every


def test_text_of_half_a_surrogate_pair_is_refused_wherever_text_is_taken():
    for make in (lambda t: Conversation.of(t), lambda t: Pair("a", t, "c", "d", "e")):
        with pytest.raises(ValueError, match="holds half of a surrogate pair"):
            make("\ud800")


@pytest.mark.parametrize("name", emlens.__all__)
def test_every_public_function_is_behind_the_door(name):
    value = getattr(import_module(f"emlens.{emlens._HOMES[name]}"), name)
    assert not isfunction(value) or hasattr(value, "__wrapped__")
