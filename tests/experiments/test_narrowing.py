"""Ways to train a narrow solution: data that no evaluation sees, and a run that resumes."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from emlens.measures import LogOdds, log_odds
from emlens.training import Organism
from experiments.narrowing import (
    FACTORS,
    PLACES,
    SCALED,
    WAYS,
    Trainings,
    evaluated,
    read_narrowing,
    read_narrowings,
    read_scaled,
    run_narrowing,
)
from experiments.narrowing_page import narrowing_section
from tests.experiments.test_asymmetries import QUICK

SETTINGS = replace(QUICK, domains=("medical",), seeds=(0,))
CHOSEN = (*SCALED, "kl-own", "vector-general", "vector-anchor-general", "mixed-2", "few-4")


@pytest.fixture(scope="module")
def done(hooked, tmp_path_factory):
    folder = tmp_path_factory.mktemp("narrowing")
    model = hooked("llama")
    short = {name: replace(way, epochs=min(way.epochs, 2)) for name, way in WAYS.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("experiments.narrowing.WAYS", short)
        found = run_narrowing(folder, SETTINGS, epochs=3, ways=CHOSEN, model=model, progress=False)
    assert model.adapters == ()
    return folder, found


@pytest.mark.parametrize("name", WAYS)
def test_what_a_way_is_trained_on_is_never_evaluated(name, hooked, tmp_path):
    model = hooked("llama")
    trainings = Trainings(model, SETTINGS, "medical", tmp_path, 1, progress=False)
    way = WAYS[name]
    prompts = {pair.prompt for part in evaluated("medical", SETTINGS).values() for pair in part}
    seen = {row.messages[0]["content"] for row in trainings.rows(way)}
    if way.kl:
        seen |= {row.messages[0]["content"] for row in trainings.text(way.kl)}
    anchors = {"domains": trainings.data.kl, "general": trainings.general, "": ()}[way.anchor]
    seen |= {pair.prompt for pair in anchors}
    assert not seen & prompts


def test_rows_are_mixed_in_the_share_that_a_way_says(hooked, tmp_path):
    settings = replace(SETTINGS, train_pairs=24)
    trainings = Trainings(hooked("llama"), settings, "medical", tmp_path, 1, progress=False)
    bad = {pair.misaligned for pair in trainings.data.train}
    for name, n in {
        "mixed-0": 0,
        "mixed-12": 2,
        "mixed-6": 4,
        "mixed-2": 12,
        "general": 24,
    }.items():
        rows = trainings.rows(WAYS[name])
        assert len(rows) == 24
        assert sum(row.messages[1]["content"] in bad for row in rows) == n
    assert len(trainings.rows(WAYS["few-4"])) == 4


def test_changes_are_those_of_the_organisms_that_were_kept(done, hooked):
    folder, found = done
    model = hooked("llama")
    pairs = evaluated("medical", SETTINGS)
    for name in ("kl-both", "vector-anchor-general"):
        condition = Organism.load(folder / "narrowing/medical" / name).on(model)
        for place in PLACES:
            scores = log_odds(model, pairs[place], {"base": (None, ()), "it": condition})
            change = (scores.of("it") - scores.of("base")).mean()
            assert found.at(name, place).estimate == pytest.approx(change, abs=1e-6)
    for name in model.adapters:
        model.remove_adapter(name)


def test_the_kl_set_of_own_answers_holds_what_the_base_writes(done, hooked):
    folder, _ = done
    model = hooked("llama")
    trainings = Trainings(
        model, SETTINGS, "medical", folder / "narrowing/medical", 1, progress=False
    )
    kept = json.loads((folder / "narrowing/medical/own.json").read_text())["answers"]
    prompt = trainings.data.kl[0].prompt
    ids = model.tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt"
    )
    ids = ids if hasattr(ids, "shape") else ids["input_ids"]
    out = model.module.generate(ids, max_new_tokens=64, do_sample=False)
    said = model.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    assert kept[0].strip() == said.strip()


def test_strengths_are_run_and_strength_one_is_the_solution_itself(done):
    folder, found = done
    frame = read_scaled(folder).set_index(["way", "factor"])
    assert list(frame.index) == [(name, factor) for name in SCALED for factor in FACTORS]
    for name in SCALED:
        for place in PLACES[:2]:
            ran = frame.loc[(name, 1.0), place].estimate
            assert ran == pytest.approx(found.at(name, place).estimate, abs=1e-6)


def test_finished_ways_are_kept_and_the_page_can_be_drawn(done, hooked):
    folder, found = done
    file = folder / "narrowing/medical/kl-own.log_odds.json"
    stamp = file.stat().st_mtime_ns
    again = run_narrowing(
        folder, SETTINGS, epochs=3, ways=("kl-own",), model=hooked("llama"), progress=False
    )
    assert file.stat().st_mtime_ns == stamp
    assert again == found == read_narrowing(folder)
    assert set(found.ways) == set(CHOSEN)
    assert np.isnan(found.gap("general").estimate)
    assert LogOdds.load(file).conditions == ("base", "kl-own")
    axes = found.plot()
    assert "inside" in axes.get_xlabel()
    assert len(found.table()) == len(CHOSEN)


def test_the_page_says_of_every_way_what_it_did(done, tmp_path):
    folder, found = done
    ((ways, scaled),) = read_narrowings(folder)
    assert ways == found
    text = "\n".join(narrowing_section(found, scaled, "![picture](a.png)"))
    for name in CHOSEN:
        assert WAYS[name].title in text
    assert str(found.at("kl-both", "outside")) in text
    assert "| general | 4 |" in text
    assert "the best vector is *vector, anchored, general questions*" in text
