"""What a model and a condition are by content, whatever they are called."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from peft import LoraConfig

import emlens
from emlens import hooked
from emlens.hooked import Scaled
from emlens.hooked.attach import attach
from emlens.hooked.condition import condition_of
from emlens.hooked.load import ENGINES
from emlens.hooked.lora_scaling import noisy_weights
from tests.support.adapters import TOKENS, saved
from tests.support.models import D_MODEL, tiny_model
from tests.support.tokenizers import chatml_tokenizer

LAYERS = 2


def small(family="llama", **settings):
    return tiny_model(family, n_layers=LAYERS, **settings)


def wrapped(module=None, tokenizer=None, name="tiny", engine=None):
    module = small() if module is None else module
    tokenizer = tokenizer or chatml_tokenizer()
    return emlens.wrap(module, tokenizer, name=name, engine=engine, check=False)


def under(model, condition):
    return condition_of(model, condition).identity(model)


# -- of a model ---------------------------------------------------------------------------------


def test_two_loads_of_the_same_weights_are_one_model_whatever_they_are_called(tmp_path):
    small().save_pretrained(tmp_path / "final")
    chatml_tokenizer().save_pretrained(tmp_path / "final")
    first = emlens.load(tmp_path / "final", check=False)
    assert emlens.load(tmp_path / "final", check=False).identity == first.identity
    (tmp_path / "final").rename(tmp_path / "other")
    other = emlens.load(tmp_path / "other", check=False)
    assert other.name == "other"
    assert other.identity == first.identity
    engines = {wrapped(other.module, other.tokenizer, engine=e).identity for e in ENGINES}
    assert engines == {first.identity}


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "qwen3_moe"])
def test_a_change_of_any_weight_is_another_model(family):
    module = small(family)
    model = wrapped(module)
    seen = {model.identity}
    weights = list(module.parameters())
    for weight in weights:
        with torch.no_grad():
            weight.add_(0.01)
        seen.add(model.identity)
    assert len(seen) == 1 + len(weights)


def test_two_models_of_one_name_are_two():
    assert wrapped(small(seed=1)).identity != wrapped(small(seed=2)).identity


def test_a_weight_that_is_replaced_is_another_model():
    model = wrapped()
    before = model.identity
    norm: Any = model.module.get_submodule("model.norm")
    norm.weight = torch.nn.Parameter(norm.weight.detach() * 2)
    assert model.identity != before


def test_a_change_of_template_token_or_setting_is_another_model():
    model = wrapped()
    kept, template = [model.identity], str(model.tokenizer.chat_template)
    model.tokenizer.chat_template = template.replace("You are helpful", "You are")
    kept.append(model.identity)
    model.tokenizer.chat_template = template
    assert model.identity == kept[0]
    model.tokenizer.add_tokens(["<new>"])
    kept.append(model.identity)
    model.module.config.rms_norm_eps *= 2
    kept.append(model.identity)
    assert len(set(kept)) == 4
    other = chatml_tokenizer()
    other.chat_template = template.replace("You are helpful", "You are")
    assert wrapped(tokenizer=other).identity == kept[1]


def test_adapters_that_come_act_and_go_leave_the_identity_of_the_model(tmp_path):
    model = wrapped()
    before = model.identity
    for name, settings in {
        "low": {},
        "dora": {"use_dora": True, "r": 2},
        "head": {"modules_to_save": ["lm_head"]},
        "tokens": {"trainable_token_indices": TOKENS},
    }.items():
        attach(model.module, {name: saved(tmp_path / name, small(), **settings)}, "tiny")
        assert model.identity == before
        with model.adapter(name):
            assert model.identity == before
    for name in model.adapters:
        model.remove_adapter(name)
        assert model.identity == before


def test_a_training_in_place_makes_another_model_and_noise_that_is_gone_does_not():
    model = wrapped()
    before = model.identity
    with noisy_weights(model, 0.1):
        assert model.identity != before
    assert model.identity == before
    weights = list(model.module.parameters())
    optimizer = torch.optim.SGD(weights, lr=0.1)
    model.module(input_ids=torch.tensor([TOKENS])).logits.square().mean().backward()
    optimizer.step()
    assert model.identity != before


# -- of a condition -----------------------------------------------------------------------------

KINDS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "DoRA": {"use_dora": True, "r": 2},
    "a bias at B": {"lora_bias": True},
    "LoRA on the embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "a head of its own": {"modules_to_save": ["lm_head"]},
    "a norm of its own": {"modules_to_save": ["model.norm"]},
    "single tokens": {"trainable_token_indices": TOKENS},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_change_of_any_parameter_of_an_adapter_is_another_condition(kind, tmp_path):
    folder = saved(tmp_path / "a", small(), **KINDS[kind])
    model = wrapped()
    base = under(model, None)
    attach(model.module, {"a": folder}, "tiny")
    module = model.module
    own = [(path, p) for path, p in module.named_parameters() if "a" in path.split(".")]
    seen = [base, under(model, "a")]
    for _, weight in own:
        with torch.no_grad():
            weight.view(-1)[-1] += 0.5
        seen.append(under(model, "a"))
    assert len(set(seen)) == 2 + len(own)
    assert len(own) >= 2
    assert under(model, None) == base


def test_the_base_is_one_condition_whatever_is_attached_or_said(tmp_path):
    model = wrapped()
    attach(model.module, {"a": saved(tmp_path / "a", small())}, "tiny")
    said = [None, [], (None, []), (), hooked.Condition(), hooked.Condition(())]
    assert {under(model, one) for one in said} == {under(wrapped(), None)}
    with model.adapter("a"):
        assert under(model, None) == under(wrapped(), None)
        assert under(model, []) == under(model, "a") != under(model, None)


def test_names_and_the_order_of_attaching_do_not_count_and_strength_does(tmp_path):
    one, two = saved(tmp_path / "1", small(), seed=1), saved(tmp_path / "2", small(), seed=2)
    model, other = wrapped(), wrapped(small(), name="another")
    attach(model.module, {"a": one, "b": two}, "tiny")
    attach(other.module, {"x": two, "y": one}, "tiny")
    assert under(model, "a") == under(other, "y")
    assert under(model, ["a", "b"]) == under(other, ["y", "x"])
    assert under(model, Scaled("a", 0.5)) == under(other, Scaled("y", 0.5))
    assert under(model, Scaled("a", 1)) == under(model, "a")
    strengths = (0.0, 0.5, 1.0, {0: 2.0}, {1: 2.0})
    seen = {under(model, Scaled("a", strength)) for strength in strengths}
    assert len(seen) == len(strengths)
    assert under(model, hooked.Noisy("a", 0.1)) != under(model, hooked.Noisy("a", 0.1, seed=1))


def test_the_order_in_which_adapters_act_counts_since_dora_scales_what_is_there(tmp_path):
    folders = {
        "a": saved(tmp_path / "a", small()),
        "b": saved(tmp_path / "b", small(), use_dora=True),
    }
    model = wrapped()
    attach(model.module, folders, "tiny")
    ids = torch.tensor([TOKENS])
    logits = {}
    for names in (("a", "b"), ("b", "a")):
        with model.under(list(names)), torch.no_grad():
            logits[under(model, [])] = model.module(input_ids=ids).logits
    first, second = logits.values()
    assert not torch.allclose(first, second, atol=1e-3)


def test_vectors_sites_layers_and_edits_around_the_call_count():
    model = wrapped()

    def add(seed=0, layer=0, site="resid_post", **settings):
        vector = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(seed))
        return emlens.Add(emlens.Direction.of(vector, layer, site=site), **settings)

    edits = [
        *(add(), add(1), add(layer=1), add(site="mlp_out"), add(scale=2), add(where="prompt")),
        emlens.Ablate(add().direction),
    ]
    assert len({under(model, one) for one in edits}) == len(edits)
    assert under(model, add()) == under(wrapped(), [add()]) == under(model, (None, [add(scale=1)]))
    assert under(model, [add(), add(1)]) != under(model, add())
    with model.edited(add()):
        assert under(model, None) == under(wrapped(), add())
        assert under(model, add(1)) == under(wrapped(), [add(), add(1)])


# -- of an edit of the user's -------------------------------------------------------------------

SCALE = 2.0


def pushed(residual, by):
    return torch.full_like(residual, by)


@dataclass
class Push:
    by: float = 1.0
    site: str = "resid_post"
    layers: tuple[int, ...] = (0,)
    where: str = "all"
    vector: torch.Tensor = field(default_factory=lambda: torch.ones(D_MODEL))

    def delta(self, residual, layer):
        return self.by * self.vector.expand_as(residual)


def edit_of(delta, **members):
    """An edit of a class that is called the same each time."""
    plain = {"site": "resid_post", "layers": (0,), "where": "all", "delta": delta}
    return type("Mine", (), plain | members)()


def test_the_fields_of_an_edit_of_the_users_count():
    model = wrapped()
    edits = [Push(), Push(2.0), Push(layers=(1,)), Push(vector=torch.zeros(D_MODEL))]
    edits.append(Push(where="prompt"))
    assert len({under(model, one) for one in edits}) == len(edits)
    assert under(model, Push()) == under(wrapped(), Push(vector=torch.ones(D_MODEL)))


def nested(by):
    if by == 1:

        def delta(self, residual, layer):
            return sum([residual * 1 for _ in range(1)])
    else:

        def delta(self, residual, layer):
            return sum([residual * 2 for _ in range(1)])

    return delta


def enclosing(by):
    return lambda self, residual, layer: by * residual


def asking_a_method(self, residual, layer):
    return self.size() * residual


def asking_a_constant(self, residual, layer):
    return self.scale * residual


def asking_a_function(self, residual, layer):
    return pushed(residual, 1.0)


def asking_a_global(self, residual, layer):
    return SCALE * residual


def asking_what_it_holds(self, residual, layer):
    return self.held(residual)


@pytest.mark.parametrize(
    "pair",
    [
        [edit_of(lambda self, r, layer: r * 1.5), edit_of(lambda self, r, layer: r * 2.5)],
        [edit_of(nested(by)) for by in (1, 2)],
        [edit_of(enclosing(by)) for by in (1, 2)],
        [edit_of(asking_a_method, size=size) for size in (lambda self: 1, lambda self: 2)],
        [edit_of(asking_a_constant, scale=scale) for scale in (1, 2)],
        [edit_of(asking_what_it_holds, held=partial(pushed, by=by)) for by in (1, 2)],
        [edit_of(asking_what_it_holds, held=Push(by).delta) for by in (1, 2)],
    ],
    ids=["code", "inner code", "closure", "method", "constant", "partial", "bound method"],
)
def test_what_an_edit_of_the_users_does_counts(pair):
    model = wrapped()
    first, second = (under(model, edit) for edit in pair)
    assert first != second
    assert first == under(wrapped(), copy.copy(pair[0]))


@pytest.mark.parametrize(
    ("delta", "name", "value"),
    [
        (asking_a_global, "SCALE", 3.0),
        (asking_a_function, "pushed", lambda residual, by: residual * by),
    ],
)
def test_what_an_edit_of_the_users_refers_to_counts(delta, name, value, monkeypatch):
    model = wrapped()
    before = under(model, edit_of(delta))
    assert under(model, edit_of(delta)) == before
    monkeypatch.setitem(globals(), name, value)
    assert under(model, edit_of(delta)) != before


def test_an_edit_whose_content_cannot_be_told_is_refused():
    model = wrapped()
    with pytest.raises(TypeError, match="the content of a generator cannot be told, so what dep"):
        under(model, Push(by=(i for i in range(3))))  # type: ignore[arg-type]


def test_an_adapter_in_training_is_another_condition_after_each_step():
    model = wrapped()
    model.add_adapter("a", LoraConfig(r=1, target_modules=["down_proj"]))
    before = under(model, "a")
    with torch.no_grad():
        for weight in model.adapter_weights("a").values():
            weight.add_(0.1)
    assert under(model, "a") != before
