"""Every kind of result: what it shows, what it keeps, and the level of its intervals."""

from __future__ import annotations

import json
import shutil
from importlib import import_module

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

import emlens
from emlens._results import _KINDS, Result, Shown
from emlens.directions import AdapterScalars, Direction, decompose
from emlens.evals import Effect, Rates, Responses, Scores
from emlens.fisher import TopDirections
from emlens.measures import LogOdds
from emlens.study import StudyResult
from emlens.watch import Roc
from tests.goldens.golden import KEPT

FILES = KEPT / "files" / "results"
ROOMS = ("directions", "edits", "evals", "fisher", "measures", "training", "watch")
for _room in ROOMS:
    import_module(f"emlens.{_room}")
BASES = {"Measured", "OnGrid", "UnderNoise"}
PUBLIC = sorted(
    name
    for name, kind in _KINDS.items()
    if kind.__module__.startswith("emlens.") and name not in BASES
)
FIXED = [name for name in PUBLIC if _KINDS[name].HOLDS_ENDS]
WORKED_OUT = {
    *("Ablation", "Agreement", "Confinement", "Divergence", "Effect", "Efficiency"),
    *("Influence", "LogOdds", "MatchedStrength", "Rates", "ScalarTable", "Stability"),
    *("TopicSplit", "WeightNoise"),
}
"""Results that hold what their intervals are worked out from."""


def kept(name: str) -> Result:
    """A result of a kind, as it was written before."""
    return _KINDS[name].load(FILES / f"{name}.json")


@pytest.mark.parametrize("name", PUBLIC)
def test_a_result_shows_draws_and_keeps_itself(name, tmp_path):
    found = kept(name)
    assert isinstance(found.table(), pd.DataFrame)
    assert found.plot(plt.figure().subplots()) is not None
    plt.close("all")
    assert "<table" in found._repr_html_() and "method" not in found._repr_html_()
    assert "\n" not in str(found) and 10 < len(str(found)) < 200
    assert len(repr(found)) < 200
    assert type(found).load(found.save(tmp_path / "it.json")) == found


DATA = {"AdapterScalars", "Decomposition", "Responses", "Scores", "StudyResult", "TopDirections"}


def data() -> list[Shown]:
    """What has a table and is no result: rows of stores, directions, a folder."""
    answers = Responses.load(KEPT / "files" / "answers" / "responses.jsonl")
    tokens = torch.zeros(2, dtype=torch.long)
    one = Direction.of(torch.tensor([1.0, 0.0]), 1)
    return [
        answers,
        Responses(()),
        Scores.load(KEPT / "files" / "answers" / "scores.jsonl"),
        Scores(()),
        AdapterScalars("x", "mlp_out", {1: torch.ones(2)}, tokens, tokens, tokens, ("talk",)),
        TopDirections({"top 1": one}, kept("ProfileScores")),  # type: ignore[arg-type]
        StudyResult.load(shutil.copytree(KEPT / "files" / "study", "study")),
        decompose({"a": one, "b": Direction.of(torch.ones(2), 1)}),
    ]


def test_what_has_a_table_and_is_no_result_is_one_line_and_a_table_in_a_notebook(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    several = data()
    assert {type(found).__name__ for found in several} == DATA
    for found in several:
        name = type(found).__name__
        assert str(found).startswith(name) and "\n" not in str(found) and len(str(found)) < 200
        assert repr(found) == f"<{found}>"
        assert "<table" in found._repr_html_()
        assert isinstance(found.table(), pd.DataFrame)


def test_every_public_class_with_a_table_shows_itself_in_one_way():
    rooms = [import_module(f"emlens.{room}") for room in emlens._ROOMS]
    classes = {value for room in rooms for value in vars(room).values() if isinstance(value, type)}
    others = {
        one.__name__ for one in classes if hasattr(one, "table") and not issubclass(one, Shown)
    }
    assert others == {"Direction", "Directions", "Monitor", "TrainingRun"}
    shown = {one.__name__ for one in classes if issubclass(one, Shown)}
    assert shown - set(PUBLIC) == {*DATA, "ProbeJudge"}


@pytest.mark.parametrize("name", PUBLIC)
def test_a_result_writes_what_it_was_read_from(name, tmp_path):
    before = json.loads((FILES / f"{name}.json").read_text())
    after = json.loads(kept(name).save(tmp_path / "it.json").read_text())
    same = {key: after[key] for key in before if key != "effect"}
    assert json.dumps(same) == json.dumps({k: v for k, v in before.items() if k != "effect"})
    assert "level" not in after


def test_results_are_equal_by_their_values_and_have_no_hash():
    first, other = kept("LogOdds"), kept("LogOdds")
    assert first == other and first != kept("Effect")
    values = first.values.copy()
    values[0, 0] += 1
    changed = LogOdds(first.conditions, first.ids, first.domains, values)
    assert changed != LogOdds(first.conditions, first.ids, first.domains, first.values)
    assert changed != changed.at_level(0.9)
    with pytest.raises(TypeError, match="unhashable"):
        hash(first)


def test_the_arrays_of_a_result_are_its_own_and_read_only():
    values = np.ones((1, 2))
    found = Effect("score", ("base",), ("a", "b"), values, (1.0,))
    values[:] = 0
    assert found.values.tolist() == [[1, 1]]
    with pytest.raises(ValueError, match="read-only"):
        found.values[0, 0] = 3
    assert found == Effect("score", ("base",), ("a", "b"), ((1, 1),), (1.0,))  # type: ignore[arg-type]


# -- the level --------------------------------------------------------------------------------


def widths(found: Result) -> np.ndarray:
    """Widths of all intervals of a table; NaN where there is none."""
    frame = found.table()
    lows = [name for name in frame if str(name) == "low" or str(name).endswith(" low")]
    lows += [name for name in frame if str(name).endswith("low [%]")]
    highs = [str(name).replace("low", "high") for name in lows]
    return np.array(frame[highs], dtype=float) - np.array(frame[lows], dtype=float)


def answers_to(questions: int) -> Rates:
    """Answers to more questions than were kept: of two, every level gives the same ends."""
    asked, n = tuple(map(str, range(questions))), questions
    scores = tuple(float(score) for score in np.random.default_rng(0).uniform(0, 60, n))
    return Rates(("base",), ("base",) * n, asked, ("d",) * n, scores, (90.0,) * n, "j")


@pytest.mark.parametrize("name", sorted(WORKED_OUT))
def test_a_level_reaches_every_interval_of_a_table(name, tmp_path):
    found = answers_to(20) if name == "Rates" else kept(name)
    narrow, plain, wide = (widths(found.at_level(level)) for level in (0.5, 0.95, 0.999))
    assert np.array_equal(plain, widths(found), equal_nan=True)
    known = np.isfinite(plain) & (plain > 0)
    assert known.any(0).all() or name in ("Ablation", "Rates", "TopicSplit", "Effect")
    assert (narrow <= plain)[known].all() and (plain <= wide)[known].all()
    assert ((narrow < wide) & known).any(0)[known.any(0)].all()
    half = found.at_level(0.5)
    assert half.level == 0.5 and type(half).load(half.save(tmp_path / "it.json")) == half
    assert "intervals at 50%" in half._repr_html_()


def test_the_results_with_intervals_are_those_that_work_them_out_or_hold_their_ends():
    shows = {name for name in PUBLIC if widths(kept(name)).size}
    assert not WORKED_OUT & set(FIXED)
    assert shows - set(FIXED) <= WORKED_OUT | {"LayerComparison"}


@pytest.mark.parametrize("name", FIXED)
def test_a_result_that_holds_the_ends_refuses_another_level(name):
    assert kept(name).at_level(0.95) == kept(name)
    with pytest.raises(ValueError, match=r"measure again inside of `with emlens.interval_level"):
        kept(name).at_level(0.9)


def test_a_result_has_the_level_that_it_was_measured_at():
    with emlens.interval_level(0.9):
        made = Rates(("a",), ("a",) * 2, ("x", "y"), ("d",) * 2, (10.0, 90.0), (90.0,) * 2, "j")
    assert made.level == 0.9 and kept("Rates").level == 0.95
    assert made.misaligned("a") == made.at_level(0.9).misaligned("a")


def test_a_saved_level_must_be_one(tmp_path):
    path = kept("Roc").save(tmp_path / "it.json")
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"level": 95.0}))
    with pytest.raises(ValueError, match=r"it\.json: level is 95\.0, not between 0 and 1"):
        Roc.load(path)
