"""llama.cpp's control vectors: written by emlens and by the plain library, read back."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from emlens.directions import Direction, Directions, Provenance, read_directions, write_directions
from tests.support.control_vectors import plain_file
from tests.support.disk import full_disk

D = 8


def some(layers=(1, 3), site="resid_post", **settings) -> Directions:
    generator = torch.Generator().manual_seed(0)
    vectors = {layer: torch.randn(D, generator=generator) for layer in layers}
    made = Provenance("mean-diff", model="org/model", n={"tokens": 7}, settings=settings)
    return (Direction if len(layers) == 1 else Directions)(vectors, site, made)


def numbers(seed: int, dtype="float32") -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(D).astype(dtype)


@pytest.mark.parametrize("layers", [(1, 3), (2,)])
def test_a_control_vector_comes_back_with_its_provenance(tmp_path, layers):
    written = some(layers)
    read = read_directions(write_directions(written, tmp_path / "v.gguf"))
    assert type(read) is type(written)
    assert (read.site, read.layers) == ("resid_post", layers)
    assert all(torch.equal(read.vectors[n], written.vectors[n]) for n in layers)
    assert read.provenance == written.provenance


def test_the_plain_library_reads_what_emlens_writes(tmp_path):
    written = some()
    reader = gguf.GGUFReader(write_directions(written, tmp_path / "v.gguf", model_hint="qwen2"))
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert fields["general.architecture"] == "controlvector"
    assert fields["controlvector.model_hint"] == "qwen2"
    assert fields["controlvector.layer_count"] == 2
    found = {tensor.name: tensor for tensor in reader.tensors}
    assert list(found) == ["direction.1", "direction.3"]
    for layer in written:
        tensor = found[f"direction.{layer}"]
        assert (tensor.tensor_type.name, list(tensor.shape)) == ("F32", [D])
        assert np.array_equal(tensor.data, written.vectors[layer].numpy())


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_direction_i_of_a_plain_file_acts_at_the_output_of_block_i(tmp_path, dtype):
    tensors = {f"direction.{i}": numbers(i, dtype) for i in (1, 2, 10)}
    read = read_directions(plain_file(tmp_path / "v.gguf", tensors), d_model=D)
    assert (read.site, read.layers) == ("resid_post", (1, 2, 10))
    for layer in read:
        expected = tensors[f"direction.{layer}"].astype("float32")
        assert np.array_equal(read.vectors[layer].numpy(), expected)
    assert read.provenance.construction == "control vector"
    assert read.provenance.settings == {"model_hint": "llama"}


def test_the_model_hint_of_a_file_is_kept_when_it_is_written_again(tmp_path):
    path = plain_file(tmp_path / "in.gguf", {"direction.1": numbers(1)}, hint="mistral")
    again = write_directions(read_directions(path), tmp_path / "out.gguf")
    field = gguf.GGUFReader(again).get_field("controlvector.model_hint")
    assert field is not None
    assert field.contents() == "mistral"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "control vector without any tensor direction.<layer>"),
        ({"output.weight": numbers(0)}, r"has a tensor 'output.weight', shape \[8\]"),
        ({"direction.1": np.ones((2, D), "f4")}, r"direction.1 is F32 of shape \[2, 8\]"),
        ({"direction.1": np.ones(D, "f8")}, r"direction.1 is F64 of shape \[8\]; one F32"),
        ({"direction.1": np.full(D, np.nan, "f4")}, r"direction.1 has 8 value\(s\) that are not"),
        (
            {"direction.1": np.ones(D, "f4"), "direction.2": np.ones(2 * D, "f4")},
            r"every layer needs one vector of the same width; got shapes .*\(16,\)",
        ),
    ],
)
def test_a_control_vector_with_something_wrong_is_refused_by_name(tmp_path, tensors, message):
    path = plain_file(tmp_path / "v.gguf", tensors)
    with pytest.raises(ValueError, match=rf"v\.gguf.* {message}"):
        read_directions(path)


def test_a_gguf_file_of_a_model_is_refused(tmp_path):
    path = plain_file(tmp_path / "v.gguf", {"direction.1": numbers(1)}, arch="llama")
    with pytest.raises(ValueError, match=r"a GGUF file of 'llama', not of 'controlvector'"):
        read_directions(path)


def test_a_damaged_key_is_refused_by_name(tmp_path):
    path = plain_file(tmp_path / "v.gguf", {"direction.1": numbers(1)}, hint="llama")
    path.write_bytes(path.read_bytes().replace(b"llama", b"ll\xffma"))
    with pytest.raises(ValueError, match=r"v\.gguf: controlvector\.model_hint is no text"):
        read_directions(path)


@pytest.mark.parametrize("record", ["{", "[]", "{}"])
def test_a_broken_provenance_is_refused(tmp_path, record):
    tensors = {"direction.1": numbers(1)}
    path = plain_file(tmp_path / "v.gguf", tensors, emlens_provenance=record)
    with pytest.raises(ValueError, match=r"v\.gguf: emlens\.provenance is no provenance"):
        read_directions(path)


@pytest.mark.parametrize(
    ("directions", "message"),
    [
        (some(site="mlp_out"), r"v\.gguf: a control vector acts at resid_post.*are at mlp_out"),
        (some((0, 1)), r"v\.gguf: llama.cpp refuses a file with direction.0.*with layers="),
    ],
)
def test_what_llama_cpp_would_not_add_there_is_not_written(tmp_path, directions, message):
    with pytest.raises(ValueError, match=message):
        write_directions(directions, tmp_path / "v.gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("missing", [1, 2000, 10_000])
def test_a_full_disk_is_an_error_that_names_the_file_and_keeps_the_old_one(tmp_path, missing):
    long = Directions(
        {n: torch.ones(704) * n for n in range(1, 9)}, "resid_post", some().provenance
    )
    path = write_directions(long, tmp_path / "v.gguf")
    before = path.read_bytes()
    with full_disk(len(before) - missing), pytest.raises(OSError, match=r"v\.gguf"):
        write_directions(long, path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["v.gguf"]


def test_a_control_vector_that_cannot_be_read_back_does_not_replace_the_old_one(
    tmp_path, monkeypatch
):
    path = write_directions(some(), tmp_path / "v.gguf")
    before = path.read_bytes()
    plain = gguf.GGUFWriter.add_tensor

    def other(self, name, values):
        plain(self, name, values + (name == "direction.3"))

    monkeypatch.setattr(gguf.GGUFWriter, "add_tensor", other)
    with pytest.raises(OSError, match=r"v\.gguf was not written completely, .*other vectors"):
        write_directions(some(), path)
    assert path.read_bytes() == before


def test_layer_0_can_be_left_out(tmp_path):
    path = write_directions(some((0, 1)), tmp_path / "v.gguf", layers=[1])
    assert read_directions(path).layers == (1,)
