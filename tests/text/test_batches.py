"""Packing: the budget, both padding sides, and the order given back."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from emlens.text import TokenMask, pack
from emlens.text.batches import restore
from emlens.text.tokens import TokenRow


def row(length, name="row", response=0):
    flags = (False,) * (length - response) + (True,) * response
    return TokenRow(tuple(range(1, length + 1)), flags, flags, name)


@given(st.lists(st.integers(1, 40), max_size=30), st.integers(1, 100), st.booleans())
def test_batches_hold_every_row_once_within_the_budget(lengths, budget, sort):
    rows = [row(n, f"r{i}") for i, n in enumerate(lengths)]
    batches = pack(rows, token_budget=budget, sort=sort)
    assert sorted(i for b in batches for i in b.index) == list(range(len(rows)))
    for batch in batches:
        n, longest = batch.shape
        assert n * longest <= budget or n == 1
        for i, place in enumerate(batch.index):
            assert batch.attention_mask[i].sum() == lengths[place]
            assert batch.names[i] == f"r{place}"
    values = [[lengths[place] for place in batch.index] for batch in batches]
    assert restore(values, batches) == lengths


def test_the_longest_rows_come_first():
    batches = pack([row(2), row(9), row(5)], token_budget=10)
    assert [batch.index for batch in batches] == [(1,), (2, 0)]


@pytest.mark.parametrize("side", ["left", "right"])
def test_masks_and_positions_follow_the_padding_side(side):
    (batch,) = pack([row(4, response=2), row(2, response=1)], padding_side=side, pad_id=99)
    short = {"left": [99, 99, 1, 2], "right": [1, 2, 99, 99]}[side]
    assert batch.input_ids.tolist() == [[1, 2, 3, 4], short]
    real = batch.attention_mask.bool()
    assert batch.position_ids[1][real[1]].tolist() == [0, 1]
    assert batch.mask("response")[real].tolist() == [False, False, True, True, False, True]
    assert batch.mask("prompt")[real].tolist() == [True, True, False, False, True, False]
    assert not batch.mask("all")[~real].any()
    assert not batch.mask("prompt")[~real].any()
    assert batch.n_tokens == 6


def test_a_batch_moves_to_a_device_as_it_is():
    (batch,) = pack([row(4, response=2), row(2, response=1)])
    moved = batch.to("meta")
    for name in ("input_ids", "attention_mask", "position_ids", "response", "thinking"):
        before, after = getattr(batch, name), getattr(moved, name)
        assert after.device.type == "meta"
        assert (after.shape, after.dtype) == (before.shape, before.dtype)
    assert batch.to("cpu") is batch


def test_the_first_token_of_a_row_is_never_a_target():
    (batch,) = pack([row(3), row(1)], padding_side="left")
    assert batch.targets("all").tolist() == [[False, True, True], [False, False, False]]


def test_rows_may_be_limited_and_keep_their_order():
    batches = pack([row(1), row(2), row(3)], max_rows=2, sort=False)
    assert [batch.index for batch in batches] == [(0, 1), (2,)]


def test_moving_to_the_same_device_is_no_copy():
    (batch,) = pack([row(3)])
    assert batch.to("cpu") is batch
    assert batch.to(torch.device("meta")).input_ids.device.type == "meta"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pack([row(1)], token_budget=0), "token_budget must be at least 1"),
        (lambda: pack([row(1)], padding_side="top"), "unknown padding_side 'top'"),
        (lambda: pack([row(0, "nil")]), "nil has no tokens"),
        (
            lambda: pack([row(1)])[0].mask("answer"),  # type: ignore[arg-type]
            f"unknown tokens 'answer'; choose {', '.join(get_args(TokenMask)[:-1])} or last",
        ),
        (lambda: restore([[1, 2]], pack([row(1)])), "2 values for a batch of 1 rows"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
