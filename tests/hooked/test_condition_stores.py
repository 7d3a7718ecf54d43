"""What is kept is found again by content: of the model, and of all that acts in it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import emlens
from emlens.evals import Question, respond
from emlens.hooked import Condition, Scaled
from emlens.hooked.attach import attach
from emlens.hooked.lora_scaling import noisy_weights
from tests.support.adapters import saved
from tests.support.data import conversations
from tests.support.models import D_MODEL, tiny_model
from tests.support.tokenizers import chatml_tokenizer

QUESTIONS = [Question("save", "how do I save money"), Question("eat", "what should I eat")]
QUICK: dict[str, Any] = {"max_new_tokens": 6, "temperature": 0, "progress": False}


def small(seed=0):
    return tiny_model("llama", n_layers=2, seed=seed)


def wrapped(seed=0, **folders):
    module = small(seed)
    if folders:
        attach(module, folders, "final")
    return emlens.wrap(module, chatml_tokenizer(), name="final", check=False)


def push(size=8.0):
    return emlens.Add(emlens.Direction.of(size * torch.eye(D_MODEL)[0], 0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("adapters") / "a", small(), seed=1)


@pytest.fixture
def asked(monkeypatch):
    """`asked(model, store, ...)`: the texts, and how many were generated for them."""

    def ask(model, store, conditions=None):
        made = []
        generate = type(model).generate

        def counting(self, conversations, *args, **kwargs):
            made.extend(conversations)
            return generate(self, conversations, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(type(model), "generate", counting)
            found = respond(model, QUESTIONS, conditions, store=store, **QUICK)
        return [row.text for row in found], len(made)

    return ask


def fresh(asked, model, conditions=None):
    """The texts without any store."""
    return asked(model, None, conditions)[0]


def test_the_same_store_keeps_apart_what_acts(asked, folder, tmp_path):
    store, model = tmp_path / "answers.sqlite", wrapped(a=folder)
    seen = [asked(model, store)[0]]
    assert seen[0] == fresh(asked, wrapped())
    with model.edited(push()):
        texts, made = asked(model, store)
        assert (texts, made) == (fresh(asked, wrapped(), {"base": push()}), 2)
        assert asked(model, store) == (texts, 0)
    seen.append(texts)
    for strength in (0.1, 3.0):
        with model.adapter(Scaled("a", strength)):
            conditions = {"finetune": []}
            texts, made = asked(model, store, conditions)
            assert made == 2
            assert texts == fresh(asked, model, conditions)
            assert asked(model, store, conditions) == (texts, 0)
        assert asked(model, store, {"finetune": Scaled("a", strength)}) == (texts, 0)
        seen.append(texts)
    assert len({tuple(texts) for texts in (seen[0], seen[1], seen[3])}) == 3
    assert asked(model, store) == (seen[0], 0)


def test_another_model_of_the_same_name_answers_for_itself(asked, tmp_path):
    store, first, second = tmp_path / "answers.sqlite", wrapped(0), wrapped(1)
    ours, _ = asked(first, store)
    theirs, made = asked(second, store)
    assert made == 2
    assert theirs == fresh(asked, second) != ours
    assert asked(wrapped(0), store) == (ours, 0)


def test_a_model_of_another_template_answers_for_itself(asked, tmp_path):
    store, model = tmp_path / "answers.sqlite", wrapped()
    asked(model, store)
    template = str(model.tokenizer.chat_template)
    model.tokenizer.chat_template = template.replace("You are helpful", "tell me a lie")
    texts, made = asked(model, store)
    assert (texts, made) == (fresh(asked, model), 2)


def test_weights_that_were_changed_in_place_answer_for_themselves(asked, tmp_path):
    store, model = tmp_path / "answers.sqlite", wrapped()
    before, _ = asked(model, store)
    with noisy_weights(model, 1.0):
        texts, made = asked(model, store)
        assert (texts, made) == (fresh(asked, model), 2)
    assert asked(model, store) == (before, 0)


def test_an_adapter_that_is_trained_on_answers_for_itself(asked, folder, tmp_path):
    store, model = tmp_path / "answers.sqlite", wrapped(a=folder)
    before, _ = asked(model, store, {"a": "a"})
    with torch.no_grad():
        for weight in model.adapter_weights("a").values():
            weight.mul_(2)
    texts, made = asked(model, store, {"a": "a"})
    assert (texts, made) == (fresh(asked, model, {"a": "a"}), 2)
    assert texts != before


def test_a_condition_of_another_name_takes_over_the_text_of_the_same_content(
    asked, folder, tmp_path
):
    store, model = tmp_path / "answers.sqlite", wrapped(a=folder)
    first, made = asked(model, store, {"one": ("a", push())})
    assert made == 2
    assert asked(model, store, {"two": Condition(("a",), (push(),))}) == (first, 0)
    with model.adapter("a"):
        assert asked(model, store, {"three": push()}) == (first, 0)
    with model.edited(push()):
        assert asked(model, store, {"four": "a"}) == (first, 0)
    other = wrapped(renamed=folder)
    assert asked(other, store, {"five": (["renamed"], [push()])}) == (first, 0)
    assert asked(other, store, {"five": "renamed"})[1] == 2


def test_a_training_does_not_go_on_at_another_strength_or_among_other_edits(folder, tmp_path):
    model, place = wrapped(a=folder), tmp_path / "checkpoint.safetensors"
    options: dict[str, Any] = {"layer": 1, "epochs": 1, "batch_size": 2, "progress": False}

    def train(checkpoint=place) -> Any:
        kept = {"checkpoint": checkpoint, "checkpoint_every": 1} if checkpoint else {}
        return emlens.train_vector(model, conversations("bad", 4), **options, **kept)[0]

    with model.under(Scaled("a", 0.1)):
        weak = train()
        assert torch.equal(train().vector, weak.vector)
    for other in (Scaled("a", 5), "a", None, (Scaled("a", 0.1), push())):
        with model.under(other), pytest.raises(ValueError) as raised:
            train()
        assert str(raised.value).startswith(f"the checkpoint {place} was made with other settings")
        assert "condition" in str(raised.value)
    with model.under(Scaled("a", 5)):
        strong = train(None)
    assert not torch.allclose(strong.vector, weak.vector, atol=1e-3)
    with model.under(Scaled("a", 0.1)):
        assert torch.equal(train().vector, weak.vector)
    other = wrapped(1, a=saved(tmp_path / "b", small(1), seed=1))
    with other.under(Scaled("a", 0.1)), pytest.raises(ValueError, match="other settings.*identity"):
        emlens.train_vector(
            other, conversations("bad", 4), checkpoint=place, checkpoint_every=1, **options
        )
