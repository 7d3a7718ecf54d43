"""Tiny random models of several families, the same in every process."""

from __future__ import annotations

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
from tests.support.tokenizers import chatml_tokenizer

FAMILIES = ("llama", "qwen2", "gpt2", "gemma2")
D_MODEL = 32


def tiny_model(family: str, n_layers: int = 4, seed: int = 0) -> PreTrainedModel:
    """A random transformers model over the vocabulary of the ChatML tokenizer."""
    config = _config(family, n_layers)
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
