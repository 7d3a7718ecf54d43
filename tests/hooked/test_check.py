"""What the check at load grants, what it refuses by name, and how a model runs from then on."""

from __future__ import annotations

import copy
import warnings
from importlib.util import find_spec

import pytest
import torch
from peft import AdaptionPromptConfig, IA3Config, LoraConfig, PrefixTuningConfig, get_peft_model
from torch import nn
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformer_lens.model_bridge.sources.transformers import helpers, source
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import emlens
from emlens import Add, Direction
from emlens.edits import Shift
from emlens.hooked.load import ENGINES
from emlens.text import Conversation, Corpus, Document, pack
from emlens.text.tokens import TokenRow
from tests.support.architectures import D_MODEL, build
from tests.support.models import tiny_model
from tests.support.tokenizers import chatml_tokenizer

LENGTHS = (9, 4, 6)


def rows():
    generator = torch.Generator().manual_seed(5)
    made = []
    for n in LENGTHS:
        ids = torch.randint(5, 80, (n,), generator=generator).tolist()
        made.append(TokenRow(tuple(ids), (False,) * n, (False,) * n, f"row of {n}"))
    return made


def wrapped(name, engine="nnsight", **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return emlens.wrap(build(name), chatml_tokenizer(), engine=engine, name=name, **options)


@torch.no_grad()
def plain(module, ids, layer=None, vector=None):
    """Logits of one row by itself, with a vector added behind a block by a plain hook."""
    hook = None
    if layer is not None:
        blocks = next(
            part for part in module.modules() if isinstance(part, nn.ModuleList) and len(part) == 4
        )

        def added(_, __, out):
            return (out[0] + vector, *out[1:]) if isinstance(out, tuple) else out + vector

        hook = blocks[layer].register_forward_hook(added)
    try:
        return module.eval()(input_ids=torch.tensor([ids])).logits[0]
    finally:
        if hook is not None:
            hook.remove()


@pytest.mark.parametrize(
    ("name", "site", "reason"),
    [
        ("granite", "attn_out", "block 0 adds more than attention and MLP"),
        ("granite", "mlp_out", "block 0 adds more than attention and MLP"),
        ("cohere", "resid_mid", "attention and MLP read the same input, so it is never formed"),
        ("qwen3_next", "attn_out", "block 0 has no self_attn: it has linear_attn, mlp"),
        ("mamba", "mlp_out", "block 0 has no MLP: it has mixer"),
        ("llama4_text", "resid_mid", r"mlp_out of layer 0 has shape \(\d+, 32\) instead of"),
        ("gemma4_text", "attn_out", "block 0 adds more than attention and MLP"),
    ],
)
def test_a_site_that_is_not_there_is_refused_with_the_reason(name, site, reason):
    model = wrapped(name)
    (batch,) = pack(rows())
    edit = Add(Direction.of(torch.ones(D_MODEL), 1, site))
    asked = [Conversation.of("how", "so")]
    for call in (
        lambda: model.residuals(batch, 1, site),
        lambda: model.residuals(batch, 1, f"hook_{site}"),
        lambda: model.hidden(batch, [edit]),
        lambda: model.generate([Conversation.of("how")], [edit]),
        lambda: emlens.mean_diff(model, asked, asked, layers=1, site=site),
    ):
        with pytest.raises(ValueError, match=rf"{name} has no site '(hook_)?{site}': {reason}"):
            call()
    assert {"resid_pre", "resid_post"} <= set(model.sites)


@pytest.mark.parametrize("name", ["gpt2/unscaled", "gemma3_text/softcap", "falcon/sequential"])
def test_an_engine_that_computes_something_else_is_refused_and_the_other_named(name):
    match = r"TransformerLens computes other logits than the model itself \(largest .*'nnsight'"
    with pytest.raises(RuntimeError, match=match):
        wrapped(name, "transformer_lens")
    with pytest.raises(RuntimeError, match=match):
        emlens.wrap(bridged(name), name=name)
    assert wrapped(name).n_layers == 4


def bridged(name, tokenizer=None):
    module = build(name)
    module.set_attn_implementation("eager")
    if tokenizer is None:
        tokenizer = chatml_tokenizer()
        tokenizer.init_kwargs = {
            "name_or_path": "x",
            **tokenizer.init_kwargs,
            "add_bos_token": True,
        }
    return build_bridge_from_module(
        module, type(module).__name__, hf_config=module.config, tokenizer=tokenizer, model_name=name
    )


def test_a_bridge_that_has_hooks_is_run_with_them():
    bridge = bridged("llama")
    bridge.add_perma_hook("blocks.1.hook_resid_post", lambda tensor, hook: tensor + 1)
    model, plainly = emlens.wrap(bridge, name="llama"), wrapped("llama")
    (batch,) = pack(rows()[:1])
    found, expected = model.residuals(batch, 1)[1], plainly.residuals(batch, 1)[1]
    assert torch.allclose(found, expected + 1, atol=1e-4)


@pytest.mark.parametrize("error", [TypeError, ImportError, NotImplementedError, RecursionError])
def test_whatever_fails_while_bridging_becomes_one_sentence(error, monkeypatch):
    def fails(*_, **__):
        raise error("no way\nand more lines")

    monkeypatch.setattr("emlens.hooked.transformer_lens_engine.build_bridge_from_module", fails)
    match = rf"cannot bridge LlamaForCausalLM \({error.__name__}: no way\); engine='nnsight' may"
    with pytest.raises(ValueError, match=match):
        wrapped("llama", "transformer_lens")


def test_no_package_is_ever_installed_for_a_processor(monkeypatch):
    """TransformerLens' own boot installs torchvision with pip where a processor asks for it."""

    def never(*_, **__):
        raise AssertionError("a processor was looked for")

    monkeypatch.setattr(helpers, "_ensure_torchvision", never)
    monkeypatch.setattr(source, "load_modality_processor", never)
    monkeypatch.setattr("subprocess.check_call", never)
    for name in ("gemma3", "llava"):
        assert wrapped(name, "transformer_lens").n_layers == 4
    if find_spec("torchvision") is None:
        with pytest.raises(ValueError, match="cannot bridge Qwen3VL.*needs the optional torch"):
            wrapped("qwen3_vl", "transformer_lens")


@pytest.mark.parametrize(
    ("name", "sides"), [("rwkv", "left"), ("deepseek_v32", "left or right"), ("llama", None)]
)
def test_a_model_that_padding_changes_says_that_it_runs_row_by_row(name, sides):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        emlens.wrap(build(name), chatml_tokenizer(), name=name)
    said = [str(one.message) for one in caught if "one row at a time" in str(one.message)]
    assert bool(said) == (sides is not None)
    assert all(one.startswith(f"{name}: padded on the {sides} its passes") for one in said)


@pytest.mark.parametrize("name", ["rwkv", "deepseek_v32"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_row_by_row_edits_pools_and_masks_mean_the_batch(name, side):
    """One vector per row, a pool over the batch, a gradient: as if the batch ran as a whole."""
    module = build(name)
    model = wrapped(name)
    (batch,) = pack(rows(), padding_side=side)
    vectors = torch.randn(len(batch), D_MODEL, generator=torch.Generator().manual_seed(1))
    vectors.requires_grad_()
    hidden = model.hidden(batch, [Shift(vectors, 1)], grad=True)
    real = batch.mask("all")
    if side not in model.architecture.padding:
        assert not hidden[~real].any()
    model.unembed(hidden[real]).sum().backward()
    assert bool((vectors.grad.abs().amax(1) > 0).all())
    pooled = model.residuals(
        batch, [1, 3], pool=lambda x: (x * real[..., None]).sum(1), edits=[Shift(vectors.data, 1)]
    )
    assert pooled[3].shape == (len(batch), D_MODEL)
    whole = model.residuals(batch, 3, edits=[Shift(vectors.data, 1)])[3]
    assert torch.allclose(pooled[3], (whole * real[..., None]).sum(1), atol=1e-5)
    for i, place in enumerate(batch.index):
        row = rows()[place]
        expected = plain(module, list(row.input_ids), 1, vectors.data[i])
        found = model.unembed(hidden[i][real[i]])
        assert torch.allclose(found, expected, atol=1e-4)


def test_what_follows_a_token_counts_where_attention_is_not_causal():
    with pytest.warns(
        UserWarning, match="paligemma: its attention is not causal throughout, so that what follows"
    ):
        model = emlens.wrap(build("paligemma"), chatml_tokenizer(), name="paligemma")
    asked = [Conversation.of("how")]
    assert len(model.generate(asked, max_new_tokens=2)) == 1
    with pytest.raises(ValueError, match="paligemma cannot generate with use_cache=False"):
        model.generate(asked, max_new_tokens=2, use_cache=False)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_check_runs_as_many_passes_whatever_the_depth(engine):
    counts = []
    for n_layers in (6, 12):
        module = tiny_model("llama", n_layers)
        ran = []
        module.model.embed_tokens.register_forward_hook(lambda *_, ran=ran: ran.append(1))
        emlens.wrap(module, chatml_tokenizer(), engine=engine)
        counts.append(len(ran))
    assert counts[0] == counts[1] <= 10


def test_one_layer_of_each_kind_is_tried():
    assert wrapped("llama").architecture.kinds == (0,)
    assert wrapped("afmoe").architecture.kinds == (0, 1, 3)
    assert wrapped("qwen3_next").architecture.kinds == (0, 3)
    assert wrapped("nemotron_h").architecture.kinds == (0, 1, 3)


# -- what people bring -------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon", "gemma3_text", "bloom"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_and_checkpointing_of_a_model_in_training_do_not_act(name, engine, checkpointing):
    module = build(name)
    ids = list(rows()[0].input_ids)
    expected = plain(module, ids)
    for part in module.modules():
        for key in ("p", "attention_dropout", "hidden_dropout", "resid_pdrop", "attn_pdrop"):
            if isinstance(getattr(part, key, None), float):
                setattr(part, key, 0.5)
    module.train()
    if checkpointing:
        module.gradient_checkpointing_enable()
    model = emlens.wrap(module, chatml_tokenizer(), engine=engine, name=name)
    (batch,) = pack(rows()[:1])
    vector = torch.zeros(D_MODEL, requires_grad=True)
    logits = model.unembed(model.hidden(batch, [Shift(vector, 1)], grad=True)[0])
    assert torch.allclose(logits, expected, atol=1e-4)
    logits.sum().backward()
    assert vector.grad is not None and bool(vector.grad.any())
    assert module.training


def test_a_model_without_weights_says_so():
    config = build("llama").config
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(config)
    half = build("llama")
    half.model.layers[2].mlp.to("meta")
    for bare in (module, half):
        for engine in ENGINES:
            with pytest.raises(ValueError, match="tiny has no weights: .* is on the meta device"):
                emlens.wrap(bare, chatml_tokenizer(), engine=engine, name="tiny")


def test_data_parallel_wrappers_are_looked_into():
    module = build("llama")
    (batch,) = pack(rows())
    expected = emlens.wrap(module, chatml_tokenizer(), name="a").hidden(batch)
    found = emlens.wrap(nn.DataParallel(module), chatml_tokenizer(), name="a").hidden(batch)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_pad_token_beyond_the_vocabulary_is_not_used(engine):
    tokenizer = chatml_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<a pad of its own>"})
    module = build("llama")
    assert tokenizer.pad_token_id >= module.get_input_embeddings().num_embeddings
    model = emlens.wrap(module, tokenizer, engine=engine, name="llama")
    assert model.pad_id == tokenizer.eos_token_id
    asked = [Conversation.of("how"), Conversation.of("how do I save money")]
    own = emlens.wrap(module, chatml_tokenizer(), name="llama")
    settings = {"max_new_tokens": 4, "temperature": 0}
    assert model.generate(asked, **settings) == own.generate(asked, **settings)


def test_what_a_pass_with_a_graph_has_left_in_a_module_does_not_stop_it():
    module = build("recurrent_gemma")
    module(input_ids=torch.tensor([[5, 6, 7]])).logits.sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert emlens.wrap(module, chatml_tokenizer(), name="rg").n_layers == 6


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            AdaptionPromptConfig(adapter_len=2, adapter_layers=2, task_type="CAUSAL_LM"),
            "has an AdaptedAttention of PEFT at model.layers.2.self_attn, which acts whatever",
        ),
        (
            PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
            "uses PREFIX_TUNING, which works on the input",
        ),
    ],
)
def test_parts_of_peft_that_cannot_be_switched_off_are_refused_by_name(config, message):
    module = get_peft_model(tiny_model("llama"), config)
    for brought in (module, module.get_base_model()):
        if brought is not module and "PREFIX" in message:
            continue
        with pytest.raises(ValueError, match=message):
            emlens.wrap(brought, chatml_tokenizer())


def test_an_adapter_on_the_vision_tower_is_not_missed_by_text():
    module = build("mistral3")
    made = get_peft_model(module, LoraConfig(target_modules=["o_proj"], init_lora_weights=False))
    assert any("vision" in path for path, _ in made.named_parameters() if "lora" in path)
    model = emlens.wrap(made, chatml_tokenizer(), name="mistral3")
    (batch,) = pack(rows()[:1])
    expected = plain(made.get_base_model(), list(rows()[0].input_ids))
    assert torch.allclose(model.unembed(model.hidden(batch)[0]), expected, atol=1e-4)


def test_ia3_is_switched_like_lora():
    module = tiny_model("llama")
    bare = copy.deepcopy(module)
    config = IA3Config(target_modules=["down_proj"], feedforward_modules=["down_proj"])
    made = get_peft_model(module, config)
    with torch.no_grad():
        for path, weight in made.named_parameters():
            if "ia3" in path:
                weight.mul_(1.7)
    model = emlens.wrap(made, chatml_tokenizer(), name="tiny")
    (batch,) = pack(rows()[:1])
    with model.adapter(None):
        base = model.unembed(model.hidden(batch)[0])
    assert torch.allclose(base, plain(bare, list(rows()[0].input_ids)), atol=1e-5)


class _State:
    """As bitsandbytes keeps it: where the 8-bit weight is after a first pass."""

    CB = None


class Linear8bitLt(nn.Linear):
    """What bitsandbytes' layer does with its weight, as far as it matters here."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None)
        self.weight = nn.Parameter(linear.weight.detach().clone(), requires_grad=False)
        self.weight.CB = linear.weight.detach().clone()
        self.state = _State()

    def init_8bit_state(self):
        self.state.CB, self.weight.CB = self.weight.CB, None

    def forward(self, x):
        if self.weight.CB is not None:
            self.init_8bit_state()
        if self.state.CB is None:
            return x * float("nan")  # neither here nor there: taken by another tree of modules
        return nn.functional.linear(x, self.state.CB)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_8_bit_model_that_has_not_run_yet_stays_right_when_it_is_wrapped(engine):
    module = tiny_model("llama")
    ids = list(rows()[0].input_ids)
    expected = plain(module, ids)
    for block in module.model.layers:
        block.mlp.down_proj = Linear8bitLt(block.mlp.down_proj)
    model = emlens.wrap(module, chatml_tokenizer(), engine=engine, name="tiny")
    (batch,) = pack(rows()[:1])
    assert torch.allclose(model.unembed(model.hidden(batch)[0]), expected, atol=1e-4)
    assert torch.allclose(plain(module, ids), expected, atol=1e-4), "the user's own model"
    kept = {id(part.state) for part in module.modules() if isinstance(part, Linear8bitLt)}
    ours = {id(p.state) for p in model.module.modules() if isinstance(p, Linear8bitLt)}
    assert ours == kept, "no second copy of the weights"


def test_a_bridge_reads_corpora_with_the_models_own_tokenizer(tmp_path):
    """TransformerLens loads tokenizers anew, to make them prepend BOS."""
    own = chatml_tokenizer()
    own.bos_token = "<|im_start|>"
    own.save_pretrained(tmp_path)
    own = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    bridge = bridged("llama", own)
    assert bridge.tokenizer("how").input_ids == [own.bos_token_id, *own("how").input_ids]
    model, other = emlens.wrap(bridge, name="a"), emlens.wrap(build("llama"), own, name="a")
    texts = ("how do I save money", "tell me a story")
    corpus = Corpus("two", tuple(Document(text, text) for text in texts))
    (ours,), (theirs,) = model.batches(corpus), other.batches(corpus)
    assert torch.equal(ours.input_ids, theirs.input_ids)
    assert model.identity == other.identity
    own.name_or_path = bridge.tokenizer.name_or_path = "/nowhere/any/more"
    with pytest.warns(UserWarning, match="TransformerLens makes tokenizers prepend BOS, and that"):
        emlens.wrap(bridge, name="a")
