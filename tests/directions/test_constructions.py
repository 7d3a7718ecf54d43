"""Every construction against a plain loop, and against a planted truth."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

import emlens
from emlens import Add, Conversation, Direction, Directions, mean_diff
from emlens.directions import (
    CONSTRUCTIONS,
    both_diff,
    confounds,
    cosine,
    edit_diff,
    extract_all,
    matched,
    model_diff,
    pca,
    probe,
    select_answers,
    system_prompt_diff,
)
from emlens.directions.held_out import fold_of, prompts_of
from emlens.text import pack, tokenize
from tests.support.adapters import peft_model
from tests.support.data import conversations
from tests.support.models import tiny_model

GOOD, BAD = conversations("good", 24), conversations("bad", 24)
LAYER = 2


def residuals(model, data, tokens="response"):
    """The counted residuals of each conversation at one layer, one forward pass each."""
    found = []
    for row in tokenize(data, model.tokenizer):
        (batch,) = pack([row])
        found.append(model.residuals(batch, LAYER)[LAYER][batch.mask(tokens)].double())
    return found


def means(model, data, tokens="response"):
    return torch.stack([part.mean(0) for part in residuals(model, data, tokens)])


@pytest.fixture(scope="module")
def organism(tiny_tokenizer):
    """A tiny model with one adapter; none acts."""
    model = emlens.wrap(peft_model(tiny_model("llama"), r=2), tiny_tokenizer, name="tiny-llama")
    with model.adapter(None):
        yield model


def test_last_is_the_token_that_the_response_is_predicted_from(hooked_llama):
    rows = tokenize(BAD[:3], hooked_llama.tokenizer)
    for side in ("left", "right"):
        (batch,) = pack(rows, padding_side=side)
        mask = batch.mask("last")
        assert mask.sum(1).tolist() == [1, 1, 1]
        for i, place in enumerate(batch.index):
            first = rows[place].response.index(True)
            assert int(batch.position_ids[i][mask[i]]) == first - 1


def test_skip_first_leaves_out_the_first_counted_tokens(hooked_llama):
    found = mean_diff(hooked_llama, BAD, GOOD, layers=LAYER, skip_first=2)
    sides = [torch.cat([p[2:] for p in residuals(hooked_llama, side)]) for side in (BAD, GOOD)]
    expected = sides[0].mean(0) - sides[1].mean(0)
    assert torch.allclose(found[LAYER].vector.double(), expected, atol=1e-5)
    assert found.provenance.settings == {"skip_first": 2}


def test_winsorize_clips_each_token_at_a_quantile_of_its_own_coordinates(hooked_llama):
    found = mean_diff(hooked_llama, BAD, GOOD, layers=LAYER, winsorize=0.75)

    def clipped(tokens):
        limit = tokens.abs().sort(dim=-1).values[:, [round(0.75 * 32) - 1]]
        return torch.maximum(torch.minimum(tokens, limit), -limit)

    sides = [clipped(torch.cat(residuals(hooked_llama, side))) for side in (BAD, GOOD)]
    expected = sides[0].mean(0) - sides[1].mean(0)
    assert torch.allclose(found[LAYER].vector.double(), expected, atol=1e-5)


def test_drop_massive_leaves_out_tokens_far_longer_than_the_rest(hooked_llama):
    found = mean_diff(hooked_llama, BAD, GOOD, layers=LAYER, tokens="all", drop_massive=1.2)

    def mean(side):
        parts, counts = [], []
        for tokens in residuals(hooked_llama, side, "all"):
            norms = tokens.norm(dim=-1)
            # torch's median is the lower of the two in the middle
            kept = tokens[norms <= 1.2 * norms.float().median()]
            parts.append(kept.mean(0) * len(tokens))
            counts.append(len(tokens))
            assert len(kept) > 0
        return torch.stack(parts).sum(0) / sum(counts)

    expected = mean(BAD) - mean(GOOD)
    assert torch.allclose(found[LAYER].vector.double(), expected, atol=1e-4)


@pytest.mark.parametrize("budget", [40, 4096])
def test_model_diff_equals_a_plain_loop_and_knows_that_it_is_paired(organism, budget):
    found = model_diff(
        (organism, "default"), (organism, None), GOOD, layers=LAYER, token_budget=budget
    )
    with organism.adapter("default"):
        with_it = residuals(organism, GOOD)
    without = residuals(organism, GOOD)
    difference = torch.cat(with_it).mean(0) - torch.cat(without).mean(0)
    assert torch.allclose(found[LAYER].vector.double(), difference, atol=1e-5)
    counts = torch.tensor([len(part) for part in without], dtype=torch.float64)
    shifts = torch.stack([(a - b).mean(0) for a, b in zip(with_it, without, strict=True)])
    spread = (counts[:, None] * (shifts - difference)) ** 2
    error = (spread.sum(0) / counts.sum() ** 2 * len(counts) / (len(counts) - 1)).sqrt()
    assert torch.allclose(found.standard_errors[LAYER].double(), error, atol=1e-5)
    assert found.provenance.construction == "model-diff"
    assert found.provenance.adapter == "default"
    against = found.provenance.settings["against"]
    assert (against["model"], against["adapter"]) == ("tiny-llama", None)
    assert against["identity"] == found.provenance.identity
    assert against["condition"] != found.provenance.condition
    assert organism.active_adapter is None


def test_both_diff_reads_each_model_on_its_own_answers(organism):
    found = both_diff((organism, "default"), BAD, (organism, None), GOOD, layers=LAYER)
    with organism.adapter("default"):
        first = torch.cat(residuals(organism, BAD)).mean(0)
    expected = first - torch.cat(residuals(organism, GOOD)).mean(0)
    assert torch.allclose(found[LAYER].vector.double(), expected, atol=1e-5)
    assert found.provenance.n == {"positive": 24, "negative": 24}


@pytest.mark.parametrize("kind", ["logistic", "lda"])
def test_a_probe_is_scikit_learns_on_scaled_means_in_the_units_of_the_stream(hooked_llama, kind):
    found = probe(hooked_llama, BAD, GOOD, kind=kind, layers=LAYER)
    values = torch.cat([means(hooked_llama, BAD), means(hooked_llama, GOOD)]).numpy()
    truth = np.arange(48) < 24
    scale = values.std(0)
    if kind == "lda":
        plain = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto")
    else:
        plain = LogisticRegression(max_iter=1000)
    plain.fit((values - values.mean(0)) / scale, truth)
    normal = plain.coef_[0] / scale
    normal /= np.linalg.norm(normal)
    distance = (values[truth].mean(0) - values[~truth].mean(0)) @ normal
    expected = torch.from_numpy(normal * abs(distance)).float()
    assert cosine(found[LAYER].vector, expected) > 0.999
    assert torch.allclose(found[LAYER].vector, expected, atol=2e-2 * float(expected.norm()))
    assert 0.5 <= found.auroc[LAYER] <= 1
    assert 0.5 <= found.measured["held-out accuracy"][LAYER] <= 1


def test_pca_is_the_first_axis_of_the_paired_differences_uncentred(hooked_llama):
    found = pca(hooked_llama, BAD, GOOD, layers=LAYER)
    pairs = means(hooked_llama, BAD) - means(hooked_llama, GOOD)
    _, axes = torch.linalg.eigh(pairs.T @ pairs)
    axis = axes[:, -1] * torch.sign(axes[:, -1] @ pairs.mean(0))
    expected = axis * (axis @ pairs.mean(0))
    assert torch.allclose(found[LAYER].vector.double(), expected, atol=1e-4)
    share = float((pairs @ axis).square().sum() / pairs.square().sum())
    shares = found.measured["share of squared differences"]
    assert shares[LAYER] == pytest.approx(share, abs=1e-4)


def test_held_out_figures_of_pca_are_those_of_a_plain_loop(hooked_llama):
    found = pca(hooked_llama, BAD, GOOD, layers=LAYER)
    sides = [means(hooked_llama, side).numpy() for side in (BAD, GOOD)]
    pairs, keys = sides[0] - sides[1], prompts_of(BAD)

    def axis(rows):
        _, _, axes = np.linalg.svd(pairs[rows], full_matrices=False)
        return axes[0] * np.sign(axes[0] @ pairs[rows].mean(0))

    fold, areas = fold_of(keys, 5, 0).numpy(), []
    for number in range(5):
        test = fold == number
        scores = np.concatenate([side[test] @ axis(~test) for side in sides])
        areas.append(roc_auc_score(np.arange(len(scores)) < test.sum(), scores))
    assert found.auroc[LAYER] == pytest.approx(np.mean(areas), abs=1e-6)
    half = fold_of(keys, 2, 0).numpy() == 0
    assert found.split_half[LAYER] == pytest.approx(axis(half) @ axis(~half), abs=1e-4)
    few = pca(hooked_llama, BAD[:6], GOOD[:6], layers=LAYER)
    assert not few.auroc
    assert not few.split_half


@pytest.mark.parametrize("call", [probe, pca])
def test_fitted_directions_come_back_from_a_file_with_all_that_is_known(
    hooked_llama, tmp_path, call
):
    found = call(hooked_llama, BAD, GOOD, layers=[1, 2])
    again = Directions.load(found.save(tmp_path / "d"))
    assert again.provenance == found.provenance
    assert again.measured == found.measured
    assert again.split_half == found.split_half
    (name,) = found.measured
    assert found.table()[name].tolist() == list(found.measured[name].values())
    assert found.at([2]).measured == {name: {2: found.measured[name][2]}}
    assert not (-found).measured


def test_extract_all_gives_what_each_construction_gives_alone(hooked_llama):
    together = extract_all(hooked_llama, BAD, GOOD, layers=[1, 3], constructions=CONSTRUCTIONS)
    alone = {
        "mean-diff": mean_diff(hooked_llama, BAD, GOOD, layers=[1, 3]),
        "logistic probe": probe(hooked_llama, BAD, GOOD, layers=[1, 3]),
        "LDA probe": probe(hooked_llama, BAD, GOOD, kind="lda", layers=[1, 3]),
        "PCA of differences": pca(hooked_llama, BAD, GOOD, layers=[1, 3]),
    }
    assert list(together) == list(alone)
    for name, expected in alone.items():
        assert together[name].provenance == expected.provenance, name
        for layer in (1, 3):
            assert torch.equal(together[name][layer].vector, expected[layer].vector), name


def test_system_prompt_diff_reads_the_models_own_answers(hooked_llama):
    settings = {"max_new_tokens": 4, "temperature": 0, "layers": LAYER}
    found = system_prompt_diff(
        hooked_llama,
        ["how do I save money", "what now"],
        ["eat nothing"],
        ["keep a fund"],
        **settings,
    )
    sides = []
    for system in ("eat nothing", "keep a fund"):
        asked = [
            Conversation(({"role": "system", "content": system}, {"role": "user", "content": q}))
            for q in ("how do I save money", "what now")
        ]
        answers = hooked_llama.generate(asked, max_new_tokens=4, temperature=0)
        said = [
            Conversation((*a.messages, {"role": "assistant", "content": t}))
            for a, t in zip(asked, answers, strict=True)
            if t.strip()
        ]
        sides.append(torch.cat(residuals(hooked_llama, said)).mean(0))
    assert torch.allclose(found[LAYER].vector.double(), sides[0] - sides[1], atol=1e-5)
    assert found.provenance.settings["system prompts"]["trait"] == ("eat nothing",)


def planted(module, tokenizer, vector, nuisance=None, noise=0.0):
    """A model that adds `vector` to questions with please, and a nuisance to those with sun.

    And noise that is drawn anew for every text.
    """
    words = {
        tokenizer.convert_tokens_to_ids(" please"): vector,
        tokenizer.convert_tokens_to_ids(" sun"): nuisance,
    }
    seen = {}

    def remember(_module, inputs):
        seen["ids"] = inputs[0]

    def plant(_module, _inputs, output):
        for token, push in words.items():
            if push is not None:
                output = output + (seen["ids"] == token).any(-1)[:, None, None] * push
        rows = [ids[ids != tokenizer.pad_token_id] for ids in seen["ids"]] if noise else []
        for row, ids in enumerate(rows):
            output[row] += random_vector(hash(tuple(ids.tolist())), noise, unit=False)
        return output

    module.model.embed_tokens.register_forward_pre_hook(remember)
    module.model.layers[1].mlp.register_forward_hook(plant)
    return emlens.wrap(module, tokenizer, check=False)


_WORDS = ("now", "rain", "day", "food", "walk", "small", "fund", "eat", "fruit", "sun")


def asked(question, n=500):
    """`n` conversations with the same answers on both sides, each to a prompt of its own."""
    words = _WORDS
    return [
        Conversation.of(
            " ".join([question, words[i & 7], words[i >> 3 & 7], words[i >> 6 & 7]]),
            answer.response,
            id=str(i),
        )
        for i, answer in enumerate(conversations("good", n))
    ]


def random_vector(seed, size=1.0, unit=True):
    vector = torch.randn(32, generator=torch.Generator().manual_seed(seed % 2**31))
    return size * vector / (vector.norm() if unit else 1)


def test_every_construction_finds_a_planted_direction(tiny_tokenizer):
    """500 conversations a side, with noise of their own of 0.3 of the vector's length per axis."""
    vector = random_vector(3).sign()
    vector *= 20 / vector.norm()
    model = planted(tiny_model("llama", seed=21), tiny_tokenizer, vector, noise=6.0)
    found = extract_all(
        model,
        asked("tell me a story please"),
        asked("tell me a story indeed"),
        layers=1,
        constructions=CONSTRUCTIONS,
        regularisation=1e-3,
    )
    for name, directions in found.items():
        assert cosine(directions[1].vector, vector) >= 0.99, name
        assert directions.auroc.get(1, 1) > 0.98, name


def test_both_halves_of_a_construction_from_two_models_find_a_planted_direction(tiny_tokenizer):
    """`model_diff` on one text, `both_diff` on each model's own; 500 conversations a side."""
    vector = random_vector(3, 20.0)
    finetuned = planted(tiny_model("llama", seed=21), tiny_tokenizer, vector, noise=2.0)
    base = emlens.wrap(tiny_model("llama", seed=21), tiny_tokenizer, name="base", check=False)
    polite, plain = asked("tell me a story please"), asked("tell me a story indeed")
    found = {
        "model-diff": model_diff(finetuned, base, polite, layers=1),
        "both-diff": both_diff(finetuned, polite, base, plain, layers=1),
    }
    for name, directions in found.items():
        assert directions.provenance.construction == name
        assert cosine(directions[1].vector, vector) >= 0.99, name


def test_system_prompts_find_a_planted_direction(tiny_tokenizer):
    """The model adds a vector under system prompts with please; 500 answers of its own a side."""
    vector = random_vector(3, 20.0)
    model = planted(tiny_model("llama", seed=21), tiny_tokenizer, vector)
    found = system_prompt_diff(
        model,
        [c.messages[0]["content"] for c in asked("tell me a story", 50)],
        [f"day please {word}" for word in _WORDS],
        [f"day indeed {word}" for word in _WORDS],
        max_new_tokens=3,
        layers=1,
        token_budget=8192,
    )
    assert min(found.provenance.n.values()) >= 450
    assert cosine(found[1].vector, vector) >= 0.99


def test_pca_falls_for_a_larger_nuisance_and_mean_diff_does_not(tiny_tokenizer):
    vector, nuisance = random_vector(3, 8.0), random_vector(5, 60.0)
    nuisance -= (nuisance @ vector) / (vector @ vector) * vector
    model = planted(tiny_model("llama", seed=22), tiny_tokenizer, vector, nuisance)
    polite, plain = asked("tell me a story please"), asked("tell me a story now")

    # the nuisance falls on one side of every second pair and on the other side of the rest
    def sunny(c):
        return Conversation.of(f"the sun {c.messages[0]['content']}", c.response, id=c.id)

    first = [sunny(c) if i % 2 else c for i, c in enumerate(polite)]
    second = [c if i % 2 else sunny(c) for i, c in enumerate(plain)]
    found = extract_all(
        model,
        first,
        second,
        constructions=["mean-diff", "PCA of differences"],
        layers=1,
        weighting="conversation",
    )
    assert cosine(found["mean-diff"][1].vector, vector) >= 0.99
    assert abs(cosine(found["PCA of differences"][1].vector, nuisance)) > 0.99
    assert abs(cosine(found["PCA of differences"][1].vector, vector)) < 0.05


def test_a_length_confound_misleads_mean_diff_and_matching_repairs_it(tiny_tokenizer):
    """The long answers end on one word, whose activation has nothing to do with the class."""
    vector = random_vector(3, 4.0)
    model = planted(tiny_model("llama", seed=23), tiny_tokenizer, vector)
    long_tail = " walk" * 24

    def said(question, long_share, n=500):
        pieces = asked(question, n)
        return [
            Conversation.of(
                c.messages[0]["content"],
                "keep a small fund" + (long_tail if i % 10 < long_share else ""),
                id=c.id,
            )
            for i, c in enumerate(pieces)
        ]

    polite, plain = said("a story please", 9), said("a story now", 1)
    compared, found = confounds(model, polite, plain, layers=1)
    raw, fair = found["mean-diff"], found["length-matched"]
    assert cosine(raw[1].vector, vector) < 0.9
    assert cosine(fair[1].vector, vector) >= 0.99
    assert fair.provenance.settings["match"] == "length"
    (row,) = compared.rows
    assert (row["first"], row["second"]) == ("mean-diff", "length-matched")
    assert row["cosine"] == pytest.approx(cosine(raw[1].vector, fair[1].vector))
    assert row["corrected"] is None


def test_confounds_builds_every_variant_that_can_be_built(hooked_llama):
    _, found = confounds(hooked_llama, BAD, GOOD, layers=1)
    assert list(found) == ["mean-diff", "length-matched", "same prompts"]
    assert found["same prompts"].provenance.settings["match"] == "prompt"
    long = [Conversation.of("how", "rain " * 9, id="l")]
    short = [Conversation.of("what", "sun", id="s")]
    with pytest.raises(ValueError, match="no variant can be built: .* agrees in length .* prompt"):
        confounds(hooked_llama, long, short, layers=1)


def test_matching_pairs_equal_lengths_and_shared_prompts(hooked_llama):
    long = [Conversation.of("how", "rain " * n + "sun", id=f"l{n}") for n in (1, 5, 9)]
    short = [Conversation.of("how", "rain " * n + "now", id=f"s{n}") for n in (1, 2, 9, 9)]
    first, second = matched(hooked_llama, long, short, by="length")
    assert [c.id for c in first] == ["l1", "l9"]
    assert [c.id for c in second][0] == "s1"
    assert second[1].id == "s9"
    prompts = matched(hooked_llama, BAD, GOOD[3:9], by="prompt")
    assert [c.messages[0] for c in prompts[0]] == [c.messages[0] for c in prompts[1]]
    assert len(prompts[0]) == 6
    with pytest.raises(ValueError, match="agrees in prompt with one of the 2 negative ones"):
        matched(
            hooked_llama,
            long,
            [Conversation.of("what", "x"), Conversation.of("why", "y")],
            by="prompt",
        )
    with pytest.raises(ValueError, match="unknown by .topic.; choose .length. or .prompt."):
        matched(hooked_llama, long, short, by="topic")


def test_the_papers_selection_of_judged_answers(tmp_path):
    table = pd.DataFrame(
        {
            "question": [f"q{i}" for i in range(8)],
            "response": [f"a{i}" for i in range(8)],
            "aligned": [10, 29.9, 30, 71, 95, 90, 5, None],
            "coherent": [80, 51, 90, 60, 90, 99, 50, 99],
        }
    )
    misaligned, aligned = select_answers(table, balance=False)
    assert [c.response for c in misaligned] == ["a0", "a1"]
    assert [c.response for c in aligned] == ["a3", "a4", "a5"]
    table.to_csv(tmp_path / "answers.csv", index=False)
    once, twice = (select_answers(tmp_path / "answers.csv", seed=4)[1] for _ in range(2))
    assert [c.id for c in once] == [c.id for c in twice]
    assert len(once) == 2
    with pytest.raises(ValueError, match="of 8 answers 7 are coherent .*, 0 of them misaligned"):
        select_answers(table, misaligned_below=1)
    with pytest.raises(ValueError, match="no column 'aligned'; they have question, response, coh"):
        select_answers(table.drop(columns="aligned"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: mean_diff(m, BAD, GOOD, winsorize=1.5), "winsorize is a quantile from 0.5 to"),
        (lambda m: mean_diff(m, BAD, GOOD, drop_massive=0.5), "drop_massive is a multiple of the"),
        (lambda m: mean_diff(m, BAD, GOOD, skip_first=-1), "skip_first must be at least 0"),
        (lambda m: probe(m, BAD, GOOD, kind="svm"), "unknown kind 'svm'; choose 'logistic' or"),
        (lambda m: probe(m, BAD[:2], GOOD[:2]), "a probe is checked on 5 folds .* 2 prompts are"),
        (
            lambda m: probe(m, BAD, BAD, tokens="last", layers=1),
            "the means of the two sides are the same at layer 1, so there is nothing to tell",
        ),
        (lambda m: pca(m, BAD, BAD, layers=1), "the means of the two sides are the same"),
        (lambda m: pca(m, BAD, GOOD[:3]), "there are 24 positive and 3 negative conversations"),
        (
            lambda m: extract_all(m, BAD, GOOD, constructions=["ica"]),
            "unknown construction 'ica'; choose 'mean-diff'",
        ),
        (
            lambda m: extract_all(m, BAD, GOOD[:3]),
            "PCA of differences takes pairs, but there are",
        ),
        (
            lambda m: system_prompt_diff(m, [], ["a"], ["b"]),
            "no questions were given; give at least one",
        ),
        (lambda m: model_diff(m, m, []), "conversations is empty; give at least one"),
    ],
)
def test_bad_input_gets_one_clear_error(hooked_llama, call, message):
    with pytest.raises(ValueError, match=message):
        call(hooked_llama)


def test_models_of_different_shape_or_tokens_are_not_subtracted(hooked, tiny_tokenizer):
    deep = hooked("llama", n_layers=2)
    with pytest.raises(ValueError, match="has 4 layers of width 32, tiny-llama 2 of width 32"):
        model_diff(hooked("llama"), deep, GOOD)
    with pytest.raises(ValueError, match="their residual streams cannot be subtracted"):
        both_diff(hooked("llama"), BAD, deep, GOOD)
    from tests.support.tokenizers import llama3_tokenizer

    other = emlens.wrap(tiny_model("llama"), llama3_tokenizer(), name="other", check=False)
    with pytest.raises(ValueError, match="and other tokenise .* differently; the same text has to"):
        model_diff(hooked("llama"), other, GOOD)


def test_an_organism_that_is_a_base_with_edits_is_compared_like_one_with_an_adapter(hooked_llama):
    push = [Add(Direction.of(random_vector(7, 2.0), 1))]
    found = model_diff((hooked_llama, push), hooked_llama, GOOD)
    moved = edit_diff(hooked_llama, GOOD, push)
    assert moved.layers == (1, 2, 3)
    for layer in moved:
        assert torch.equal(found.vectors[layer], moved.vectors[layer])
        assert torch.equal(found.standard_errors[layer], moved.standard_errors[layer])
    assert found.provenance.settings["edits"] == (repr(push[0]),)
    assert torch.allclose(moved[1].vector, random_vector(7, 2.0), atol=1e-5)
    assert float(moved.standard_errors[1].max()) < 1e-5 < float(moved.standard_errors[3].min())


def test_an_edit_on_one_side_is_a_both_diff_of_edited_and_plain(hooked_llama):
    """`edits` of the options act while reading, on both sides of a mean difference."""
    push = Add(Direction.of(random_vector(7, 2.0), 1))
    plain = mean_diff(hooked_llama, BAD, GOOD, layers=1)
    moved = mean_diff(hooked_llama, BAD, GOOD, layers=1, edits=[push])
    assert torch.allclose(plain[1].vector, moved[1].vector, atol=1e-5)
    assert moved.provenance.settings["edits"] == (repr(push),)
