"""A study: its stages, that it goes on where it was killed, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from html import unescape
from pathlib import Path

import pytest

from emlens.study import StudySettings, preset, run, run_study
from emlens.study.data import StudyData
from emlens.study.stages import ABLATED, RANDOM, SAME_KL, without
from emlens.study.store import StudyStore
from emlens.training import train_adapter
from tests.support.browser import WIDTHS, look
from tests.support.data import conversations
from tests.support.kills import KILLS, killed
from tests.support.models import tiny_hooked

QUICK = replace(preset("smoke"), layers=(1, 2), rank=2, lr=0.05)
VECTOR = replace(QUICK, kind="vector", layers=(1,))
ARTEFACTS = ("results.json", "report.html", "log_odds.json", "influence.json", "settings.json")

LARGEST = 5_000_000
"""Bytes of a report."""


@pytest.fixture(scope="module")
def finished(hooked, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    return run_study(QUICK, folder, model=hooked("llama"), progress=False)


def contents(folder):
    """Everything that a study writes and that must not depend on how it was interrupted."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    kept = {}
    for path in files:
        name = str(path.relative_to(folder))
        if name == "timings.json" or name == "report.html":
            continue
        kept[name] = path.read_bytes()
        if name.startswith("stages/"):
            kept[name] = json.dumps(json.loads(path.read_text())["record"]).encode()
    return kept


def test_a_study_writes_results_directions_figures_and_a_report(finished):
    for name in ARTEFACTS:
        assert (finished.folder / name).is_file(), name
    directions = {p.stem for p in (finished.folder / "directions").iterdir()}
    assert {"general", "narrow", "benign", "other", "mean_diff"} <= directions
    for name in ("general", "narrow", "benign", "other"):
        assert (finished.folder / "organisms" / name / "adapter_config.json").is_file()
    for name in ("log_odds", "ablation", "cosines", "efficiency", "stability", "influence"):
        for suffix in ("png", "svg"):
            assert (finished.folder / "figures" / f"{name}.{suffix}").stat().st_size > 1000
    results = json.loads((finished.folder / "results.json").read_text())
    assert results["findings"] == {n: asdict(one) for n, one in finished.findings.items()}
    # the model that was given, not the one that the settings would load
    told = {**QUICK.to_dict(), "model": "tiny-llama"}
    assert results["settings"] == json.loads(json.dumps(told))
    conditions = {row["condition"] for row in results["log_odds"]}
    ablated = {without(name, direction) for name in ("general", "base") for direction in ABLATED}
    assert {"base", "general", "narrow", "benign"} | ablated <= conditions
    assert {RANDOM, SAME_KL} & conditions
    assert len(finished.table()) == len(finished.findings)


def test_the_report_is_one_file_that_shows_the_figures(finished):
    page = finished.report.read_text()
    assert page.count("data:image/") >= 7
    assert "http://" not in page.replace("http://www.w3.org", "")
    plain = unescape(page).replace("\u2212", "-").replace("\u00a0", " ")
    for finding in finished.findings.values():
        assert plain.count(finding.text) == 2
        assert finding.claim in plain
    assert "This is a smoke run" in plain
    assert "What this does not show" in plain


def test_a_study_of_vectors_writes_a_report_and_leaves_the_model_as_it_was(hooked, tmp_path):
    model = hooked("llama")
    result = run_study(VECTOR, tmp_path, model=model, progress=False)
    assert result.report.is_file()
    assert (tmp_path / "organisms" / "narrow" / "vector.safetensors").is_file()
    assert model.adapters == ()


def test_a_study_of_adapters_refuses_a_model_that_has_one_of_its_names(hooked, tmp_path):
    model = tiny_hooked("llama")
    train_adapter(model, conversations("bad", 2), "narrow", rank=1, epochs=1, progress=False)
    with pytest.raises(ValueError, match="has an adapter 'narrow' already, a name that is needed"):
        run_study(QUICK, tmp_path, model=model, progress=False)
    with (
        model.adapter("narrow"),
        pytest.raises(ValueError, match="adapter 'narrow' is in force; put the call into"),
    ):
        run_study(QUICK, tmp_path / "other", model=model, progress=False)


def test_the_report_is_right_in_a_browser_on_a_laptop_and_on_a_phone(finished, chromium):
    assert finished.report.stat().st_size < LARGEST
    for width in WIDTHS:
        seen = look(chromium, finished.report, width)
        assert seen.complaints == []
        sections = ("What was trained", "Which is more stable?", "What it says", "Versions")
        assert all(seen.text.count(name) == 2 for name in sections)
        assert "Figure 7." in seen.text
        assert len(seen.screenshot) > 100_000


def test_a_second_run_computes_nothing_again(finished, hooked, monkeypatch):
    before = contents(finished.folder)
    monkeypatch.setattr("emlens.study.stages.Study.train", None)
    monkeypatch.setattr("emlens.study.stages.log_odds", None)
    again = run_study(QUICK, finished.folder, model=hooked("llama"), progress=False)
    assert contents(finished.folder) == before
    assert again.findings == finished.findings


def study(folder: Path) -> None:
    """All but the report, which is written anew each time; with a model of the fewest layers."""
    run.StudyResult.write_report = lambda result: result.report  # type: ignore[method-assign]
    run_study(
        replace(QUICK, layers=(0, 1)),
        folder,
        model=tiny_hooked("llama", n_layers=2),
        progress=False,
    )


def test_a_study_killed_at_random_times_ends_with_the_same_results(tmp_path):
    left = killed(study, tmp_path)
    whole = contents(left.whole)
    assert left.kills >= KILLS
    for end in left.ends:
        assert contents(end) == whole
        assert not list(end.rglob("*.tmp"))


def test_another_study_in_the_same_folder_is_refused_unless_restarted(finished, hooked, tmp_path):
    store = StudyStore(tmp_path, QUICK)
    store.stage("data", lambda: {"n": 1})
    other = replace(QUICK, lr=0.5)
    with pytest.raises(
        ValueError, match=r"was made with other settings \(lr: 0.05 there, 0.5 now\); choose"
    ):
        StudyStore(tmp_path, other)
    assert StudyStore(tmp_path, QUICK).finished("data")
    assert not StudyStore(tmp_path, other, restart=True).finished("data")


def test_a_stage_that_fails_leaves_no_record(tmp_path):
    store = StudyStore(tmp_path, QUICK)

    def fail():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        store.stage("x", fail)
    assert not store.finished("x")
    assert store.stage("x", lambda: {"n": 2}) == {"n": 2}
    assert store.stage("x", fail) == {"n": 2}


def test_no_pair_is_on_two_sides_and_general_is_never_trained_on():
    data = StudyData.of(StudySettings())
    parts = [{pair.id for pair in part} for part in (data.train, data.kl, data.test)]
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
    assert {pair.domain for pair in data.train} == {"medical"}
    assert {pair.domain for pair in data.kl} == {"finance", "sports"}
    assert {pair.domain for pair in data.test} == {"medical", "general"}
    assert {pair.domain for pair in data.other} == {"sports"}


def test_unknown_settings_and_presets_are_refused_with_the_known_ones():
    with pytest.raises(
        ValueError, match=r"unknown study setting\(s\) depth; the settings are .*lr"
    ):
        StudySettings().with_options(depth=3)
    with pytest.raises(
        ValueError, match="unknown preset 'huge'; the presets are demo, vector, smoke"
    ):
        preset("huge")
    with pytest.raises(ValueError, match="never two of these"):
        StudySettings(outside=("medical",))


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"kind": "vector"}, "a vector is trained at one layer"),
        ({"factors": (0.5,)}, "factors must hold 1"),
        ({"epsilons": ()}, "no epsilons were given"),
        ({"other": "medical"}, "choose another than 'medical'"),
    ],
)
def test_settings_that_do_not_fit_each_other_are_refused(wrong, told):
    with pytest.raises(ValueError, match=told):
        StudySettings(**wrong)
