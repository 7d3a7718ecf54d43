"""Models for remote execution: in a folder, by a hub name, and on a server of the tests."""

from __future__ import annotations

import shutil
import sys
from functools import cache

import cloudpickle
import pytest
from nnsight.intervention.backends.remote import RemoteBackend
from nnsight.modeling import huggingface
from transformers import GenerationConfig

import emlens
from tests.support.models import tiny_model
from tests.support.server import Server, load_served
from tests.support.tokenizers import chatml_tokenizer


@pytest.fixture(scope="session")
def own_functions_travel():
    """What a user does for a module of their own: `nnsight.register("tests")`, and undo it."""
    cloudpickle.register_pickle_by_value(sys.modules["tests"])
    yield
    cloudpickle.unregister_pickle_by_value(sys.modules["tests"])


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """`saved(family)`: the folder of a tiny model."""

    @cache
    def save(family):
        folder = tmp_path_factory.mktemp("saved") / f"tiny-{family}"
        module = tiny_model(family)
        # what decoding on the server must not take over
        module.generation_config = GenerationConfig(
            repetition_penalty=30.0,
            suppress_tokens=list(range(40, 200)),
            min_new_tokens=3,
            eos_token_id=[module.config.eos_token_id, 7],
            pad_token_id=module.config.pad_token_id,
        )
        module.save_pretrained(folder)
        chatml_tokenizer().save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def here(saved):
    """`here(family)`: the model with its weights here."""
    return cache(lambda family: emlens.load(saved(family), check=False))


@pytest.fixture(scope="session")
def dry(saved, own_functions_travel):
    """`dry(family)`: the model with nnsight's local stand-in for a server."""
    return cache(lambda family: emlens.load(saved(family), remote="local", check=False))


@pytest.fixture(scope="session")
def server():
    process = Server()
    yield process
    process.stop()


@pytest.fixture
def hub(saved, tmp_path, monkeypatch):
    """`hub(family)`: the name of a tiny model whose configuration, not weights, is cached."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))

    def publish(family):
        name = f"emlens-tests/tiny-{family}"
        repo = tmp_path / f"models--{name.replace('/', '--')}"
        weights = shutil.ignore_patterns("*.safetensors")
        shutil.copytree(saved(family), repo / "snapshots" / ("0" * 40), ignore=weights)
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text("0" * 40)
        monkeypatch.setitem(huggingface._ID_CACHE, name, name)
        return name

    return publish


@pytest.fixture
def served(saved, hub, server, own_functions_travel, monkeypatch):
    """`served(family)`: the model by its hub name, on the server process."""

    def request(backend, envelope, tracer):
        family = envelope.model_key.partition("/tiny-")[2].partition('"')[0]
        blob = backend._serialize(tracer)
        return server.run(saved(family), blob, envelope.compress, envelope.env)

    monkeypatch.setattr(RemoteBackend, "request", request)
    return lambda family: load_served(hub(family))
