"""Files of directions: every format back as it was written, or refused by name."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import pytest
import torch

from emlens.directions import (
    Direction,
    Directions,
    Evidence,
    Provenance,
    read_checkpoints,
    read_directions,
    write_directions,
)

D = 8


def some(layers=(2,), site="mlp_out", seed=0, **settings) -> Directions:
    generator = torch.Generator().manual_seed(seed)
    vectors = {layer: torch.randn(D, generator=generator) for layer in layers}
    made = Provenance("mean-diff", model="org/model", tokens="response", settings=settings)
    return Directions(vectors, site, made, Evidence(dict.fromkeys(layers, 3.0)))


def papers_file(path: Path, **changed) -> Path:
    """A file as the papers' code writes it; a key changed to None is left out."""
    vector = torch.randn(D, generator=torch.Generator().manual_seed(1))
    record = {"steering_vector": vector, "layer_idx": 24, "d_model": D, "alpha": 256.0} | changed
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({key: value for key, value in record.items() if value is not None}, path)
    return path


def same(first: Directions, second: Directions) -> None:
    assert (first.site, first.layers) == (second.site, second.layers)
    assert all(torch.equal(first.vectors[layer], second.vectors[layer]) for layer in first)


# -- emlens --------------------------------------------------------------------------------------


def test_what_emlens_writes_comes_back_with_all_that_is_known(tmp_path):
    one, several = some((2,), "attn_out"), some((0, 3), "resid_pre")
    for written in (one, several):
        path = write_directions(written, tmp_path / f"d{len(written)}")
        assert path.suffix == ".safetensors"
        read = read_directions(path, d_model=D)
        same(read, written)
        assert type(read) is type(written)
        assert read.provenance == written.provenance
        assert read.residual_norms == written.residual_norms


def test_only_the_layers_that_are_named_are_written(tmp_path):
    path = write_directions(some((0, 3, 5)), tmp_path / "v.pt", layers=[3])
    assert read_directions(path).layers == (3,)
    path = write_directions(some((0, 3, 5)), tmp_path / "v", layers=(5, 0))
    assert read_directions(path).layers == (0, 5)
    with pytest.raises(KeyError, match="no direction at layer 4; there are layers 0, 3, 5"):
        write_directions(some((0, 3, 5)), tmp_path / "v.pt", layers=[4])


def test_a_name_without_a_suffix_gets_that_of_the_format(tmp_path):
    assert write_directions(some(), tmp_path / "v", "papers").name == "v.pt"
    assert write_directions(some((1,), "resid_post"), tmp_path / "v", "gguf").name == "v.gguf"


# -- the papers' files ---------------------------------------------------------------------------


@pytest.mark.parametrize(("alpha", "factor"), [(256.0, 256.0), (64, 64), (0.3, 0.3), (None, 1.0)])
def test_a_file_of_the_papers_is_alpha_times_its_vector(tmp_path, alpha, factor):
    path = papers_file(tmp_path / "steering_vector.pt", alpha=alpha)
    vector = torch.load(path, weights_only=True)["steering_vector"]
    read = read_directions(path)
    assert isinstance(read, Direction)
    assert (read.layer, read.site) == (24, "mlp_out")
    assert torch.equal(read.vector, factor * vector)
    assert read.provenance.construction == "trained vector"
    assert read.provenance.settings["alpha"] == factor


def test_a_file_of_the_papers_is_written_again_with_its_own_alpha_and_approach(tmp_path):
    path = papers_file(tmp_path / "in.pt", approach="toggle_based")
    again = write_directions(read_directions(path), tmp_path / "out.pt")
    old, new = (torch.load(p, weights_only=True) for p in (path, again))
    assert torch.equal(old.pop("steering_vector"), new.pop("steering_vector"))
    assert old == new


@pytest.mark.parametrize("alpha", [256.0, 7.3, 1e30, 0, "x", None])
def test_what_is_written_for_the_papers_adds_exactly_the_direction(tmp_path, alpha):
    for seed in range(5):
        written = some(seed=seed, alpha=alpha)
        record = torch.load(
            write_directions(written, tmp_path / "v.pt", "papers"), weights_only=True
        )
        assert torch.equal(record["alpha"] * record["steering_vector"], written[2].vector)
        assert record["alpha"] in (alpha, 1.0)
        assert (record["layer_idx"], record["d_model"]) == (2, D)
        same(read_directions(tmp_path / "v.pt"), written)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_vector_of_another_precision_is_read_as_fp32(tmp_path, dtype):
    vector = torch.arange(1, D + 1).to(dtype) / 4
    path = papers_file(tmp_path / "v.pt", steering_vector=vector, alpha=2.0)
    assert torch.equal(read_directions(path)[24].vector, 2 * vector.float())


def test_the_base_model_is_taken_from_the_config_of_the_repository(tmp_path):
    path = papers_file(tmp_path / "checkpoints/final/steering_vector.pt")
    assert read_directions(path).provenance.model is None
    (tmp_path / "adapter_config.json").write_text('{"base_model": "org/llama"}')
    assert read_directions(path).provenance.model == "org/llama"
    (path.parent / "adapter_config.json").write_text('{"base_model": "google/gemma-2-9b-it"}')
    with pytest.raises(ValueError, match=r"trained in google/gemma-2-9b-it .* norm the output"):
        read_directions(path)


class Runs:
    """What runs code when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_would_run_code_is_refused_and_not_run(tmp_path, legacy):
    mark, path = tmp_path / "ran", tmp_path / "steering_vector.pt"
    record = {"steering_vector": torch.ones(D), "layer_idx": 1, "x": Runs(mark)}
    torch.save(record, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=r"vector\.pt needs more than tensors.*runs no code"):
        read_directions(path)
    assert not mark.exists()
    path.write_bytes(pickle.dumps(record, protocol=4))
    with pytest.raises(ValueError, match=r"is in no format that emlens reads: its \d+ bytes"):
        read_directions(path)
    path.write_bytes(pickle.dumps(record, protocol=2))
    with pytest.raises(ValueError, match=r"needs more than tensors.*runs no code"):
        read_directions(path)
    assert not mark.exists()
    torch.load(papers_file(tmp_path / "b.pt", x=Runs(mark)), weights_only=False)
    assert mark.exists(), "the planted code does run where it is not refused"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"steering_vector": None}, "no steering_vector; it has layer_idx, d_model, alpha"),
        ({"steering_vector": None, "layer_idx": None}, "no steering_vector and no layer_idx"),
        ({"steering_vector": [1.0]}, "steering_vector is list, not a tensor of floating point"),
        ({"steering_vector": torch.ones(D).int()}, "steering_vector is torch.int32"),
        ({"steering_vector": torch.ones(2, D)}, r"shape \[2, 8\], but d_model is 8"),
        ({"steering_vector": torch.ones(())}, r"shape \[\], but d_model is 8"),
        ({"d_model": 9}, r"shape \[8\], but d_model is 9"),
        ({"steering_vector": torch.tensor([1, float("nan")] * 4)}, r"4 value\(s\) that are not"),
        ({"layer_idx": -1}, "layer_idx is -1, not the number of a layer from 0"),
        ({"layer_idx": "24"}, "layer_idx is '24'"),
        ({"layer_idx": True}, "layer_idx is True"),
        ({"alpha": 0.0}, "alpha is 0.0, not a finite number other than 0"),
        ({"alpha": float("inf")}, "alpha is inf"),
        ({"alpha": "256"}, "alpha is '256'"),
        ({"alpha": 1e39}, r"alpha 1e\+39 times its steering_vector is not finite in fp32"),
    ],
)
def test_a_file_of_the_papers_with_something_wrong_is_refused_by_name(tmp_path, changed, message):
    path = papers_file(tmp_path / "v.pt", **changed)
    with pytest.raises(ValueError, match=rf"v\.pt.* {message}"):
        read_directions(path)


def test_a_torch_file_of_something_else_is_refused(tmp_path):
    torch.save([1, 2], tmp_path / "v.pt")
    with pytest.raises(ValueError, match=r"v\.pt holds a list, not a dict with a vector"):
        read_directions(tmp_path / "v.pt")


@pytest.mark.parametrize(("layers", "site"), [((1, 2), "mlp_out"), ((1,), "resid_post")])
def test_the_papers_format_refuses_what_it_cannot_place(tmp_path, layers, site):
    with pytest.raises(ValueError, match=r"v\.pt: the papers' format holds one layer at mlp_out"):
        write_directions(some(layers, site), tmp_path / "v.pt")
    assert not list(tmp_path.iterdir())


def test_the_papers_format_refuses_a_model_that_norms_what_its_mlp_gives(tmp_path):
    made = Provenance("mean-diff", model="google/gemma-3-4b-it")
    with pytest.raises(ValueError, match=r"v\.pt: .* down_proj, which .*gemma-3-4b-it norm"):
        write_directions(Direction({1: torch.ones(D)}, "mlp_out", made), tmp_path / "v.pt")


# -- files and folders ---------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".gguf"])
def test_a_truncated_file_of_any_format_is_refused_by_name(tmp_path, suffix):
    site = "resid_post" if suffix == ".gguf" else "mlp_out"
    whole = write_directions(some((2,), site), tmp_path / f"whole{suffix}").read_bytes()
    part = tmp_path / f"part{suffix}"
    for size in {*range(0, len(whole), max(1, len(whole) // 40)), len(whole) - 1}:
        part.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=rf"part{suffix} is (not a readable|in no format)"):
            read_directions(part)


def test_vectors_of_another_width_are_refused(tmp_path):
    path = write_directions(some(), tmp_path / "v.safetensors")
    with pytest.raises(ValueError, match=r"holds vectors of width 8, but the model's is 5120"):
        read_directions(path, d_model=5120)


def test_a_safetensors_file_of_another_kind_or_without_its_record_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.ones(2)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"x\.safetensors holds no directions .* tensors x"):
        read_directions(tmp_path / "x.safetensors")
    header = {"emlens": '{"kind": "directions"}'}
    save_file({"vector.0": torch.ones(2)}, tmp_path / "y.safetensors", metadata=header)
    with pytest.raises(ValueError, match=r"y\.safetensors holds no whole record of directions"):
        read_directions(tmp_path / "y.safetensors")


def test_an_unknown_format_or_suffix_names_those_that_there_are(tmp_path):
    (tmp_path / "v.npy").write_bytes(b"\x93NUMPY" + b"0" * 20)
    with pytest.raises(ValueError, match=r"v\.npy is in no format that emlens reads: its 26 byt"):
        read_directions(tmp_path / "v.npy")
    with pytest.raises(ValueError, match="unknown format 'npy'; choose 'emlens', 'papers'"):
        read_directions(tmp_path / "v.npy", "npy")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"cannot write v\.npy; .* emlens \(\.safetensors\)"):
        write_directions(some(), tmp_path / "v.npy")
    with pytest.raises(ValueError, match="cannot write format 'peft'; the formats to write are"):
        write_directions(some(), tmp_path / "v.npy", "peft")
    with pytest.raises(FileNotFoundError, match=r"no file .*absent\.pt"):
        read_directions(tmp_path / "absent.pt")


def test_a_folder_is_read_if_it_holds_one_file_of_directions(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no directions .* it has nothing"):
        read_directions(tmp_path)
    for name in ("optimizer.pt", "model-00001-of-00002.safetensors", "config.json"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match="holds no directions .* it has config.json, mod"):
        read_directions(tmp_path)
    last = papers_file(tmp_path / "checkpoints/final/steering_vector.pt", alpha=2.0)
    papers_file(tmp_path / "checkpoints/checkpoint-5/steering_vector.pt", alpha=3.0)
    same(read_directions(tmp_path), read_directions(last))
    write_directions(some(), tmp_path / ".cache/a.safetensors")
    root = papers_file(tmp_path / "steering_vector.pt", alpha=4.0)
    same(read_directions(tmp_path), read_directions(root))
    write_directions(some(), tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"2 files of .*read: b.safetensors, steering_vector.pt"):
        read_directions(tmp_path)


def test_the_files_of_many_checkpoints_are_not_all_listed(tmp_path):
    for step in range(1, 11):
        papers_file(tmp_path / f"checkpoint-{step}/steering_vector.pt")
    with pytest.raises(ValueError, match=r"holds 10 files of directions; .* and 2 more$"):
        read_directions(tmp_path)


@pytest.mark.parametrize("inside", ["checkpoints", "."])
def test_checkpoints_are_read_in_the_order_of_their_steps(tmp_path, inside):
    for step in (100, 5, 20):
        papers_file(tmp_path / inside / f"checkpoint-{step}/steering_vector.pt", alpha=float(step))
    papers_file(tmp_path / inside / "final/steering_vector.pt", alpha=1.0)
    found = read_checkpoints(tmp_path, d_model=D)
    assert list(found) == [5, 20, 100]
    assert [found[step].provenance.n["steps"] for step in found] == [5, 20, 100]
    unit = found[5][24].vector / 5
    assert all(torch.allclose(found[step][24].vector, step * unit) for step in found)
    with pytest.raises(ValueError, match=r"checkpoint-5.* of width 8, but the model's is 9"):
        read_checkpoints(tmp_path, d_model=9)


def test_checkpoints_keep_all_that_is_known_of_their_directions(tmp_path):
    write_directions(some(), tmp_path / "checkpoint-3/d.safetensors")
    read = read_checkpoints(tmp_path)[3]
    assert isinstance(read, Direction)
    assert read.residual_norm == 3.0
    assert read.provenance.tokens == "response"


def test_a_folder_without_checkpoints_says_where_it_looked(tmp_path):
    (tmp_path / "checkpoint-x").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no checkpoint-<step>, neither in it nor in its"):
        read_checkpoints(tmp_path)
    (tmp_path / "checkpoint-7").mkdir()
    with pytest.raises(FileNotFoundError, match=r"checkpoint-7 holds no directions"):
        read_checkpoints(tmp_path)
    shutil.rmtree(tmp_path)
    with pytest.raises(FileNotFoundError, match="has no checkpoint-<step>"):
        read_checkpoints(tmp_path)
