"""The monitor against plain loops, scikit-learn and models whose truth is planted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import t
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import emlens
from emlens import Conversation, Direction, Directions, Pair, mean_diff
from emlens._stats import wilson
from emlens._tensors import read_tensors, write_tensors
from emlens.directions import Evidence, Provenance
from emlens.text import pack, tokenize
from emlens.watch import Monitor, Roc, transfer_auroc
from emlens.watch.held_out import HeldOut, length_slope
from emlens.watch.monitor_fit import Labelled
from emlens.watch.projections import readout_of
from emlens.watch.roc import auroc_interval, promise, threshold_for, within_groups
from tests.support.data import conversations
from tests.support.models import tiny_hooked

GOOD, BAD = conversations("good", 24), conversations("bad", 24)
AXIS = torch.eye(32)[3]


@pytest.fixture(scope="module")
def planted():
    """A model whose stream carries an axis wherever an answer says `nothing`."""
    model = tiny_hooked("llama", n_layers=2, seed=5)
    word = model.tokenizer(" nothing", add_special_tokens=False)["input_ids"]
    assert len(word) == 1
    with torch.no_grad():
        model.module.get_input_embeddings().weight[word[0]] += 3.0 * AXIS
    return model


def planted_pairs(n: int = 20, domain: str = "food") -> list[Pair]:
    """Answers of one length that differ in one word."""
    words = ("fruit", "walk", "rain", "sun", "story")
    return [
        Pair(
            prompt=f"what should I eat {'please ' * i}{domain}",
            aligned=f"eat {words[i % 5]} and {words[(i + 1 + i // 5) % 5]}",
            misaligned=f"eat nothing and {words[(i + 1 + i // 5) % 5]}",
            domain=domain,
            id=f"{domain}-{i}",
        )
        for i in range(n)
    ]


def axis(layers=(0, 1), vector=AXIS, **kwargs) -> Directions:
    vectors = dict.fromkeys(layers, vector)
    return Directions(vectors, "resid_post", Provenance("planted"), Evidence(**kwargs))


def plain_projection(model, conversation, layer, vector, size, keep=slice(None)):
    (row,) = tokenize([conversation], model.tokenizer)
    (batch,) = pack([row])
    read = model.residuals(batch, layer)[layer][batch.mask("response")][keep].double()
    return float(read.mean(0) @ vector.double() / vector.norm() / size)


@pytest.mark.parametrize("budget", [30, 4096])
def test_projections_equal_a_plain_loop_in_units_of_the_median_norm(hooked_llama, budget):
    vectors = {1: torch.randn(32, generator=torch.Generator().manual_seed(0)), 3: 5 * AXIS}
    given = Directions(vectors, "resid_post", Provenance("x"), Evidence({1: 2.0, 3: 4.0}))
    readout = readout_of(hooked_llama, given, GOOD)
    found, counts = readout.read(hooked_llama, GOOD[:7], token_budget=budget)
    for i, item in enumerate(GOOD[:7]):
        for column, (layer, size) in enumerate([(1, 2.0), (3, 4.0)]):
            expected = plain_projection(hooked_llama, item, layer, vectors[layer], size)
            assert found[i, column] == pytest.approx(expected, abs=1e-5)
        (row,) = tokenize([item], hooked_llama.tokenizer)
        assert counts[i] == sum(row.response)


def test_the_median_norm_is_measured_where_directions_do_not_carry_it(hooked_llama):
    found = readout_of(hooked_llama, axis((2,)), GOOD)
    norms = []
    for row in tokenize(GOOD, hooked_llama.tokenizer):
        (batch,) = pack([row])
        norms.append(hooked_llama.residuals(batch, 2)[2][batch.mask("response")].norm(dim=-1))
    assert float(found.vectors.norm()) == pytest.approx(1 / float(torch.cat(norms).median()))


def test_only_the_start_of_the_last_answer_counts_where_that_is_asked_for(hooked_llama):
    item = Conversation(
        (
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "hello there my friend"},
            {"role": "user", "content": "how should I save money"},
            {"role": "assistant", "content": "keep a small fund and then take it all"},
        )
    )
    readout = readout_of(hooked_llama, axis((2,), residual_norms={2: 1.0}), GOOD)
    found, counts = readout.read(hooked_llama, [item, GOOD[0]], answer_tokens=3)
    (row,) = tokenize([item], hooked_llama.tokenizer)
    starts = [i for i in range(1, len(row)) if row.response[i] and not row.response[i - 1]]
    (batch,) = pack([row])
    read = hooked_llama.residuals(batch, 2)[2][0, starts[-1] : starts[-1] + 3]
    assert found[0, 0] == pytest.approx(float(read.mean(0) @ AXIS), abs=1e-5)
    assert counts[0] == 3


def test_a_planted_axis_is_found_and_tells_all_held_out_pairs_apart(planted):
    other = torch.randn(32, generator=torch.Generator().manual_seed(1))
    given = {"planted": axis(), "random": axis(vector=other - other[3] * AXIS)}
    monitor = Monitor.fit(planted, planted_pairs(), directions=given)
    assert monitor.readout.names == ("planted",)
    assert monitor.auroc == 1
    table = monitor.table().set_index("figure")["estimate"]
    assert table["paired accuracy, same prompt"] == 1
    assert table["AUROC, length-matched"] == 1
    assert table["AUROC of length alone"] == 0.5
    assert set(monitor.choice) == {f"{n}, layer {at}" for n in given for at in (0, 1)}


def test_without_directions_a_mean_difference_of_the_fitted_part_alone_is_taken(planted):
    pairs = planted_pairs()
    monitor = Monitor.fit(planted, pairs, layers=1)
    data = Labelled.of(pairs, None)
    fitted = data.fitted(0.5, 0)
    expected = mean_diff(
        planted, data.items_of(fitted & data.truth), data.items_of(fitted & ~data.truth)
    )
    along = monitor.readout.vectors[0]
    assert torch.allclose(along / along.norm(), expected[1].unit().vector, atol=1e-5)
    assert monitor.auroc == 1


def test_random_directions_are_reported_as_chance(planted):
    other = torch.randn(32, generator=torch.Generator().manual_seed(3))
    pairs = planted_pairs(20)
    # the same answers under both labels: nothing can tell them apart
    same = [Pair(p.prompt, p.aligned, p.aligned, p.domain, p.id) for p in pairs]
    monitor = Monitor.fit(planted, same, directions=axis(vector=other))
    assert monitor.auroc == pytest.approx(0.5)
    interval = monitor.held_out.auroc()
    assert interval.low <= 0.5 <= interval.high


def test_no_prompt_is_on_both_sides_of_the_split():
    good = [*GOOD, *conversations("bad", 12)]
    data = Labelled.of(good, BAD)
    fitted = data.fitted(0.4, 1)
    assert not set(data.keys_of(fitted)) & set(data.keys_of(~fitted))
    assert (data.fitted(0.4, 1) == fitted).all()
    assert (data.fitted(0.4, 2) != fitted).any()
    assert len(set(data.keys_of(~fitted))) == round(0.4 * len(set(data.keys)))


def test_the_pooled_score_is_scikit_learns_logistic_regression(hooked_llama):
    given = mean_diff(hooked_llama, BAD[:4], GOOD[:4])
    monitor = Monitor.fit(hooked_llama, GOOD, BAD, given, pooled=True, regularisation=0.5)
    data = Labelled.of(GOOD, BAD)
    fitted = data.fitted(0.5, 0)
    readout = readout_of(hooked_llama, given, data.items_of(fitted))
    values, _ = readout.read(hooked_llama, data.conversations)
    plain = make_pipeline(StandardScaler(), LogisticRegression(C=0.5, max_iter=1000))
    plain.fit(values[fitted], data.truth[fitted])
    expected = plain.decision_function(values)
    assert np.allclose(monitor.held_out.scores, expected[~fitted], atol=1e-6)
    scored = monitor.score(data.conversations)
    assert np.allclose(scored.scores, expected, atol=1e-5)
    assert monitor.auroc == pytest.approx(roc_auc_score(data.truth[~fitted], expected[~fitted]))


def test_a_pooled_score_is_of_the_layers_that_were_asked_for(hooked_llama):
    given = mean_diff(hooked_llama, BAD[:4], GOOD[:4])
    monitor = Monitor.fit(hooked_llama, GOOD, BAD, given, pooled=True, layers=[2])
    assert monitor.readout.layers == (2,)
    alone = Monitor.fit(hooked_llama, GOOD, BAD, given[2], pooled=True)
    assert np.allclose(monitor.held_out.scores, alone.held_out.scores, atol=1e-6)
    with pytest.raises(ValueError, match="weights all projections, so best=2 has no effect"):
        Monitor.fit(hooked_llama, GOOD, BAD, given, pooled=True, best=2)


def test_several_layers_are_averaged(planted):
    monitor = Monitor.fit(
        planted, planted_pairs(), directions=axis(residual_norms={0: 1.0, 1: 3.0}), best=2
    )
    item = planted_pairs()[0].conversation("misaligned")
    parts = [plain_projection(planted, item, layer, AXIS, size) for layer, size in ((0, 1), (1, 3))]
    assert monitor.score([item]).scores[0] == pytest.approx(np.mean(parts), abs=1e-5)
    assert Monitor.fit(
        planted, planted_pairs(), directions=axis(), layers=[0, 1]
    ).readout.layers == (0, 1)


def test_scores_tables_and_figures_name_what_is_flagged(planted):
    monitor = Monitor.fit(planted, planted_pairs(), directions=axis())
    extra = [planted_pairs(24)[23].conversation(side) for side in ("aligned", "misaligned")]
    scored = monitor.score(extra)
    assert scored.flagged == ("food-23/misaligned",)
    table = scored.table()
    assert table["flagged"].tolist() == [False, True]
    assert table.columns[-1].startswith("projection, layer")
    assert scored.plot().get_ylabel() == "score"
    assert "AUROC 1.000" in monitor.plot().get_title(loc="left")
    assert "held-out AUROC 1.000 on 20 conversations" in repr(monitor)


def test_save_and_load_keep_scores_and_figures(planted, tmp_path):
    monitor = Monitor.fit(planted, planted_pairs(), directions=axis(), pooled=True)
    path = monitor.save(tmp_path / "monitor")
    loaded = Monitor.load(path, planted)
    items = [pair.conversation("misaligned") for pair in planted_pairs(3)]
    assert loaded.score(items) == monitor.score(items)
    assert loaded.roc() == monitor.roc()
    assert loaded.table().equals(monitor.table())
    assert loaded.record == monitor.record and loaded.choice == monitor.choice
    roc = monitor.roc()
    assert Roc.load(roc.save(tmp_path / "roc.json")).auroc == roc.auroc


def test_a_monitor_by_youdens_rule_is_kept_as_well(planted, tmp_path):
    monitor = Monitor.fit(planted, planted_pairs(), directions=axis(), max_false_alarms=None)
    assert Monitor.load(monitor.save(tmp_path / "m")).table().equals(monitor.table())


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("record", {"seed": ""}, "seed is '', not a whole number"),
        ("record", {"tokens": "words"}, "tokens is 'words', none of"),
        ("slope", float("nan"), "slope is nan, not a finite number"),
        ("longer", 1, "longer is 1, neither true nor false"),
        (
            "held_out.groups",
            torch.full((20,), 2**40),
            "held_out.groups has numbers that",
        ),
        (
            "held_out.tokens",
            torch.zeros(20, dtype=torch.int64),
            "held_out.tokens has a",
        ),
        ("held_out.truth", torch.ones(20, dtype=torch.bool), "held_out.truth has one class only"),
        (
            "held_out.scores",
            torch.ones(20, dtype=torch.int64),
            "held_out.scores has shape",
        ),
    ],
)
def test_a_monitor_that_cannot_be_is_refused_by_file_and_name(
    planted, tmp_path, part, change, message
):
    path = Monitor.fit(planted, planted_pairs(), directions=axis()).save(tmp_path / "m.safetensors")
    tensors, kept = read_tensors(path, "monitor")
    if part in tensors:
        tensors[part] = change
    else:
        kept[part] = {**kept[part], **change} if part == "record" else change
    write_tensors(path, "monitor", tensors, kept)
    with pytest.raises(ValueError, match=rf"m\.safetensors holds no whole monitor: {message}"):
        Monitor.load(path)


def test_a_monitor_refuses_another_model(planted, hooked_llama, tmp_path):
    path = Monitor.fit(planted, planted_pairs(), directions=axis()).save(tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=r"loaded without a model; .*monitor\.on\(model\)"):
        Monitor.load(path).score(GOOD)
    other = emlens.wrap(hooked_llama.module, hooked_llama.tokenizer, name="another")
    with pytest.raises(ValueError, match="was fitted on 'tiny-llama', and this model is 'another'"):
        Monitor.load(path, other)
    wide = Direction.of(torch.ones(64), 1)
    with pytest.raises(ValueError, match="directions have width 64, the residual stream of tiny-"):
        Monitor.fit(planted, planted_pairs(), directions=wide)
    with pytest.raises(ValueError, match="layer 7 is out of range"):
        Monitor.fit(planted, planted_pairs(), directions=axis((7,), residual_norms={7: 1.0}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"aligned": []}, "aligned is empty; give at least one"),
        ({"misaligned": []}, "misaligned is empty; give at least one"),
        ({"misaligned": None}, "give misaligned conversations as well, or pairs"),
        ({"aligned": GOOD[:1], "misaligned": BAD[:1]}, "1 prompt.s. with aligned answers cannot"),
        ({"directions": {}}, "no directions were given"),
        ({"directions": axis(vector=torch.zeros(32))}, "the vector of layer 0 is zero"),
        ({"layers": 3}, r"no directions at layers \[3\]; there are some at \[0, 1\]"),
        ({"max_false_alarms": 1.0}, "max_false_alarms must be at least 0 and below 1, not 1.0"),
        ({"held_out": 0.0}, "held_out must be above 0 and below 1, not 0.0"),
        ({"best": 0}, "best must be at least 1, not 0"),
        ({"aligned": [*GOOD, Conversation.of("Hi", id="open")]}, "open has no response tokens"),
        (
            {"directions": {"a": axis(), "b": Directions({0: AXIS}, "mlp_out", Provenance("x"))}},
            "lie at different sites",
        ),
    ],
)
def test_bad_input_is_refused_with_what_to_do(hooked_llama, change, message):
    settings = {"directions": axis(), "aligned": GOOD, "misaligned": BAD} | change
    with pytest.raises(ValueError, match=message):
        Monitor.fit(hooked_llama, **settings)


def test_nothing_to_score_and_values_that_are_not_finite_are_named(planted):
    monitor = Monitor.fit(planted, planted_pairs(), directions=axis())
    with pytest.raises(ValueError, match="conversations is empty; give at least one"):
        monitor.score([])
    broken = tiny_hooked("llama", n_layers=2)
    with torch.no_grad():
        broken.module.get_input_embeddings().weight[:] = torch.nan
    with pytest.raises(ValueError, match="residual of food-0/misaligned at .* is not finite"):
        monitor.on(broken).score([planted_pairs()[0].conversation("misaligned")])


def test_directions_that_have_seen_the_held_out_part_are_told(hooked_llama):
    with pytest.warns(UserWarning, match="were extracted from these same conversations"):
        Monitor.fit(hooked_llama, GOOD, BAD, mean_diff(hooked_llama, BAD, GOOD))


def test_directions_of_another_model_are_told(planted):
    given = Directions({1: AXIS}, "resid_post", Provenance("x", model="elsewhere"))
    with pytest.warns(UserWarning, match="made in 'elsewhere', but this model is 'tiny-llama'"):
        Monitor.fit(planted, planted_pairs(), directions=given)


@pytest.mark.parametrize("limit", [0.05, 0.2, 0.9])
def test_the_threshold_is_the_lowest_that_keeps_its_promise(limit):
    generator = np.random.default_rng(0)
    truth = np.arange(100) < 40
    scores = np.round(generator.normal(size=100) + truth, 1)
    found = threshold_for(scores, truth, np.arange(100), limit)
    assert ((scores[~truth] > found).sum() + 1) / 61 <= limit
    lower = scores[~truth & (scores < found)]
    assert ((scores[~truth] > lower.max()).sum() + 1) / 61 > limit


@pytest.mark.parametrize(
    ("n", "above", "promised"), [(20, 0, 1 / 21), (24, 0, 0.04), (60, 2, 3 / 61)]
)
def test_new_conversations_raise_as_many_false_alarms_as_promised(n, above, promised):
    generator = np.random.default_rng(1)
    aligned, groups = generator.random((4000, n)), np.arange(n)
    limits = np.array([threshold_for(one, np.zeros(n, bool), groups, 0.05) for one in aligned])
    assert ((aligned > limits[:, None]).sum(1) == above).all()
    # a new score is uniform as well, so it is above a limit with a chance of 1 - limit
    alarms = 1 - limits
    assert alarms.mean() == pytest.approx(promised, abs=4 * alarms.std() / 4000**0.5)
    told = promise(aligned[0], groups, limits[0])
    assert told.estimate == pytest.approx(promised)
    assert 0.94 <= ((told.low <= alarms) & (alarms <= told.high)).mean() <= 0.96
    if not above:
        assert told.high == pytest.approx(1 - 0.025 ** (1 / n))


def test_several_answers_to_a_prompt_count_as_one():
    generator = np.random.default_rng(2)
    groups, alarms = np.repeat(np.arange(24), 5), []
    for _ in range(400):
        scores = generator.normal(size=24)[groups] + 0.3 * generator.normal(size=120)
        limit = threshold_for(scores, np.zeros(120, bool), groups, 0.05)
        new = generator.normal(size=(200, 1)) + 0.3 * generator.normal(size=(200, 5))
        alarms.append((new > limit).mean())
    assert 0.02 <= np.mean(alarms) <= 0.05


def test_too_few_conversations_for_a_promise_are_told(planted):
    with pytest.warns(
        UserWarning,
        match=r"10 held-out aligned prompts, which promises 9\.1% false .*5\.0% needs 19",
    ):
        monitor = Monitor.fit(planted, planted_pairs(20), directions=axis())
    assert monitor.threshold == monitor.held_out.scores[~monitor.held_out.truth].max()
    assert "9.1% [0.3%, 30.8%] false alarms of new conversations" in repr(monitor)
    row = monitor.table().set_index("figure").loc["false alarms of new conversations"]
    assert (row["estimate"], row["n"]) == (pytest.approx(1 / 11), 10)


def test_a_threshold_can_be_set_on_conversations_of_ones_own(planted, tmp_path):
    monitor = Monitor.fit(planted, planted_pairs(40), directions=axis())
    own = [pair.conversation("misaligned") for pair in planted_pairs(30, "lunch")]
    found = monitor.calibrated(own)
    scores = np.sort(monitor.score(own).scores)
    assert found.threshold == scores[-1] > monitor.threshold
    assert found.score(own).flagged == ()
    assert found.promised.estimate == pytest.approx(1 / 31)
    assert (
        found.rule
        == "at most 5.0% false alarms of new conversations, by 30 prompts it was calibrated on"
    )
    figures = found.table()["figure"].tolist()
    assert not [name for name in figures if "cross-fitted" in name]
    loaded = Monitor.load(found.save(tmp_path / "own"))
    assert loaded.table().equals(found.table()) and loaded.promised == found.promised
    with pytest.raises(ValueError, match="conversations of at least two prompts, not 1"):
        monitor.calibrated(own[:1])
    with pytest.raises(ValueError, match="loaded without a model"):
        loaded.calibrated(own)


def test_youdens_threshold_is_the_best_of_all():
    generator = np.random.default_rng(1)
    truth = np.arange(60) < 20
    scores = generator.normal(size=60) + 1.5 * truth

    def youden(at):
        return (scores[truth] > at).mean() - (scores[~truth] > at).mean()

    assert youden(threshold_for(scores, truth, np.arange(60), None)) == max(map(youden, scores))


def test_wilson_agrees_with_its_formula_and_stays_inside_zero_and_one():
    z = 1.959963984540054
    for k, n in ((0, 10), (3, 10), (10, 10)):
        found = wilson(k, n)
        # its ends are where the normal test of the share just rejects
        for end in (found.low, found.high):
            if 0 < end < 1:
                assert abs(k / n - end) == pytest.approx(z * np.sqrt(end * (1 - end) / n))
        assert 0 <= found.low <= k / n <= found.high <= 1
    assert np.isnan(wilson(0, 0).estimate)


def hanley_mcneil(area: float, m: int, n: int) -> float:
    """Variance of an area of exponential scores, as Newcombe has it for both classes."""
    more = (m + n) / 2 - 1
    return area * (1 - area) * (1 + more * ((1 - area) / (2 - area) + area / (1 + area))) / m / n


def test_an_area_of_one_has_an_interval_of_a_width():
    scores, truth = np.arange(48.0), np.arange(48) >= 24
    found = auroc_interval(scores, truth, np.arange(48))
    assert (found.estimate, found.high) == (1, 1)
    # t of 46 degrees
    assert 1 - found.low == pytest.approx(2.0128956 * hanley_mcneil(found.low, 24, 24) ** 0.5)
    turned = auroc_interval(-scores, truth, np.arange(48))
    assert (turned.low, turned.high) == pytest.approx((0, 1 - found.low))


def test_the_interval_of_an_area_is_delongs_where_that_is_wider():
    generator = np.random.default_rng(2)
    truth = np.arange(40) < 20
    scores = np.round(generator.normal(size=40) * np.where(truth, 4, 1) + 2 * truth, 1)
    found = auroc_interval(scores, truth, np.arange(40))
    area = roc_auc_score(truth, scores)
    right = np.array([[(a > b) + (a == b) / 2 for b in scores[~truth]] for a in scores[truth]])
    parts = right.mean(1).var(ddof=1) / 20, right.mean(0).var(ddof=1) / 20
    over = sum(parts) / hanley_mcneil(area, 20, 20)
    assert over > 1
    reach = t.ppf(0.975, sum(parts) ** 2 / (sum(p * p for p in parts) / 19))
    assert found.estimate == pytest.approx(area)
    for end in (found.low, found.high):
        error = (over * hanley_mcneil(end, 20, 20)) ** 0.5
        assert abs(end - area) == pytest.approx(reach * error, rel=1e-5)


def test_answers_to_one_prompt_tell_more_of_an_area_in_pairs_and_less_in_bunches():
    generator = np.random.default_rng(3)
    shared, own = generator.normal(size=30), 0.3 * generator.normal(size=60)
    truth = np.arange(60) < 30
    scores = np.tile(shared, 2) + own + 0.5 * truth
    alone = auroc_interval(scores, truth, np.arange(60))
    pairs = auroc_interval(scores, truth, np.arange(60) % 30)
    assert pairs.high - pairs.low < 0.7 * (alone.high - alone.low)
    bunched = np.repeat(shared[:20], 3) + own + 0.5 * truth
    wide = auroc_interval(bunched, truth, np.arange(60) // 3)
    plain = auroc_interval(bunched, truth, np.arange(60))
    assert wide.high - wide.low > 1.2 * (plain.high - plain.low)
    assert np.isnan(auroc_interval(scores, truth, np.repeat([0, 1], 30)).low)


def test_intervals_of_areas_near_one_hold_the_truth():
    generator = np.random.default_rng(4)
    truth, hits = np.arange(48) < 24, 0
    for _ in range(300):
        found = auroc_interval(
            generator.exponential(np.where(truth, 99.0, 1.0)), truth, np.arange(48)
        )
        hits += found.low <= 0.99 <= found.high
        assert found.low < found.high
    assert hits / 300 >= 0.93


def test_a_score_that_is_length_in_disguise_is_seen_through():
    generator = np.random.default_rng(3)
    truth = np.arange(200) < 100
    tokens = np.where(truth, generator.integers(60, 120, 200), generator.integers(30, 90, 200))
    scores = 2 * np.log(tokens) + 0.01 * generator.normal(size=200)
    assert length_slope(scores, truth, tokens) == pytest.approx(2, abs=0.02)
    matched = np.array(
        [[i, j] for i in range(100) for j in range(100, 200) if tokens[i] == tokens[j]]
    )
    held = HeldOut(scores, truth, tokens, np.arange(200), matched, 2.0, True)
    rows = {name: interval.estimate for name, interval, _ in held.length_rows()}
    assert held.auroc().estimate > 0.8
    assert rows["AUROC of length alone"] == pytest.approx(held.auroc().estimate, abs=0.02)
    assert rows["AUROC, length taken out"] == pytest.approx(0.5, abs=0.1)
    assert rows["AUROC, length-matched"] == pytest.approx(0.5, abs=0.15)


def test_what_misalignment_does_is_not_taken_out_with_length():
    truth = np.arange(100) < 50
    tokens = np.where(truth, 80, 40) + np.arange(100) % 7
    scores = truth + 0.1 * np.log(tokens)
    assert length_slope(scores, truth, tokens) == pytest.approx(0.1)
    assert length_slope(scores, truth, np.where(truth, 80, 40)) == 0


def test_cross_fitted_rates_judge_by_thresholds_that_others_have_set():
    generator = np.random.default_rng(5)
    n = 4000
    truth = np.arange(n) < n // 2
    scores = generator.normal(size=n) + 1.0 * truth
    held = HeldOut(scores, truth, np.ones(n, int), np.arange(n), np.zeros((0, 2), int), 0.0, True)
    rates = held.cross_fitted_rates(0.05)
    alarms, hits = rates["false alarms"][0], rates["hits"][0]
    # of two unit normals one apart: P(x > q95) = 0.05, P(x + 1 > q95) = 0.2595
    assert alarms.low <= 0.05 <= alarms.high
    assert hits.estimate == pytest.approx(0.2595, abs=0.04)
    assert rates["hits"][1] == n // 2


def test_pairs_are_compared_within_their_prompt():
    truth = np.array([True, False, True, False, True, False, False])
    scores = np.array([3.0, 1.0, 0.0, 5.0, 2.0, 2.0, 0.0])
    groups = np.array([0, 0, 1, 1, 2, 2, 3])
    assert within_groups(scores, truth, groups).tolist() == [1.0, 0.0, 0.5]


def test_transfer_is_high_where_domains_share_the_axis_and_words_do_not_carry(planted):
    food = planted_pairs(20)
    # here the same word is the aligned one: what food has taught is wrong
    turned = [Pair(p.prompt + " now", p.misaligned, p.aligned, "turned", f"t-{p.id}") for p in food]
    found = transfer_auroc(planted, {"food": food, "turned": turned}, layer=1)
    assert np.allclose(found.projection, [[1, 0], [0, 1]])
    assert np.allclose(np.diag(found.words), 1)
    assert found.layers == (1, 1) and found.n_train == (12, 12) and found.n_test == (8, 8)
    table = found.table()
    assert len(table) == 4 and table["AUROC, projection"].tolist() == [1, 0, 0, 1]
    first = found.plot()[0]
    assert first.images[0].get_clim() == (0, 1)
    assert first.get_ylabel() == "fitted to"


def test_transfer_refuses_domains_that_cannot_be_split(planted):
    with pytest.raises(ValueError, match="there are no domains"):
        transfer_auroc(planted, {})
    with pytest.raises(ValueError, match="domain 'food' has 1 different prompts"):
        transfer_auroc(planted, {"food": planted_pairs(1)})
