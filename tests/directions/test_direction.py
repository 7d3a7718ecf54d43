"""Directions: algebra, what they refuse, files, and words."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from emlens import Direction, Directions, compare, mean_diff
from emlens.directions import Evidence, Provenance, cosine, random_direction
from emlens.directions.compare import null_band
from tests.support.data import conversations


def made(layers=(0, 1, 2), seed=0, site="resid_post", width=16, **kwargs):
    generator = torch.Generator().manual_seed(seed)
    vectors = {layer: torch.randn(width, generator=generator) for layer in layers}
    return Directions(
        vectors, site, Provenance("mean-diff", model="m", seed=seed), Evidence(**kwargs)
    )


def test_algebra_acts_layer_by_layer():
    a, b = made(seed=1), made(seed=2)
    for layer in a:
        x, y = a[layer].vector, b[layer].vector
        assert torch.equal((a + b)[layer].vector, x + y)
        assert torch.equal((a - b)[layer].vector, x - y)
        assert torch.allclose((2 * a / 4)[layer].vector, x / 2)
        assert torch.equal((-a)[layer].vector, -x)
        assert torch.isclose(a.unit()[layer].vector.norm(), torch.tensor(1.0))
        rest = a.orthogonal_to(b)[layer].vector
        assert abs(cosine(rest, y)) < 1e-6
        assert torch.isclose(a.scaled_to(5.0)[layer].vector.norm(), torch.tensor(5.0))


def test_a_layer_of_directions_is_a_direction_and_keeps_its_figures():
    errors = {layer: torch.full((16,), 0.1) for layer in range(3)}
    directions = made(residual_norms={1: 8.0}, standard_errors=errors, split_half={1: 0.5})
    one = directions[1]
    assert isinstance(one, Direction)
    assert (one.layer, one.residual_norm, one.split_half[1]) == (1, 8.0, 0.5)
    assert one.doses[1] == pytest.approx(one.norm / 8)
    assert torch.allclose((one * -3).standard_errors[1], torch.full((16,), 0.3))


def test_directions_do_not_change_when_the_tensors_they_came_from_do():
    vector = torch.ones(4)
    direction = Direction.of(vector, 0)
    vector.zero_()
    assert direction.norm == 2
    with pytest.raises(TypeError):
        direction.vectors[0] = vector


def everything(value, name="directions"):
    """What hangs below a value, with where it does: attributes, entries, and theirs."""
    yield name, value
    if isinstance(value, Mapping):
        for key in value:
            yield from everything(value[key], f"{name}[{key!r}]")
    elif isinstance(value, tuple):
        for place, one in enumerate(value):
            yield from everything(one, f"{name}[{place}]")
    elif isinstance(value, Directions | Provenance | Evidence):
        for attribute in dir(value):
            if not attribute.startswith("_") and not callable(getattr(value, attribute)):
                yield from everything(getattr(value, attribute), f"{name}.{attribute}")


def test_nothing_of_directions_can_be_changed():
    layers = (0, 1, 2)
    tensors = {layer: torch.ones(16) for layer in layers}
    known = Evidence(
        residual_norms=dict.fromkeys(layers, 2.0),
        standard_errors=tensors,
        split_half=dict.fromkeys(layers, 0.5),
        means=tensors,
        shuffled={layer: torch.ones(3, 16) for layer in layers},
        auroc=dict.fromkeys(layers, 0.5),
        measured={"accuracy": dict.fromkeys(layers, 0.5)},
    )
    settings = {"against": {"model": "m", "edits": ["a", {"b": [1]}]}}
    provenance = Provenance("x", data={"positive": "h"}, n={"positive": 1}, settings=settings)
    directions = Directions(tensors, "resid_post", provenance, known)
    before = [(name, repr(value)) for name, value in everything(directions)]
    for given in (tensors, settings, settings["against"]):
        given.clear()
    for one in (directions, directions[1]):
        for name, value in everything(one):
            if isinstance(value, Directions | Provenance | Evidence):
                for attribute in ("site", "provenance", "data", "n", "auroc", "invented"):
                    with pytest.raises((AttributeError, TypeError)):
                        setattr(value, attribute, None)
            elif isinstance(value, torch.Tensor):
                value.zero_()
            elif isinstance(value, Mapping) and not name.endswith((".norms", ".doses")):
                with pytest.raises(TypeError):
                    value[next(iter(value))] = None  # type: ignore[index]
    assert [(name, repr(value)) for name, value in everything(directions)] == before


def test_directions_of_one_layer_are_a_direction_whoever_makes_them(hooked_llama):
    one = made(layers=(4,))
    assert isinstance(one, Direction)
    assert isinstance(made().at([1]), Direction)
    assert not isinstance(made().at([0, 1]), Direction)
    sides = conversations("bad", 4), conversations("good", 4)
    assert mean_diff(hooked_llama, *sides, layers=2).layer == 2  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="a Direction has one layer, not 3; use Directions"):
        Direction(made().vectors, "resid_post", Provenance("x"))


def test_files_hold_everything_exactly(tmp_path):
    directions = made(
        residual_norms={0: 1.25},
        standard_errors={0: torch.rand(16)},
        split_half={0: 0.75, 1: float("nan")},
    )
    again = Directions.load(directions.save(tmp_path / "d"))
    assert again.provenance == directions.provenance
    assert again.site == "resid_post"
    assert again.residual_norms == {0: 1.25}
    assert all(torch.equal(again[i].vector, directions[i].vector) for i in directions)
    assert torch.equal(again.standard_errors[0], directions.standard_errors[0])
    assert isinstance(Directions.load(directions[2].save(tmp_path / "one.safetensors")), Direction)
    assert not list(tmp_path.glob("*tmp*"))


def test_files_of_another_kind_are_refused_by_name(tmp_path):
    path = made().save(tmp_path / "d.safetensors")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"d.safetensors is not a readable safetensors file"):
        Directions.load(path)
    save_file({"weight": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"holds no directions .*tensors weight"):
        Directions.load(tmp_path / "other.safetensors")
    with pytest.raises(FileNotFoundError, match="no file .*nothing"):
        Directions.load(tmp_path / "nothing.safetensors")
    with pytest.raises(ValueError, match="are kept as .safetensors; other formats are written by"):
        made().save(tmp_path / "d.gguf")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"vector.0": torch.tensor([1.0, torch.nan])}, "vector of layer 0 has 1 value"),
        ({"vector.x": torch.ones(2)}, "vector.x names no layer: 'x' is not a whole number from 0"),
        ({"vector.0": torch.ones(2), "weights": torch.ones(2)}, "no part of one: weights"),
        ({"vector.0": torch.ones(2), "vector.1": torch.ones(3)}, r"same width; got shapes"),
        ({"vector.0": torch.ones(2), "mean.0": torch.ones(3)}, r"means of layer 0 have shape"),
        ({"mean.0": torch.ones(2)}, "at least one layer"),
    ],
)
def test_a_file_with_something_wrong_is_refused_by_its_name(tmp_path, tensors, message):
    path = Direction.of(torch.ones(2), 0).save(tmp_path / "d.safetensors")
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    save_file(tensors, path, metadata=header)
    with pytest.raises(ValueError, match=rf"d\.safetensors holds no whole record.*{message}"):
        Directions.load(path)


def test_provenance_of_a_later_version_is_kept():
    record = {"construction": "x", "invented_later": 3}
    assert Provenance.from_dict(record).settings == {"invented_later": 3}
    with pytest.raises(ValueError, match="names no construction"):
        Provenance.from_dict({})


def test_compare_gives_signed_cosines_and_the_band_of_chance():
    a, b = made(seed=1, width=400), made(seed=2, width=400)
    found = compare({"a": a, "b": b, "minus a": -a})
    table = found.table().set_index(["first", "second", "layer"])
    assert table.loc[("a", "minus a", 1), "cosine"] == pytest.approx(-1)
    assert bool(table.loc[("a", "minus a", 1), "beyond chance"])
    low, high = null_band(400)
    assert high == pytest.approx(1.96 / 400**0.5, rel=0.01)
    assert low == -high
    chance = [cosine(torch.randn(400), torch.randn(400)) for _ in range(2000)]
    assert sum(low < c < high for c in chance) / 2000 == pytest.approx(0.95, abs=0.02)


def test_a_comparison_can_be_kept(tmp_path):
    from emlens.directions import Comparison

    found = compare({"a": made(), "b": made(seed=2)})
    assert Comparison.load(found.save(tmp_path / "c.json")) == found
    with pytest.raises(ValueError, match="does not hold a Comparison"):
        (tmp_path / "x.json").write_text('{"kind": "LogOdds"}')
        Comparison.load(tmp_path / "x.json")


def test_a_random_control_has_the_norm_and_place_of_its_model():
    one = made(residual_norms={1: 3.0})[1]
    control = random_direction(one, seed=4)
    assert (control.layer, control.site, control.residual_norm) == (1, "resid_post", 3.0)
    assert control.norm == pytest.approx(one.norm, rel=1e-6)
    assert torch.equal(control.vector, random_direction(one, seed=4).vector)
    assert abs(cosine(control.vector, random_direction(one, seed=5).vector)) < 0.9


def test_describe_says_the_convention_and_html_is_escaped():
    directions = Directions({0: torch.ones(4)}, "resid_post", Provenance("<b>bold</b>"))
    assert "output of block i, before the final norm" in directions.describe()
    assert "<b>bold</b>" not in directions._repr_html_()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Directions({}, "resid_post", Provenance("x")), "at least one layer"),
        (
            lambda: Directions({0: torch.ones(2), 1: torch.ones(3)}, "resid_post", Provenance("x")),
            r"same width; got shapes \{0: \(2,\), 1: \(3,\)\}",
        ),
        (lambda: Direction.of(torch.tensor([1.0, float("nan")]), 3), "layer 3 has 1 value"),
        (lambda: Direction.of(torch.ones(3), -1), "layer must be at least 0, not -1"),
        (
            lambda: made(standard_errors={1: torch.ones(3)}),
            r"the standard errors of layer 1 have shape \(3,\); the vector has width 16",
        ),
        (lambda: made(means={7: torch.ones(16)}), "there are means of layer 7, but no vector"),
        (lambda: made(means={1: torch.full((16,), torch.inf)}), "of the means, layer 1 has 16 val"),
        (lambda: made().cosine(made(width=8)), r"two vectors of one width, not shapes \(16,\) and"),
        (lambda: made().orthogonal_to(made(width=8)), "are of different widths"),
        (lambda: made()[9], "no direction at layer 9; there are layers 0, 1, 2"),
        (lambda: made() + made(layers=(0,)), "site, layers or width differ"),
        (lambda: made().cosine(made(site="attn_out")), "cannot compare resid_post with attn_out"),
        (lambda: made((0,)).cosine(made((1,))), "no layer in common"),
        (lambda: Direction.of(torch.zeros(3), 0).unit(), "is zero: it has no direction"),
        (lambda: compare({"a": made()}), "at least two"),
        (lambda: compare({"a": made(), "b": made(width=8)}), r"width \{'a': 16, 'b': 8\}"),
    ],
)
def test_bad_directions_are_refused(make, message):
    with pytest.raises((ValueError, KeyError), match=message):
        make()
