"""Tiny random models of several families, the same in every process."""

from __future__ import annotations

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

import emlens
from tests.support.tokenizers import chatml_tokenizer

# What is asked of every family beyond the common shape. Windows are short enough for sliding
# layers to differ from full ones, and experts enough for the router to matter.
_OWN: dict[str, dict] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "mistral": {"head_dim": 8, "sliding_window": 16},
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16},
    "gemma3_text": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16},
    "phi3": {"sliding_window": None},
    "olmo2": {},
    "gpt2": {},
    "gpt_neox": {"num_key_value_heads": 4},
    "qwen3_moe": {
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
}
FAMILIES = tuple(_OWN)
SEQUENTIAL = tuple(family for family in FAMILIES if family != "gpt_neox")
"""Families whose MLP reads what attention has written: those with a `resid_mid`."""
D_MODEL = 32


def tiny_model(
    family: str, n_layers: int = 4, seed: int = 0, tied: bool | None = None
) -> PreTrainedModel:
    """A random transformers model over the vocabulary of the ChatML tokenizer.

    Its embeddings are tied as the family's are, unless `tied` says otherwise.
    """
    config = _config(family, n_layers)
    if tied is not None:
        config.tie_word_embeddings = tied
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.config._name_or_path = f"tiny-{family}"
    return model.eval()


def tiny_hooked(family: str, n_layers: int = 4, seed: int = 0) -> emlens.HookedModel:
    """The same model, wrapped."""
    module = tiny_model(family, n_layers, seed)
    return emlens.wrap(module, chatml_tokenizer(), name=f"tiny-{family}")


def _config(family: str, n_layers: int) -> PretrainedConfig:
    tokenizer = chatml_tokenizer()
    # At this width 0.15 keeps the size of activations, so that every block matters.
    common = {
        "vocab_size": len(tokenizer),
        "initializer_range": 0.15,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if family == "gpt2":
        common |= {"n_layer": n_layers, "n_embd": D_MODEL, "n_head": 4, "n_positions": 1024}
        common |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    else:
        common |= {
            "num_hidden_layers": n_layers,
            "hidden_size": D_MODEL,
            "intermediate_size": 2 * D_MODEL,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
        }
    return AutoConfig.for_model(family, **(common | _OWN[family]))
