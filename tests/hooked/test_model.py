"""The interface: what is read, what is refused, and that the user's model is left alone."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

import emlens
from emlens import Add, Direction
from emlens.edits import Shift
from emlens.hooked.check import self_check
from emlens.hooked.load import ENGINES
from emlens.hooked.sites import SITES
from emlens.text import pack, tokenize
from tests.support.data import conversations
from tests.support.models import FAMILIES, SEQUENTIAL, tiny_model
from tests.support.state import state_of


@pytest.fixture
def batch(hooked_llama):
    (packed,) = pack(tokenize(conversations("good", 4), hooked_llama.tokenizer))
    return packed


@pytest.fixture(scope="module")
def brought(tiny_tokenizer):
    """`brought(engine)`: a user's own model, and the same wrapped."""

    @cache
    def make(engine):
        module = tiny_model("llama", seed=1)
        return module, emlens.wrap(module, tiny_tokenizer, engine=engine, name="tiny-llama")

    return make


def push(model, layer=1, site="resid_post", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Add(Direction.of(torch.randn(model.d_model, generator=generator), layer, site))


@pytest.mark.parametrize("family", FAMILIES)
def test_resid_post_is_the_hidden_state_before_the_final_norm(hooked, family):
    model = hooked(family)
    (batch,) = pack(tokenize(conversations("good", 3), model.tokenizer))
    read = model.residuals(batch, "all")
    with torch.no_grad():
        states = model.module(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            output_hidden_states=True,
        ).hidden_states
    real = batch.mask("all")
    for layer in range(model.n_layers - 1):
        assert torch.allclose(read[layer][real], states[layer + 1][real], atol=1e-5)
    last = model.n_layers - 1
    assert not torch.allclose(read[last][real], states[last + 1][real], atol=1e-2)
    assert torch.allclose(model.hidden(batch)[real], states[last + 1][real], atol=1e-5)


@pytest.mark.parametrize("family", SEQUENTIAL)
def test_the_sites_of_a_block_add_up(hooked, family):
    model = hooked(family)
    (batch,) = pack(tokenize(conversations("good", 3), model.tokenizer))
    at = {site: model.residuals(batch, 2, site)[2] for site in SITES}
    assert torch.allclose(at["resid_pre"] + at["attn_out"], at["resid_mid"], atol=1e-5)
    assert torch.allclose(at["resid_mid"] + at["mlp_out"], at["resid_post"], atol=1e-5)
    assert torch.allclose(at["resid_pre"], model.residuals(batch, 1)[1], atol=1e-6)


@pytest.mark.parametrize("family", SEQUENTIAL)
@pytest.mark.parametrize("site", SITES)
def test_an_edit_at_any_site_changes_every_row(hooked, family, site):
    model = hooked(family)
    (batch,) = pack(tokenize(conversations("good", 4), model.tokenizer))
    change = (model.hidden(batch, [push(model, 1, site)]) - model.hidden(batch)).abs().amax((1, 2))
    assert bool((change > 1e-4).all())


def test_adding_at_the_middle_adds_to_the_block_output_through_the_stream(hooked_llama, batch):
    edit = push(hooked_llama, 1, "resid_mid")
    before = hooked_llama.residuals(batch, 1, "resid_mid")[1]
    after = hooked_llama.residuals(batch, 1, "resid_mid", edits=[edit])[1]
    assert torch.allclose(after - before, edit.direction[1].vector.expand_as(before), atol=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_reads_stop_after_the_deepest_layer_and_never_run_the_head(brought, batch, engine):
    _, model = brought(engine)
    blocks = model.module.get_submodule(model.architecture.blocks)
    parts = {str(i): block.mlp for i, block in enumerate(blocks)}
    parts["head"] = model.module.get_output_embeddings()
    ran = []
    hooks = [
        part.register_forward_hook(lambda *_, name=name: ran.append(name))
        for name, part in parts.items()
    ]
    try:
        model.residuals(batch, [0, 2])
        assert ran == ["0", "1", "2"]
        ran.clear()
        model.residuals(batch, 1, pool=lambda h: h.mean(1))
        assert ran == ["0", "1"]
        ran.clear()
        model.hidden(batch)
        assert ran == ["0", "1", "2", "3"]
    finally:
        for hook in hooks:
            hook.remove()


def test_layers_may_be_numbers_of_any_kind(hooked_llama, batch):
    expected = hooked_llama.residuals(batch, [1, 3])
    for layers in (np.array([1, 3]), torch.tensor([3, 1]), range(1, 4, 2), [np.int64(1), -1]):
        found = hooked_llama.residuals(batch, layers)
        assert list(found) == [1, 3]
        assert all(torch.equal(found[layer], expected[layer]) for layer in found)


def test_a_pool_reduces_inside_of_the_hook(hooked_llama, batch):
    pooled = hooked_llama.residuals(batch, [1, 2], pool=lambda residual: residual.sum(1))
    whole = hooked_llama.residuals(batch, [1, 2])
    assert pooled[2].shape == (len(batch), hooked_llama.d_model)
    assert torch.equal(pooled[1], whole[1].sum(1))


def test_edited_puts_edits_in_force_and_takes_them_back_when_a_call_raises(hooked_llama, batch):
    plain = hooked_llama.hidden(batch)
    edit = push(hooked_llama)
    with pytest.raises(ZeroDivisionError), hooked_llama.edited(edit):
        assert torch.equal(hooked_llama.hidden(batch), hooked_llama.hidden(batch, [])), "stable"
        assert not torch.equal(hooked_llama.hidden(batch), plain)
        raise ZeroDivisionError
    assert torch.equal(hooked_llama.hidden(batch), plain)
    assert torch.equal(hooked_llama.prefix(batch, 1)[1], hooked_llama.residuals(batch, 1)[1])


def test_the_gradient_reaches_a_shift_and_equals_that_of_the_unsplit_model(hooked_llama, batch):
    from emlens.hooked.losses import Targets, loss_sum

    targets = Targets.of(batch)

    def gradient(resume):
        vector = torch.zeros(hooked_llama.d_model, requires_grad=True)
        hidden = hooked_llama.hidden(batch, [Shift(vector, 1)], resume, grad=True)
        loss_sum(hooked_llama, targets.predictors(hidden), targets.ids).backward()
        return vector.grad

    def plain():
        vector = torch.zeros(hooked_llama.d_model, requires_grad=True)
        block = hooked_llama.module.model.layers[1]
        hook = block.register_forward_hook(lambda _m, _i, out: out + vector)
        logits = hooked_llama.module(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
        ).logits
        hook.remove()
        predicted = logits[targets.rows, targets.positions - 1]
        torch.nn.functional.cross_entropy(predicted, targets.ids, reduction="sum").backward()
        return vector.grad

    expected = plain()
    hooked_llama.module.zero_grad()
    with hooked_llama.frozen():
        assert torch.allclose(gradient(None), expected, atol=1e-4)
        resumed = gradient((1, hooked_llama.prefix(batch, 1)[1]))
        assert torch.allclose(resumed, expected, atol=1e-4)
    assert all(weight.requires_grad for weight in hooked_llama.module.parameters())
    assert all(weight.grad is None for weight in hooked_llama.module.parameters())


def test_the_self_check_refuses_a_model_whose_hooks_miss_a_row(hooked_llama, monkeypatch):
    from emlens.hooked.remote import trace

    def first_row_only(visit, layer, site, residual):
        edited = original(visit, layer, site, residual)
        return torch.cat([edited[:1], residual[1:]]) if edited is not residual else residual

    original = trace.at_point
    monkeypatch.setattr(trace, "at_point", first_row_only)
    with pytest.raises(RuntimeError, match=r"left row 1 of 6 as it was"):
        self_check(hooked_llama)


def test_the_self_check_refuses_a_head_that_it_cannot_reproduce(hooked_llama, monkeypatch):
    monkeypatch.setattr(
        type(hooked_llama),
        "unembed",
        lambda self, hidden: hidden @ torch.ones(self.d_model, self.n_vocab),
    )
    with pytest.raises(RuntimeError, match="unembed does not reproduce the model's logits"):
        self_check(hooked_llama)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, b: m.residuals(b, 4), r"layer 4 is out of range: the model has 4 layers"),
        (lambda m, b: m.residuals(b, -5), r"layer -5 is out of range: the model has 4 layers"),
        (lambda m, b: m.residuals(b, []), "no layers were given; give at least one"),
        (lambda m, b: m.residuals(b, 1.0), r"layers\[0\] must be a whole number, not 1.0"),
        (lambda m, b: m.residuals(b, "last"), "layers must be whole numbers, or 'all', not 'last'"),
        (lambda m, b: m.residuals(b, 1, "resid"), "unknown site 'resid'; the sites are resid_pre"),
        (lambda m, b: m.hidden(b, push(m).direction), "edits must be a list, each an Edit, not a"),
        (
            lambda m, b: m.hidden(b, [push(m).direction]),
            r"edits\[0\] must be an Edit, not a D",
        ),
        (lambda m, b: m.hidden(b, [push(m, 7)]), "layer 7 is out of range"),
        (
            lambda m, b: m.hidden(b, [Add(push(m).direction, layers=(2, -1))]),
            "Add acts at layer -1, but an edit counts its layers from 0; in this model that is "
            "layer 3",
        ),
        (
            lambda m, b: m.generate("how", [Shift(torch.ones(m.d_model), -4)]),
            "Shift acts at layer -4, but an edit .* that is layer 0",
        ),
        (
            lambda m, b: m.hidden(b, [Add(push(m).direction, layers=(2, 2))]),
            "Add names layer 2 more than once; for twice the effect use a larger scale",
        ),
        (
            lambda m, b: m.hidden(b, [Add(Direction.of(torch.ones(5), 1))]),
            "Add has width 5, but tiny-llama has d_model 32",
        ),
        (
            lambda m, b: m.hidden(b, resume=(1, torch.zeros(1, 2, 3))),
            r"the residual to resume from has shape \(1, 2, 3\); this batch needs \(4, ",
        ),
        (
            lambda m, b: m.hidden(b, [push(m, 0)], (1, m.residuals(b, 1)[1])),
            "cannot resume after layer 1: an edit acts before it; resume after layer 0",
        ),
        (lambda m, b: m.adapter("x").__enter__(), "there is no adapter 'x': this model has none"),
        (lambda m, b: m.generate("how", max_new_tokens=0), "max_new_tokens must be at least 1"),
        (lambda m, b: m.generate("how", temperature=-1), "temperature must be at least 0"),
        (lambda m, b: m.generate("how", top_p=0), "top_p must be above 0"),
    ],
)
def test_bad_input_gets_one_clear_error_and_leaves_the_model_alone(
    brought, batch, engine, call, message
):
    module, model = brought(engine)
    before, plain = state_of(module, model.tokenizer), model.hidden(batch)
    with pytest.raises((ValueError, TypeError), match=message):
        call(model, batch)
    assert state_of(module, model.tokenizer) == before
    assert torch.equal(model.hidden(batch), plain)


def test_logits_are_those_of_a_plain_model_under_a_plain_hook(brought, batch):
    for engine in ENGINES:
        module, model = brought(engine)
        ids = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        ids["position_ids"] = batch.position_ids
        vector = torch.linspace(-1, 1, model.d_model)

        def add(_module, _inputs, output, vector=vector):
            return output + vector

        with torch.no_grad():
            plain = module(**ids).logits
            hook = module.model.layers[1].register_forward_hook(add)
            edited = module(**ids).logits
            hook.remove()
        real = batch.attention_mask.bool()
        edit = Add(Direction.of(vector, 1))
        assert torch.allclose(model.logits(batch)[real], plain[real], atol=1e-5)
        assert torch.allclose(model.logits(batch, edit)[real], edited[real], atol=1e-5)
        assert not torch.allclose(plain[real], edited[real], atol=1e-2)
        with model.edited([edit]), torch.no_grad():
            # the module is not touched: an edit acts in what emlens runs
            assert torch.equal(module(**ids).logits, plain)


def test_a_direction_from_a_model_of_another_name_is_warned_of_once(tiny, tiny_tokenizer, batch):
    import warnings

    made = emlens.wrap(tiny("llama"), tiny_tokenizer, name="one")
    other = emlens.wrap(tiny("llama"), tiny_tokenizer, name="two")
    direction = emlens.mean_diff(made, conversations("bad", 2), conversations("good", 2), layers=1)
    match = r"Add uses a direction that was made in 'one', but this model is 'two'"
    with pytest.warns(UserWarning, match=match):
        other.hidden(batch, [Add(direction)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.hidden(batch, [Add(direction)])
        made.hidden(batch, [Add(direction)])


def test_loading_and_wrapping_refuse_what_they_cannot_hook(hooked_llama, tiny_llama, tmp_path):
    with pytest.raises(ValueError, match="unknown engine 'jax'; choose 'nnsight' or"):
        emlens.load(engine="jax")
    with pytest.raises(TypeError, match="needs the model's tokenizer"):
        emlens.wrap(tiny_llama)
    with pytest.raises(TypeError, match="already hooked"):
        emlens.wrap(hooked_llama)
    with pytest.raises(TypeError, match="cannot wrap a dict"):
        emlens.wrap({}, hooked_llama.tokenizer)
    config = T5Config(d_model=16, d_ff=16, num_layers=1, num_heads=2, vocab_size=32, d_kv=8)
    with pytest.raises(ValueError, match="is an encoder-decoder"):
        emlens.wrap(T5ForConditionalGeneration(config), hooked_llama.tokenizer)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "tiny-t5")
    hooked_llama.tokenizer.save_pretrained(tmp_path / "tiny-t5")
    for options in ({}, {"engine": "transformer_lens"}, {"remote": "local"}):
        with pytest.raises(ValueError, match=r"tiny-t5 is an encoder-decoder \(t5\); emlens reads"):
            emlens.load(tmp_path / "tiny-t5", **options)
    with pytest.raises(ValueError, match="found no decoder blocks"):
        lost = torch.nn.Linear(2, 2)
        lost.config = tiny_llama.config
        emlens.wrap(lost, hooked_llama.tokenizer)


def test_the_repr_names_the_model_and_escapes_html(hooked_llama):
    assert "tiny-llama" in repr(hooked_llama)
    assert "<table>" in hooked_llama._repr_html_()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_load_and_take_edits(tiny, tiny_tokenizer, dtype):
    import copy

    module = copy.deepcopy(tiny("llama")).to(dtype)
    model = emlens.wrap(module, tiny_tokenizer)
    (batch,) = pack(tokenize(conversations("good", 2), tiny_tokenizer))
    moved = model.hidden(batch, [push(model)])
    assert moved.dtype == dtype
    assert model.unembed(moved[0]).dtype == torch.float32
