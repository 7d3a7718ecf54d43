"""An adapter's vectors and scalars: together they are what it adds to the stream."""

from __future__ import annotations

import pytest
import torch

import emlens
from emlens.directions import adapter_scalars, adapter_vectors
from emlens.hooked.load import ENGINES
from emlens.text import pack, tokenize
from tests.support.adapters import peft_model
from tests.support.data import conversations
from tests.support.models import tiny_model
from tests.support.tokenizers import chatml_tokenizer


def model_with(engine="nnsight", family="llama", **settings):
    brought = peft_model(tiny_model(family), **settings)
    return emlens.wrap(brought, chatml_tokenizer(), engine=engine, name="tiny")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("rslora", [True, False])
@pytest.mark.parametrize(("module", "site"), [("down_proj", "mlp_out"), ("o_proj", "attn_out")])
def test_scalar_times_vector_is_what_a_rank_1_adapter_adds(engine, rslora, module, site):
    model = model_with(
        engine,
        target_modules=[module],
        layers_to_transform=[2],
        lora_alpha=7,
        use_rslora=rslora,
    )
    talk = conversations("bad", 4)
    vectors = adapter_vectors(model, "default")
    scalars = adapter_scalars(model, talk, "default", tokens="all")
    assert vectors.layers == (2,)
    assert (vectors.site, scalars.site) == (site, site)
    assert vectors.provenance.construction == "LoRA B"
    assert vectors.provenance.adapter == "default"
    done = 0
    for row in tokenize(talk, model.tokenizer):
        (batch,) = pack([row])
        with model.adapter("default"):
            moved = model.residuals(batch, 2, site)[2][0]
        with model.adapter(None):
            base = model.residuals(batch, 2, site)[2][0]
        mine = slice(done, done + len(moved))
        expected = scalars.scalars[2][mine, None] * vectors[2].vector
        assert torch.allclose(moved - base, expected, atol=1e-4)
        assert float((moved - base).abs().max()) > 0.1
        done += len(moved)


def test_the_scale_is_the_one_that_the_adapter_applies():
    for rslora, scale in ((True, 8 / 4**0.5), (False, 8 / 4)):
        model = model_with(r=4, lora_alpha=8, use_rslora=rslora)
        vectors = adapter_vectors(model, "default", column=3)
        layer = model.lora_layers("default")["model.layers.1.mlp.down_proj"]
        assert torch.allclose(vectors[1].vector, scale * layer.lora_B["default"].weight[:, 3])
        assert vectors.layers == (0, 1, 2, 3)


@pytest.mark.parametrize("budget", [1, 4096])
def test_scalars_equal_a_plain_loop_whatever_the_batches(budget):
    model = model_with()
    talk = conversations("good", 5)
    found = adapter_scalars(model, talk, "default", token_budget=budget).table()
    reference = peft_model(tiny_model("llama"))
    down = reference.get_base_model().model.layers[3].mlp.down_proj
    seen = []
    hook = down.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0][0]))
    expected = []
    for item, row in zip(talk, tokenize(talk, model.tokenizer), strict=True):
        seen.clear()
        with torch.no_grad():
            reference(input_ids=torch.tensor([row.input_ids]))
        values = seen[0] @ down.lora_A["default"].weight[0]
        expected += [
            (item.id, t, row.input_ids[t], float(values[t]))
            for t in range(len(row.input_ids))
            if row.response[t]
        ]
    hook.remove()
    top = found[found["layer"] == 3]
    columns = ["conversation", "position", "token id"]
    assert list(top[columns].itertuples(index=False, name=None)) == [e[:3] for e in expected]
    assert torch.allclose(
        torch.tensor(top["scalar"].to_numpy()).float(),
        torch.tensor([e[3] for e in expected]),
        atol=1e-4,
    )
    assert len(found) == 4 * len(expected)


@pytest.mark.parametrize(
    ("family", "settings", "call", "message"),
    [
        ("llama", {"r": 3}, {}, r"has rank 3 at model\.layers\.0\.mlp\.down_proj, so B has 3 col"),
        ("llama", {}, {"column": 1}, "has rank 1 at .*: there is no column 1"),
        (
            "llama",
            {"target_modules": ["q_proj"]},
            {},
            r"does not write into the residual stream directly: model\.layers\.0\.self_attn\.q",
        ),
        ("gemma2", {}, {}, r"mlp\.down_proj is read by .*, or normed before it is added"),
        (
            "llama",
            {"target_modules": ["o_proj", "down_proj"]},
            {},
            "writes at attn_out and mlp_out; name one with site=",
        ),
        ("llama", {}, {"site": "attn_out"}, "writes at mlp_out, not at attn_out"),
        ("llama", {"use_dora": True}, {}, "is DoRA at .*: it rescales the weight as well"),
        ("llama", {"lora_bias": True}, {}, "has a bias at .*, which B alone does not give"),
    ],
)
def test_what_is_no_vector_of_the_stream_is_refused_by_name(family, settings, call, message):
    model = model_with(family=family, **settings)
    with pytest.raises(ValueError, match=message):
        adapter_vectors(model, "default", **call)


def test_one_site_of_an_adapter_that_writes_at_both_can_be_named():
    model = model_with(target_modules=["o_proj", "down_proj"])
    assert adapter_vectors(model, "default", site="hook_attn_out").site == "attn_out"
    with pytest.raises(ValueError, match="no adapter 'x'; the adapters are default"):
        adapter_vectors(model, "x")
    with pytest.raises(ValueError, match="conversations is empty; give at least one"):
        adapter_scalars(model, [], "default", site="mlp_out")
