"""Between general and narrow: the curve, the drifts and the joint picture, resumable."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from emlens.training import Organism
from experiments import Asymmetries, AsymmetrySettings, read_paths, run_paths
from experiments.asymmetry_page import write_findings
from experiments.paths import FREED, PENALISED
from experiments.trials import trial_folder

QUICK = AsymmetrySettings(
    seeds=(3,),
    adapter_layers=(2, 3),
    rank=2,
    train_pairs=6,
    kl_pairs=3,
    inside_pairs=4,
    outside_pairs=5,
    epochs=2,
    lr=(("adapter", 1e-2), ("vector", 0.05)),
)


@pytest.fixture(scope="module")
def done(hooked, tmp_path_factory):
    folder = tmp_path_factory.mktemp("paths")
    model = hooked("llama")
    found = run_paths(folder, QUICK, domain="finance", weights=(0, 5), model=model, progress=False)
    assert model.adapters == ()
    return folder, found


def test_each_solution_is_trained_on_from_where_it_ended(done):
    folder, found = done
    at = trial_folder(folder, "finance", "adapter", 3)
    ends = {name: Organism.load(at / name).run for name in ("general", "narrow")}
    for title, start in ((FREED, "narrow"), (PENALISED, "general")):
        drift = found.drifts[title]
        assert drift.cosines[start][0] == pytest.approx(1, abs=1e-6)
        assert drift.cosines[start][-1] < 1
        here, there = found.trajectory.coordinates[title][0], found.trajectory.coordinates[start]
        assert np.allclose(here, there[-1], atol=1e-4)
    assert tuple(found.trajectory.steps["general"]) == ends["general"].path_steps


def test_the_curve_has_a_training_per_weight_of_which_the_first_is_the_general_one(done):
    folder, found = done
    assert found.sweep.weights == (0.0, 5.0)
    run = Organism.load(trial_folder(folder, "finance", "adapter", 3) / "general").run
    assert found.sweep.norms[0] == pytest.approx(run.steps[-1].norm, rel=1e-5)


def test_finished_parts_are_read_and_not_made_again(done, hooked):
    folder, found = done
    kept = folder / "paths" / "finance" / "freed.safetensors"
    stamp = kept.stat().st_mtime_ns
    model = hooked("llama")
    again = run_paths(folder, QUICK, domain="finance", weights=(0, 5), model=model, progress=False)
    assert kept.stat().st_mtime_ns == stamp
    assert again.drifts == found.drifts
    (read,) = read_paths(folder)
    assert read.domain == "finance"
    assert read.sweep == found.sweep
    assert read_paths(folder / "paths") == []


def test_paths_of_another_seed_or_other_weights_are_refused(done, hooked):
    folder, _ = done
    model = hooked("llama")
    for settings, weights, said in (
        (QUICK, (0, 2), r"\(weights: \[0.0, 5.0\] there, \[0.0, 2.0\] now\)"),
        (replace(QUICK, seeds=(4,)), (0, 5), r"\(seed: 3 there, 4 now\); give the settings"),
    ):
        with pytest.raises(ValueError, match=said):
            run_paths(folder, settings, domain="finance", weights=weights, model=model)
    assert not trial_folder(folder, "finance", "adapter", 4).exists()


def test_the_page_shows_curve_paths_and_drifts(done, tmp_path):
    _, found = done
    row = {"kind": "adapter", "domain": "finance", "quantity": "efficiency"}
    row |= {"estimate": 0.1, "low": 0.0, "high": 0.2, "seeds": [0.1]}
    shown = {**row, "quantity": "general inside"}
    everything = Asymmetries((row, shown), AsymmetrySettings().to_dict())
    text = write_findings(
        everything, tmp_path / "page.md", tmp_path / "figures", [found]
    ).read_text()
    assert "## Between general and narrow: finance" in text
    assert "| 5 | " in text
    assert f"**{FREED}**" in text
    for run in found.trajectory.steps:
        assert f"- {run}: {found.trajectory.transition(run)}" in text
    for name in ("tradeoff_finance", "paths_finance"):
        assert f"(figures/{name}.png)" in text
        assert (tmp_path / "figures" / f"{name}.svg").is_file()


def test_other_settings_are_refused(done, hooked):
    folder, _ = done
    other = AsymmetrySettings(rank=4)
    with pytest.raises(ValueError, match="was made with other settings .*rank: 2 there, 4 now"):
        run_paths(folder, other, model=hooked("llama"), progress=False)
