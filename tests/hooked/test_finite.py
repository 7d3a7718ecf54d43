"""Passes that are not finite: every verb says under what and on which row, and keeps nothing."""

from __future__ import annotations

import sqlite3
from contextlib import contextmanager

import pytest
import torch

import emlens
from emlens import Add, Conversation, Direction
from emlens.evals import Question, respond
from emlens.hooked import NonFiniteError, response_losses
from emlens.hooked.finite import late_checks
from emlens.hooked.load import ENGINES
from emlens.hooked.losses import Targets
from emlens.training import TrainingStopped, train_adapter, train_vector
from tests.support.data import conversations
from tests.support.models import tiny_hooked, tiny_model
from tests.support.tokenizers import chatml_tokenizer
from tests.support.verbs import QUICK, VERBS, Case

ASKED = [Conversation.of("how do I save money", id="long"), Conversation.of("how", id="short")]
OWN_PASS = "judge with LocalJudge"  # it grades without the edits in force


def huge(model, size=1e25, **options):
    return Add(Direction.of(torch.full((model.d_model,), size), 1), **options)


@contextmanager
def overflowing(model):
    """In half precision, with a block whose output is beyond it."""
    model.module.half()
    with torch.no_grad():
        model.module.model.layers[0].mlp.down_proj.weight.fill_(6e4)
    yield


@contextmanager
def poisoned(model):
    """A block that writes what is no number, in full precision."""
    with torch.no_grad():
        model.module.model.layers[0].mlp.down_proj.weight.fill_(float("nan"))
    yield


WAYS = {
    "half precision": overflowing,
    "no numbers": poisoned,
    "an edit": lambda model: model.edited(huge(model)),
}


def endless(model, logits):
    """Logits under which no answer ends."""
    logits = logits.clone()
    logits[..., model.tokenizer.all_special_ids] = -1e4
    return logits


def with_adapter():
    model = tiny_hooked("llama")
    train_adapter(model, conversations("bad", 2), "mine", rank=1, **QUICK)
    return model


def kept(folder):
    """Rows of stores and other files in a folder."""
    found = []
    for path in folder.rglob("*"):
        if path.suffix != ".sqlite":
            found.append(path.name)
            continue
        with sqlite3.connect(path) as store:
            tables = [n for (n,) in store.execute("select name from sqlite_master")]
            found += [
                row for t in tables if t == "rows" for row in store.execute(f"select * from {t}")
            ]
    return found


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("verb", VERBS)
def test_no_verb_takes_a_pass_that_is_not_finite(verb, way, tmp_path):
    if (verb, way) == ("train_weights", "half precision") or (verb, way) == (OWN_PASS, "an edit"):
        return  # refused for another reason; not reached
    model = with_adapter()
    case = Case(model, tmp_path)
    with (
        WAYS[way](model),
        pytest.raises(NonFiniteError, match=r"of .* under .* is not finite in float(16|32); "),
    ):
        VERBS[verb](case)
    assert not kept(tmp_path)
    assert model.adapters == ("mine",)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("where", ["all", "prompt", "response"])
@pytest.mark.parametrize("cached", [True, False])
def test_an_edit_beyond_the_norms_of_the_model_is_named_with_its_place(engine, where, cached):
    # 1e25 is finite, but its square is not: the model's own norms would make zeros of it
    model = emlens.wrap(tiny_model("llama"), chatml_tokenizer(), name="tiny", engine=engine)
    before = model.generate(ASKED, temperature=0, max_new_tokens=5)
    message = r"the residual of long at layer 1 \(resid_post\) under base, Add\(.*make the scale"
    with pytest.raises(NonFiniteError, match=message):
        edits = [huge(model, where=where)]
        model.generate(ASKED, edits, temperature=0, max_new_tokens=5, use_cache=cached)
    assert model.generate(ASKED, temperature=0, max_new_tokens=5) == before


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("edited", [True, False])
def test_generation_stops_at_the_first_step_whose_logits_are_not_finite(
    engine, temperature, edited
):
    model = emlens.wrap(tiny_model("llama"), chatml_tokenizer(), name="tiny", engine=engine)
    head, steps = model.module.get_output_embeddings(), []

    def fail_late(_module, _inputs, output):
        steps.append(len(output))
        output = endless(model, output)
        return output * float("inf") if len(steps) > 3 else output

    hook = head.register_forward_hook(fail_late)
    edits = [huge(model, 1e-3)] if edited else []
    with pytest.raises(NonFiniteError, match="a logit of (long|short) under base"):
        model.generate(ASKED, edits, temperature=temperature, max_new_tokens=50, seed=1)
    hook.remove()
    assert len(steps) == 4


def test_what_a_row_does_after_its_end_does_not_count():
    model = tiny_hooked("llama")
    end, steps = model.tokenizer.convert_tokens_to_ids("<|im_end|>"), []

    def end_the_first(_module, _inputs, output):
        output = endless(model, output)
        if not steps:
            output[0, -1, end] = 1e4
        else:
            output[0] = float("nan")
        steps.append(len(output))
        return output

    hook = model.module.get_output_embeddings().register_forward_hook(end_the_first)
    first, _ = model.generate(ASKED, temperature=0, max_new_tokens=5)
    hook.remove()
    assert first == ""
    assert len(steps) > 1


def test_padding_that_is_not_finite_does_not_count():
    model = tiny_hooked("llama")
    batch = model.batches([*conversations("good", 2), Conversation.of("how", "so", id="short")])[0]
    blank = ~batch.mask("all")
    assert blank.any()
    norm = model.module.get_submodule(model.architecture.norm)
    hook = norm.register_forward_hook(
        lambda _m, _i, out: out.masked_fill(blank[:, :, None], float("nan"))
    )
    hidden = model.hidden(batch)
    hook.remove()
    assert torch.isfinite(hidden[batch.mask("all")]).all()


def test_the_condition_is_called_by_its_name_and_answers_before_it_are_kept(tmp_path):
    model, store = tiny_hooked("llama"), tmp_path / "answers.sqlite"
    conditions = {"base": None, "steered": huge(model)}
    with pytest.raises(NonFiniteError, match=r"under condition 'steered' \(base, Add\("):
        respond(
            model,
            [Question("q", "how do I save money")],
            conditions,
            store=store,
            max_new_tokens=4,
            progress=False,
        )
    assert [row[0] for row in sqlite3.connect(store).execute("select count(*) from rows")] == [1]


def test_a_loss_beyond_the_head_is_named_where_hidden_states_are_finite():
    model = tiny_hooked("llama")
    batch = model.batches(conversations("bad", 2))[0]
    token = int(Targets.of(batch).ids[0])
    with torch.no_grad():
        model.module.get_output_embeddings().weight[token] = float("inf")
    with pytest.raises(NonFiniteError, match="the loss of bad-. under base is not finite"):
        response_losses(model, [batch])


def test_training_that_leaves_what_is_finite_stops_with_the_run_so_far(tmp_path):
    model = tiny_hooked("llama")
    path = tmp_path / "run.safetensors"
    with pytest.raises(TrainingStopped, match=r"update [1-9].* is not finite .*\.run") as stopped:
        train_vector(
            model,
            conversations("bad"),
            1,
            lr=1e30,
            alpha=1.0,
            clip=None,
            checkpoint=path,
            checkpoint_every=1,
            progress=False,
        )
    assert len(stopped.value.run.steps) >= 1
    assert isinstance(stopped.value, NonFiniteError)


def test_a_late_check_names_the_row_of_the_pass_that_it_belongs_to():
    model = tiny_hooked("llama")
    batches = model.batches(ASKED, token_budget=1)
    edits = [[], [huge(model)], [], []]
    named = r"the residual of short at layer 1.*Add"
    with pytest.raises(NonFiniteError, match=named), late_checks():
        for batch, acting in zip([*batches, *batches], edits, strict=True):
            model.residuals(batch, [2], edits=acting)


def test_late_checks_stop_a_long_loop_within_a_few_passes():
    model = tiny_hooked("llama")
    (batch,) = model.batches(ASKED[:1])
    passes = []
    with pytest.raises(NonFiniteError, match="long"), late_checks():
        for i in range(20):
            passes.append(i)
            model.residuals(batch, [2], edits=[huge(model)])
    assert len(passes) < 8


def test_an_error_that_comes_of_what_is_not_finite_is_that_of_the_late_check():
    model = tiny_hooked("llama")
    (batch,) = model.batches(ASKED[:1])
    with pytest.raises(NonFiniteError, match="long"), late_checks():
        model.residuals(batch, [2], edits=[huge(model)])
        raise RuntimeError("what followed")
    with late_checks():
        model.residuals(batch, [2])
