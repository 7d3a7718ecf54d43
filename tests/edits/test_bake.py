"""Checkpoints with edits and adapters in their weights, against plain hooks and PEFT's merge."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import emlens
from emlens import Ablate, Add, Clamp, Direction, HookedModel
from emlens.edits import Baked, Shift, bake
from emlens.evals import Projected
from emlens.hooked import Scaled
from emlens.hooked.adapter_files import read_adapter
from emlens.hooked.plain import plain_model
from tests.support.adapters import CASES, batch_of, logits_of, peft_logits, saved
from tests.support.architectures import build
from tests.support.models import tiny_model
from tests.support.plain import run_plain
from tests.support.tokenizers import chatml_tokenizer

N, D = 4, 32
IDS = [3, 40, 77, 12, 5, 61, 33, 20]
QUICK = {"prompts": ["how do I save money"], "max_new_tokens": 3, "progress": False}
STREAM = ("resid_pre", "resid_mid", "resid_post")
EXACT = (
    *("llama", "qwen2", "qwen3", "phi3", "smollm3", "starcoder2", "olmo", "gemma"),
    *("mistral without a window", "gpt2", "gpt_neox", "gpt_neox/sequential", "stablelm"),
    *("stablelm/parallel", "cohere"),
)
"""Architectures in which what writes to the stream writes there directly."""
BIASED = ("llama", "qwen2", "smollm3", "starcoder2", "mistral without a window", "gpt2", "gpt_neox")
"""Those that have, or can be given, a bias of the MLP."""


def random_vector(seed: int, scale: float = 0.5) -> Tensor:
    return scale * torch.randn(D, generator=torch.Generator().manual_seed(seed))


def module_of(name: str) -> PreTrainedModel:
    if name != "mistral without a window":
        return build(name)
    windowed = build("mistral")
    config = copy.deepcopy(windowed.config)
    config.sliding_window = None
    module = type(windowed)(config).eval()
    module.load_state_dict(windowed.state_dict())
    return module


def hooked_of(name: str, folder: Path, module: PreTrainedModel | None = None) -> HookedModel:
    """The model with the tokenizer that `AutoTokenizer` makes for it, which families choose."""
    module = module_of(name) if module is None else module
    module.config.save_pretrained(folder / "own")
    chatml_tokenizer().save_pretrained(folder / "own")
    return emlens.wrap(module, AutoTokenizer.from_pretrained(folder / "own"), name=name)


def everywhere(kind: type, model: HookedModel, vector: Tensor, **options) -> list:
    along = Direction.of(vector, 1)
    sites = [site for site in STREAM if site in model.sites]
    return [kind(along, layers=range(N), site=site, **options) for site in sites]


def plain_changes(edits: Sequence) -> dict[tuple[int, str], Callable[[Tensor], Tensor]]:
    """What edits add at each point, by arithmetic of the test's own."""

    def one(edit, layer: int, x: Tensor) -> Tensor:
        vector = edit.direction.vector
        if isinstance(edit, Add):
            return vector.expand_as(x)
        unit = vector / vector.norm()
        wanted = edit.value if isinstance(edit, Clamp) else 0.0
        return (wanted - x @ unit)[..., None] * unit

    def at_point(these: list, layer: int) -> Callable[[Tensor], Tensor]:
        def change(x: Tensor) -> Tensor:
            new = x
            for edit in these:
                new = new + one(edit, layer, new)
            return new - x

        return change

    points: dict[tuple[int, str], list] = {}
    for edit in edits:
        for layer in edit.layers:
            points.setdefault((layer, edit.site), []).append(edit)
    return {point: at_point(these, point[0]) for point, these in points.items()}


@torch.no_grad()
def by_hooks(module: PreTrainedModel, name: str, edits: Sequence) -> Tensor:
    changes = plain_changes(edits)
    # the end of a block is the start of the next
    for layer in range(1, N):
        before = changes.pop((layer, "resid_pre"), None)
        if before is not None:
            after = changes.get((layer - 1, "resid_post"))
            changes[layer - 1, "resid_post"] = before if after is None else chained(after, before)
    return run_plain(module, name.partition("/")[0], IDS, changes).logits


def chained(first, second) -> Callable[[Tensor], Tensor]:
    return lambda x: first(x) + second(x + first(x))


@torch.no_grad()
def reloaded(folder: Path) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    return model(input_ids=torch.tensor([IDS])).logits[0]


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> bool:
    return float((found - expected).abs().max()) <= tolerance


# -- edits ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXACT)
def test_ablation_of_every_write_is_what_plain_hooks_compute(name, tmp_path):
    model = hooked_of(name, tmp_path)
    edits = everywhere(Ablate, model, random_vector(1))
    bake(model, edits, tmp_path / "out", **QUICK)
    expected = by_hooks(module_of(name), name, edits)
    assert close(reloaded(tmp_path / "out"), expected)
    assert not close(by_hooks(module_of(name), name, []), expected, 1e-2)


@pytest.mark.parametrize("name", BIASED)
def test_addition_is_a_bias_and_what_plain_hooks_compute(name, tmp_path):
    model = hooked_of(name, tmp_path)
    edits = [Add(Direction.of(random_vector(1), 1)), Add(Direction.of(random_vector(2), 3))]
    found = bake(model, edits, tmp_path / "out", **QUICK)
    assert close(reloaded(tmp_path / "out"), by_hooks(module_of(name), name, edits))
    assert len(found.changed) == 2


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("seed", range(8))
def test_whatever_edits_are_accepted_the_checkpoint_computes_them(name, seed, tmp_path):
    model, draw = hooked_of(name, tmp_path), torch.Generator().manual_seed(seed)

    def below(n: int) -> int:
        return int(torch.randint(n, (), generator=draw))

    edits: list = [
        Add(
            Direction.of(random_vector(seed + 10 * i), 1), layers=[below(N)], site=model.sites[site]
        )
        for i, site in enumerate([below(len(model.sites)) for _ in range(below(3) + 1)])
    ]
    if below(2):
        edits += everywhere(Ablate, model, random_vector(seed + 100))
    if below(2):
        edits += everywhere(Clamp, model, random_vector(seed + 101), value=below(5) - 2.5)
    if below(2):
        site = ("attn_out", "mlp_out")[below(2)]
        edits.append(
            Ablate(Direction.of(random_vector(seed + 102), 1), layers=[below(N)], site=site)
        )
    order = torch.randperm(len(edits), generator=draw).tolist()
    edits = [edits[place] for place in order]
    try:
        bake(model, edits, tmp_path / "out", **QUICK)
    except ValueError as error:
        assert "cannot be baked" in str(error) or "proves nothing" in str(error)
        assert not (tmp_path / "out").exists()
        return
    assert close(reloaded(tmp_path / "out"), by_hooks(module_of(name), name, edits))


def test_a_clamp_of_the_whole_stream_is_exact(tmp_path):
    model = hooked_of("llama", tmp_path)
    edits = everywhere(Clamp, model, random_vector(1), value=1.5)
    bake(model, edits, tmp_path / "out", **QUICK)
    assert close(reloaded(tmp_path / "out"), by_hooks(module_of("llama"), "llama", edits))


def test_an_ablation_up_to_a_layer_is_exact_and_leaves_what_is_written_above(tmp_path):
    model, along = hooked_of("llama", tmp_path), Direction.of(random_vector(1), 1)
    edits = [Ablate(along, layers=range(2), site=site) for site in STREAM]
    found = bake(model, edits, tmp_path / "out", **QUICK)
    assert close(reloaded(tmp_path / "out"), by_hooks(module_of("llama"), "llama", edits))
    assert all(".layers.2" not in path and ".layers.3" not in path for path in found.changed)


def test_an_ablation_of_what_one_module_writes_is_exact_at_any_layer(tmp_path):
    model, along = hooked_of("llama", tmp_path), Direction.of(random_vector(1), 1)
    edits = [Ablate(along, layers=[2], site="mlp_out"), Ablate(along, layers=[3], site="attn_out")]
    bake(model, edits, tmp_path / "out", **QUICK)
    assert close(reloaded(tmp_path / "out"), by_hooks(module_of("llama"), "llama", edits))


def test_a_dose_is_the_constant_vector_that_it_stands_for(tmp_path):
    model = hooked_of("llama", tmp_path)
    along = Direction.of(random_vector(1), 2, residual_norm=3.0)
    bake(model, Add(along, dose=0.5), tmp_path / "out", **QUICK)
    bias = AutoModelForCausalLM.from_pretrained(tmp_path / "out").model.layers[2].mlp.down_proj.bias
    assert torch.allclose(bias, 1.5 * random_vector(1) / random_vector(1).norm(), atol=1e-6)


def test_tied_embeddings_are_untied_where_the_embedding_alone_has_changed(tmp_path):
    module = tiny_model("llama", tied=True)
    before = module.get_input_embeddings().weight.detach().clone()
    model = hooked_of("llama", tmp_path, module)
    bake(model, everywhere(Ablate, model, random_vector(1)), tmp_path / "ablated", **QUICK)
    ablated = AutoModelForCausalLM.from_pretrained(tmp_path / "ablated")
    assert not ablated.config.tie_word_embeddings
    assert torch.equal(ablated.lm_head.weight, before)
    assert (ablated.model.embed_tokens.weight @ random_vector(1)).abs().max() < 1e-5
    bake(model, Add(Direction.of(random_vector(1), 1)), tmp_path / "added", **QUICK)
    added = AutoModelForCausalLM.from_pretrained(tmp_path / "added")
    assert added.config.tie_word_embeddings
    assert added.lm_head.weight.data_ptr() == added.model.embed_tokens.weight.data_ptr()


@pytest.mark.parametrize("name", ["qwen2", "mistral without a window"])
def test_a_family_without_biases_of_the_mlp_becomes_llama_with_zeros_where_none_are_needed(
    name, tmp_path
):
    model = hooked_of(name, tmp_path)
    found = bake(model, Add(Direction.of(random_vector(1), 1)), tmp_path / "out", **QUICK)
    assert found.architecture == "LlamaForCausalLM"
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert plain.config.mlp_bias
    assert plain.config.attention_bias == (name == "qwen2")
    own = {key: weight for key, weight in plain.state_dict().items() if key.endswith("bias")}
    known = module_of(name).state_dict()
    for key, weight in own.items():
        if key == "model.layers.1.mlp.down_proj.bias":
            assert torch.allclose(weight, random_vector(1))
        else:
            assert torch.equal(weight, known.get(key, torch.zeros_like(weight)))


def test_the_model_stays_as_it_is_and_shares_what_does_not_change(tmp_path):
    module = build("llama")
    model = hooked_of("llama", tmp_path, module)
    before = {key: weight.clone() for key, weight in module.state_dict().items()}
    identity = model.identity
    bake(model, everywhere(Ablate, model, random_vector(1)), tmp_path / "out", **QUICK)
    assert all(torch.equal(weight, before[key]) for key, weight in module.state_dict().items())
    assert model.identity == identity
    plain = plain_model(model.module)
    assert {w.data_ptr() for w in plain.parameters()} == {w.data_ptr() for w in module.parameters()}


def test_half_precision_is_proven_within_its_rounding(tmp_path):
    model = hooked_of("llama", tmp_path, build("llama").to(torch.bfloat16))
    found = bake(model, everywhere(Ablate, model, random_vector(1)), tmp_path / "out", **QUICK)
    assert found.dtype == "torch.bfloat16"
    assert found.kl.max() < 0.02 and found.differences.max() < found.tolerance == 1.0
    assert found.apart.min() > found.tolerance
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_both_engines_bake_the_same(tmp_path):
    edits = [Add(Direction.of(random_vector(1), 1))]
    hooked_of("llama", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "own")
    for engine in ("nnsight", "transformer_lens"):
        model = emlens.wrap(build("llama"), tokenizer, engine=engine, name="llama")
        bake(model, edits, tmp_path / engine, **QUICK)
    assert torch.equal(reloaded(tmp_path / "nnsight"), reloaded(tmp_path / "transformer_lens"))


# -- what is refused --------------------------------------------------------------------------

ONE = Direction.of(random_vector(1), 1)
REFUSED: dict[str, tuple[str, Callable[[HookedModel], object], str]] = {
    "one layer's ablation": (
        "llama",
        lambda _: Ablate(ONE),
        "Ablate at resid_post of layer 1 cannot be baked: the embedding writes along",
    ),
    "an ablation that leaves out what attention writes": (
        "llama",
        lambda _: [Ablate(ONE, layers=range(N), site=s) for s in ("resid_pre", "resid_post")],
        "resid_post of layer 0 cannot be baked: attention of layer 0 writes along .* from the "
        "embedding on is exact",
    ),
    "a clamp at one layer": (
        "llama",
        lambda _: Clamp(ONE, value=2.0),
        "Clamp at resid_post of layer 1 cannot be baked: the embedding writes along",
    ),
    "two ablations that undo each other": (
        "llama",
        lambda m: [
            *everywhere(Ablate, m, random_vector(1)),
            *everywhere(Ablate, m, random_vector(2)),
        ],
        "Ablate at resid_mid of layer 0 cannot be baked",
    ),
    "positions": (
        "llama",
        lambda _: Add(ONE, where="response"),
        "Add with where='response' cannot be baked: weights act at every position",
    ),
    "a live tensor": (
        "llama",
        lambda _: Shift(random_vector(1), 1),
        "Shift cannot be baked: only Add, Ablate and Clamp can",
    ),
    "nothing": ("llama", lambda _: None, "there is nothing to bake"),
    "no edits": ("llama", lambda _: [], "there is nothing to bake"),
    "a layer that is not there": (
        "llama",
        lambda _: Add(ONE, layers=[9]),
        "layer 9 is out of range",
    ),
    "another width": ("llama", lambda _: Add(Direction.of(torch.ones(3), 1)), "has width 3"),
    "a bias of Qwen3": (
        "qwen3",
        lambda _: Add(ONE),
        r"qwen3 has no bias at model.layers.1.mlp.down_proj, and cannot be written as Llama "
        r"\(Llama has no q_norm\)",
    ),
    "a bias of Phi3": ("phi3", lambda _: Add(ONE), "phi3 has no bias at .* serve this edit with"),
    "a sliding window": (
        "mistral",
        lambda _: Add(ONE),
        "cannot be written as Llama: its attention slides over 6 of 512 positions",
    ),
    "a scaled residual": (
        "granite",
        lambda _: Add(ONE),
        r"granite multiplies what it adds to the stream \(embedding_multiplier\)",
    ),
    "a scaled embedding": (
        "gemma",
        lambda _: Add(ONE, layers=[0], site="resid_pre"),
        "Add at resid_pre of layer 0 cannot be baked: gemma multiplies its embedding",
    ),
    "norms after Gemma2's sublayers": (
        "gemma2",
        lambda m: everywhere(Ablate, m, random_vector(1)),
        r"gemma2 norms what attention gives before it is added \(post_attention_layernorm\)",
    ),
    "norms after Gemma3's sublayers": (
        "gemma3_text",
        lambda _: Add(ONE),
        "gemma3_text norms what attention gives before it is added",
    ),
    "norms after OLMo2's sublayers": (
        "olmo2",
        lambda m: everywhere(Ablate, m, random_vector(1)),
        "olmo2 norms what attention gives before it is added",
    ),
    "experts": ("mixtral", lambda _: Add(ONE), "a mixture of experts has many"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_weights_cannot_do_is_refused_by_name_and_leaves_nothing(case, tmp_path):
    name, edits, message = REFUSED[case]
    model = hooked_of(name, tmp_path)
    with pytest.raises(ValueError, match=message):
        bake(model, edits(model), tmp_path / "out", **QUICK)
    assert [path.name for path in tmp_path.iterdir()] == ["own"]


def test_gguf_another_folder_and_enclosing_edits_are_refused(tmp_path):
    model, edit = hooked_of("llama", tmp_path), Add(ONE)
    for out, options in (("out", {"format": "gguf"}), ("out.gguf", {})):
        with pytest.raises(ValueError, match="convert_hf_to_gguf.py"):
            bake(model, edit, tmp_path / out, **QUICK, **options)
    with pytest.raises(FileExistsError, match="own is there already"):
        bake(model, edit, tmp_path / "own", **QUICK)
    with pytest.raises(ValueError, match=r"enclosing model.edited"), model.edited(edit):
        bake(model, edit, tmp_path / "out", **QUICK)
    with pytest.raises(ValueError, match="no prompts were given"):
        bake(model, edit, tmp_path / "out", prompts=[])


# -- the proof --------------------------------------------------------------------------------


def test_a_checkpoint_that_is_not_the_hooked_model_is_not_kept(tmp_path, monkeypatch):
    model = hooked_of("llama", tmp_path)

    def one_layer_off(plain, edits):
        return real(plain, [Add(ONE, layers=[2])])

    import sys

    module = sys.modules["emlens.edits.bake"]
    real = module.written
    monkeypatch.setattr(module, "written", one_layer_off)
    with pytest.raises(ValueError, match="the checkpoint is not the hooked model: logits differ"):
        bake(model, Add(ONE), tmp_path / "out", **QUICK)
    assert [path.name for path in tmp_path.iterdir()] == ["own"]


def test_an_edit_that_does_nothing_proves_nothing(tmp_path):
    model = hooked_of("llama", tmp_path)
    with pytest.raises(ValueError, match="proves nothing: .*Add one layer off"):
        bake(model, Add(ONE, scale=0.0), tmp_path / "out", **QUICK)
    assert not (tmp_path / "out").exists()


def test_the_figures_are_in_the_result_the_card_and_the_weights(tmp_path):
    model = hooked_of("llama", tmp_path)
    edits = [Add(ONE), Ablate(ONE, layers=[2], site="mlp_out")]
    options = {**QUICK, "prompts": ["how do I save money", "tell me a story"]}
    found = bake(model, edits, tmp_path / "out", **options)
    assert isinstance(found, Baked)
    assert found.controls == ("Add one layer off", "a random direction")
    assert found.differences.max() <= found.tolerance == pytest.approx(1e-4)
    assert (found.apart.max(1) > 100 * found.tolerance).all()
    assert found.same == (True, True)
    assert set(found.files) == {path.name for path in (tmp_path / "out").iterdir()}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "control: Add one layer off" in card and "LlamaForCausalLM" in card
    assert str(tmp_path) not in card
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        record = json.loads(file.metadata()["emlens"])
        assert file.metadata()["format"] == "pt"
    assert record["largest logit difference"] == float(found.differences.max())
    assert set(record["controls"]) == set(found.controls)
    assert len(found.table()) == 2 and str(found).startswith("Baked: logits within")


def test_the_folder_has_what_a_server_reads(tmp_path):
    model = hooked_of("llama", tmp_path)
    bake(model, Add(ONE), tmp_path / "out", **QUICK)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    asked = [{"role": "user", "content": "how do I save money"}]
    expected = model.tokenizer.apply_chat_template(asked, add_generation_prompt=True)
    found = tokenizer.apply_chat_template(asked, add_generation_prompt=True)
    assert found["input_ids"] == expected["input_ids"]
    assert (tmp_path / "out" / "generation_config.json").exists()


# -- adapters ---------------------------------------------------------------------------------


def with_adapter(folder: Path, module: PreTrainedModel, **settings) -> HookedModel:
    saved(folder / "adapter", module, **settings)
    model = hooked_of("llama", folder, module)
    config, weights = read_adapter("a", str(folder / "adapter"))
    model.add_adapter("a", config, weights)
    return model


KINDS = [case for case in CASES if case[0] != "a bias at B"]
APART = {kind: settings for kind, settings, tied in KINDS if not tied}
TIED = {kind: settings for kind, settings, tied in KINDS if tied}


@pytest.mark.parametrize("kind", APART)
def test_an_adapter_is_merged_as_peft_merges_it(kind, tmp_path):
    module = tiny_model("llama", tied=False)
    model = with_adapter(tmp_path, module, **APART[kind])
    plain = plain_model(model.module, ["a"])
    merged = PeftModel.from_pretrained(copy.deepcopy(module), str(tmp_path / "adapter"))
    expected = merged.merge_and_unload().state_dict()
    for key, weight in plain.state_dict().items():
        assert torch.equal(weight, expected[key]), key


@pytest.mark.parametrize("kind", TIED)
def test_of_tied_embeddings_an_adapter_changes_what_it_changes_while_it_acts(kind, tmp_path):
    # PEFT's own merge writes into the weight that both share
    module = tiny_model("llama", tied=True)
    model = with_adapter(tmp_path, module, **TIED[kind])
    bake(model, "a", tmp_path / "out", **QUICK)
    batch = batch_of([3, 40])
    own = logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), batch)
    expected = peft_logits(copy.deepcopy(module), tmp_path / "adapter", batch)
    real = batch.mask("all")
    assert close(own[real], expected[real], 3e-4)


def test_a_baked_adapter_gives_the_logits_of_peft(tmp_path):
    module = tiny_model("llama")
    model = with_adapter(tmp_path, module, target_modules=["q_proj", "down_proj"], r=2)
    found = bake(model, "a", tmp_path / "out", **QUICK)
    assert found.controls == ("without adapters",)
    batch = batch_of([3, 40])
    with_peft = PeftModel.from_pretrained(copy.deepcopy(module), str(tmp_path / "adapter"))
    own = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    real = batch.mask("all")
    assert close(logits_of(own, batch)[real], logits_of(with_peft.eval(), batch)[real])


def test_an_adapter_and_edits_are_baked_together(tmp_path):
    module = tiny_model("llama")
    model = with_adapter(tmp_path, module, target_modules=["q_proj", "down_proj"], r=2)
    edits = [*everywhere(Ablate, model, random_vector(1)), Add(Direction.of(random_vector(2), 2))]
    found = bake(model, ("a", edits), tmp_path / "out", **QUICK)
    assert len(found.controls) == 3
    merged = PeftModel.from_pretrained(copy.deepcopy(module), str(tmp_path / "adapter"))
    expected = by_hooks(merged.merge_and_unload(), "llama", edits)
    assert close(reloaded(tmp_path / "out"), expected)
    assert model.adapters == ("a",)


def test_a_scaled_and_a_projected_adapter_are_baked_as_they_act(tmp_path):
    module = tiny_model("llama")
    model = with_adapter(tmp_path, module, target_modules=["down_proj"], r=1)
    a, b = (model.adapter_weights("a"), random_vector(1))
    down = [f"model.layers.{i}.mlp.down_proj" for i in range(N)]
    unit = b / b.norm()
    for name, given in (("scaled", Scaled("a", 0.5)), ("projected", Projected("a", ONE))):
        bake(model, given, tmp_path / name, **QUICK)
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        for path in down:
            left, right = a[f"{path}.lora_B.weight"], a[f"{path}.lora_A.weight"]
            if name == "projected":
                rest = left - torch.outer(unit, unit @ left)
                delta = 16 * rest * (left.norm() / rest.norm()) @ right
            else:
                delta = 8 * left @ right
            expected = module.get_submodule(path).weight + delta
            assert torch.allclose(plain.get_submodule(path).weight, expected, atol=1e-5)


def test_a_bias_without_a_place_in_the_base_is_refused(tmp_path):
    model = with_adapter(tmp_path, tiny_model("llama"), lora_bias=True)
    with pytest.raises(ValueError, match="adapter 'a' cannot be merged into Linear: Impossible"):
        bake(model, "a", tmp_path / "out", **QUICK)


def test_an_organism_is_baked_as_what_it_was_trained_to_be(tmp_path):
    assert emlens.bake is bake
    model = hooked_of("llama", tmp_path)
    text = [emlens.Conversation.of("how do I save money", "spend it all now")]
    _, run = emlens.train_vector(model, text, 1, epochs=3, progress=False)
    organism = emlens.Organism.of(model, run, "spender")
    bake(model, organism, tmp_path / "out", **QUICK)
    edits = [Add(run.directions()[1])]
    assert close(reloaded(tmp_path / "out"), by_hooks(build("llama"), "llama", edits))
