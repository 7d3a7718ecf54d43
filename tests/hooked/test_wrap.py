"""What people bring is run as it is, and left as it was."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import LlamaForSequenceClassification

import emlens
from emlens import Add, Direction
from emlens.text import Conversation, pack, tokenize
from tests.support.data import conversations
from tests.support.models import FAMILIES, tiny_model
from tests.support.state import state_of
from tests.support.tokenizers import chatml_tokenizer


def direction(layer=1):
    return Direction.of(torch.randn(32, generator=torch.Generator().manual_seed(0)), layer)


def bridge(module, tokenizer):
    from transformer_lens.model_bridge import TransformerBridge

    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.init_kwargs |= {"name_or_path": "tiny-llama", "add_bos_token": True}
    module.config.architectures = ["LlamaForCausalLM"]
    return TransformerBridge.boot_transformers("tiny-llama", hf_model=module, tokenizer=tokenizer)


def traced(module, tokenizer):
    from nnsight import TransformersModel

    return TransformersModel(module, tokenizer=tokenizer)


def language_model(module, tokenizer):
    from nnsight import LanguageModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return LanguageModel(module, tokenizer=tokenizer)


# What nnterp 1.3 renames. Its package does not import beside nnsight 0.8, so its names are put
# over a model here as its class puts them.
NNTERP = {
    "transformer": "model",
    "gpt_neox": "model",
    "h": "layers",
    "model.layers": "layers",
    "attn": "self_attn",
    "attention": "self_attn",
    "final_layer_norm": "ln_final",
    "ln_f": "ln_final",
    "norm": "ln_final",
    "model.ln_final": "ln_final",
    "embed_out": "lm_head",
    "wte": "embed_tokens",
    "embed_in": "embed_tokens",
    "model.embed_tokens": "embed_tokens",
}


def renamed(module, tokenizer):
    """As nnterp's `StandardizedTransformer`: a `LanguageModel` under other module names."""
    from nnsight import LanguageModel

    class StandardizedTransformer(LanguageModel):
        pass

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return StandardizedTransformer(module, tokenizer=tokenizer, rename=NNTERP)


def lora(module, tokenizer):
    config = LoraConfig(target_modules=["down_proj"], r=2, init_lora_weights=False)
    return get_peft_model(module, config)


KINDS: dict[str, tuple[Callable, str]] = {
    "TransformerBridge": (bridge, "transformer_lens"),
    "TransformersModel": (traced, "nnsight"),
    "LanguageModel": (language_model, "nnsight"),
    "StandardizedTransformer": (renamed, "nnsight"),
    "PeftModel": (lora, "nnsight"),
    "transformers": (lambda module, _: module, "nnsight"),
    "transformers on TransformerLens": (lambda module, _: module, "transformer_lens"),
}


class Boom(Exception):
    pass


def fail(*_):
    raise Boom


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_brought_gives_the_models_numbers_and_stays_as_it_was(kind):
    make, engine = KINDS[kind]
    tokenizer = chatml_tokenizer()
    tokenizer.padding_side = "right"
    module = tiny_model("llama", seed=4)
    module.set_attn_implementation("sdpa")
    module.train()
    module.model.layers[0].eval()
    module.model.embed_tokens.weight.requires_grad_(False)
    brought = make(module, tokenizer)
    (batch,) = pack(tokenize(conversations("good", 3), tokenizer))
    edit = Add(direction())
    expected = plain_hidden(module, batch, edit.direction.vector)
    own = getattr(brought, "tokenizer", tokenizer)
    before = state_of(module, tokenizer), state_of(module, own)
    given = tokenizer if kind in ("PeftModel", "transformers", KINDS_ON_TL) else None
    model = emlens.wrap(brought, given, engine=engine)
    assert model.engine == engine
    found = model.hidden(batch, [edit])
    answer = model.generate([Conversation.of("how")], [edit], max_new_tokens=3, temperature=0)
    assert len(answer) == 1
    for call in (
        lambda: model.residuals(batch, 1, pool=fail),
        lambda: model.hidden(batch, [Failing(edit.direction)]),
        lambda: model.generate([Conversation.of("how")], [Failing(edit.direction)]),
    ):
        with pytest.raises(Boom):
            call()
    with pytest.raises(ValueError, match="unknown site"):
        model.residuals(batch, 1, "elsewhere")
    with pytest.raises(ZeroDivisionError), model.frozen(), model.edited(edit):
        loss = model.unembed(model.hidden(batch, grad=True)[0]).sum()
        assert not loss.requires_grad
        raise ZeroDivisionError
    assert (state_of(module, tokenizer), state_of(module, own)) == before
    real = batch.mask("all")
    assert torch.allclose(found[real], expected[real], atol=1e-4)


KINDS_ON_TL = "transformers on TransformerLens"


class Failing(Add):
    def delta(self, residual, layer):
        raise Boom


def plain_inputs(batch):
    return {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "position_ids": batch.position_ids,
    }


@torch.no_grad()
def plain_hidden(module, batch, vector):
    modes = {part: part.training for part in module.modules()}
    module.eval()
    hook = module.model.layers[1].register_forward_hook(lambda _m, _i, out: out + vector)
    try:
        return module(**plain_inputs(batch), output_hidden_states=True).hidden_states[-1]
    finally:
        hook.remove()
        for part, mode in modes.items():
            part.training = mode


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "gemma2", "mixtral"])
def test_nnterps_names_over_a_model_change_nothing(family, tiny_tokenizer):
    module = tiny_model(family)
    made = renamed(module, tiny_tokenizer)
    (batch,) = pack(tokenize(conversations("good", 3), tiny_tokenizer))
    with torch.no_grad(), made.trace(plain_inputs(batch)):
        read = made.layers[1].output.save()
    before = state_of(module, made.tokenizer)
    model, plain = emlens.wrap(made, name=family), emlens.wrap(module, tiny_tokenizer, name=family)
    real = batch.mask("all")
    assert torch.allclose(model.residuals(batch, 1)[1][real], read[real], atol=1e-5)
    assert torch.equal(
        model.hidden(batch, [Add(direction())]), plain.hidden(batch, [Add(direction())])
    )
    assert state_of(module, made.tokenizer) == before


@pytest.mark.parametrize("engine", ["nnsight", "transformer_lens"])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_weights_are_copied_but_those_that_transformer_lens_unfuses(
    family, engine, tiny_tokenizer
):
    module = tiny_model(family)
    lie = [(w.data_ptr(), w.data_ptr() + w.nbytes) for w in module.parameters()]
    model = emlens.wrap(module, tiny_tokenizer, engine=engine)
    whole = getattr(model, "bridge", model.module)
    copies = {
        name
        for name, weight in whole.named_parameters()
        if weight.ndim > 1 and not any(a <= weight.data_ptr() < b for a, b in lie)
    }
    assert {weight.data_ptr() for weight in model.module.parameters()} >= {a for a, _ in lie}
    unfused = {name for name in copies if ".attention." in name and name.split(".")[-3] in "qkv"}
    assert copies == unfused
    assert bool(copies) == ((family, engine) == ("gpt_neox", "transformer_lens"))


def test_a_plain_model_on_transformer_lens_shares_its_weights(tiny_tokenizer):
    module = tiny_model("llama", seed=5)
    model = emlens.wrap(module, tiny_tokenizer, engine="transformer_lens")
    theirs = {weight.data_ptr() for weight in module.parameters()}
    ours = {weight.data_ptr() for weight in model.module.parameters()}
    assert ours == theirs
    assert module.config._attn_implementation == "sdpa"
    assert type(module.model.layers[0]).__name__ == "LlamaDecoderLayer"
    module.model.layers[2].mlp.down_proj.weight.data.zero_()
    (batch,) = pack(tokenize(conversations("good", 2), tiny_tokenizer))
    assert not model.residuals(batch, 2, "mlp_out")[2].any(), "a change of the user's is seen"


@pytest.mark.parametrize("engine", ["nnsight", "transformer_lens"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_device_map_and_a_dtype_are_taken_by_load(engine, dtype, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    chatml_tokenizer().save_pretrained(tmp_path)
    options = {"engine": engine, "dtype": dtype, "attn_implementation": "eager"}
    plain = emlens.load(tmp_path, **options)
    model = emlens.load(tmp_path, device_map="auto", **options)
    assert model.dtype == plain.dtype == getattr(torch, dtype)
    (batch,) = pack(tokenize(conversations("bad", 3), model.tokenizer))
    real = batch.mask("all")
    moved = model.hidden(batch, [Add(direction())]).cpu()[real]
    assert moved.dtype == model.dtype
    gap = (moved.float() - plain.hidden(batch, [Add(direction())])[real].float()).abs().max()
    assert gap <= (0 if model.device == plain.device else 0.1)


@pytest.mark.parametrize("engine", ["nnsight", "transformer_lens"])
def test_a_model_that_accelerate_has_placed_gives_the_same_numbers(
    engine, tiny_tokenizer, tmp_path
):
    """One block is on disk: its weights are there only while a module runs."""
    from accelerate import dispatch_model

    whole = emlens.wrap(tiny_model("llama"), tiny_tokenizer)
    module = copy.deepcopy(tiny_model("llama"))
    parts = ["model.embed_tokens", *(f"model.layers.{i}" for i in range(4))]
    places = dict.fromkeys([*parts, "model.norm", "model.rotary_emb", "lm_head"], "cpu")
    places["model.layers.1"] = "disk"
    dispatch_model(module, places, "cpu", offload_dir=tmp_path, force_hooks=True)  # type: ignore
    assert any(weight.is_meta for weight in module.parameters())
    model = emlens.wrap(module, tiny_tokenizer, engine=engine, name="tiny-llama")
    (batch,) = pack(tokenize(conversations("good", 3), tiny_tokenizer))
    edit = Add(direction())
    found, expected = model.hidden(batch, [edit]), whole.hidden(batch, [edit])
    real = batch.mask("all")
    assert torch.allclose(found[real], expected[real], atol=1e-4)
    assert torch.allclose(model.unembed(found[real]), whole.unembed(expected[real]), atol=1e-3)
    asked = [Conversation.of("how do I save money")]
    settings = {"max_new_tokens": 4, "temperature": 0}
    assert model.generate(asked, [edit], **settings) == whole.generate(asked, [edit], **settings)


def test_the_users_own_hooks_on_a_bridge_act_and_stay(tiny_tokenizer):
    made = bridge(tiny_model("llama", seed=6), tiny_tokenizer)
    model = emlens.wrap(made)
    (batch,) = pack(tokenize(conversations("good", 2), tiny_tokenizer))
    plain = model.residuals(batch, 1)[1]
    made.add_perma_hook("blocks.1.hook_resid_post", lambda tensor, hook: tensor + 1)
    assert torch.allclose(model.residuals(batch, 1)[1], plain + 1)
    assert len(made.blocks[1].hook_out.fwd_hooks) == 1


def test_bridges_in_compatibility_mode_are_refused(tiny_tokenizer):
    made = bridge(tiny_model("llama", seed=9), tiny_tokenizer)
    made.enable_compatibility_mode(disable_warnings=True)
    with pytest.raises(ValueError, match="is in compatibility mode: its weights may be folded"):
        emlens.wrap(made)


def test_an_engine_that_does_not_fit_what_is_brought_is_refused(tiny_tokenizer):
    made = bridge(tiny_model("llama", seed=7), tiny_tokenizer)
    with pytest.raises(ValueError, match="a TransformerBridge runs with engine='transformer_lens'"):
        emlens.wrap(made, engine="nnsight")
    model = emlens.wrap(traced(tiny_model("llama"), tiny_tokenizer), engine="transformer_lens")
    assert model.engine == "transformer_lens"


def test_what_cannot_be_run_gets_one_clear_error(tiny_tokenizer):
    module = tiny_model("llama", seed=8)
    prompts = get_peft_model(
        module, PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    )
    with pytest.raises(ValueError, match="PROMPT_TUNING, which works on the input and not on the"):
        emlens.wrap(prompts, tiny_tokenizer)
    with pytest.raises(TypeError, match="cannot wrap a list; give a TransformerBridge, an nnsight"):
        emlens.wrap([], tiny_tokenizer)
    with pytest.raises(ValueError, match="LlamaModel has no LM head; give the LlamaForCausalLM"):
        emlens.wrap(tiny_model("llama").model, tiny_tokenizer)
    with pytest.raises(TypeError, match="wrap needs the model's tokenizer"):
        emlens.wrap(tiny_model("llama"))
    labels = LlamaForSequenceClassification(tiny_model("llama").config)
    with pytest.raises(ValueError, match="has no LM head; give the LlamaForCausalLM of that model"):
        emlens.wrap(labels, tiny_tokenizer)


def test_a_model_without_generate_says_so(tiny_tokenizer):
    class Bare(nn.Module):
        """A causal model that cannot generate."""

        def __init__(self, inner):
            super().__init__()
            self.model, self.lm_head = inner.model, inner.lm_head
            self.config, self.dtype = inner.config, inner.dtype

        def get_input_embeddings(self):
            return self.model.embed_tokens

        def get_output_embeddings(self):
            return self.lm_head

        def forward(self, **inputs):
            from transformers.modeling_outputs import CausalLMOutput

            return CausalLMOutput(logits=self.lm_head(self.model(**inputs)[0]))

    bare = Bare(tiny_model("llama"))
    model = emlens.wrap(bare, tiny_tokenizer, name="bare")
    with pytest.raises(TypeError, match="bare cannot generate: its module has no generate method"):
        model.generate([Conversation.of("how")])


@pytest.mark.parametrize("engine", ["nnsight", "transformer_lens"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_edits_follow_the_activations_and_gradients_flow(engine, dtype):
    from emlens.edits import Shift
    from emlens.hooked.losses import Targets, loss_sum

    exact = emlens.wrap(tiny_model("llama"), chatml_tokenizer(), engine=engine)
    model = emlens.wrap(
        copy.deepcopy(tiny_model("llama")).to(dtype), chatml_tokenizer(), engine=engine
    )
    (batch,) = pack(tokenize(conversations("bad", 3), model.tokenizer))
    targets = Targets.of(batch)
    gradients = []
    for each in (exact, model):
        assert each.residuals(batch, 1)[1].dtype == each.dtype
        vector = torch.zeros(32, requires_grad=True)
        with each.frozen():
            hidden = each.hidden(batch, [Shift(vector, 1)], grad=True)
            loss_sum(each, targets.predictors(hidden), targets.ids).backward()
        assert hidden.dtype == each.dtype
        assert vector.grad is not None and vector.grad.dtype == torch.float32
        gradients.append(vector.grad)
    assert torch.cosine_similarity(gradients[0], gradients[1], dim=0) > 0.99
