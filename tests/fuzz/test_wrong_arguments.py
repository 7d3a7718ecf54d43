"""A few hundred of the wrong calls that `make fuzz` makes by the thousand."""

from __future__ import annotations

import sys

import pytest

from emlens._door import resolved
from emlens._kinds import check_of
from tests.fuzz.arguments import outcomes
from tests.fuzz.calls import NOT_CALLED, World, public_functions


@pytest.fixture(scope="module")
def world():
    with World() as found:
        yield found


def test_every_public_function_takes_part(world):
    missing = set(public_functions()) - set(world.calls())
    assert {name.split(".")[-1] for name in missing} == set(NOT_CALLED), missing


def test_the_calls_work_as_they_are(world):
    for name, call in world.calls().items():
        world.reset()
        try:
            call.function(**call.arguments)
        except Exception as error:
            raise AssertionError(f"{name} does not work") from error


def test_a_stream_is_read_whole_wherever_a_list_is_taken(world):
    read = 0
    for name, call in world.calls().items():
        module = vars(sys.modules[call.function.__module__])
        for argument, value in call.arguments.items():
            if not isinstance(value, list) or argument not in call.parameters:
                continue
            check = check_of(resolved(call.parameters[argument].annotation, module))
            if check is not None:
                found = list(check(argument, iter(value)))
                assert found == list(check(argument, value)), f"{name}, {argument}"
                read += 1
    assert read > 50


def test_wrong_arguments_are_refused_by_name_or_give_a_right_answer():
    counts, faults = outcomes(400, seed=0)
    assert not faults, "\n".join(faults)
    assert sum(counts.values()) == 400
