"""Numbers are what they were when they were kept: see `make.py`."""

from __future__ import annotations

import pytest

from tests.goldens import of_real
from tests.goldens.all_goldens import GROUPS
from tests.goldens.golden import GOLDENS, World, differences, plain, read_numbers

OTHER_ENGINE = [name for name, golden in GOLDENS.items() if golden.both_engines]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def other_world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("other"), "transformer_lens")


def unlike(name: str, world: World, looser: float = 1.0) -> list[str]:
    """Where a golden is not what was kept."""
    one = GOLDENS[name]
    kept = read_numbers(name.split(": ")[0])[name]
    return differences(kept, plain(one.compute(world)), looser * one.rtol, looser * one.atol, name)


@pytest.mark.parametrize("name", GOLDENS)
def test_the_numbers_are_the_kept_ones(name, world):
    lines = unlike(name, world)
    assert not lines, "\n".join(lines[:20])
    assert world.model.active_adapter is None


@pytest.mark.parametrize("name", OTHER_ENGINE)
def test_the_other_engine_gives_the_kept_numbers(name, other_world):
    lines = unlike(name, other_world, looser=2.0)
    assert not lines, "\n".join(lines[:20])


def test_the_numbers_of_the_real_model_are_the_kept_ones(smollm):
    found = {"real": plain(of_real.numbers(smollm))}
    lines = differences(read_numbers("real"), found, 1e-4, 1e-4)
    assert not lines, "\n".join(lines[:20])


def test_nothing_is_kept_that_is_not_computed():
    kept = {name for group in GROUPS for name in read_numbers(group)}
    assert kept == set(GOLDENS)


@pytest.mark.parametrize(
    ("found", "line"),
    [
        ({"a": [1, 2.001]}, "/a/1: 2.0 was kept, 2.001 found"),
        ({"a": [2, 2.0]}, "/a/0: 1 was kept, 2 found"),
        ({"a": [1]}, "/a: 2 were kept, 1 found"),
        ({"a": [1, 2.0], "b": 0}, "/b is new"),
        ({}, "/a is missing"),
        ({"a": [1, "nan"]}, "/a/1: 2.0 was kept, 'nan' found"),
    ],
)
def test_what_differs_is_named(found, line):
    assert differences({"a": [1, 2.0]}, found, 1e-5, 1e-6) == [line]


def test_rounding_and_new_fields_of_results_do_not_count():
    kept = {"kind": "LogOdds", "values": [1.0, 0.0]}
    found = {"kind": "LogOdds", "values": [1.000005, 5e-7], "later": 3}
    assert differences(kept, found, 1e-5, 1e-6) == []
