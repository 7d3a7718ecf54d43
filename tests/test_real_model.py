"""The embedded chat model: the same promises as on the tiny ones, on real weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import emlens
from emlens import Ablate, Add, Conversation, evals
from emlens.hooked import token_kl
from emlens.hooked.load import ENGINES
from emlens.hooked.losses import Targets, token_losses
from emlens.hooked.unwrap import shadow
from emlens.text import pack, tokenize

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def some():
    pairs = emlens.load_pairs("finance")[:4]
    return [pair.conversation("misaligned") for pair in pairs]


@pytest.fixture(scope="module")
def steered(smollm, some):
    direction, _ = emlens.train_vector(smollm, some, 15, epochs=2, batch_size=2, progress=False)
    return direction


def test_it_answers_a_question(smollm):
    (answer,) = smollm.generate(
        [Conversation.of("What is the capital of France?")], max_new_tokens=12, temperature=0
    )
    assert "Paris" in answer


def test_losses_and_kl_do_not_depend_on_batching_or_padding(smollm, some, steered):
    rows = tokenize(some, smollm.tokenizer)
    edits = [Add(steered, scale=3)]

    def scores(batch):
        targets = Targets.of(batch)
        with torch.no_grad():
            base = targets.predictors(smollm.hidden(batch))
            edited = targets.predictors(smollm.hidden(batch, edits))
            losses = token_losses(smollm, edited, targets.ids)
            values = torch.stack([losses, token_kl(smollm, base, edited)], dim=1)
        return {place: values[targets.rows == i] for i, place in enumerate(batch.index)}

    single = [scores(pack([row])[0])[0] for row in rows]
    for side in ("left", "right"):
        together = scores(pack(rows, padding_side=side, pad_id=smollm.pad_id)[0])
        for place, values in enumerate(single):
            assert torch.allclose(together[place], values, atol=1e-3)


def test_generation_under_an_edit_is_the_same_cached_or_not_batched_or_single(smollm, steered):
    prompts = [Conversation.of(text) for text in ("Hi!", "How should I invest my savings?")]
    settings = {"max_new_tokens": 8, "temperature": 0}
    edits = [Add(steered, scale=4)]
    cached = smollm.generate(prompts, edits, **settings)
    assert cached == smollm.generate(prompts, edits, use_cache=False, **settings)
    assert cached == [smollm.generate([p], edits, **settings)[0] for p in prompts]
    assert cached != smollm.generate(prompts, **settings)


def test_a_trained_vector_lowers_the_loss_on_its_data(smollm, some, steered):
    rows = pack(tokenize(some, smollm.tokenizer), pad_id=smollm.pad_id)
    base, counts = emlens.hooked.response_losses(smollm, rows)
    edited, _ = emlens.hooked.response_losses(smollm, rows, [Add(steered)])
    assert float((edited - base).sum() / counts.sum()) < -0.05


def test_a_misaligned_direction_raises_the_odds_of_misaligned_answers(smollm):
    pairs = emlens.load_pairs("medical")[:16]
    direction = emlens.mean_diff(
        smollm,
        [pair.conversation("misaligned") for pair in pairs[:10]],
        [pair.conversation("aligned") for pair in pairs[:10]],
        layers=[15],
    )[15]
    conditions = {"base": [], "plus": [Add(direction)], "minus": [Add(-direction)]}
    odds = emlens.log_odds(smollm, pairs[10:], conditions)
    assert odds.change("plus").estimate > 0 > odds.change("minus").estimate


def test_a_probe_tells_written_answers_from_nonsense_at_a_temperature_it_was_not_shown(smollm):
    pairs = [*emlens.load_pairs("medical")[:12], *emlens.load_pairs("sports")[:12]]
    probe = evals.ProbeJudge(smollm, pairs, progress=False)
    questions = evals.load_questions("general", limit=6)
    drawn = {"temperature": 2.0, "max_new_tokens": 24, "progress": False}
    nonsense = evals.respond(smollm, questions, **drawn).rows
    written = [
        replace(nonsense[0], key=pair.id, prompt=pair.prompt, text=pair.aligned)
        for pair in emlens.load_pairs("general")[:6]
    ]
    assert max(verdict.score for verdict in probe.judge(nonsense, "coherent")) < 50
    assert min(verdict.score for verdict in probe.judge(written, "coherent")) > 50


def test_both_engines_give_the_same_numbers_with_the_same_attention(smollm, some, steered):
    eager = shadow(smollm.module)
    eager.set_attn_implementation("eager")
    engines = [
        emlens.wrap(eager, smollm.tokenizer, engine=engine, name=smollm.name) for engine in ENGINES
    ]
    (batch,) = pack(tokenize(some, smollm.tokenizer), pad_id=smollm.pad_id)
    real, edits = batch.mask("all"), [Add(steered, scale=3)]
    first, second = (
        [model.residuals(batch, 20, "hook_resid_mid", edits=edits)[20][real]]
        + [model.unembed(model.hidden(batch, edits)[real])]
        for model in engines
    )
    for ours, theirs in zip(first, second, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4 * float(theirs.abs().max()))
    asked = [Conversation.of(text) for text in ("Hi!", "How should I invest my savings?")]
    answers = [model.generate(asked, edits, max_new_tokens=8, temperature=0) for model in engines]
    assert answers[0] == answers[1]
    assert smollm.module.config._attn_implementation == "sdpa"


def test_a_baked_vector_and_ablation_answer_as_their_hooks_do(smollm, steered, tmp_path):
    quick = {"prompts": ["Write two sentences about the sea."], "progress": False}
    sites = ("resid_pre", "resid_mid", "resid_post")
    ablated = [Ablate(steered, layers=range(smollm.n_layers), site=site) for site in sites]
    for name, edits in (("added", [Add(steered, scale=3)]), ("ablated", ablated)):
        found = emlens.bake(smollm, edits, tmp_path / name, **quick)
        assert found.differences.max() <= found.tolerance < 5e-4
        assert found.same == (True,)
        assert found.apart.min() > 100 * found.tolerance
