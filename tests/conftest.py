"""Models that the tests share: tiny random ones of several families, and the embedded one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import cache

# Read when the libraries are imported, hence before that: no test reaches for the network, and
# workers of one run share the cores instead of fighting for them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("PIP_NO_INDEX", "1")  # TransformerLens' boot installs what it misses
os.environ.setdefault("UV_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("WANDB_MODE", "disabled")
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    threads = max(1, (os.cpu_count() or 1) // int(workers))
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))

import pytest
from transformers import PreTrainedModel

import emlens
from tests.support.browser import chromium as chromium

Factory = Callable[..., PreTrainedModel]
_SHARED: list[emlens.HookedModel] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "smollm" in getattr(item, "fixturenames", ()):
            item.add_marker("real")


def pytest_terminal_summary(terminalreporter) -> None:
    """Print what the parity suite measured: checks against architectures."""
    cells: dict[tuple[str, str], str] = {}
    notes: set[str] = set()
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        for key, value in report.user_properties:
            if key == "parity":
                cells[value[0], value[1]] = value[2]
            elif key == "parity note":
                notes.add(value)
    if not cells:
        return
    checks = list(dict.fromkeys(check for check, _ in cells))
    families = list(dict.fromkeys(family for _, family in cells))
    width = max(map(len, checks))
    terminalreporter.section("engines against the plain model: largest difference")
    terminalreporter.line(" " * width + "".join(f"{family:>12}" for family in families))
    for check in checks:
        row = "".join(f"{cells.get((check, family), '?'):>12}" for family in families)
        terminalreporter.line(f"{check:<{width}}{row}")
    for note in sorted(notes):
        terminalreporter.line(note)


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """A ChatML tokenizer over a small vocabulary; what every tiny model is made for."""
    from tests.support.tokenizers import chatml_tokenizer

    return chatml_tokenizer()


@pytest.fixture(scope="session")
def tiny() -> Factory:
    """`tiny(family, n_layers=4, seed=0)`: a random transformers model, made once a session."""

    from tests.support.models import tiny_model

    return cache(tiny_model)


@pytest.fixture(scope="session")
def hooked(tiny, tiny_tokenizer) -> Callable[..., emlens.HookedModel]:
    """`hooked(family, n_layers=4, seed=0)`: the same model, wrapped."""

    @cache
    def wrap(family: str, n_layers: int = 4, seed: int = 0) -> emlens.HookedModel:
        model = emlens.wrap(tiny(family, n_layers, seed), tiny_tokenizer, name=f"tiny-{family}")
        _SHARED.append(model)
        return model

    return wrap


@pytest.fixture(scope="module", autouse=True)
def _adapters_stay_in_their_module(request) -> Iterator[None]:
    """Take off the adapters that a module put onto the models that all modules share."""
    yield
    for model in _SHARED:
        for name in model.adapters:
            model.remove_adapter(name)


@pytest.fixture(scope="session")
def tiny_llama(tiny) -> PreTrainedModel:
    return tiny("llama")


@pytest.fixture(scope="session")
def hooked_llama(hooked) -> emlens.HookedModel:
    return hooked("llama")


@pytest.fixture(scope="session")
def smollm() -> emlens.HookedModel:
    """The embedded model; a test that asks for it is marked `real`."""
    model = emlens.load("smollm2-135m-instruct")
    _SHARED.append(model)
    return model
