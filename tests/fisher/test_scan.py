"""Many directions: ranked by the profile, then the leaders and a sample checked exactly."""

from __future__ import annotations

import copy
import importlib
from unittest.mock import patch

import pytest
import torch

import emlens
from emlens import Ablate, influence
from emlens.directions import mean_diff, random_direction
from emlens.fisher import InfluenceProfile, InfluenceScan, scan
from emlens.text import Corpus
from tests.measures.test_influence import TEXT, direction
from tests.support.data import conversations
from tests.support.models import tiny_hooked

# the package has a function of this name
scan_module = importlib.import_module("emlens.fisher.scan")


@pytest.fixture(scope="module")
def scanned():
    model = tiny_hooked("llama")
    profile = InfluenceProfile.fit(model, TEXT, draws=64)
    many = {f"random {i}": random_direction(direction(model, i % 3), i) for i in range(12)}
    many |= dict(profile.top(1, k=2))
    found = scan(model, TEXT, many, profile=profile, doses=(0.05, 0.1, 1.0), check=4)
    return model, profile, many, found


def test_a_scan_ranks_by_the_profile_and_checks_leaders_and_a_sample(scanned):
    _, profile, many, found = scanned
    table = found.table()
    assert len(table) == len(many)
    assert list(table["KL [nats/token]"]) == sorted(table["KL [nats/token]"], reverse=True)
    scores = profile.score(many, 0.05).table()
    assert table["KL [nats/token]"].max() == pytest.approx(scores["KL [nats/token]"].max())
    chosen = {(row["direction"], row["chosen"]) for row in found.checked}
    assert len(chosen) == 8
    leaders = {name for name, why in chosen if why == "leader"}
    assert leaders == set(table["direction"][:4])
    assert table["exact KL [nats/token]"].notna().sum() == 8


def test_a_direction_found_on_half_of_the_documents_is_checked_on_the_other(scanned):
    model, profile, many, _ = scanned
    few = {name: many[name] for name in ("top 1", "random 1")}
    found = scan(model, TEXT, few, profile=profile, doses=(0.05,), check=2)
    exact = influence(model, TEXT, few, doses=(0.05,), controls=0)
    other = exact.among(range(1, len(TEXT), 2))
    assert other.documents == exact.documents[1::2]
    rows = {row["direction"]: row for row in found.checked}
    assert {name: row["held out"] for name, row in rows.items()} == {
        "top 1": True,
        "random 1": False,
    }
    for name, of in (("top 1", other), ("random 1", exact)):
        assert rows[name]["exact"] == pytest.approx(of.divergence(name, 0.05).estimate, rel=1e-5)
    with pytest.raises(ValueError, match="no places were given; give at least one"):
        exact.among([])


def test_a_scan_says_how_far_it_agrees_and_where_the_quadratic_breaks(scanned, tmp_path):
    model, _, many, found = scanned
    at = found.agreement().set_index("dose")
    assert at.loc[0.05, "median relative error"] < 0.25
    assert at.loc[0.05, "Spearman"] > 0.8
    assert at.loc[1.0, "median relative error"] > at.loc[0.05, "median relative error"]
    assert found.holds_to in (0.05, 0.1)
    row = next(row for row in found.checked if row["dose"] == 0.1)
    exact = influence(model, TEXT, {"x": many[row["direction"]]}, doses=(0.1,), controls=0)
    exact = exact.among(range(1, len(TEXT), 2)) if row["held out"] else exact
    assert row["exact"] == pytest.approx(exact.divergence("x", 0.1).estimate, rel=1e-5)
    assert "the second order holds within 25% up to dose" in str(found)
    change = exact.loss_change("x", 0.1)
    assert row["exact loss change"] == pytest.approx(change.estimate, rel=1e-4, abs=1e-7)
    assert at.loc[0.05, "loss error"] < 0.25 < at.loc[1.0, "loss error"]
    assert at.loc[0.05, "loss Spearman"] > 0.8 and at.loc[0.05, "loss signs right"] > 0.8
    assert InfluenceScan.load(found.save(tmp_path / "scan.json")).checked == found.checked
    assert found.plot().get_xscale() == "log"


def test_what_is_predicted_at_each_dose_is_what_the_profile_says_of_it(scanned):
    _, profile, many, found = scanned
    for row in found.checked:
        name, layer = row["direction"], row["layer"]
        said = profile.score({name: many[name][layer]}, dose=row["dose"])
        assert row["predicted"] == pytest.approx(said.kl[0])
        assert row["predicted loss change"] == pytest.approx(said.loss_change[0], rel=1e-4)


def row(dose: float, kl: tuple[float, float], loss: tuple[float, float]) -> dict:
    """A checked row: exact and predicted KL, exact and predicted change of loss."""
    values = {"exact": kl[0], "predicted": kl[1], "dose": dose}
    around = {"exact loss change low": loss[0] - 0.1, "exact loss change high": loss[0] + 0.1}
    return {**values, "exact loss change": loss[0], "predicted loss change": loss[1], **around}


def test_a_scan_holds_only_as_far_as_the_change_of_loss_does():
    checked = [
        row(0.05, (1, 1.0), (-1.0, -1.1)),
        row(0.05, (1, 1.0), (0.05, -0.02)),
        row(0.1, (1, 1.1), (-1.0, 1.0)),
        row(0.1, (1, 1.1), (1.0, 1.0)),
    ]
    found = InfluenceScan(({"direction": "a", "layer": 0},), tuple(checked), 0.05, "words")
    at = found.agreement().set_index("dose")
    assert at.loc[0.05, "loss error"] == pytest.approx(0.085 / 0.525)
    # the second row's exact interval holds zero, so its sign says nothing
    assert list(at["loss signs right"]) == [1.0, 0.5]
    assert list(at["median relative error"]) == pytest.approx([0, 0.1])
    assert found.holds_to == 0.05
    old = [{k: v for k, v in one.items() if "loss" not in k} for one in checked]
    before = InfluenceScan(found.scores, tuple(old), 0.05, "words")
    assert before.holds_to == 0.1 and before.agreement()["loss error"].isna().all()


def test_a_scan_makes_its_own_profile_and_refuses_what_it_cannot_do(hooked_llama):
    diff = mean_diff(hooked_llama, conversations("bad", 4), conversations("good", 4))
    found = scan(hooked_llama, TEXT, diff, doses=(0.05,), check=1, draws=2)
    assert {row["layer"] for row in found.scores} == set(diff.layers)
    with pytest.raises(ValueError, match="no directions were given"):
        scan(hooked_llama, TEXT, {})
    with pytest.raises(ValueError, match="doses must be above zero"):
        scan(hooked_llama, TEXT, diff, doses=(-0.1,))
    with pytest.raises(ValueError, match="check must be at least 1"):
        scan(hooked_llama, TEXT, diff, check=0)


def test_a_scan_checks_all_directions_in_one_measurement(scanned):
    model, profile, many, found = scanned
    calls = []

    def counting(*args, **kwargs):
        calls.append(kwargs["doses"])
        return influence(*args, **kwargs)

    with patch.object(scan_module, "influence", counting):
        again = scan(model, TEXT, many, profile=profile, doses=(0.05, 0.1, 1.0), check=4)
    assert calls == [[0.05, 0.1, 1.0]]
    assert again.checked == found.checked


def test_a_profile_of_another_model_is_refused_and_of_other_text_told(scanned):
    model, profile, _, _ = scanned
    x = {"x": direction(model)}
    renamed = emlens.wrap(model.module, model.tokenizer, name="another")
    scan(renamed, TEXT, x, profile=profile, doses=(0.05,), check=1)
    module = copy.deepcopy(model.module)
    with torch.no_grad():
        module.lm_head.weight[0] += 1
    other = emlens.wrap(module, model.tokenizer, name=model.name)
    with pytest.raises(
        ValueError, match=f"identity: '.*' there, '{other.identity}' now.; fit one of 'tiny-llama'"
    ):
        scan(other, TEXT, x, profile=profile)
    acting = model.edited(Ablate(x["x"]))
    with acting, pytest.raises(ValueError, match=r"edits: \[\] there, \['Ablate"):
        scan(model, TEXT, x, profile=profile)
    part = Corpus("part", TEXT.documents[:4])
    with pytest.warns(
        UserWarning, match=r"the profile was fitted on rain, but the exact check uses part"
    ):
        scan(model, part, x, profile=profile, doses=(0.05,), check=1)
