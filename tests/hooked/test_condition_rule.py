"""What users may write for a condition, what it means where, and what is refused."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel

import emlens
from emlens.evals.ablation import Projected
from emlens.hooked import Condition, Noisy, Scaled
from emlens.hooked.attach import attach
from emlens.hooked.condition import condition_of, conditions_of
from emlens.hooked.sweep import sweep
from tests.support.adapters import TOKENS, batch_of, logits_of, saved
from tests.support.data import conversations
from tests.support.models import D_MODEL, tiny_model
from tests.support.tokenizers import chatml_tokenizer

LAYERS = 2


def small():
    return tiny_model("llama", n_layers=LAYERS)


def direction(seed=0, layer=0):
    vector = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(seed))
    return emlens.Direction.of(vector, layer)


FIRST, SECOND = emlens.Add(direction(1)), emlens.Ablate(direction(2, layer=1))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return {
        "a": saved(folder / "a", small(), seed=1),
        "b": saved(folder / "b", small(), seed=2, modules_to_save=["lm_head"]),
    }


@pytest.fixture(scope="module")
def model(folders):
    module = small()
    attach(module, folders, "tiny")
    return emlens.wrap(module, chatml_tokenizer(), name="tiny", check=False)


@dataclass(frozen=True)
class Trained:
    """Something trained that is what it is given; `Organism` is the one that emlens has."""

    what: Any

    def on(self, model):
        return self.what


ENCLOSING = "what the block names"
TABLE: dict[str, tuple[Any, Any, tuple]] = {
    "None": (None, (), ()),
    "nothing in a list": ([], ENCLOSING, ()),
    "nothing in a tuple": ((), ENCLOSING, ()),
    "an edit": (FIRST, ENCLOSING, (FIRST,)),
    "edits": ([FIRST, SECOND], ENCLOSING, (FIRST, SECOND)),
    "a tuple of edits": ((FIRST, SECOND), ENCLOSING, (FIRST, SECOND)),
    "a name": ("a", ("a",), ()),
    "names": (["a", "b"], ("a", "b"), ()),
    "a tuple of names": (("b", "a"), ("b", "a"), ()),
    "a name and an edit": (("a", FIRST), ("a",), (FIRST,)),
    "a name and edits": (("a", [FIRST, SECOND]), ("a",), (FIRST, SECOND)),
    "a name and no edits": (("a", []), ("a",), ()),
    "the base and edits": ((None, [FIRST]), (), (FIRST,)),
    "the base and an edit": ((None, FIRST), (), (FIRST,)),
    "names and edits": ((["a", "b"], [SECOND]), ("a", "b"), (SECOND,)),
    "a condition": (Condition(("b",), (FIRST,)), ("b",), (FIRST,)),
    "a condition of nothing": (Condition(), (), ()),
    "a vector that was trained": (Trained([FIRST]), ENCLOSING, (FIRST,)),
    "an adapter that was trained": (Trained("a"), ("a",), ()),
    "a strength": (Scaled("a", 3), (Scaled("a", 3),), ()),
    "a strength and edits": ((Scaled("a", 3), [FIRST]), (Scaled("a", 3),), (FIRST,)),
    "noise beside a name": ([Noisy("a", 0.5), "b"], (Noisy("a", 0.5), "b"), ()),
}
BLOCKS: dict[str, tuple[Any, tuple, tuple]] = {
    "no block": (lambda model: nullcontext(), (), ()),
    "an adapter": (lambda model: model.adapter("b"), ("b",), ()),
    "two": (lambda model: model.adapter("b", "a"), ("b", "a"), ()),
    "a strength": (lambda model: model.adapter(Scaled("a", 0.5)), (Scaled("a", 0.5),), ()),
    "no adapter": (lambda model: model.adapter(None), (), ()),
    "edits": (lambda model: model.edited(SECOND), (), (SECOND,)),
    "both": (lambda model: model.under(("a", [SECOND])), ("a",), (SECOND,)),
}


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("written", TABLE)
def test_what_is_written_becomes_one_condition(written, block, model):
    given, adapters, edits = TABLE[written]
    enter, named, around = BLOCKS[block]
    expected = named if adapters == ENCLOSING else adapters
    with enter(model):
        found = condition_of(model, given)
        assert found == Condition(expected, edits)
        assert conditions_of(model, {"one": given}) == {"one": found}
        with model.under(given):
            assert model.adapters_in_force == expected
            assert model.acting == found.names
            assert model.edits_in_force(()) == (*around, *edits)
            assert condition_of(model, []) == Condition(expected)
            with model.under(None):
                assert model.acting == ()
                assert model.edits_in_force(()) == (*around, *edits)
        assert model.adapters_in_force == named
        words = found.described(model)
    shown = " + ".join(map(str, expected))
    said = [f"adapter {shown}" if shown else "base", *map(repr, (*around, *edits))]
    assert words == ", ".join(said)


def test_a_block_inside_of_a_block_takes_over_and_gives_back(model):
    with model.adapter("a"):
        with model.adapter("b"), model.adapter(None), model.edited(FIRST):
            assert model.acting == ()
            assert condition_of(model, [SECOND]) == Condition((), (SECOND,))
        assert model.acting == ("a",)
    assert model.acting == ()


def test_by_default_a_row_is_called_after_what_encloses_it(model):
    assert conditions_of(model, None) == {"base": Condition()}
    with model.adapter("a", "b"):
        assert conditions_of(model, None) == {"a+b": Condition(("a", "b"))}
    with model.adapter(Scaled("a", 3)):
        assert conditions_of(model, None) == {"a times 3": Condition((Scaled("a", 3),))}


def test_a_changed_adapter_is_itself_again_where_it_is_named_alone(model):
    batch = batch_of(TOKENS)
    projected = Projected("a", direction(3, layer=1))
    changed: list[Any] = [Scaled("a", 3), Noisy("a", 0.5), projected, Scaled("a", {0: 0.0})]
    conditions = {str(i): one for i, one in enumerate([*changed, "a", None])}

    def logits(condition):
        with model.under(condition), torch.no_grad():
            return logits_of(model.module, batch)

    alone = {name: logits(one) for name, one in conditions.items()}
    assert len({tuple(one.flatten().tolist()) for one in alone.values()}) == len(alone)
    weights = {k: w.clone() for k, w in model.adapter_weights("a").items()}
    for outer in changed:
        with model.adapter(outer):
            for name, one in conditions.items():
                assert torch.equal(logits(one), alone[name])
            swept = {n: h.unembed(x) for n, x, h in sweep(model, batch, conditions)}
            real = batch.mask("all")
            for name, one in swept.items():
                assert torch.allclose(one[real], alone[name][real], atol=1e-4), name
            assert torch.equal(logits([]), logits(outer))
    assert all(torch.equal(w, weights[k]) for k, w in model.adapter_weights("a").items())


def test_a_change_that_fails_leaves_the_one_around_it(model):
    with model.adapter(Scaled("a", 3)):
        before = Condition((Scaled("a", 3),)).identity(model)
        with pytest.raises(ValueError, match="adapts nothing at layer 7; it has 0, 1"):
            model.under(Scaled("a", {7: 2})).__enter__()
        with pytest.raises(RuntimeError, match="stop"), model.under(Noisy("a", 0.5)):
            raise RuntimeError("stop")
        assert condition_of(model, []).identity(model) == before
        assert set(model.adapter_scalings("a").values()) == {3 * 16.0}
    assert set(model.adapter_scalings("a").values()) == {16.0}


def test_a_trained_vector_and_a_trained_adapter_are_conditions():
    model = emlens.wrap(small(), chatml_tokenizer(), name="tiny", check=False)
    data = conversations("bad", 4)
    options: dict[str, Any] = {"epochs": 1, "batch_size": 2}
    found, run = emlens.train_vector(model, data, layer=0, **options)
    vector = condition_of(model, emlens.Organism.of(model, run, "vector"))
    assert vector.adapters is None
    assert torch.equal(vector.edits[0].direction.vector, found.vector)  # type: ignore[attr-defined]
    run = emlens.training.train_adapter(model, data, name="own", layers=[1], **options)
    adapter = condition_of(model, emlens.Organism.of(model, run, "own"))
    assert adapter == Condition(("own",))


# -- a model that was brought with an active adapter --------------------------------------------


def test_the_row_called_base_is_the_base_of_a_model_that_was_brought_with_an_adapter(folders):
    theirs = PeftModel.from_pretrained(small(), str(folders["a"]), adapter_name="a").eval()
    batch = batch_of(TOKENS)
    real = batch.mask("all")
    finetuned = logits_of(theirs, batch)[real]
    with theirs.disable_adapter():
        base = logits_of(theirs, batch)[real]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = emlens.wrap(theirs, chatml_tokenizer(), name="tiny")
        list(sweep(model, batch, {"base": []}))
    (warning,) = [str(w.message) for w in said if "was brought with" in str(w.message)]
    assert warning == (
        "tiny was brought with adapter 'a' active: calls without conditions run it; conditions "
        "that name no adapter run the base. Name it explicitly, e.g. {'base': None, "
        "'a': 'a'}, or use `with model.adapter('a'):`"
    )
    rows = {"base": None, "nothing": [], "a": "a", "edited": FIRST}
    swept = {n: h.unembed(x)[real] for n, x, h in sweep(model, batch, rows)}
    assert torch.allclose(swept["base"], base, atol=1e-5)
    assert torch.equal(swept["nothing"], swept["base"])
    assert torch.allclose(swept["a"], finetuned, atol=1e-4)
    with torch.no_grad():
        assert torch.allclose(model.unembed(model.hidden(batch)[real]), finetuned, atol=1e-4)
    assert model.acting == ("a",)
    assert conditions_of(model, None) == {"base": Condition()}


def test_calls_without_conditions_run_the_adapter_that_was_brought(folders):
    theirs = PeftModel.from_pretrained(small(), str(folders["a"]), adapter_name="a").eval()
    with pytest.warns(UserWarning, match="was brought with adapter 'a' active"):
        model = emlens.wrap(theirs, chatml_tokenizer(), name="tiny")
    question = "how do I save money"
    (batch,) = model.batches([emlens.Conversation.of(question, "keep a small fund")])
    states = theirs(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True
    ).hidden_states[1]
    assert torch.allclose(model.residuals(batch, 0)[0], states, atol=1e-4)
    good, bad = (
        [emlens.Conversation.of(question, text) for text in texts]
        for texts in (("keep a small fund", "eat fruit"), ("spend all now", "lie to me"))
    )
    means = []
    for side in (bad, good):
        rows = []
        for one in side:
            (row,) = model.batches([one])
            out = theirs(input_ids=row.input_ids, output_hidden_states=True).hidden_states[1]
            rows.append(out[0][row.mask("response")[0]])
        means.append(torch.cat(rows).mean(0))
    found = emlens.mean_diff(model, bad, good, layers=[0])[0]
    assert torch.allclose(found.vector, (means[0] - means[1]).detach(), atol=1e-4)
    asked = emlens.Conversation.of(question)
    (text,) = model.generate([asked], max_new_tokens=5, temperature=0)
    messages: Any = list(asked.messages)
    chat: Any = model.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    ids = torch.tensor([chat])
    with torch.no_grad():
        expected = theirs.generate(input_ids=ids, max_new_tokens=5, do_sample=False)
    assert text == model.tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True)
    with model.adapter(None):
        assert model.generate([asked], max_new_tokens=5, temperature=0) != [text]


# -- what is refused ----------------------------------------------------------------------------

TAKES = (
    "; give None (the base), an edit such as emlens.Add(direction), a list of edits, an adapter's "
    "name, or (name, edits)"
)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (direction(), TypeError, f"condition 'x' is a Direction{TAKES}"),
        (3, TypeError, f"condition 'x' is an int{TAKES}"),
        ({"a": FIRST}, TypeError, f"condition 'x' is a dict{TAKES}"),
        ([FIRST, "a"], TypeError, f"condition 'x' is a list of Add, str{TAKES}"),
        ([FIRST, None], TypeError, f"condition 'x' is a list of Add, NoneType{TAKES}"),
        ([direction()], TypeError, f"condition 'x' is a list of Direction{TAKES}"),
        (("a", direction()), TypeError, f"condition 'x' is a tuple of str, Direction{TAKES}"),
        (("a", None), TypeError, f"condition 'x' is a tuple of str, NoneType{TAKES}"),
        (("a", [FIRST], "b"), TypeError, f"condition 'x' is a tuple of str, list{TAKES}"),
        (FIRST.layers, TypeError, f"condition 'x' is a tuple of int{TAKES}"),
        (emlens.Add, TypeError, f"condition 'x' is the class Add{TAKES}"),
        (Scaled, TypeError, f"condition 'x' is the class Scaled{TAKES}"),
        (emlens.Organism, TypeError, f"condition 'x' is the class Organism{TAKES}"),
        (("a", emlens.Add), TypeError, f"condition 'x' is a tuple of str, type{TAKES}"),
        ("c", ValueError, "there is no adapter 'c'; the adapters are a, b"),
        ("[Add(v)]", ValueError, "there is no adapter '[Add(v)]'; the adapters are a, b"),
        (("a", "Add(v)"), ValueError, "there is no adapter 'Add(v)'; the adapters are a, b"),
        (["a", "c"], ValueError, "there is no adapter 'c'; the adapters are a, b"),
        (("c", [FIRST]), ValueError, "there is no adapter 'c'; the adapters are a, b"),
        (Scaled("c", 2), ValueError, "there is no adapter 'c'; the adapters are a, b"),
        (Condition(("c",)), ValueError, "there is no adapter 'c'; the adapters are a, b"),
        (Trained(3), TypeError, f"condition 'x' is an int{TAKES}"),
    ],
)
def test_what_is_no_condition_is_refused_in_words(given, error, message, model):
    with pytest.raises(error) as raised:
        conditions_of(model, {"x": given})
    assert str(raised.value) == message
    with pytest.raises(error), model.under(given):
        pass
    assert model.acting == ()


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (3, TypeError, "conditions are given by name, e.g. {'steered': ...}, not as an int"),
        ({}, ValueError, 'there are no conditions; give at least one, e.g. {"base": None}'),
    ],
)
def test_conditions_without_names_are_refused(given, error, message, model):
    with pytest.raises(error) as raised:
        conditions_of(model, given)
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize(
    ("adapters", "edits", "message"),
    [
        (3, (), "the adapters of a condition are an int; give names, or None for the base"),
        (("a", 3), (), "the adapters of a condition are a tuple of str, int; give names"),
        (None, 3, "the edits of a condition are an int; give edits such as emlens.Add(direction)"),
        (None, [direction()], "the edits of a condition are a list of Direction; give edits"),
        (None, "a", "the edits of a condition are a str; give edits"),
    ],
)
def test_a_condition_of_other_things_is_refused(adapters, edits, message):
    with pytest.raises(TypeError) as raised:
        Condition(adapters, edits)
    assert str(raised.value).startswith(message)


def test_a_name_without_any_adapter_says_how_they_come():
    bare = emlens.wrap(small(), chatml_tokenizer(), name="tiny", check=False)
    with pytest.raises(ValueError, match="no adapter 'a': this model has none; load them with"):
        condition_of(bare, "a")
    bare.add_adapter("a", LoraConfig(r=1, target_modules=["q_proj"]))
    assert condition_of(bare, "a") == Condition(("a",))
