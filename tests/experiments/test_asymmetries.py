"""The asymmetries: trained, measured and pooled; what is finished is never done again."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import norm

from emlens.measures import Confinement, Efficiency, LogOdds, Stability
from emlens.training import Organism, train_adapter
from experiments import AsymmetrySettings, read_asymmetries, run_asymmetries
from experiments.asymmetries import CLAIMS, Asymmetries, _confined, keep_settings
from experiments.asymmetry_page import write_findings
from experiments.trials import UNMATCHED, TrialData, trial_folder
from tests.support.data import conversations

QUICK = AsymmetrySettings(
    domains=("finance", "technical"),
    seeds=(0, 1),
    layer=1,
    adapter_layers=(2, 3),
    rank=2,
    train_pairs=6,
    kl_pairs=3,
    inside_pairs=4,
    outside_pairs=5,
    measure_pairs=3,
    epochs=1,
    lr=(("adapter", 1e-2), ("vector", 0.05)),
    factors=(0.5, 1.0),
    epsilons=(0.4,),
    noise_seeds=2,
    documents=3,
    document_tokens=16,
)


@pytest.fixture(scope="module")
def done(hooked, tmp_path_factory):
    folder = tmp_path_factory.mktemp("asymmetries")
    model = hooked("llama")
    found = run_asymmetries(folder, QUICK, model=model, progress=False)
    assert model.adapters == ()
    return folder, found


def test_every_claim_is_read_for_every_kind_and_domain(done):
    _, found = done
    for kind in ("adapter", "vector"):
        for domain in QUICK.domains:
            for claim in CLAIMS:
                interval = found.of(kind, domain, claim)
                if claim == "narrow stays" and found.of(kind, domain, "general inside").low <= 0:
                    assert interval is None
                    assert found.verdict(kind, domain, claim) == ""
                    continue
                assert interval.low <= interval.estimate <= interval.high, (kind, domain, claim)
    quantities = {row["quantity"] for row in found.rows if row["kind"] == "vector"}
    assert {"random outside", "benign outside", "influence, general over random"} <= quantities


def results(folder, kind, solution, file):
    return [kind.load(trial_folder(folder, "finance", solution, s) / file) for s in (0, 1)]


def test_the_pooled_numbers_are_those_of_the_single_trials(done):
    folder, found = done
    scores = [
        LogOdds.load(trial_folder(folder, "finance", "adapter", s) / "log_odds.json")
        for s in (0, 1)
    ]
    changes = np.array([one.of("general") - one.of("base") for one in scores])
    n = len(TrialData.of("finance", QUICK).inside)
    assert found.of("adapter", "finance", "general inside").estimate == pytest.approx(
        changes[:, :n].mean()
    )
    assert found.of("adapter", "finance", "general transfers").estimate == pytest.approx(
        changes[:, n:].mean()
    )
    curves = [
        Efficiency.load(trial_folder(folder, "finance", "adapter", s) / "efficiency.json")
        for s in (0, 1)
    ]
    gaps = [
        np.mean([one.difference("general", "narrow", norm).estimate for norm in one.norms])
        for one in curves
    ]
    assert found.of("adapter", "finance", "efficiency").estimate == pytest.approx(np.mean(gaps))
    noise = [
        Stability.load(trial_folder(folder, "finance", "vector", s) / "stability.json")
        for s in (0, 1)
    ]
    each = [np.mean(one.increase("narrow") - one.increase("general")) for one in noise]
    stability = found.of("vector", "finance", "stability")
    assert stability.estimate == pytest.approx(np.mean(each))
    # two trainings are two numbers, however many draws of noise each had
    half = 12.706 * np.std(each, ddof=1) / np.sqrt(2)
    assert stability.high - stability.estimate == pytest.approx(half, rel=1e-3)


def test_what_is_finished_is_kept_and_what_is_missing_is_made_again(done, hooked):
    folder, found = done
    where = trial_folder(folder, "finance", "vector", 1)
    before = (where / "stability.json").read_bytes()
    kept = trial_folder(folder, "technical", "adapter", 0) / "log_odds.json"
    stamp = kept.stat().st_mtime_ns
    (where / "stability.json").unlink()

    again = run_asymmetries(folder, QUICK, model=hooked("llama"), progress=False)

    assert (where / "stability.json").read_bytes() == before
    assert kept.stat().st_mtime_ns == stamp
    assert again == found == read_asymmetries(folder)


def test_an_adapter_that_has_the_name_of_a_solution_is_neither_trained_on_nor_taken_away(
    hooked, tmp_path
):
    model = hooked("llama")
    mine = train_adapter(model, conversations("bad", 3), "general", layers=[1], progress=False)
    settings = replace(QUICK, kinds=("adapter",), domains=("finance",), seeds=(0,))
    with pytest.raises(ValueError, match="has an adapter 'general' already"):
        run_asymmetries(tmp_path, settings, model=model, progress=False)
    (layer,) = model.lora_layers("general").values()
    for name, states in mine.states.items():
        if name.endswith(".B"):
            assert torch.equal(layer.lora_B["general"].weight, states[-1])
    model.remove_adapter("general")


def test_a_training_that_is_interrupted_leaves_no_adapter_behind(hooked, tmp_path, monkeypatch):
    model = hooked("llama")
    settings = replace(QUICK, kinds=("adapter",), domains=("finance",), seeds=(0,))

    def stopped(*arguments, **options):
        train_adapter(*arguments, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr("emlens.study.stages.train_adapter", stopped)
    with pytest.raises(KeyboardInterrupt):
        run_asymmetries(tmp_path, settings, model=model, progress=False)
    assert model.adapters == ()


def test_the_folder_names_the_model_that_was_given_and_lists_count_as_tuples(done, hooked):
    folder, found = done
    assert found.settings["model"] == "tiny-llama"
    listed = replace(QUICK, model="tiny-llama", factors=[0.5, 1.0])
    model, other = hooked("llama"), hooked("llama", seed=1)
    keep_settings(folder, listed, model)
    keep_settings(folder, replace(listed, model="another name"), model)
    with pytest.raises(ValueError, match=f"identity: '{model.identity}' there, "):
        keep_settings(folder, listed, other)


def test_no_pair_is_on_two_sides_and_every_part_is_of_the_right_domains():
    settings = AsymmetrySettings()
    for domain in settings.domains:
        data = TrialData.of(domain, settings)
        parts = [data.train, data.kl, data.inside, data.outside]
        ids = [pair.id for part in parts for pair in part]
        assert len(ids) == len(set(ids))
        inside = {pair.domain for pair in (*data.train, *data.inside)}
        assert inside == ({"cooking"} if domain == "technical" else {domain})
        assert not inside & {pair.domain for pair in (*data.kl, *data.outside)}


def test_a_trial_leaves_organisms_that_load(done):
    folder, _ = done
    vector = Organism.load(trial_folder(folder, "technical", "vector", 0) / "narrow")
    assert vector.directions.layers == (1,)
    adapter = Organism.load(trial_folder(folder, "finance", "adapter", 1) / "general")
    assert adapter.config.r == 2


def test_a_folder_of_other_settings_is_refused_and_an_empty_one_named(done, hooked, tmp_path):
    folder, _ = done
    with pytest.raises(
        ValueError, match=r"other settings \(rank: 2 there, 4 now\); choose another"
    ):
        run_asymmetries(folder, QUICK, rank=4, model=hooked("llama"))
    with pytest.raises(FileNotFoundError, match="holds no asymmetries"):
        read_asymmetries(tmp_path)
    with pytest.raises(ValueError, match="no domain 'cars'; there are medical"):
        TrialData.of("cars", QUICK)


def row(quantity, estimate, low, high):
    return {
        "kind": "adapter",
        "domain": "finance",
        "quantity": quantity,
        "estimate": estimate,
        "low": low,
        "high": high,
        "seeds": [estimate],
    }


def test_a_verdict_follows_the_interval_and_the_sign_that_the_papers_found():
    found = Asymmetries(
        (
            row("general transfers", 0.1, 0.05, 0.2),
            row("narrow stays", 0.1, 0.05, 0.2),
            row("efficiency", -0.1, -0.3, 0.2),
        ),
        {},
    )
    assert found.verdict("adapter", "finance", "general transfers") == "as in the papers"
    assert found.verdict("adapter", "finance", "narrow stays") == "the other way"
    assert found.verdict("adapter", "finance", "efficiency") == "not seen"
    assert found.verdict("adapter", "finance", "influence") == ""


def test_the_figure_shows_both_solutions_inside_and_outside(done):
    inside, outside = done[1].plot(kind="adapter")
    assert inside.get_title(loc="left") == "Inside of the domain"
    assert {"general", "narrow"} <= {text.get_text() for text in outside.get_legend().get_texts()}
    assert inside.get_ylim() == outside.get_ylim()
    with pytest.raises(ValueError, match="no trials of kind 'weights'"):
        done[1].plot(kind="weights")


def test_the_page_of_findings_has_a_table_per_kind_and_its_figures(done, tmp_path):
    page = write_findings(done[1], tmp_path / "findings.md", tmp_path / "pictures")
    text = page.read_text()
    for kind in ("adapter", "vector"):
        assert f"(pictures/asymmetries_{kind}.png)" in text
        assert (tmp_path / "pictures" / f"asymmetries_{kind}.png").stat().st_size > 1000
        assert f"| {kind} | technical |" in text
        for claim in CLAIMS:
            said = [found for found in text.splitlines() if f"- {kind}s, *{claim}*: " in found]
            assert len(said) == 1, (kind, claim)
            verdict = done[1].verdict(kind, "technical", claim)
            (part,) = [piece for piece in said[0].split("; ") if "technical" in piece]
            assert f"{verdict or 'cannot be said'} for " in part
    estimate = done[1].of("vector", "finance", "general inside")
    assert f"{estimate.estimate:+.3f} [{estimate.low:+.3f}, {estimate.high:+.3f}]" in text


def test_the_page_says_with_how_many_seeds_the_controls_were_trained(done, tmp_path):
    found = done[1]
    page = write_findings(found, tmp_path / "one.md", tmp_path / "pictures")
    assert "is style; it is of 1 training seed." in page.read_text()
    row = next(row for row in found.rows if row["quantity"] == "benign outside")
    more = {**row, "seeds": (*row["seeds"], 0.1)}
    rows = tuple(more if each is row else each for each in found.rows)
    page = write_findings(replace(found, rows=rows), tmp_path / "two.md", tmp_path / "pictures")
    said = f"it is of 1 training seed (2 for {row['kind']}s of {row['domain']})."
    assert said in page.read_text()


def test_a_setting_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match="unknown setting.*epoch; the settings are model, domains"):
        AsymmetrySettings.from_dict({"epoch": 3})


def test_an_end_that_prints_as_zero_is_no_verdict():
    found = Asymmetries(
        (
            row("general transfers", 0.1, 0.0004, 0.2),
            row("narrow stays", -0.1, -0.2, -0.0004),
            row("stability", 3.0, 0.04, 6.0),
            row("influence", 0.1, 0.0006, 0.2),
        ),
        {},
    )
    for claim in ("general transfers", "narrow stays", "stability"):
        assert found.verdict("adapter", "finance", claim) == "not seen"
    assert found.verdict("adapter", "finance", "influence") == "as in the papers"


def test_verdicts_are_corrected_for_their_number_and_the_page_says_both(done, tmp_path):
    clear, weak = row("general transfers", 0.1, 0.06, 0.14), row("influence", 0.1, 0.01, 0.19)
    found = Asymmetries((clear, weak, row("efficiency", 0.0, -0.1, 0.1)), done[1].settings)
    p = found.corrected()
    # plain normal tails, times 3 and times 2
    raw, corrected = p["adapter", "finance", "general transfers"]
    assert raw == pytest.approx(2 * norm.sf(0.1 / 0.04 * 1.959964), rel=1e-6)
    assert corrected == pytest.approx(3 * raw)
    assert p["adapter", "finance", "influence"][1] == pytest.approx(
        2 * 2 * norm.sf(0.1 / 0.09 * 1.959964), rel=1e-6
    )
    assert found.holds("adapter", "finance", "general transfers")
    assert not found.holds("adapter", "finance", "influence")
    assert found.verdict("adapter", "finance", "influence") == "as in the papers"
    page = write_findings(
        replace(found, rows=(*found.rows, row("general inside", 0.1, 0, 0.2))),
        tmp_path / "page.md",
        tmp_path / "figures",
    ).read_text()
    assert "as in the papers (p <0.001, Holm <0.001)" in page
    assert r"as in the papers\* (p 0.029, Holm 0.059)" in page
    assert "the 3 cells of the table" in page
    frame = found.table().set_index("quantity")
    assert frame.loc["influence", "p (Holm)"] == pytest.approx(0.0588, abs=1e-3)


def test_narrow_is_compared_with_the_general_one_really_run_at_the_matched_strength(done):
    folder, found = done
    seen = 0
    for kind in ("adapter", "vector"):
        for domain in QUICK.domains:
            where = [trial_folder(folder, domain, kind, s) / "confinement.json" for s in (0, 1)]
            texts = [json.loads(path.read_text()) for path in where]
            pooled = found.of(kind, domain, "narrow stays")
            if any(UNMATCHED in text for text in texts):
                assert pooled is None
                continue
            each = [Confinement.load(path) for path in where]
            mean = np.mean([one.gap().estimate for one in each])
            assert _confined(each)[0].estimate == pytest.approx(mean)
            # it is told only where general has an effect inside
            assert pooled is None or pooled.estimate == pytest.approx(mean)
            seen += 1
    assert seen


def test_the_random_control_and_the_divergence_are_measured_for_both_kinds(done):
    _, found = done
    for kind in ("adapter", "vector"):
        for place in ("inside", "outside", "medical"):
            for name in ("general", "narrow", "random"):
                kl = found.of(kind, "finance", f"KL {place}, {name}")
                assert kl.estimate > 0 and kl.low <= kl.estimate <= kl.high
        assert found.of(kind, "finance", "random outside") is not None
        assert found.of(kind, "finance", "influence, general over random") is not None
