"""Text beyond a model's positions: refused with the row and its length, or cut where asked."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import emlens
from emlens import Conversation
from emlens.hooked.positions import max_positions
from emlens.text import Corpus, Document
from emlens.training import train_adapter
from tests.support.data import conversations
from tests.support.models import tiny_hooked, tiny_model
from tests.support.tokenizers import chatml_tokenizer
from tests.support.verbs import QUICK, VERBS, Case

LIMIT = 64
LONG = " please" * LIMIT
FAMILIES = ("llama", "gpt2", "gpt_neox", "mistral")


def limited(family="llama"):
    """A model of so few positions that it takes the short texts, and not the long ones."""
    module = tiny_model(family)
    config = module.config
    config.update({"n_positions" if family == "gpt2" else "max_position_embeddings": LIMIT})
    made = AutoModelForCausalLM.from_config(config)
    return emlens.wrap(made, chatml_tokenizer(), name=f"tiny-{family}")


def with_adapter():
    model = limited()
    train_adapter(model, conversations("bad", 2), "mine", rank=1, **QUICK)
    return model


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_refuses_a_text_beyond_the_positions(verb, tmp_path):
    model = with_adapter()
    with pytest.raises(ValueError, match=rf".* has \d+ tokens.* beyond the {LIMIT} positions of"):
        VERBS[verb](Case(model, tmp_path, LONG))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_as_long_as_the_model_is_read_and_one_token_more_is_not(family):
    model = limited(family)
    fits, beyond = (Corpus("c", (Document(f"d{n}", " the" * n),)) for n in (LIMIT, LIMIT + 1))
    assert model.max_positions == LIMIT
    assert model.hidden(model.batches(fits)[0]).shape[1] == LIMIT
    with pytest.raises(ValueError, match=rf"d{LIMIT + 1} has {LIMIT + 1} tokens; .*max_tokens=64"):
        model.batches(beyond)
    cut = model.batches(beyond, max_tokens=LIMIT)[0]
    assert torch.equal(model.hidden(cut), model.hidden(model.batches(fits)[0]))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_may_fill_the_positions_and_not_go_beyond(family):
    model = limited(family)
    asked = [Conversation.of("how", id="short"), Conversation.of("how" + " please" * 20, id="long")]
    (row,) = emlens.text.tokenize(asked[1:], model.template, generation_prompt=True)
    room = LIMIT - len(row)
    assert len(model.generate(asked, max_new_tokens=room)) == 2
    message = rf"long has {len(row)} tokens, and {room + 1} new ones may follow; that goes beyond"
    with pytest.raises(ValueError, match=message):
        model.generate(asked, max_new_tokens=room + 1)


def test_a_batch_made_elsewhere_is_refused_as_well():
    model, other = limited(), tiny_hooked("llama")
    (batch,) = other.batches(Corpus("c", (Document("d", " the" * (LIMIT + 1)),)))
    for call in (model.hidden, lambda batch: model.residuals(batch, 0)):
        with pytest.raises(ValueError, match=f"d has {LIMIT + 1} tokens"):
            call(batch)


def test_padding_does_not_count():
    model = limited()
    rows = Corpus("c", (Document("d", " the" * LIMIT),))
    (batch,) = model.batches(rows)
    wide = torch.nn.functional.pad(batch.input_ids, (0, 3))
    padded = type(batch)(
        input_ids=wide,
        **{
            name: torch.nn.functional.pad(getattr(batch, name), (0, 3))
            for name in (
                *("attention_mask", "position_ids", "response", "assistant_turn"),
                *("thinking", "closing"),
            )
        },
        index=batch.index,
        names=batch.names,
    )
    assert model.hidden(padded).shape[1] == LIMIT + 3


@pytest.mark.parametrize(
    ("kind", "settings", "limit"),
    [
        ("llama", {"max_position_embeddings": 300}, 300),
        ("gpt2", {"n_positions": 300}, 300),
        ("gptj", {"n_positions": 300}, 300),
        ("opt", {"max_position_embeddings": 300}, 300),
        ("mistral", {"max_position_embeddings": 300, "sliding_window": 16}, 300),
        ("mpt", {"max_seq_len": 300}, 300),
        ("bloom", {}, None),
        ("mamba", {}, None),
        ("falcon", {"alibi": True}, None),
        ("falcon", {"alibi": False, "max_position_embeddings": 300}, 300),
        (
            "llama",
            {
                "max_position_embeddings": 300,
                "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
            },
            600,
        ),
        (
            "qwen2",
            {
                "max_position_embeddings": 300,
                "rope_parameters": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 300,
                    "rope_theta": 1e4,
                },
            },
            1200,
        ),
        (
            "llama",
            {
                "max_position_embeddings": 800,
                "rope_parameters": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 100,
                    "rope_theta": 1e4,
                },
            },
            800,
        ),
        ("gemma3_text", {"max_position_embeddings": 300}, 300),
        ("gemma3", {"text_config": {"max_position_embeddings": 300}}, 300),
    ],
)
def test_positions_are_read_from_the_configuration(kind, settings, limit):
    assert max_positions(AutoConfig.for_model(kind, **settings)) == limit
