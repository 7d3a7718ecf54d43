"""Models that the tests share: tiny random ones of several families, and the embedded one."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache

# Read when the libraries are imported, hence before that: no test reaches for the network, and
# workers of one run share the cores instead of fighting for them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("WANDB_MODE", "disabled")
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    threads = max(1, (os.cpu_count() or 1) // int(workers))
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

import emlens

FAMILIES = ("llama", "qwen2", "gpt2", "gemma2")
D_MODEL = 32
Factory = Callable[..., PreTrainedModel]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "smollm" in getattr(item, "fixturenames", ()):
            item.add_marker("real")


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """A ChatML tokenizer over a small vocabulary; what every tiny model is made for."""
    from tests.support.tokenizers import chatml_tokenizer

    return chatml_tokenizer()


@pytest.fixture(scope="session")
def tiny(tiny_tokenizer) -> Factory:
    """`tiny(family, n_layers=4, seed=0)`: a random transformers model, made once a session."""

    @cache
    def make(family: str, n_layers: int = 4, seed: int = 0) -> PreTrainedModel:
        config = _config(family, n_layers, tiny_tokenizer)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.config._name_or_path = f"tiny-{family}"
        return model.eval()

    return make


@pytest.fixture(scope="session")
def hooked(tiny, tiny_tokenizer) -> Callable[..., emlens.HookedModel]:
    """`hooked(family, n_layers=4, seed=0)`: the same model, wrapped."""

    @cache
    def wrap(family: str, n_layers: int = 4, seed: int = 0) -> emlens.HookedModel:
        return emlens.wrap(tiny(family, n_layers, seed), tiny_tokenizer, name=f"tiny-{family}")

    return wrap


@pytest.fixture(scope="session")
def tiny_llama(tiny) -> PreTrainedModel:
    return tiny("llama")


@pytest.fixture(scope="session")
def hooked_llama(hooked) -> emlens.HookedModel:
    return hooked("llama")


@pytest.fixture(scope="session")
def smollm() -> emlens.HookedModel:
    """The embedded model; a test that asks for it is marked `real`."""
    return emlens.load("smollm2-135m-instruct")


def _config(family: str, n_layers: int, tokenizer) -> PretrainedConfig:
    # At this width 0.15 keeps the size of activations, so that every block matters.
    common = {
        "vocab_size": len(tokenizer),
        "initializer_range": 0.15,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if family == "gpt2":
        return GPT2Config(
            n_layer=n_layers,
            n_embd=D_MODEL,
            n_head=4,
            n_positions=1024,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            **common,
        )
    common |= {
        "num_hidden_layers": n_layers,
        "hidden_size": D_MODEL,
        "intermediate_size": 2 * D_MODEL,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
    }
    if family == "gemma2":
        # Short enough a window for the sliding layers to differ from the full ones.
        return Gemma2Config(head_dim=8, query_pre_attn_scalar=8, sliding_window=16, **common)
    return {"llama": LlamaConfig, "qwen2": Qwen2Config}[family](**common)
