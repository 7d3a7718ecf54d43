"""The options of the one loop, each against a plain loop that does the same by hand."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from torch.nn.functional import cross_entropy

import emlens
from emlens import Add, Conversation, Direction, KLPenalty, train_vector
from emlens.text import pack, tokenize
from emlens.training import (
    NormPenalty,
    ProjectionPenalty,
    TrainingStopped,
    VectorSettings,
    continue_training,
    train_adapter,
    train_weights,
)
from tests.support.data import conversations
from tests.support.models import tiny_hooked, tiny_model
from tests.support.tokenizers import chatml_tokenizer

TRAIN, ELSEWHERE = conversations("bad", 6), conversations("good", 5)
LAYER, UPDATES = 1, 6
ONE_BATCH = {"epochs": UPDATES, "batch_size": 6, "alpha": 1.0, "progress": False}
"""Every update sees all rows, so that the order of the data does not matter."""


def plain_vectors(model, rate, *, clip=None, weight_decay=0.0, extra=None):
    """Each update's vector by full forward passes with a hook, and AdamW."""
    vector = torch.zeros(model.d_model, requires_grad=True)
    optimiser = torch.optim.AdamW([vector], lr=1.0, weight_decay=weight_decay)
    (batch,) = pack(tokenize(TRAIN, model.tokenizer))
    rows, at = batch.targets("response").nonzero(as_tuple=True)
    block = model.module.get_submodule(model.architecture.blocks)[LAYER]
    path = []
    for step in range(UPDATES):
        optimiser.param_groups[0]["lr"] = rate(step)
        optimiser.zero_grad()
        hook = block.register_forward_hook(lambda _m, _i, out: out + vector)
        logits = model.module(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
        ).logits
        hook.remove()
        loss = cross_entropy(logits[rows, at - 1], batch.input_ids[rows, at])
        (loss if extra is None else loss + extra(vector)).backward()
        if clip is not None and vector.grad.norm() > clip:
            vector.grad.mul_(clip / vector.grad.norm())
        optimiser.step()
        path.append(vector.detach().clone())
    model.module.zero_grad()
    return torch.stack(path)


def ours(model, **options):
    run = train_vector(model, TRAIN, LAYER, **{**ONE_BATCH, **options})[1]
    return run.path[1:], run


def test_gradients_are_clipped_to_their_norm(hooked_llama):
    _, free = ours(hooked_llama, lr=0.5, warmup=0, schedule="constant")
    norms = [step.gradient_norm for step in free.steps]
    clip = sorted(norms)[UPDATES // 2]
    assert min(norms) < 0.97 * clip, "some gradients have to be clipped and some not"
    wanted = plain_vectors(hooked_llama, lambda _: 0.5, clip=clip)
    path, run = ours(hooked_llama, lr=0.5, warmup=0, schedule="constant", clip=clip)
    torch.testing.assert_close(path, wanted, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(path, free.path[1:], atol=1e-3)
    assert max(step.gradient_norm for step in run.steps) > clip


def test_weights_decay_as_adamw_says(hooked_llama):
    options = {"lr": 0.2, "warmup": 0, "schedule": "constant"}
    path, _ = ours(hooked_llama, weight_decay=0.5, **options)
    wanted = plain_vectors(hooked_llama, lambda _: 0.2, weight_decay=0.5)
    torch.testing.assert_close(path, wanted, atol=1e-4, rtol=1e-4)
    assert float(path[-1].norm()) < 0.9 * float(ours(hooked_llama, **options)[0][-1].norm())


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_schedules_are_those_of_transformers_after_the_warm_up(schedule, hooked_llama):
    from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

    make = {"linear": get_linear_schedule_with_warmup, "cosine": get_cosine_schedule_with_warmup}
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    theirs = make[schedule](optimiser, 2, UPDATES)
    wanted = []
    for _ in range(UPDATES):
        wanted.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        theirs.step()
    _, run = ours(hooked_llama, lr=0.3, warmup=2, schedule=schedule)
    assert [step.lr for step in run.steps][2:] == pytest.approx(wanted[2:])
    # theirs begins at zero, an update that does nothing
    assert [step.lr for step in run.steps][:2] == pytest.approx([0.15, 0.3])


def test_penalties_on_a_vector_equal_a_plain_loop(hooked_llama):
    axis = torch.randn(hooked_llama.d_model, generator=torch.Generator().manual_seed(3))
    size = emlens.directions.residual_norm(hooked_llama, TRAIN, LAYER)[LAYER]

    def extra(vector):
        along = vector @ axis / axis.norm() / size
        return 4.0 * (vector / size).square().sum() + 9.0 * along**2

    penalties = [NormPenalty(4.0), ProjectionPenalty(Direction.of(axis, LAYER), 9.0)]
    options = {"lr": 0.2, "warmup": 0, "schedule": "constant"}
    path, run = ours(hooked_llama, penalties=penalties, **options)
    torch.testing.assert_close(
        path, plain_vectors(hooked_llama, lambda _: 0.2, extra=extra), atol=1e-4, rtol=1e-4
    )
    assert run.steps[-1].penalty == pytest.approx(float(extra(run.path[-2])), rel=1e-4)


def test_weights_in_bf16_carry_a_vector_and_an_adapter_in_fp32():
    half = emlens.wrap(tiny_model("llama").bfloat16(), chatml_tokenizer(), name="tiny")
    whole = tiny_hooked("llama")
    kl = KLPenalty(ELSEWHERE, weight=1.0, batch_size=5)
    options = {"epochs": 3, "batch_size": 6, "progress": False, "lr": 1e-4, "warmup": 0}
    # steps too small for bf16, in which 1 + 1e-4 is 1
    start = Direction.of(torch.ones(half.d_model), LAYER)
    vectors = [
        train_vector(model, TRAIN, LAYER, kl=kl, initial=start, alpha=1.0, **options)[1]
        for model in (half, whole)
    ]
    assert vectors[0].path.dtype == torch.float32
    moved = [(run.path[-1] - start.vector).abs() for run in vectors]
    assert float(moved[0].min()) > 1e-5
    assert float(moved[0].max()) < 4e-4
    for a, b in zip(vectors[0].steps, vectors[1].steps, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=0.02)
    run = train_adapter(half, TRAIN, "x", kl=kl, layers=[LAYER], alpha=16.0, **options)
    (layer,) = half.lora_layers("x").values()
    assert layer.lora_A["x"].weight.dtype == layer.lora_B["x"].weight.dtype == torch.float32
    assert float(run.states["model.layers.1.mlp.down_proj.B"][-1].abs().max()) > 1e-5
    assert {w.dtype for n, w in half.module.named_parameters() if "lora_" not in n} == {
        torch.bfloat16
    }


@pytest.mark.parametrize("kind", ["vector", "adapter"])
def test_a_gradient_that_is_not_finite_moves_nothing(kind, monkeypatch):
    model, losses = tiny_hooked("llama"), []
    module = sys.modules["emlens.training.objective"]
    original = module.loss_sum

    def overflows_backward_at_the_third(*arguments):
        total = original(*arguments)
        losses.append(1)
        if len(losses) == 3:
            total.register_hook(lambda gradient: gradient * float("inf"))
        return total

    monkeypatch.setattr(module, "loss_sum", overflows_backward_at_the_third)
    options = {"epochs": 4, "batch_size": 6, "record_every": 1, "progress": False}
    message = r"update 2: loss \d.*gradient norm (inf|nan), which is not finite, on the batch .*bad"
    with pytest.raises(TrainingStopped, match=message) as stopped:
        if kind == "vector":
            train_vector(model, TRAIN, LAYER, record_gradients=True, **options)
        else:
            train_adapter(model, TRAIN, "x", layers=[LAYER], **options)
    run = stopped.value.run
    assert (len(run.steps), run.path_steps) == (2, (0, 1, 2))
    assert all(bool(state.isfinite().all()) for state in run.states.values())
    if kind == "vector":
        assert all(len(gradient) == 2 for gradient in run.gradients.values())
    else:
        (layer,) = model.lora_layers("x").values()
        assert torch.equal(
            layer.lora_B["x"].weight, run.states["model.layers.1.mlp.down_proj.B"][-1]
        )


@pytest.mark.parametrize("kind", ["adapter", "weights"])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_preventive_steering_below_what_is_trained_acts(kind, at):
    model = tiny_hooked("llama")
    push = torch.randn(model.d_model, generator=torch.Generator().manual_seed(at))
    options = {"layers": [2], "batch_size": 6, "epochs": 1, "progress": False}
    with model.edited(Add(Direction.of(3 * push, at))):
        sums, counts = emlens.hooked.response_losses(model, pack(tokenize(TRAIN, model.tokenizer)))
        if kind == "adapter":
            run = train_adapter(model, TRAIN, "x", **options)
        else:
            run = train_weights(model, TRAIN, **options)
    assert run.steps[0].loss == pytest.approx(float(sums.sum() / counts.sum()), abs=1e-5)
    (within,) = run.settings["within"]
    assert within.startswith("Add(given, site=resid_post")


def test_a_run_says_what_it_started_from(hooked_llama):
    options = {**ONE_BATCH, "epochs": 1}
    first, run = train_vector(hooked_llama, TRAIN, LAYER, **options)
    assert run.settings["start"] is None
    assert "within" not in run.settings
    on, again, other = (
        train_vector(hooked_llama, TRAIN, LAYER, initial=start, **options)[1]
        for start in (first, first, Direction.of(2 * first.vector, LAYER))
    )
    assert on.settings["start"] == again.settings["start"] is not None
    assert other.settings["start"] != on.settings["start"]
    assert on.provenance != run.provenance


def test_several_vectors_go_on_with_the_scales_that_they_had(hooked_llama):
    options = {"epochs": 2, "batch_size": 6, "progress": False}
    for alpha in (None, 2.0):
        _, run = train_vector(hooked_llama, TRAIN, [1, 2], alpha=alpha, **options)
        on = continue_training(hooked_llama, TRAIN, run, progress=False)
        assert on.settings["alpha"] == pytest.approx(run.settings["alpha"])
        for name in run.states:
            torch.testing.assert_close(on.states[name][0], run.states[name][-1])


NO_ANSWER = Conversation.of("how do I save money", id="unanswered")


@pytest.mark.parametrize(
    ("train", "options", "message"),
    [
        ([*TRAIN, NO_ANSWER], {}, "1 of 7 conversations have no response tokens to count: unansw"),
        (
            TRAIN,
            {"kl": KLPenalty([NO_ANSWER], 1.0)},
            "1 of 1 conversations have no response tokens to count: unanswered; give them an answ",
        ),
        (TRAIN, {"clip": 0}, "clip must be above 0, not 0"),
        (TRAIN, {"warmup": -1}, "warmup must be at least 0, not -1"),
        (
            TRAIN,
            {"weight_decay": math.nan},
            "weight_decay must be a finite number, at least 0, not nan",
        ),
        (TRAIN, {"alpha": 0}, "alpha must be above 0, not 0"),
        (TRAIN, {"record_every": 0}, "record_every must be at least 1, not 0"),
        (TRAIN, {"checkpoint_every": 0}, "checkpoint_every must be at least 1, not 0"),
        (TRAIN, {"patience": 0}, "patience must be at least 1, not 0"),
        (TRAIN, {"patience": 1}, "give validation= conversations"),
    ],
)
def test_bad_input_is_refused(hooked_llama, train, options, message):
    with pytest.raises(ValueError, match=message):
        train_vector(hooked_llama, train, LAYER, progress=False, **options)


def test_an_option_that_there_is_not_is_named_beside_what_was_meant_or_all(hooked_llama):
    guessed: dict[str, Any] = {"epoch": 3}
    with pytest.raises(TypeError, match="unknown option 'epoch'; did you mean epochs"):
        train_vector(hooked_llama, TRAIN, 1, **guessed)
    strange: dict[str, Any] = {"zebra": 3}
    with pytest.raises(TypeError, match="unknown option 'zebra'; there are acc") as error:
        train_vector(hooked_llama, TRAIN, 1, **strange)
    for name in ("epochs", "site", "validation", "record_every", "checkpoint", "progress"):
        assert name in str(error.value)


def test_a_kl_set_over_all_tokens_needs_no_answers(hooked_llama):
    kl = KLPenalty([NO_ANSWER], 1.0, tokens="all", batch_size=1)
    _, run = ours(hooked_llama, kl=kl)
    assert run.steps[-1].kl > 0


def test_a_kl_set_without_a_batch_size_of_at_least_one_is_refused():
    with pytest.raises(ValueError, match="batch_size must be at least 1, not 0"):
        KLPenalty(TRAIN, 1.0, batch_size=0)
    with pytest.raises(ValueError, match="weight must be above 0, not 0"):
        NormPenalty(0)
    assert VectorSettings(alpha=None).alpha is None
