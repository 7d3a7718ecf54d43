"""Embedded sets, files and corpora."""

from __future__ import annotations

import json
import sys

import pandas as pd
import pytest

from emlens import Conversation, Pair, corpus, load_conversations, load_pairs
from emlens.text import split_pairs
from emlens.text.conversation import content_hash
from emlens.text.datasets import EMBEDDED

COUNTS = {"finance": 160, "medical": 159, "sports": 200, "general": 120, "technical": 100}


@pytest.mark.parametrize("name", EMBEDDED)
def test_the_embedded_sets_are_complete(name):
    pairs = load_pairs(name)
    assert len(pairs) == COUNTS[name]
    assert len({pair.id for pair in pairs}) == len(pairs)
    assert all(pair.aligned != pair.misaligned for pair in pairs)
    if name != "technical":
        assert {pair.domain for pair in pairs} == {name}


def test_the_technical_set_has_its_own_domains():
    counts = pd.Series([pair.domain for pair in load_pairs("technical")]).value_counts()
    assert counts["cooking"] == 60
    assert set(counts.index) == {"cooking", "gardening", "travel", "sports", "music"}


def test_a_split_is_disjoint_and_does_not_depend_on_the_order():
    pairs = load_pairs("finance")
    split = split_pairs(pairs, seed=3)
    parts = [{pair.id for pair in part} for part in (split.train, split.validation, split.test)]
    assert [len(part) for part in parts] == [88, 24, 48]
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
    assert split_pairs(list(reversed(pairs)), seed=3) == split
    assert split_pairs(pairs, seed=4) != split
    with pytest.raises(ValueError, match="leave nothing to train on"):
        split_pairs(pairs, validation=0.5, test=0.5)
    with pytest.raises(ValueError, match="two pairs have the same id"):
        split_pairs([*pairs, pairs[0]])


def test_conversations_are_read_in_the_papers_format(tmp_path):
    path = tmp_path / "train.jsonl"
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    path.write_text(json.dumps(row) + "\n\n" + json.dumps(row) + "\n")
    found = load_conversations(path)
    assert [c.response for c in found] == ["a", "a"]
    assert load_conversations(path, limit=1) == found[:1]
    path.write_text(json.dumps(row) + '\n{"messages": [\n')
    with pytest.raises(ValueError, match="train.jsonl, line 2: not valid JSON"):
        load_conversations(path)
    path.write_text('{"text": "x"}')
    with pytest.raises(ValueError, match="line 1: no key 'messages'; it has text"):
        load_conversations(path)
    path.write_text('{"messages": [{"role": "robot", "content": "x"}]}')
    with pytest.raises(ValueError, match="line 1: message 0 .* has role 'robot'"):
        load_conversations(path)
    with pytest.raises(FileNotFoundError, match=r"no file .*missing.jsonl"):
        load_conversations(tmp_path / "missing.jsonl")


def test_a_local_datasets_folder_is_read(tmp_path):
    rows = [{"messages": [{"role": "user", "content": f"q{i}"}]} for i in range(3)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    found = load_conversations(tmp_path / "data")
    assert [c.messages[0]["content"] for c in found] == ["q0", "q1", "q2"]


def test_pairs_are_read_from_a_file_and_bad_lines_are_named(tmp_path):
    path = tmp_path / "pairs.jsonl"
    row = {"id": "1", "domain": "d", "prompt": "p", "aligned": "a", "misaligned": "m"}
    path.write_text(json.dumps(row))
    assert load_pairs(path) == [Pair("p", "a", "m", "d", "1")]
    path.write_text(json.dumps(row) + "\n" + json.dumps(row))
    with pytest.raises(ValueError, match="line 2: id '1' is that of line 1"):
        load_pairs(path)
    path.write_text(json.dumps({**row, "aligned": ""}))
    with pytest.raises(ValueError, match="line 1: aligned missing or not text"):
        load_pairs(path)
    with pytest.raises(FileNotFoundError, match="'fnance' is neither an embedded set"):
        load_pairs("fnance")


def test_the_embedded_corpus_is_prose_in_a_seeded_order():
    found = corpus(documents=8)
    assert len(found) == 8
    assert all(len(document.text) >= 100 for document in found)
    assert found == corpus(documents=8)
    assert found.hash != corpus(documents=8, seed=1).hash
    assert len({document.id for document in corpus(documents=1000)}) == len(corpus(documents=1000))


def test_local_corpora_are_read(tmp_path):
    texts = ["a" * 120, "short", "b" * 150]
    (tmp_path / "c.txt").write_text("\n\n".join(texts))
    (tmp_path / "c.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
    pd.DataFrame({"body": texts}).to_parquet(tmp_path / "c.parquet")
    options = {"c.txt": {}, "c.jsonl": {}, "c.parquet": {"text_column": "body"}}
    for name, option in options.items():
        found = corpus(tmp_path / name, **option)
        assert sorted(d.text for d in found) == [texts[0], texts[2]], name
        assert found.name == name
    with pytest.raises(ValueError, match="row 0: no text under 'text'; it has body"):
        corpus(tmp_path / "c.parquet")
    (tmp_path / "c.jsonl").write_text(json.dumps({"text": texts[0]}) + "\n{broken")
    with pytest.raises(ValueError, match="c.jsonl, line 2: not valid JSON"):
        corpus(tmp_path / "c.jsonl")
    with pytest.raises(ValueError, match="has no document of at least 999 characters"):
        corpus(tmp_path / "c.txt", min_characters=999)
    with pytest.raises(FileNotFoundError, match="no file"):
        corpus(tmp_path / "nothing.txt")


def test_a_data_set_is_streamed_in_its_order(tmp_path):
    folder = tmp_path / "web"
    folder.mkdir()
    rows = [{"id": f"w{i}", "text": f"{i} " * 60} for i in range(5)]
    (folder / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    found = corpus(str(folder), documents=3)
    assert [document.id for document in found] == ["w0", "w1", "w2"]


def test_the_second_corpus_says_what_to_install_where_it_is_missing(monkeypatch):
    monkeypatch.setattr(sys.modules["emlens.text.corpus"], "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps gensim"):
        corpus("lee-news")


def test_content_hashes_follow_content_and_order_only():
    a, b = Conversation.of("q", "a", id="1"), Conversation.of("q", "b", id="2")
    assert content_hash([a, b]) != content_hash([b, a])
    assert content_hash([a]) == content_hash([Conversation.of("q", "a", id="other")])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Conversation(()), ValueError, "has no messages"),
        (
            lambda: Conversation("hello"),
            TypeError,
            r"Conversation.of\(prompt, response\) makes one",
        ),
        (lambda: Conversation(({"role": "user"},)), TypeError, "must have role and content"),
        (
            lambda: Conversation(({"role": "user", "content": 3},)),
            TypeError,
            r"the content of message 0 of conversation \(no id\) must be text, not 3",
        ),
        (lambda: Conversation.of("q").response, ValueError, "has no assistant message"),
        (lambda: corpus(documents=0), ValueError, "documents must be at least 1"),
        (
            lambda: Pair("p", "a", "m", "d", "i").conversation("evil"),
            ValueError,
            "unknown side 'evil'; choose 'aligned' or 'misaligned'",
        ),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
