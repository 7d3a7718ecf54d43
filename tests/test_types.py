"""What is read is compared with the annotations of what it becomes."""

from __future__ import annotations

import json
from typing import Literal, TypedDict

import pytest

from emlens._results import Result
from emlens.watch import Roc
from tests.goldens.golden import KEPT

NAN = float("nan")


class Inner(Result):
    n: int


class Outer(Result):
    AXES = {"values": "names points", "sizes": "names points"}

    names: tuple[str, ...]
    values: tuple[tuple[float, ...], ...]
    sizes: dict[str, tuple[int, ...]]
    pair: tuple[float, str]
    kind_of: Literal["a", "b"]
    inner: Inner
    tolerance: float | None = None
    rows: tuple[dict, ...] = ()


RESULT = Outer(
    ("x", "y"),
    ((1.0, NAN), (2, 3.0)),
    {"x": (1, 2), "y": (3, 4)},
    (0.5, "s"),
    "a",
    Inner(3),
    rows=({"kind": "free", "list": (1, 2)},),
)


def test_a_result_comes_back_as_it_was(tmp_path):
    path = RESULT.save(tmp_path / "r.json")
    assert repr(Outer.load(path)) == repr(RESULT)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("names", "xy", "names is 'xy', not a list"),
        ("names", ["x", 1], r"names\[1\] is 1, not text"),
        ("names", ["x"], "values has 2 values for 1 names"),
        ("values", [[1.0, 2.0], [1.0]], r"values\[1\] has 1 values for 2 points"),
        ("values", [[1.0, True], [1.0, 2.0]], r"values\[0\]\[1\] is True, not a number"),
        ("values", [[1.0, "2"], [1.0, 2.0]], r"values\[0\]\[1\] is '2', not a number"),
        ("values", [[1.0, 1e999], [1.0, 2.0]], r"values\[0\]\[1\] is inf, not a finite number"),
        (
            "values",
            [[1.0, 10**400], [1.0, 2.0]],
            r"values\[0\]\[1\] is 1000.*, not a finite number",
        ),
        ("sizes", [1], r"sizes is \[1\], not an object"),
        ("sizes", {"x": [1, 2]}, "sizes has no 'y' of names"),
        ("sizes", {"x": [1.5, 2]}, r"sizes\.x\[0\] is 1.5, not a whole number"),
        ("sizes", {"z": [1, 2], "x": [1, 2], "y": [3, 4]}, "sizes has 'z', which is none of names"),
        ("sizes", {"x": [True, 2]}, r"sizes\.x\[0\] is True, not a whole number"),
        ("pair", [1.0], r"pair is \[1.0\], not a list of 2"),
        ("kind_of", "c", "kind_of is 'c', not one of 'a', 'b'"),
        ("tolerance", "low", "tolerance is 'low', not a number"),
        ("inner", {"n": 3}, r"inner is .*, not Inner"),
        ("inner", {"kind": "Inner", "n": None}, "n is None, not a whole number"),
        ("rows", [1], r"rows\[0\] is 1, not an object"),
    ],
)
def test_a_damaged_result_is_refused_by_file_and_field(tmp_path, field, value, message):
    path = RESULT.save(tmp_path / "r.json")
    record = json.loads(path.read_text()) | {field: value}
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=rf"r\.json: {message}"):
        Outer.load(path)


def test_a_result_is_json_and_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"written as JSON, not as r\.gguf; name it r\.json"):
        RESULT.save(tmp_path / "r.gguf")
    assert not list(tmp_path.iterdir())


def test_a_threshold_that_nothing_reaches_may_be_infinite():
    assert Roc.load(KEPT / "files" / "results" / "Roc.json").thresholds[0] == float("inf")


class Row(TypedDict):
    name: str
    seeds: tuple[float, ...]


class Ragged(Result):
    AXES = {
        "steps": "runs steps*",
        "cosines": "runs runs? steps*",
        "scores": "runs? steps*",
        "curve": "levels",
    }

    steps: dict[str, tuple[int, ...]]
    cosines: dict[str, dict[str, tuple[float, ...]]]
    scores: dict[str, tuple[float, ...]]
    levels: tuple[float, ...]
    curve: tuple[float, ...]
    rows: tuple[Row, ...]

    def _verify(self) -> None:
        if not self.rows:
            raise ValueError("rows is empty; one is needed")


RAGGED = Ragged(
    {"a": (1, 2), "b": (1, 2, 3)},
    {"a": {"b": (0.1, 0.2)}, "b": {"a": (0.1, 0.2, 0.3), "b": (1.0, 1.0, 1.0)}},
    {"b": (0.1, 0.2, 0.3)},
    (0.0, 0.5),
    (1.0, 2.0),
    ({"name": "a", "seeds": (1.0,)},),
)


def test_a_result_of_ragged_parts_comes_back_as_it_was(tmp_path):
    path = RAGGED.save(tmp_path / "r.json")
    assert Ragged.load(path) == RAGGED


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (
            "cosines",
            {"a": {"b": [0.1]}, "b": {}},
            r"cosines\['a'\]\['b'\] has 1 values for 2",
        ),
        ("cosines", {"a": {}}, "cosines has no 'b' of runs"),
        (
            "cosines",
            {"a": {"c": [1, 2]}, "b": {}},
            r"cosines\['a'\] has 'c', which is none of",
        ),
        ("scores", {"b": [0.1]}, r"scores\['b'\] has 1 values for 3 steps"),
        (
            "steps",
            {"a": [1, 2**64], "b": [1, 2, 3]},
            r"steps\.a\[1\] is .*, not a whole number",
        ),
        ("scores", {"b": []}, r"scores\['b'\] has 0 values for 3 steps"),
        ("rows", [{"name": "a"}], r"rows\[0\] is .*, not an object with name, seeds"),
        ("rows", [{"name": "a", "seeds": "1"}], r"rows\[0\]\.seeds is '1', not a list"),
        ("rows", [], "rows is empty; one is needed"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(tmp_path, field, value, message):
    path = RAGGED.save(tmp_path / "r.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(ValueError, match=rf"r\.json: {message}"):
        Ragged.load(path)
