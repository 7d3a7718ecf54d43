"""Paths of training: recorded, kept, and read from folders as the papers' code leaves them."""

from __future__ import annotations

import json
import math
import shutil
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from emlens import train_vector
from emlens.training import TrainingPath, read_path
from tests.support.adapters import saved
from tests.support.data import conversations

B = "model.layers.1.mlp.down_proj.B"
D = 6


def some_path(records=5) -> TrainingPath:
    generator = torch.Generator().manual_seed(0)
    states = {
        "b.A": torch.randn(records, 2, 3, generator=generator),
        "a.B": torch.randn(records, 4, generator=generator),
    }
    log = tuple({"step": 5 * n, "loss": 1.0 / (n + 1)} for n in range(records))
    steps = tuple(5 * n for n in range(records))
    return TrainingPath(steps, states, {"a.B": 2 * states["a.B"]}, log, {"lr": 0.1})


def state_of(step: int, every: int = 5) -> dict:
    """A `trainer_state.json` as transformers' Trainer writes it."""
    history: list[dict] = []
    for at in range(every, step + 1, every):
        logged = {"grad_norm": 0.5, "learning_rate": 1e-5, "loss": 2.0 - at / 100}
        history.append({"epoch": at / 100, **logged, "step": at})
        history.append({"epoch": at / 100, "eval_loss": 1.5, "eval_runtime": 3.0, "step": at})
    return {"global_step": step, "log_history": history, "save_steps": every, "epoch": 1.0}


def adapters(folder: Path, module, steps=(5, 10, 15), **settings) -> Path:
    for step in steps:
        place = saved(folder / "checkpoints" / f"checkpoint-{step}", module, seed=step, **settings)
        (place / "trainer_state.json").write_text(json.dumps(state_of(step)))
    saved(folder / "checkpoints" / "final", module, seed=99, **settings)
    return folder


def weights_of(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"checkpoint-{step}" / "adapter_model.safetensors"


@pytest.fixture
def llama(hooked_llama):
    return hooked_llama.module


# -- a path ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("patience", [None, 1, 3])
def test_a_path_rises_though_patience_puts_an_earlier_solution_back(hooked_llama, patience, every):
    text = conversations(8)
    # a learning rate that overshoots: the validation loss soon rises
    _, run = train_vector(
        hooked_llama,
        text[:4],
        1,
        validation=text[4:],
        patience=patience,
        epochs=6,
        lr=3.0,
        batch_size=2,
        record_every=every,
        progress=False,
    )
    losses = [step.validation for step in run.steps if step.validation is not None]
    if patience is not None:
        assert losses.index(min(losses)) < len(losses) - 1, "the case needs a rising loss"
    path = TrainingPath.of(run)
    ends = [len(run.steps)] if patience is None and len(run.steps) % every else []
    assert path.steps == (*range(0, len(run.steps) + 1, every), *ends)
    for name, state in path.states.items():
        assert torch.equal(state, run.states[name][: len(path)])


def test_flat_states_are_those_of_each_parameter_beside_each_other():
    path = some_path()
    flat = path.flat()
    assert flat.shape == (5, 10)
    for record, row in enumerate(flat):
        plain = [*path.states["b.A"][record].flatten(), *path.states["a.B"][record]]
        assert row.tolist() == [float(value) for value in plain]
    assert torch.equal(path.flat(part="B"), path.states["a.B"])
    assert torch.equal(path.flat(["b.A"]), path.states["b.A"].flatten(1))


def test_one_parameter_is_flattened_without_a_copy():
    path = some_path()
    assert path.flat(["b.A"]).data_ptr() == path.states["b.A"].data_ptr()


def test_a_part_of_the_path_has_its_records_gradients_and_log():
    part = some_path().between(4, 10)
    assert part.steps == (5, 10)
    assert torch.equal(part.states["a.B"], some_path().states["a.B"][1:3])
    assert torch.equal(part.gradients["a.B"], some_path().gradients["a.B"][1:3])
    assert [entry["step"] for entry in part.log] == [5, 10]
    with pytest.raises(ValueError, match="no record between steps 6 and 9; the path goes from 0"):
        some_path().between(6, 9)


def test_a_path_comes_back_as_it_was_saved(tmp_path):
    path = some_path()
    read = TrainingPath.load(path.save(tmp_path / "path.safetensors"))
    assert (read.steps, read.log, read.settings) == (path.steps, path.log, path.settings)
    assert list(read.states) == list(path.states)
    assert all(torch.equal(read.states[name], path.states[name]) for name in path.states)
    assert torch.equal(read.gradients["a.B"], path.gradients["a.B"])


@pytest.mark.parametrize(
    ("steps", "shapes", "gradient", "message"),
    [
        ((), {"a": (0, 2)}, None, "needs records and states; it has 0 and 1"),
        ((0, 1), {}, None, "it has 2 and 0"),
        ((0, 5, 5), {"a": (3, 2)}, None, "must rise; they are 0, 5, 5"),
        ((0, 5), {"a": (3, 2)}, None, r"states of a have shape \[3, 2\], but there are 2 records"),
        ((0, 5), {"a": (2, 2)}, (1, 2), r"gradients of a have shape \[1, 2\], its states \[2, 2\]"),
    ],
)
def test_a_path_that_does_not_hold_together_is_refused(steps, shapes, gradient, message):
    states = {name: torch.zeros(shape) for name, shape in shapes.items()}
    gradients = {} if gradient is None else {"a": torch.zeros(gradient)}
    with pytest.raises(ValueError, match=message):
        TrainingPath(steps, states, gradients)


def test_the_path_of_a_run_has_its_vectors_and_the_gradients_that_led_to_them(hooked_llama):
    _, run = train_vector(
        hooked_llama,
        conversations("bad", 6),
        1,
        epochs=5,
        batch_size=6,
        record_every=2,
        record_gradients=True,
        progress=False,
    )
    path = TrainingPath.of(run)
    assert path.steps == tuple(run.path_steps) == (0, 2, 4, 5)
    assert torch.equal(path.states["vector.1"], run.path)
    gradients = path.gradients["vector.1"]
    assert gradients[[0, 3]].isnan().all()
    assert torch.equal(gradients[1:3], run.gradients["vector.1"])
    assert [entry["step"] for entry in path.log] == [0, 1, 2, 3, 4]


# -- folders of adapters --------------------------------------------------------------------------


def test_checkpoints_of_adapters_are_read_as_their_files_hold_them(tmp_path, llama):
    folder = adapters(tmp_path, llama, layers_to_transform=[1], use_rslora=True, r=4)
    path = read_path(folder)
    assert path.steps == (5, 10, 15)
    assert list(path.states) == [B.replace(".B", ".A"), B]
    for record, step in enumerate(path.steps):
        for name, state in path.states.items():
            key = f"base_model.model.{name[:-2]}.lora_{name[-1]}.weight"
            assert torch.equal(state[record], load_file(weights_of(folder, step))[key])
    assert path.settings["scales"] == {B[:-2]: 16 / math.sqrt(4)}
    assert path.settings["use_rslora"] is True


def test_the_log_is_that_of_the_last_trainer_state(tmp_path, llama):
    path = read_path(adapters(tmp_path, llama), part="B")
    assert [entry["step"] for entry in path.log] == [5, 10, 15]
    wanted = {"step": 15, "loss": 1.85, "gradient_norm": 0.5, "lr": 1e-5, "validation": 1.5}
    assert path.log[-1] == wanted


def test_scales_follow_the_patterns_of_the_config(tmp_path, llama):
    settings = {"alpha_pattern": {"layers.1.mlp.down_proj": 8}, "r": 2, "lora_alpha": 16}
    path = read_path(adapters(tmp_path, llama, **settings))
    scales = path.settings["scales"]
    assert scales["model.layers.1.mlp.down_proj"] == 4
    assert scales["model.layers.0.mlp.down_proj"] == 8


def test_only_the_parameters_asked_for_are_read(tmp_path, llama, monkeypatch):
    folder = adapters(tmp_path, llama)
    asked = []

    @contextmanager
    def watched(*args, **kwargs):
        with safe_open(*args, **kwargs) as file:
            yield SimpleNamespace(
                keys=file.keys, get_tensor=lambda key: asked.append(key) or file.get_tensor(key)
            )

    monkeypatch.setattr("emlens._tensors.safe_open", watched)
    assert list(read_path(folder, names=[B]).states) == [B]
    assert asked == [f"base_model.model.{B[:-2]}.lora_B.weight"] * 3
    assert all(name.endswith(".B") for name in read_path(folder, part="B").states)


def test_a_start_with_b_at_zero_is_a_record_like_any_other(tmp_path, llama):
    folder = adapters(tmp_path, llama)
    tensors = load_file(weights_of(folder, 5))
    save_file({k: 0 * v if "_B" in k else v for k, v in tensors.items()}, weights_of(folder, 5))
    assert not read_path(folder, part="B").flat()[0].any()


def damage(folder: Path, llama, how: str) -> None:
    file = weights_of(folder, 10)
    tensors = load_file(file)
    key = f"base_model.model.{B[:-2]}.lora_B.weight"
    if how == "missing":
        file.unlink()
    elif how == "no config":
        (file.parent / "adapter_config.json").unlink()
    elif how == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif how == "nan":
        save_file({**tensors, key: tensors[key] * float("nan")}, file)
    elif how == "shape":
        save_file({**tensors, key: torch.ones(3, 1)}, file)
    elif how == "modules":
        save_file({k: v for k, v in tensors.items() if k != key}, file)
    elif how == "scale":
        shutil.rmtree(file.parent)
        saved(file.parent, llama, lora_alpha=64)
    elif how == "empty":
        save_file({"x": torch.ones(2)}, file)
    elif how == "log":
        last = weights_of(folder, 15).parent / "trainer_state.json"
        last.write_text(json.dumps(state_of(10)))


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("missing", FileNotFoundError, "checkpoint-10 has no adapter_model.safetensors, as"),
        ("no config", FileNotFoundError, "checkpoint-10 has no adapter_config.json"),
        ("truncated", ValueError, "checkpoint-10/adapter_model.* not a readable safetensors file"),
        ("nan", ValueError, f"checkpoint-10: {B} has values that are not finite"),
        ("shape", ValueError, rf"checkpoint-10: {B} has shape \[3, 1\], but \[\d+, 1\] in"),
        ("modules", ValueError, f"checkpoint-10 lacks {B}, compared with checkpoint-5"),
        ("scale", ValueError, "checkpoint-10 says .*64.* but checkpoint-5 says .*16"),
        ("empty", ValueError, "checkpoint-10.* has no LoRA weights; its tensors are x"),
        ("log", ValueError, "belongs to step 10, its folder to step 15"),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path, llama, how, error, message):
    folder = adapters(tmp_path, llama)
    damage(folder, llama, how)
    with pytest.raises(error, match=message):
        read_path(folder)


def test_what_is_not_there_is_named(tmp_path, llama):
    with pytest.raises(FileNotFoundError, match="has no checkpoint-<step>"):
        read_path(tmp_path)
    folder = adapters(tmp_path, llama)
    with pytest.raises(ValueError, match=r"has no parameter 'x'; it has model\.layers\.0"):
        read_path(folder, names=["x"])
    with pytest.raises(ValueError, match="unknown part 'C'; choose 'A' or 'B'"):
        read_path(folder, part="C")  # type: ignore[arg-type]


# -- folders of vectors ---------------------------------------------------------------------------


def vectors(folder: Path, steps=(2, 10, 30), layer=24) -> dict[int, torch.Tensor]:
    made = {}
    for step in steps:
        made[step] = torch.randn(D, generator=torch.Generator().manual_seed(step))
        place = folder / f"checkpoint-{step}"
        place.mkdir(parents=True)
        record = {"steering_vector": made[step], "layer_idx": layer, "d_model": D, "alpha": 256.0}
        torch.save(record, place / "steering_vector.pt")
        (place / "trainer_state.json").write_text(json.dumps(state_of(step)))
    return made


def test_checkpoints_of_vectors_come_in_order_and_as_they_act(tmp_path):
    made = vectors(tmp_path)
    for step in (10, 30):
        (tmp_path / f"checkpoint-{step}" / "gradients").mkdir()
        file = tmp_path / f"checkpoint-{step}" / "gradients" / "gradients.safetensors"
        save_file({"steering_vector": -made[step]}, file)
    path = read_path(tmp_path)
    assert path.steps == (2, 10, 30)
    wanted = torch.stack([256 * made[step] for step in path.steps])
    assert torch.equal(path.states["vector.24"], wanted)
    assert path.gradients["vector.24"][0].isnan().all()
    assert torch.equal(path.gradients["vector.24"][1:], -wanted[1:] / 256)
    assert path.settings["alpha"] == 256.0
    assert path.log[-1]["step"] == 30


def test_vectors_of_another_layer_or_width_are_refused_by_name(tmp_path):
    vectors(tmp_path / "layer", (2, 4))
    vectors(tmp_path / "layer", (6,), layer=23)
    with pytest.raises(ValueError, match="checkpoint-6 holds .* but checkpoint-2"):
        read_path(tmp_path / "layer")
    vectors(tmp_path / "width", (2, 4))
    record = {"steering_vector": torch.ones(9), "layer_idx": 24, "d_model": 9, "alpha": 256.0}
    torch.save(record, tmp_path / "width" / "checkpoint-4" / "steering_vector.pt")
    with pytest.raises(ValueError, match=r"checkpoint-4: vector.24 has shape \[9\], but \[6\]"):
        read_path(tmp_path / "width")
