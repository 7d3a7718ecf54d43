"""Every kind of result: what it shows, what it keeps, and the level of its intervals."""

from __future__ import annotations

import json
from importlib import import_module

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

import emlens
from emlens._results import _KINDS, Result
from emlens.evals import Effect, Rates
from emlens.measures import LogOdds
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
    assert "<table" in found._repr_html_()
    assert "\n" not in str(found) and 10 < len(str(found)) < 200
    assert len(repr(found)) < 200
    assert type(found).load(found.save(tmp_path / "it.json")) == found


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
