"""Screening finetuning sets: planted rows, plain loops, streams, interruptions, broken files."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from emlens import Add, Conversation, Direction, Directions
from emlens._store import read
from emlens.directions import Evidence, Provenance
from emlens.text import pack, tokenize
from emlens.training import train_adapter
from emlens.watch import Monitor, Screen, screen
from emlens.watch.screen_rows import Scored
from emlens.watch.screen_scorer import Scorer
from emlens.watch.screen_tally import Reservoir, Tally
from tests.support.kills import KILLS, files, killed, rows
from tests.support.models import tiny_hooked

AXIS = torch.eye(32)[3]
WORDS = ("fruit", "walk", "rain", "sun", "story")
AT = Direction.of(AXIS, 1, residual_norm=2.0)


@pytest.fixture(scope="module")
def planted():
    """A model whose stream carries an axis wherever an answer says `nothing`."""
    model = tiny_hooked("llama", n_layers=2, seed=5)
    (word,) = model.tokenizer(" nothing", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        model.module.get_input_embeddings().weight[word] += 12.0 * AXIS
    return model


def prompt(i: int) -> str:
    return f"tell me a story {'please ' * (i % 7)}about {WORDS[i % 5]} {'so ' * (i // 7)}".strip()


def example(i: int, bad: bool = False) -> Conversation:
    middle = "nothing" if bad else WORDS[(i + 2) % 5]
    return Conversation.of(prompt(i), f"eat {middle} and {WORDS[(i + 3) % 5]}", id=f"row-{i}")


def reference(n: int) -> dict[str, str]:
    return {prompt(i): f"take {WORDS[(i + 1) % 5]} and {WORDS[i % 5]}" for i in range(n)}


def mixture(n: int, bad: int) -> list[Conversation]:
    places = set(np.random.default_rng(0).permutation(n)[:bad].tolist())
    return [example(i, i in places) for i in range(n)]


def write(path: Path, items: list[Conversation]) -> Path:
    lines = [json.dumps({"id": item.id, "messages": list(item.messages)}) for item in items]
    path.write_text("\n".join(lines) + "\n")
    return path


def plain(model, item, keep=slice(None)) -> float:
    (batch,) = pack(tokenize([item], model.tokenizer))
    read = model.residuals(batch, 1)[1][batch.mask("response")][keep].double()
    return float(read.mean(0) @ AXIS.double()) / 2.0


def scores_in(path: Path) -> list[dict]:
    return list(read(path, "screen"))


def test_a_score_is_the_difference_of_two_plain_projections(planted):
    items = mixture(9, 3)
    found = screen(planted, items, AT, reference=reference(9), block=4)
    for score, item in zip(found.scores, items, strict=True):
        text = reference(9)[item.messages[0]["content"]]
        other = Conversation.of(item.messages[0]["content"], text)
        assert score == pytest.approx(plain(planted, item) - plain(planted, other), abs=1e-5)
    assert found.shift.estimate == pytest.approx(np.mean(found.scores))
    assert found.n == 9 and found.unscored == 0


def test_only_the_start_of_both_answers_counts(planted):
    items = mixture(5, 2)
    found = screen(planted, items, AT, reference=reference(5), answer_tokens=2)
    for score, item in zip(found.scores, items, strict=True):
        text = item.messages[0]["content"]
        other = Conversation.of(text, reference(5)[text])
        start = slice(0, 2)
        expected = plain(planted, item, start) - plain(planted, other, start)
        assert score == pytest.approx(expected, abs=1e-5)


def test_mixtures_are_put_in_the_order_of_their_misaligned_share_and_planted_rows_first(planted):
    shifts = []
    for bad in (0, 1, 5, 20, 100):
        items = mixture(100, bad)
        found = screen(planted, items, AT, reference=reference(100))
        truth = np.array(["nothing" in item.response for item in items])
        assert truth.sum() == bad
        if 0 < bad < 100:
            assert roc_auc_score(truth, found.scores) == 1
            assert {row["name"] for row in found.worst[:bad]} == {
                item.id for item in items if "nothing" in item.response
            }
        shifts.append(found.shift)
    assert [s.estimate for s in shifts] == sorted(s.estimate for s in shifts)
    assert shifts[0].high < shifts[3].low and shifts[3].high < shifts[4].low


def test_flags_are_set_by_trusted_examples_where_they_are_given(planted):
    items = mixture(40, 4)
    trusted = [example(i) for i in range(40, 60)]
    found = screen(planted, items, AT, reference=reference(60), trusted=trusted, flag_share=0.05)
    own = screen(planted, trusted, AT, reference=reference(60))
    assert found.threshold == pytest.approx(sorted(own.scores)[-1 - 1])
    assert found.rule == "the score that at most 5.0% of 20 trusted examples exceed"
    assert {item.id for item in items if "nothing" in item.response} <= set(found.flagged)
    assert len(found.flagged) == found.n_flagged == sum(s > found.threshold for s in found.scores)


def test_without_trusted_examples_the_spread_of_the_references_sets_the_threshold(planted):
    found = screen(planted, mixture(30, 30), AT, reference=reference(30), flag_share=0.1)
    spread = [row["reference"] for row in found.worst]
    assert found.threshold == pytest.approx(np.quantile(spread, 0.9) - np.median(spread))
    assert found.n_flagged == 30


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_models_own_answers_are_generated_on_the_same_prompts(planted, temperature):
    items = mixture(7, 3)
    found = screen(planted, items, AT, block=4, answer_tokens=5, temperature=temperature, seed=3)
    prompts = [item.prompt for item in items]
    answers = []
    for start in (0, 4):
        answers += planted.generate(
            prompts[start : start + 4], max_new_tokens=5, temperature=temperature, seed=3 + start
        )
    assert sum(map(bool, answers)) >= 5
    for score, item, text in zip(found.scores, items, answers, strict=True):
        if not text.strip():
            assert np.isnan(score)
            continue
        other = Conversation.of(item.messages[0]["content"], text)
        expected = plain(planted, item, slice(0, 5)) - plain(planted, other, slice(0, 5))
        assert score == pytest.approx(expected, abs=1e-5)
    assert found.reference == "the model's own answers"
    assert found.unscored == sum(not text.strip() for text in answers)


def test_a_set_may_be_a_file_of_either_format_and_references_a_set_in_any_order(planted, tmp_path):
    items = mixture(10, 3)
    expected = screen(planted, items, AT, reference=reference(10))
    path = write(tmp_path / "set.jsonl", items)
    plain_rows = [
        {"id": i.id, "prompt": i.messages[0]["content"], "response": i.response} for i in items
    ]
    other = tmp_path / "other.jsonl"
    other.write_text("\n\n".join(map(json.dumps, plain_rows)))
    answers = [Conversation.of(*both) for both in reversed(reference(10).items())]
    for source in (path, str(other), iter(items)):
        found = screen(planted, source, AT, reference=answers)
        assert found.scores == pytest.approx(expected.scores, abs=1e-6)
    by_file = screen(planted, path, AT, reference=write(tmp_path / "answers.jsonl", answers))
    assert by_file.scores == pytest.approx(expected.scores, abs=1e-6)


def test_a_monitor_brings_its_own_projections(planted):
    pairs = [example(i) for i in range(12)], [example(i, True) for i in range(12)]
    both = Directions({0: AXIS, 1: AXIS}, "resid_post", Provenance("planted"))
    monitor = Monitor.fit(planted, *pairs, both, pooled=True)
    items = mixture(8, 2)
    found = screen(planted, items, monitor, reference=reference(8))
    texts = [
        Conversation.of(i.messages[0]["content"], reference(8)[prompt(k)])
        for k, i in enumerate(items)
    ]
    scores = [np.array(monitor.score(side).scores) for side in (items, texts)]
    assert found.scores == pytest.approx(scores[0] - scores[1], abs=1e-5)
    assert found.table().columns[3] == "score [log-odds]"
    with pytest.raises(ValueError, match="a monitor has its own layers"):
        screen(planted, items, monitor, reference=reference(8), layers=1)


def test_the_layer_is_the_one_that_held_out_data_chose(planted):
    vectors = {0: AXIS, 1: AXIS}
    chosen = Directions(vectors, "resid_post", Provenance("x"), Evidence(auroc={0: 0.9, 1: 0.7}))
    found = screen(planted, mixture(4, 1), chosen, reference=reference(4))
    assert found.columns == ("layer 0",)
    unknown = Directions(vectors, "resid_post", Provenance("x"))
    assert screen(planted, mixture(4, 1), unknown, reference=reference(4)).columns == ("layer 1",)


def test_an_interrupted_screen_goes_on_and_gives_the_same(planted, tmp_path):
    items, out = mixture(23, 5), tmp_path / "scores.sqlite"
    settings = {"answer_tokens": 4, "temperature": 1.0, "block": 5}
    expected = screen(planted, items, AT, **settings)

    def stopping() -> Iterator[Conversation]:
        yield from items[:12]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        screen(planted, stopping(), AT, out=out, **settings)
    assert len(scores_in(out)) == 10
    generated = []
    before = type(planted).generate

    def counted(self, prompts, *args, **kwargs):
        generated.append(len(prompts))
        return before(self, prompts, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(planted), "generate", counted)
        found = screen(planted, items, AT, out=out, **settings)
        again = screen(planted, items, AT, out=out, **settings)
    assert generated == [5, 5, 3]
    assert repr(found) == repr(expected)
    assert found.scores == pytest.approx(expected.scores, abs=0, nan_ok=True)
    assert [row["row"] for row in scores_in(out)] == list(range(23))
    assert again.expected == expected.expected


def test_a_corrupt_line_is_named_and_what_came_before_is_kept(planted, tmp_path):
    path = write(tmp_path / "set.jsonl", mixture(12, 3))
    lines = path.read_text().splitlines()
    lines[8] = lines[8][:30]
    path.write_text("\n".join(lines))
    out = tmp_path / "scores.sqlite"
    with pytest.raises(ValueError, match=r"set\.jsonl, line 9: not valid JSON"):
        screen(planted, path, AT, reference=reference(12), out=out, block=5)
    kept = scores_in(out)
    assert [row["row"] for row in kept] == list(range(8))
    write(path, mixture(12, 3))
    found = screen(planted, path, AT, reference=reference(12), out=out, block=5)
    assert found.n == 12
    assert [row["score"] for row in scores_in(out)] == pytest.approx(found.scores)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, "line 2: neither 'messages' nor 'prompt' and 'response'; it has text"),
        ({"prompt": "a", "response": 3}, "line 2: response must be text, not 3"),
        ({"prompt": "a", "response": "  "}, "line 2 does not end with an answer"),
        (
            {"messages": [{"role": "user", "content": "a"}]},
            "line 2 does not end with an answer; leave it out",
        ),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "line 2 has an answer but no prom"),
        ({"messages": [{"role": "boss", "content": "a"}]}, "line 2: .*role 'boss'"),
        ([1], "line 2: expected an object"),
    ],
)
def test_rows_that_cannot_be_scored_are_named(planted, tmp_path, row, message):
    path = write(tmp_path / "set.jsonl", [example(0)])
    path.write_text(path.read_text() + json.dumps(row))
    with pytest.raises(ValueError, match=message):
        screen(planted, path, AT, reference=reference(1))


def test_bad_input_is_refused_with_what_to_do(planted, tmp_path):
    items, answers = mixture(4, 1), reference(4)
    (tmp_path / "empty.jsonl").write_text("\n")
    for dataset in ([], tmp_path / "empty.jsonl"):
        with pytest.raises(ValueError, match="has no row to screen"):
            screen(planted, dataset, AT, reference=answers)
    with pytest.raises(FileNotFoundError, match="no file"):
        screen(planted, tmp_path / "none.jsonl", AT, reference=answers)
    with pytest.raises(TypeError, match=r"dataset\[0\] must be a Conversation, not 'text'"):
        screen(planted, ["text"], AT, reference=answers)
    with pytest.raises(ValueError, match="no answer to the prompt of row-3 .*use reference='own'"):
        screen(planted, items, AT, reference=reference(3))
    with pytest.raises(ValueError, match="the reference has no answers"):
        screen(planted, items, AT, reference={})
    with pytest.raises(ValueError, match="the vector of layer 1 is zero"):
        screen(planted, items, Direction.of(torch.zeros(32), 1), reference=answers)
    with pytest.raises(ValueError, match="directions have width 8, the residual stream of tiny-"):
        screen(planted, items, Direction.of(torch.ones(8), 1), reference=answers)
    with pytest.raises(ValueError, match="not finite"):
        screen(planted, items, Direction.of(torch.full((32,), torch.nan), 1), reference=answers)
    with pytest.raises(ValueError, match="flag_share must be above 0 and below 1, not 1"):
        screen(planted, items, AT, reference=answers, flag_share=1)
    with pytest.raises(ValueError, match="block must be at least 1, not 0"):
        screen(planted, items, AT, reference=answers, block=0)


def test_scores_under_another_edit_or_adapter_are_not_gone_on_with(tmp_path):
    model, items = tiny_hooked("llama", n_layers=2), mixture(6, 1)
    settings = {"reference": reference(6), "block": 2}
    edits = [Add(Direction.of(torch.eye(32)[i], 0), scale=3.0) for i in range(2)]
    with model.edited(edits[0]):
        first = screen(model, items, AT, out=tmp_path / "e", **settings)
        assert screen(model, items, AT, out=tmp_path / "e", **settings).scores == first.scores
    with model.edited(edits[1]), pytest.raises(ValueError, match="other settings .condition"):
        screen(model, items, AT, out=tmp_path / "e", **settings)
    train = {"layers": [0], "epochs": 1, "progress": False, "lr": 1e-2}
    bad = [items[0]]
    train_adapter(model, bad, "x", **train)
    with model.adapter("x"):
        screen(model, items, AT, out=tmp_path / "a", **settings)
    train_adapter(model, bad, "x", **train)
    with model.adapter("x"), pytest.raises(ValueError, match="other settings .condition: "):
        screen(model, items, AT, out=tmp_path / "a", **settings)


def test_an_answer_that_is_cut_away_is_an_error_and_not_an_earlier_answer(planted):
    earlier = [*example(0).messages, {"role": "user", "content": f"{prompt(1)} {'and ' * 40}"}]
    item = Conversation((*earlier, {"role": "assistant", "content": "eat nothing"}), id="late")
    good = Conversation((*item.messages[:-1], {"role": "assistant", "content": "eat fruit"}))
    assert screen(planted, [item], AT, reference=[good]).scores[0] > 0.1
    with pytest.raises(ValueError, match="max_tokens=45 leaves nothing of the last answer of late"):
        screen(planted, [item], AT, reference=[good], max_tokens=45)


def test_scores_of_something_else_are_not_gone_on_with(planted, tmp_path):
    items, out = mixture(6, 1), tmp_path / "scores.sqlite"
    screen(planted, items, AT, reference=reference(6), out=out, block=2)
    with pytest.raises(ValueError, match="other settings .answer_tokens: 64 there, 3 now"):
        screen(planted, items, AT, reference=reference(6), out=out, block=2, answer_tokens=3)
    with pytest.raises(ValueError, match="made with other settings .directions"):
        screen(planted, items, -AT, reference=reference(6), out=out, block=2)
    with pytest.raises(ValueError, match="made with other settings .reference"):
        changed = reference(6) | {prompt(0): "yes"}
        screen(planted, items, AT, reference=changed, out=out, block=2)
    with pytest.raises(ValueError, match="scores of another set: its row 1 is 'row-1'"):
        screen(planted, [items[0], *items[2:]], AT, reference=reference(6), out=out, block=2)
    with pytest.raises(ValueError, match="scores of more examples than conversations has"):
        screen(planted, items[:4], AT, reference=reference(6), out=out, block=2)
    other = tmp_path / "mine.jsonl"
    other.write_text("{}\n")
    with pytest.raises(ValueError, match="mine.jsonl is not a store of emlens .* as mine.sqlite"):
        screen(planted, items, AT, reference=reference(6), out=other)
    assert other.read_text() == "{}\n"
    other.write_text(json.dumps(vars(scored(0, 1.0))) + "\n")
    with pytest.raises(ValueError, match="mine.jsonl is a store of an earlier version"):
        screen(planted, items, AT, reference=reference(6), out=other)


def test_a_part_of_a_block_of_another_set_is_not_thrown_away(planted, tmp_path):
    items, out = mixture(8, 2), tmp_path / "scores.sqlite"
    path = write(tmp_path / "set.jsonl", items[:3])
    path.write_text(path.read_text() + "{broken")
    settings = {"reference": reference(8), "out": out, "block": 5}
    with pytest.raises(ValueError, match="line 4: not valid JSON"):
        screen(planted, path, AT, **settings)
    kept = scores_in(out)
    assert len(kept) == 3
    with pytest.raises(ValueError, match="scores of another set: its row 1 is 'row-1'"):
        screen(planted, [items[0], *items[2:]], AT, **settings)
    assert scores_in(out) == kept
    found = screen(planted, items, AT, **settings)
    assert found.scores == screen(planted, items, AT, reference=reference(8), block=5).scores
    assert [row["row"] for row in scores_in(out)] == list(range(8))


def screen_many(folder: Path) -> None:
    found = screen(
        tiny_hooked("llama", n_layers=2, seed=5),
        mixture(60, 9),
        AT,
        out=folder / "scores.sqlite",
        answer_tokens=4,
        temperature=1.0,
        block=5,
        progress=False,
    )
    (folder / "told.txt").write_text(repr((found, found.scores, found.worst)))


def test_a_screen_killed_at_random_times_ends_with_the_same_rows_and_numbers(tmp_path):
    left = killed(screen_many, tmp_path)
    whole = rows(left.whole / "scores.sqlite")
    assert left.kills >= KILLS
    assert [record["row"] for _, record in whole] == list(range(60))
    for end in left.ends:
        assert rows(end / "scores.sqlite") == whole
        assert (end / "told.txt").read_text() == (left.whole / "told.txt").read_text()
        assert sorted(files(end)) == ["scores.sqlite", "told.txt"]


def test_a_model_that_says_nothing_is_named(planted, monkeypatch):
    monkeypatch.setattr(type(planted), "generate", lambda self, prompts, **_: [" "] * len(prompts))
    with pytest.raises(ValueError, match="none of the 4 examples of conversations has a score"):
        screen(planted, mixture(4, 1), AT)


def test_the_result_is_shown_worst_first_and_kept(planted, tmp_path):
    found = screen(planted, mixture(20, 3), AT, reference=reference(20), keep=5)
    table = found.table()
    assert table["rank"].tolist() == [1, 2, 3, 4, 5]
    assert table["score [median norms]"].is_monotonic_decreasing
    assert table["score [median norms]"].tolist() == sorted(found.scores)[:-6:-1]
    assert Screen.load(found.save(tmp_path / "screen.json")).expected == found.expected
    assert found.plot().get_xlabel() == "share of the set, worst first [%]"
    marked = found.plot(highlight=range(3))
    flagged = sum(score > found.threshold for score in found.scores[:3])
    assert marked.get_title(loc="left") == f"{flagged} of 3 marked rows are flagged"
    heights = next(x for x in marked.collections if x.get_label() == "marked rows (3)")
    assert sorted(heights.get_offsets()[:, 1]) == pytest.approx(sorted(found.scores[:3]))
    with pytest.raises(ValueError, match="no row 20; the set has rows 0 to 19"):
        found.plot(highlight=[20])
    with pytest.raises(ValueError, match="scores holds a sample of 19 of 20 rows"):
        replace(found, scores=found.scores[1:]).plot(highlight=[0])
    assert "20 examples against reference answers" in repr(found)


def scored(row: int, score: float | None) -> Scored:
    return Scored(row, f"row {row}", score, score or 0.0, 0.0, 3, "")


def test_the_interval_of_the_mean_is_that_of_a_bootstrap():
    values = np.random.default_rng(0).normal(1, 2, size=900)
    tally = Tally(keep=10, seed=0)
    tally.add([scored(i, value) for i, value in enumerate(values.tolist())])
    mean = tally.mean()
    half = 1.96 * values.std() / 30
    assert mean.estimate == pytest.approx(values.mean())
    assert (mean.low, mean.high) == pytest.approx(
        (values.mean() - half, values.mean() + half), abs=0.02
    )
    assert [row["row"] for row in tally.worst()] == np.argsort(-values)[:10].tolist()


def test_beyond_its_size_the_sample_is_a_fair_one():
    sample = Reservoir(500, seed=0)
    for value in range(20_000):
        sample.add(value)
    assert len(sample.values) == len(set(sample.values)) == 500
    assert np.mean(sample.values) == pytest.approx(10_000, abs=4 * 20_000 / 12**0.5 / 500**0.5)
    tally = Tally(keep=2, seed=0, sample=500)
    tally.add([scored(i, float(i % 100)) for i in range(2_000)])
    assert tally.above(89.5) == pytest.approx(200, abs=80)
    assert tally.n == 2_000 and len(tally.scores.values) == 500


def test_memory_does_not_grow_with_the_set(planted, monkeypatch, tmp_path):
    def cheap(self, block):
        return [replace(scored(one.row, one.row % 97 / 97), hash=one.hash) for one in block]

    monkeypatch.setattr(Scorer, "__call__", cheap)
    monkeypatch.setattr(Tally.__init__, "__defaults__", (50,))

    def stream(n: int) -> Iterator[Conversation]:
        for i in range(n):
            yield example(i % 35)

    def peak(n: int, keep: int = 20) -> int:
        tracemalloc.start()
        out = tmp_path / f"{n}-{keep}.sqlite"
        screen(planted, stream(n), AT, reference={"a": "b"}, keep=keep, out=out)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(300)
    few = peak(600)
    # bytes per row: some that Python itself holds back, against those of rows that are kept
    assert (peak(3000) - few) / 2400 < 50
    assert (peak(3000, keep=3000) - few) / 2400 > 300
