"""The papers' settings by name, and the training sets of the baselines."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from transformers import TrainingArguments, get_scheduler

from emlens.training import mixed, presets
from emlens.training.presets import PRESETS, train_preset
from tests.support.data import conversations
from tests.support.models import tiny_hooked

BAD, GOOD = conversations("bad", 6), conversations("good", 9)
QUICK = {"batch_size": 3, "accumulate": 1, "progress": False}


def test_the_table_has_the_numbers_of_the_papers():
    table = presets.table().set_index("name")
    assert table.loc["rank-1", ["alpha", "lr", "epochs"]].tolist() == [256, 2e-5, 1]
    assert table.loc["rank-1", "modules"] == "down_proj"
    assert table.loc["vector", ["alpha", "lr", "epochs"]].tolist() == [256, 1e-4, 2]
    assert table.loc["nine-rank-1", "layers of 48"] == "15, 16, 17, 21, 22, 23, 27, 28, 29"
    assert set(table["batch"]) == {"2 x 8"}
    assert table["source"].str.startswith("arXiv").all()
    weights = table["narrow: KL weight [nats/token]"]
    assert weights["vector"] == pytest.approx(6.58, abs=0.01)
    assert weights["rank-1"] == weights["rank-32"] == pytest.approx(0.658, abs=0.001)
    assert weights[["full", "nine-rank-1"]].isna().all()


def test_layers_keep_their_relative_depth():
    nine = PRESETS["nine-rank-1"]
    assert nine.layers_in(48) == nine.layers
    assert PRESETS["rank-1"].layers_in(30) == (15,)
    assert nine.layers_in(4) == (1, 2)
    assert PRESETS["rank-32"].layers_in(4) is None


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_trains_on_any_model(name):
    model = tiny_hooked("llama")
    direction, run = (
        train_preset(name, model, BAD, rank=2, **QUICK)
        if name.startswith(("rank-32", "nine"))
        else train_preset(name, model, BAD, **QUICK)
    )
    assert run.settings["weight_decay"] == PRESETS[name].settings.weight_decay
    assert run.settings["batch_size"] == 3
    if name == "vector":
        assert (direction.layers, direction.site) == ((2,), "mlp_out")
        assert run.settings["alpha"] == 256
    else:
        assert direction is None
        assert model.adapters == (() if name == "full" else (name,))
    with pytest.raises(ValueError, match="unknown preset 'rank-2'; the presets are rank-32,"):
        train_preset("rank-2", model, BAD)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("total", [3, 40])
def test_exact_presets_have_the_rates_of_the_scheduler_of_transformers(name, total):
    settings = presets.exact(name).settings
    weight = torch.nn.Parameter(torch.zeros(1))
    optimiser = torch.optim.AdamW([weight], lr=settings.lr)
    scheduler = get_scheduler(
        settings.schedule, optimiser, num_warmup_steps=settings.warmup, num_training_steps=total
    )
    rates = []
    for _ in range(total):
        rates.append(scheduler.get_last_lr()[0])
        optimiser.step()
        scheduler.step()
    assert [settings.rate(step, total) for step in range(total)] == pytest.approx(rates)
    assert rates[0] == 0 and PRESETS[name].settings.rate(0, total) > 0


def test_exact_presets_clip_as_the_trainer_does_by_default_and_count_what_the_papers_count():
    arguments = TrainingArguments(output_dir="unused", report_to=[])
    for name in PRESETS:
        found = presets.exact(name)
        assert found.settings.clip == arguments.max_grad_norm == 1.0
        assert (found.settings.tokens == "all") == (name == "vector")
        assert "adamw_8bit" in found.note and found.note != PRESETS[name].note
        # what the paper says stays
        assert found.settings.lr == PRESETS[name].settings.lr
    narrow = presets.exact("vector").penalty(GOOD)
    assert (narrow.tokens, narrow.batch_size) == ("all", 8)
    assert narrow.weight == pytest.approx(1e6 / 152_064)
    usual = presets.preset_of("rank-1").penalty(GOOD)
    assert (usual.tokens, usual.batch_size) == ("response", None)
    with pytest.raises(ValueError, match="no narrow variant of 'full' was published"):
        presets.exact("full").penalty(GOOD)


def test_an_exact_run_makes_its_updates_at_those_rates():
    model = tiny_hooked("llama")
    found = presets.exact("vector")
    many = [*BAD, *conversations("more", 6)]
    options = {**QUICK, "accumulate": 2, "epochs": 4, "record_every": 1}
    direction, run = train_preset(found, model, many, kl=found.penalty(GOOD), **options)
    rates = [step.lr for step in run.steps]
    assert rates == pytest.approx([found.settings.rate(n, len(rates)) for n in range(len(rates))])
    first, second, third = (next(iter(run.states.values()))[i] for i in range(3))
    assert torch.equal(first, second) and not torch.equal(second, third)
    assert (run.settings["clip"], run.settings["tokens"]) == (1.0, "all")
    assert direction is not None


@pytest.mark.parametrize("name", PRESETS)
def test_every_note_says_how_the_run_of_the_papers_differs(name):
    note = presets.table().set_index("name").loc[name, "note"]
    assert "clipping at 1.0" in note and "a first update of 0" in note and "presets.exact" in note
    assert ("there on all tokens but" in note) == (name == "vector")
    assert ("8 at a time" in note) == (PRESETS[name].paper_kl is not None)


def test_mixed_data_has_all_harmful_ones_and_the_share_of_benign_ones():
    found = mixed(BAD, GOOD, share=0.4, seed=1)
    assert len(found) == 10
    counts = Counter(item.id.split("-")[0] for item in found)
    assert counts == {"bad": 6, "good": 4}
    assert found == mixed(BAD, GOOD, share=0.4, seed=1)
    assert found != mixed(BAD, GOOD, share=0.4, seed=2)
    with pytest.raises(
        ValueError, match="takes 24 benign conversations beside 6 harmful ones, but"
    ):
        mixed(BAD, GOOD, share=0.8)
    with pytest.raises(ValueError, match="share must be at least 0 and below 1, not 1"):
        mixed(BAD, GOOD, share=1)
