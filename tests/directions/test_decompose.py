"""Shared and specific parts of planted directions, and the tokens that a direction favours."""

from __future__ import annotations

import pytest
import torch

from emlens import Direction
from emlens.directions import (
    PromotedTokens,
    cosine,
    decompose,
    promoted_tokens,
)
from tests.support.tokenizers import chatml_tokenizer

WIDTH = 48


def vector(seed: int, width: int = WIDTH) -> torch.Tensor:
    drawn = torch.randn(width, generator=torch.Generator().manual_seed(seed))
    return drawn / drawn.norm()


def planted(common: float = 2.0, n: int = 3) -> dict[str, Direction]:
    """Directions with one part in common and a part of their own."""
    eye = torch.eye(WIDTH)
    return {f"d{i}": Direction.of((i + 1) * (common * eye[0] + eye[i + 1]), 4) for i in range(n)}


@pytest.mark.parametrize("by", ["mean", "component"])
def test_what_is_planted_in_all_is_shared_and_the_rest_is_specific(by):
    eye, found = torch.eye(WIDTH), decompose(planted(20.0), by=by)
    assert cosine(found.shared[4].vector, eye[0]) > 0.999
    for name, place in (("d0", 1), ("d1", 2), ("d2", 3)):
        own = found.specific[name][4].vector
        assert abs(float(own @ found.shared[4].vector)) < 1e-4
        assert float(own.abs().argmax()) == place
    table = found.table().set_index("name")
    assert (table["share"] > 0.99).all()
    assert found.shared.provenance.construction == f"shared by d0, d1, d2 ({by})"


def test_the_parts_add_up_to_the_direction():
    named = planted()
    found = decompose(named)
    for name, direction in named.items():
        whole = direction.along(found.shared)[4].vector + found.specific[name][4].vector
        assert torch.allclose(whole, direction.vector, atol=1e-6)


def test_unrelated_directions_share_what_chance_gives_and_nothing_with_the_others():
    named = {f"d{i}": Direction.of(vector(i, 4000), 1) for i in range(5)}
    table = decompose(named).table()
    assert table["share"].mean() == pytest.approx(1 / 5, rel=0.1)
    assert (table["share by chance"] == 1 / 5).all()
    low, high = decompose(named).null
    inside = table["cosine with the others"].between(1.5 * low, 1.5 * high)
    assert inside.all()
    axes = decompose(named).plot()
    assert axes.get_ylabel() == "cosine with the others"


def test_cosine_with_the_others_leaves_the_direction_itself_out():
    named = planted()
    rows = {row["name"]: row for row in decompose(named).rows}
    units = [d.vector / d.vector.norm() for d in named.values()]
    expected = cosine(units[0], (units[1] + units[2]) / 2)
    assert rows["d0"]["cosine with the others"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_promoted_tokens_are_those_of_the_plain_lens(hooked, family, tmp_path):
    model = hooked(family)
    direction = Direction.of(7 * vector(3, 32), 2)
    found = promoted_tokens(model, direction, k=3)
    weight = model.module.get_output_embeddings().weight.detach()
    norm = model.module.get_submodule(model.architecture.norm)
    with torch.no_grad():
        hidden = norm(direction.vector[None]) - norm(torch.zeros(1, 32))
        scores = (hidden @ weight.T)[0]
    order = scores.argsort(descending=True).tolist()
    table = found.table()
    tokenizer = chatml_tokenizer()
    assert table["promoted"].tolist() == [tokenizer.decode([i]) for i in order[:3]]
    assert table["suppressed"].tolist() == [tokenizer.decode([i]) for i in order[:-4:-1]]
    assert (table["promoted z"] > 0).all()
    assert (table["suppressed z"] < 0).all()
    assert PromotedTokens.load(found.save(tmp_path / "t.json")) == found


def test_a_direction_that_is_a_row_of_the_unembedding_promotes_its_token(hooked):
    model = hooked("llama")
    rows = model.module.get_output_embeddings().weight.detach()
    token = model.tokenizer.convert_tokens_to_ids(" rain")
    scale = model.module.get_submodule(model.architecture.norm).weight.detach()
    found = promoted_tokens(model, Direction.of(rows[token] * scale, 3), k=1)
    assert found.table()["promoted"].tolist() == [" rain"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: decompose(planted(), by="ica"), "unknown by 'ica'; choose 'mean'"),
        (lambda m: decompose({"a": planted()["d0"]}), "at least two named directions"),
        (
            lambda m: decompose({"a": planted()["d0"], "b": -planted()["d0"]}),
            "unit vectors of layer 4 cancel",
        ),
        (
            lambda m: decompose({"a": planted()["d0"], "b": Direction.of(torch.zeros(WIDTH), 4)}),
            "a vector of layer 4 is zero",
        ),
        (
            lambda m: decompose({"a": planted()["d0"], "b": Direction.of(vector(1), 5)}),
            "no layer in common",
        ),
        (
            lambda m: promoted_tokens(m, planted()["d0"]),
            "a direction has width 48, but tiny-llama has d_model 32",
        ),
        (
            lambda m: promoted_tokens(m, Direction.of(torch.zeros(32), 1)),
            "the vector of layer 1 is zero: it has no direction",
        ),
        (
            lambda m: promoted_tokens(m, Direction.of(vector(1, 32), 1), k=0),
            "k must be at least 1, not 0",
        ),
    ],
)
def test_bad_input_gets_one_clear_error(hooked_llama, call, message):
    with pytest.raises(ValueError, match=message):
        call(hooked_llama)
