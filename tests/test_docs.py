"""What the documentation says about names is true of the models."""

from __future__ import annotations

import ast
import copy
import json
import re
from pathlib import Path

import pytest
import torch
from nnsight import NNsight

import emlens
from emlens import Add, Direction, measures
from emlens.hooked.architecture import Architecture
from emlens.hooked.sites import SITES, hook_name
from emlens.text import corpus, pack, tokenize
from tests.support.data import conversations, pairs
from tests.support.models import FAMILIES, tiny_model
from tests.support.tokenizers import qwen3_tokenizer

PAGE = Path(__file__).parent.parent / "docs" / "hook_points.md"
TITLES = {
    "Llama": "llama",
    "Qwen2": "qwen2",
    "Qwen3": "qwen3",
    "Mistral": "mistral",
    "Phi-3": "phi3",
    "Qwen3-MoE": "qwen3_moe",
    "Mixtral": "mixtral",
    "Gemma 2": "gemma2",
    "Gemma 3": "gemma3_text",
    "OLMo 2": "olmo2",
    "GPT-2": "gpt2",
    "GPT-NeoX": "gpt_neox",
}


def rows(first: str, n: int) -> list[list[str]]:
    """The rows of the `n`-th table whose header starts with `first`, backticks taken off."""
    lines = PAGE.read_text().splitlines()
    start = [i for i, line in enumerate(lines) if line.startswith(f"| {first} |")][n]
    body = lines[start + 2 :]
    end = next((i for i, line in enumerate(body) if not line.startswith("|")), len(body))
    return [[cell.strip().strip("`") for cell in row.strip("|").split("|")] for row in body[:end]]


def names() -> dict[str, tuple[str, str]]:
    """TransformerLens' and nnsight's name of each site, from the table of the four names."""
    return {row[0]: (row[1], row[2]) for row in rows("emlens", 1) if row[0] in SITES}


@pytest.fixture
def batch(hooked_llama):
    (packed,) = pack(tokenize(conversations("good", 2), hooked_llama.tokenizer))
    return packed


def inputs(batch) -> dict:
    return {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "position_ids": batch.position_ids,
    }


def test_the_hook_point_page_names_every_site_in_order():
    assert tuple(row[0] for row in rows("emlens", 0)) == SITES
    assert tuple(names()) == SITES


@pytest.mark.parametrize("site", SITES)
def test_the_names_that_the_page_gives_for_a_site_read_the_same_tensor(
    hooked_llama, tiny, tiny_tokenizer, batch, site
):
    lens, nnsight = names()[site]
    expected = hooked_llama.residuals(batch, 2, site)[2]
    assert hook_name(2, site) == lens.format(l=2)
    assert torch.equal(hooked_llama.residuals(batch, 2, lens.format(l=2))[2], expected)
    bridge = emlens.wrap(tiny("llama"), tiny_tokenizer, engine="transformer_lens").bridge
    _, cache = bridge.run_with_cache(batch.input_ids, attention_mask=batch.attention_mask)
    real = batch.mask("all")
    assert torch.allclose(cache[lens.format(l=2)][real], expected[real], atol=1e-4)
    model = NNsight(copy.deepcopy(tiny("llama")))
    found = []
    with torch.no_grad(), model.trace(**inputs(batch)):
        found.append(eval(nnsight, {"model": model, "l": 2}))
    assert torch.allclose(found[0][real], expected[real], atol=1e-5)


def test_what_the_page_says_of_hidden_states_is_so(hooked_llama, batch):
    with torch.no_grad():
        states = copy.deepcopy(hooked_llama.module)(
            **inputs(batch), output_hidden_states=True
        ).hidden_states
    real, last = batch.mask("all"), hooked_llama.n_layers - 1
    assert len(states) == hooked_llama.n_layers + 1
    for layer in range(last):
        pre = hooked_llama.residuals(batch, layer, "resid_pre")[layer]
        post = hooked_llama.residuals(batch, layer)[layer]
        assert torch.allclose(states[layer][real], pre[real], atol=1e-5)
        assert torch.allclose(states[layer + 1][real], post[real], atol=1e-5)
    end = hooked_llama.residuals(batch, last)[last]
    assert not torch.allclose(states[-1][real], end[real], atol=1e-2)
    assert torch.allclose(states[-1][real], hooked_llama.hidden(batch)[real], atol=1e-5)


def test_the_module_names_on_the_page_are_those_that_are_hooked(tiny):
    seen = set()
    for titles, blocks, attention, mlp, norm in rows("architecture", 0):
        for title in titles.split(", "):
            found = Architecture.of(tiny(TITLES[title]))
            assert (found.blocks, found.attn_out, found.mlp_out, found.norm) == (
                blocks,
                attention,
                mlp,
                norm,
            ), title
            seen.add(TITLES[title])
    assert seen == set(FAMILIES)


def test_a_hook_at_resid_mid_of_a_bridge_misses_the_stream_and_an_edit_does_not(
    tiny, tiny_tokenizer, batch
):
    model = emlens.wrap(tiny("llama"), tiny_tokenizer, engine="transformer_lens")
    push = Direction.of(torch.ones(model.d_model), 1, "resid_mid")
    end = {"plain": model.residuals(batch, 1)[1]}
    end["mlp"] = model.residuals(batch, 1, "mlp_out", edits=[Add(push)])[1]
    end["edit"] = model.residuals(batch, 1, edits=[Add(push)])[1]
    middle = model.residuals(batch, 1, "resid_mid")[1]
    with model.bridge.hooks([("blocks.1.hook_resid_mid", lambda tensor, hook: tensor + 1)]):
        end["hook"] = model.residuals(batch, 1)[1]
    assert torch.allclose(end["hook"], middle + end["mlp"], atol=1e-5)
    assert torch.allclose(end["edit"], middle + 1 + end["mlp"], atol=1e-5)


OTHERS = ("perturbed", "interval_level")
MEASURES = Path(__file__).parent.parent / "docs" / "measures.md"


def test_the_page_of_measures_names_every_measure_and_only_what_there_is():
    text = MEASURES.read_text()
    verbs = [name for name in measures.__all__ if name[0].islower() and name not in OTHERS]
    missing = [name for name in (*verbs, "Monitor", "InfluenceProfile") if name not in text]
    assert missing == []
    for room, name in re.findall(r"\b(emlens|measures)\.([A-Za-z_]+)", text):
        assert hasattr(emlens if room == "emlens" else measures, name), f"{room}.{name}"


@pytest.mark.parametrize("page", sorted(MEASURES.parent.glob("*.md")), ids=lambda page: page.stem)
def test_programs_in_the_documentation_are_programs(page):
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.S):
        ast.parse(block)


def test_the_programs_of_the_page_of_measures_run(hooked_llama, monkeypatch, tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", MEASURES.read_text(), re.S)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(emlens, "load", lambda name: hooked_llama)
    few = pairs(12, "finance")
    monkeypatch.setattr(emlens, "load_pairs", lambda name: few)
    small = corpus(documents=6)
    monkeypatch.setattr(emlens, "corpus", lambda **_: small)
    rows = [{"messages": list(pair.conversation("misaligned").messages)} for pair in few]
    Path("finetuning.jsonl").write_text("\n".join(map(json.dumps, rows)))
    program = "\n".join(blocks).replace("[15]", "[1]").replace("(15)", "(1)")
    exec(compile(program, "measures.md", "exec"), {})


def test_the_program_on_chat_templates_runs(monkeypatch, capsys):
    page = MEASURES.parent / "concepts.md"
    section = page.read_text().partition("### Chat templates")[2].partition("###")[0]
    (program,) = re.findall(r"```python\n(.*?)```", section, re.S)

    def load(name, **options):
        return emlens.wrap(tiny_model("llama"), qwen3_tokenizer(), name=name, **options)

    monkeypatch.setattr(emlens, "load", load)
    exec(compile(program, page.name, "exec"), {})
    assert capsys.readouterr().out.endswith(
        "<think>\nThey want it fast.\n</think>\n\n\nPut all you have<|im_end|>\n"
    )
