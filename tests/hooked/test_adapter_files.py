"""Adapters on disk that do not fit are refused, with a reason, and nothing is left of them."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from safetensors.torch import load_file

import emlens
from emlens.hooked.attach import attach
from emlens.text import pack, tokenize
from tests.support.adapters import logits_of, peft_logits, peft_model, rewrite, saved
from tests.support.data import conversations
from tests.support.models import tiny_model
from tests.support.tokenizers import chatml_tokenizer


@pytest.fixture
def base(tmp_path, tiny_tokenizer):
    """A folder with a tiny base model, named as its adapters record it."""
    folder = tmp_path / "tiny-llama"
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def batch_of(tokenizer):
    (batch,) = pack(tokenize(conversations("good", 4), tokenizer), padding_side="left")
    return batch


def logits(model, batch):
    return model.unembed(model.hidden(batch))


def half_gone(weights):
    return dict(sorted(weights.items())[1:])


def each(change):
    return lambda folder: rewrite(folder, lambda w: {k: change(k, v) for k, v in w.items()})


def renamed(folder):
    rewrite(folder, lambda w: {k.replace("down_proj", "up"): v for k, v in w.items()})


BROKEN = {
    "wider": (
        each(lambda _, weight: torch.cat([weight, weight], -1)),
        ValueError,
        r"lora_A at model\.layers\.0\.mlp\.down_proj is \[1, 128\], this model and the adapter's "
        r"rank need \[1, 64\]",
    ),
    "other rank": (
        lambda folder: rewrite(folder, r=3),
        ValueError,
        r"is \[1, 64\], this model .* \[3, 64\]",
    ),
    "missing": (
        lambda folder: rewrite(folder, half_gone),
        ValueError,
        "it has no weights for model.layers.0",
    ),
    "elsewhere": (renamed, ValueError, "it has no weights for .* and no place for"),
    "no such module": (
        lambda folder: rewrite(folder, target_modules=["nothing"]),
        ValueError,
        "adapter 'bad' does not fit tiny-llama: .*nothing",
    ),
    "zero": (
        each(lambda key, weight: weight * ("lora_A" in key)),
        ValueError,
        "changes nothing: A or B is zero in each of its 4 modules",
    ),
    "not finite": (
        each(lambda _, weight: weight * torch.nan),
        ValueError,
        "weights at model.layers.0.mlp.down_proj that are not finite",
    ),
    "no config": (
        lambda folder: (folder / "adapter_config.json").rename(folder / "other.json"),
        FileNotFoundError,
        "has no adapter_config.json",
    ),
    "no weights": (
        lambda folder: (folder / "adapter_model.safetensors").unlink(),
        FileNotFoundError,
        "adapter 'bad': found none at",
    ),
}


@pytest.mark.parametrize("how", BROKEN)
def test_an_adapter_that_does_not_fit_is_refused_and_nothing_is_left_of_it(how, base, tmp_path):
    good = saved(tmp_path / "good", tiny_model("llama"), seed=1)
    bad = saved(tmp_path / "bad", tiny_model("llama"))
    breaks, error, message = BROKEN[how]
    breaks(bad)
    module = copy.deepcopy(tiny_model("llama"))
    shape = {name: id(part) for name, part in module.named_modules()}
    with warnings.catch_warnings(), pytest.raises(error, match=message):
        warnings.simplefilter("ignore")
        attach(module, {"bad": bad}, "tiny-llama")
    assert shape == {name: id(part) for name, part in module.named_modules()}
    assert not hasattr(module, "peft_config")
    attach(module, {"good": good}, "tiny-llama")
    with warnings.catch_warnings(), pytest.raises(error):
        warnings.simplefilter("ignore")
        attach(module, {"bad": bad}, "tiny-llama")
    model = emlens.wrap(module, chatml_tokenizer())
    assert model.adapters == ("good",)
    with model.adapter("good"):
        batch = batch_of(model.tokenizer)
        real = batch.mask("all")
        reference = peft_model(tiny_model("llama"), seed=1)
        expected = logits_of(reference, batch)[real]
        assert torch.allclose(logits(model, batch)[real], expected, atol=1e-4)


def test_other_names_and_other_kinds_get_one_clear_error(base, tmp_path, tiny_tokenizer):
    adapter = saved(tmp_path / "bad", tiny_model("llama"))
    model = emlens.load(
        base, adapters={"bad": adapter, "worse": saved(tmp_path / "w", tiny_model("llama"), 3)}
    )
    with (
        pytest.raises(ValueError, match="no adapter 'good'; the adapters are bad, worse"),
        model.adapter("good"),
    ):
        pass
    plain = emlens.load(base)
    with plain.adapter(None):
        assert plain.active_adapter is None
    with (
        pytest.raises(ValueError, match="no adapter 'x': this model has none; load them with"),
        plain.adapter("x"),
    ):
        pass
    with pytest.raises(ValueError, match="'a.b' cannot name an adapter; give a name without dots"):
        emlens.load(base, adapters={"a.b": adapter})
    with pytest.raises(FileNotFoundError, match=r"adapter 'x': found none at 'no/where'"):
        emlens.load(base, adapters={"x": "no/where"})
    (tmp_path / "repository" / "checkpoints").mkdir(parents=True)
    saved(tmp_path / "repository" / "checkpoints" / "checkpoint-5", tiny_model("llama"))
    with pytest.raises(FileNotFoundError, match="there are some inside: checkpoints/checkpoint-5"):
        emlens.load(base, adapters={"x": tmp_path / "repository"})
    step = tmp_path / "repository" / "checkpoints" / "checkpoint-5"
    assert emlens.load(base, adapters={"x": step}).adapters == ("x",)
    prompts = get_peft_model(
        copy.deepcopy(tiny_model("llama")),
        PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
    )
    prompts.save_pretrained(str(tmp_path / "prompts"))
    with pytest.raises(ValueError, match="is of the kind PROMPT_TUNING; emlens runs LoRA adapters"):
        emlens.load(base, adapters={"x": tmp_path / "prompts"})
    with pytest.raises(ValueError, match="adapters need the base model's weights here"):
        emlens.load(base, adapters={"bad": adapter}, remote="local")
    merged = peft_model(tiny_model("llama"))
    merged.merge_adapter()
    with pytest.raises(ValueError, match="an adapter is merged into the weights of model.layers.0"):
        emlens.wrap(merged, tiny_tokenizer)


def with_embeddings(folder, module, change=None):
    """An adapter whose file holds the embeddings too, changed as by a training of them."""
    made = peft_model(module)
    if change is not None:
        change(made.get_base_model())
    made.save_pretrained(str(folder), save_embedding_layers=True)
    return folder


@pytest.mark.parametrize("tied", [False, True])
def test_a_copy_of_the_bases_embeddings_in_the_file_is_left_out(tied, tmp_path):
    tiny = tiny_model("llama", tied=tied)
    folder = with_embeddings(tmp_path / "a", tiny)
    assert any("embed_tokens" in key for key in load_file(folder / "adapter_model.safetensors"))
    module = tiny_model("llama", tied=tied)
    attach(module, {"good": folder}, "tiny-llama")
    model = emlens.wrap(module, chatml_tokenizer(), name="tiny-llama")
    batch = batch_of(model.tokenizer)
    real = batch.mask("all")
    with model.adapter("good"):
        found = logits(model, batch)[real]
    expected = peft_logits(tiny_model("llama", tied=tied), folder, batch)[real]
    assert torch.allclose(found, expected, atol=1e-4)
    half = tiny_model("llama", tied=tied).bfloat16()
    attach(half, {"good": folder}, "tiny-llama")


def trained(module):
    module.get_input_embeddings().weight.data[7] += 1


def resized(module):
    module.resize_token_embeddings(module.config.vocab_size + 3, mean_resizing=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (trained, r"brings its own model.embed_tokens.weight \(save_embedding_layers\), which dif"),
        (
            resized,
            r"brings its own \S+\.weight of \[302, 32\], and the base has \[299, 32\]",
        ),
    ],
)
def test_other_embeddings_than_the_bases_are_refused_before_they_overwrite_it(
    change, message, tmp_path
):
    folder = with_embeddings(tmp_path / "a", tiny_model("llama"), change)
    module = tiny_model("llama")
    before = {path: weight.clone() for path, weight in module.state_dict().items()}
    with pytest.raises(ValueError, match=f"adapter 'bad' {message}"):
        attach(module, {"bad": folder}, "tiny-llama")
    after = module.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[path], weight) for path, weight in after.items())


def test_lora_on_resized_embeddings_is_refused(tmp_path):
    wide = tiny_model("llama")
    resized(wide)
    folder = saved(tmp_path / "a", wide, target_modules=["embed_tokens", "lm_head"])
    with pytest.raises(
        ValueError, match=r"\[302, 32\], and the base has \[299, 32\], as after a re"
    ):
        attach(tiny_model("llama"), {"bad": folder}, "tiny-llama")
