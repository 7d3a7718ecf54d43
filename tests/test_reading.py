"""Text is read in one place: a damaged file is named, with its line and byte."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import pandas as pd
import pytest

from emlens._reading import (
    expanded,
    read_csv,
    read_json,
    read_jsonl,
    read_lines,
    read_text,
    readable,
)
from emlens._tables import dataset_rows, parquet_rows
from emlens._yaml import read_yaml
from emlens.text import corpus

NESTED = "[" * 150 + "]" * 150
DEEPER = "[" * 100_000
BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n"
    for old, new in zip("abcdef", "bcdefg", strict=True)
)


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes('\ufeff{"a": "é"}\r\n'.encode())
    assert read_json(path) == {"a": "é"}
    assert list(read_lines(path)) == [(1, '{"a": "é"}\n')]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (gzip.compress(b"{}", mtime=0), "line 1, byte 1: this is compressed with gzip"),
        ('{"a": 1}'.encode("utf-16"), "line 1, byte 1: this is UTF-16"),
        ('{"a": 1}'.encode("utf-16-le"), "line 1, byte 2 of it: a NUL"),
        (b"\xef\xbb\xbfab\n\xc3\xa9 caf\xe9\n", "line 2, byte 7 of it: 0xe9, which is not UTF-8"),
        (b"\xef\xbb\xbfab\xff", "line 1, byte 3 of it: 0xff"),
        (b"ok\nno \xed\xa0\x80", "line 2, byte 4 of it: 0xed, which is not UTF-8"),
        (b"ok\nno\0", "line 2, byte 3 of it: a NUL"),
    ],
)
def test_what_is_not_utf8_is_refused_by_line_and_byte(tmp_path, data, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(data)
    for read in (read_text, lambda p: list(read_lines(p))):
        with pytest.raises(ValueError, match=rf"a\.jsonl, {message}"):
            read(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"a": 1,\n "b": {"c": 1,\n "d": {"c": 2},\n "c": 3}}',
            "line 4: the key 'c' occurs twice",
        ),
        ('{\n"a": ' + "9" * 5000 + "}", "line 2: a number of more than 4,300 digits"),
        (NESTED, "line 1: nested too deep; 100 levels"),
        (DEEPER, "line 1: nested too deep; 100 levels"),
        ('["\\ud83d\\ude00",\n "\\\\ud800", "\\ud800"]', r"line 2: \\ud800 is half of a character"),
        ('{"a": }', r"is not valid JSON \(.*line 1 column 7"),
        ("", "is not valid JSON"),
    ],
)
def test_json_that_cannot_be_meant_is_refused_by_line(tmp_path, text, message):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_json(path)


def test_json_of_another_kind_is_refused_where_the_kind_is_known(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("[1]")
    assert read_json(path) == read_json(path, list) == [1]
    with pytest.raises(ValueError, match=r"a\.json must hold an object .*, not a list"):
        read_json(path, dict)


def test_a_bad_record_is_refused_by_its_line(tmp_path):
    path = tmp_path / "a.jsonl"
    for line, message in {
        '{"a": 1, "a": 2}': "line 3: the key 'a' occurs twice",
        "[1]": "line 3: expected an object",
        "{": "line 3: not valid JSON",
        NESTED: "line 3: nested too deep",
    }.items():
        path.write_text(f'{{"a": 0}}\n\n{line}\n')
        with pytest.raises(ValueError, match=message):
            list(read_jsonl(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "line 3: the key 'a' occurs twice"),
        (BOMB, r"line 1: its aliases \(\*name\) stand for [\d,]+ values"),
        ("a: &a [*a]\n", "line 1: it holds itself"),
        ("a: " + NESTED, "line 1: nested too deep"),
        ("a:\n- 1\n- " + "9" * 5000, "line 3: a number of more than 4,300 digits"),
        ("a: 1\nb: 2001-99-99\n", "line 2: '2001-99-99' is no value"),
        ("a: 1\nb: !!python/object/apply:os.getpid []\n", "line 2: not valid YAML"),
        ("a: [\n", "line 2: not valid YAML"),
        ("a: \x01\n", "line 1: not valid YAML"),
        ("- 1\n", "must hold names and values, one `name: value` a line, not a list"),
        ("", "must hold names and values, one `name: value` a line, not NoneType"),
    ],
)
def test_yaml_that_cannot_be_meant_is_refused_by_line(tmp_path, text, message):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"a\.yaml.*{message}"):
        read_yaml(path, dict)


def test_aliases_and_merged_mappings_are_read(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: *a\n")
    assert read_yaml(path, dict)["b"] == {"x": 1, "y": 3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: a CSV file begins with the names"),
        ("a,a\n1,2\n", "line 1: .* each once; this has a, a"),
        ("a,b\n1,2\n1,2,3\n", "line 3: 3 fields under 2 columns"),
        ('a,b\n"1,2\n', "not valid CSV"),
        ("a,c\n1,2\n", "must have the columns a, b; it has a, c"),
    ],
)
def test_csv_that_does_not_fit_is_refused_by_line(tmp_path, text, message):
    path = tmp_path / "a.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        list(read_csv(path, ("a", "b")))


def test_what_is_no_file_is_said_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name, kind, message in (
        ("gone", FileNotFoundError, "no file .*gone"),
        ("link", FileNotFoundError, "is a link to nothing"),
        ("loop", OSError, "loop cannot be read"),
        ("pipe", OSError, "pipe is a pipe, a socket or a device"),
        (".", IsADirectoryError, "is a folder; a file is needed"),
        ("a\0b", ValueError, "holds a NUL"),
        ("x" * 300, OSError, "cannot be read: File name too long"),
    ):
        with pytest.raises(kind, match=message):
            readable(f"{tmp_path}/{name}")


def test_a_file_that_may_not_be_read_is_said(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("a")
    # root may read everything
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(PermissionError, match=r"a\.txt cannot be read; check its permissions"):
        read_text(path)


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("home")
    assert read_text("~/a.txt") == "home"
    assert expanded("a/~/b") == Path("a/~/b")
    with pytest.raises(ValueError, match="there is no home folder to put for ~"):
        expanded("~no-such-user-here/a")


def test_damaged_tables_are_named(tmp_path):
    path = tmp_path / "a.parquet"
    pd.DataFrame({"text": ["a" * 200, "b" * 200]}).to_parquet(path)
    whole = path.read_bytes()
    assert [row["text"][0] for row in parquet_rows(path, "text")] == ["a", "b"]
    for data in (b"", whole[:-40], whole[: len(whole) // 2], b"PAR1" * 20):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"a\.parquet is not a readable Parquet file"):
            corpus(path)


def test_a_parquet_file_that_unpacks_to_far_more_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("emlens._tables._FREE", 0)
    path = tmp_path / "bomb.parquet"
    pd.DataFrame({"text": ["a" * 10_000] * 1000}).to_parquet(path)
    with pytest.raises(ValueError, match="texts unpack to over 200 times its size"):
        corpus(path)
    pd.DataFrame({"text": [""] * 100_000}).to_parquet(path)
    with pytest.raises(ValueError, match="declares 100,000 rows in"):
        corpus(path)


def test_a_folder_that_is_no_data_set_is_named(tmp_path):
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match=f"data set '{tmp_path}' cannot be read by `datasets`"):
        list(dataset_rows(tmp_path, None, "train", streaming=False))
