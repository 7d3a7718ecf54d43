"""Tiny random models of many architectures of `transformers`, for the zoo.

One entry each: what its configuration asks for beyond the common shape. Names with a `/` are
variants of one architecture. Weights are drawn large, and norms away from 1, so that whatever an
engine does otherwise than the model shows in the logits.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)

from tests.support.tokenizers import chatml_tokenizer

Options = dict[str, Any]

D_MODEL = 32
_COMMON: Options = {
    "initializer_range": 0.15,
    "num_hidden_layers": 4,
    "hidden_size": D_MODEL,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
_HEAD: Options = {"head_dim": 8}
_WINDOW: Options = {"head_dim": 8, "sliding_window": 6}
_GEMMA: Options = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 6}
_EXPERTS: Options = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LOCAL_EXPERTS: Options = {"num_local_experts": 4, "num_experts_per_tok": 2}
_ROUTED: Options = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
_LATENT: Options = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
}
_LINEAR: Options = {
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_HYBRID: Options = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
}
_GRANITE: Options = {
    "residual_multiplier": 0.22,
    "embedding_multiplier": 6.0,
    "logits_scaling": 2.0,
    "attention_multiplier": 0.3,
}
_MAMBA_LAYERS = ["mamba", "attention", "mamba", "attention"]
_GPT2: Options = {
    "n_layer": 4,
    "n_embd": D_MODEL,
    "n_head": 4,
    "n_positions": 512,
    "initializer_range": 0.15,
}
_NO_KV: Options = {"num_key_value_heads": None}

MODELS: dict[str, Options] = {
    # dense
    "apertus": {},
    "arcee": {},
    "bitnet": {},
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"sliding_window": 6, "logit_scale": 0.5},
    "cwm": _HEAD,
    "diffllama": _HEAD,
    "ernie4_5": _HEAD,
    "exaone4": _WINDOW,
    "gemma": _HEAD,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "gemma3_text/softcap": {
        **_GEMMA,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 9.0,
    },
    "glm": _HEAD,
    "glm4": _HEAD,
    "granite": _GRANITE,
    "granite/plain": {},
    "hunyuan_v1_dense": _HEAD,
    "llama": {},
    "ministral": _WINDOW,
    "mistral": _WINDOW,
    "modernbert-decoder": {"local_attention": 6},
    "nanochat": _HEAD,
    "nemotron": {"head_dim": 8},
    "olmo": {},
    "olmo2": {},
    "olmo3": {"sliding_window": 6},
    "phi": {},
    "phi3": {"sliding_window": None},
    "qwen2": {},
    "qwen3": _HEAD,
    "seed_oss": _HEAD,
    "smollm3": {},
    "stablelm": {},
    "stablelm/parallel": {"use_parallel_residual": True},
    "starcoder2": {"sliding_window": None},
    "vaultgemma": _GEMMA,
    # older ones, with learned positions, ALiBi, tuples or parallel blocks
    "bloom": {"n_layer": 4, "n_head": 4},
    "codegen": {**_GPT2, "rotary_dim": 4},
    "falcon": _NO_KV,
    "falcon/new": {"new_decoder_architecture": True, "num_kv_heads": 2, **_NO_KV},
    "falcon/sequential": {"parallel_attn": False, "alibi": True, **_NO_KV},
    "gpt2": {**_GPT2},
    "gpt2/unscaled": {**_GPT2, "scale_attn_weights": False},
    "gpt_bigcode": {**_GPT2},
    "gpt_neo": {"num_layers": 4, "num_heads": 4, "attention_types": [[["global", "local"], 2]]},
    "gpt_neox": {"num_key_value_heads": 4},
    "gpt_neox/sequential": {"num_key_value_heads": 4, "use_parallel_residual": False},
    "gptj": {**_GPT2, "rotary_dim": 4},
    "mpt": {"d_model": D_MODEL, "n_layers": 4, "n_heads": 4, "max_seq_len": 512},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": D_MODEL},
    # mixtures of experts
    "afmoe": {**_EXPERTS, **_WINDOW, "num_dense_layers": 1},
    "cohere2_moe": {**_EXPERTS, "sliding_window": 6, "logit_scale": 0.5},
    "deepseek_v2": {**_ROUTED, **_LATENT},
    "deepseek_v3": {**_ROUTED, **_LATENT},
    "deepseek_v32": {
        **_ROUTED,
        **_LATENT,
        "index_topk": 6,
        "index_head_dim": 16,
        "index_n_heads": 2,
    },
    "dots1": {**_ROUTED, **_HEAD},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32, **_HEAD},
    "glm4_moe": {**_ROUTED, **_HEAD},
    "gpt_oss": {**_LOCAL_EXPERTS, **_WINDOW},
    "granitemoe": {**_LOCAL_EXPERTS, **_GRANITE},
    "jetmoe": {**_LOCAL_EXPERTS, "kv_channels": 8},
    "llama4_text": {
        **_LOCAL_EXPERTS,
        **_HEAD,
        "intermediate_size_mlp": 48,
        "attention_chunk_size": 8,
    },
    "llama4_text/tuned": {
        **_LOCAL_EXPERTS,
        **_HEAD,
        "intermediate_size_mlp": 48,
        "no_rope_layers": [1, 0, 1, 0],
        "attn_temperature_tuning": True,
        "floor_scale": 4,
    },
    "minimax_m2": {**_LOCAL_EXPERTS, **_HEAD, "rotary_dim": 8},
    "mixtral": {**_LOCAL_EXPERTS, "sliding_window": None},
    "olmoe": _EXPERTS,
    "phimoe": {**_LOCAL_EXPERTS, "sliding_window": None},
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 48},
    "qwen3_moe": {**_EXPERTS, **_HEAD},
    # more than attention and MLP: linear attention, convolutions, Mamba, scalars
    "bamba": {**_HYBRID, "attn_layer_indices": [1, 3]},
    "falcon_h1": {**_HYBRID, **_HEAD, "mamba_d_ssm": 64, "lm_head_multiplier": 0.5},
    "falcon_mamba": {"state_size": 8},
    "gemma4_text": {
        "head_dim": 8,
        "global_head_dim": 8,
        "sliding_window": 6,
        "hidden_size_per_layer_input": 0,
    },
    "gemma4_text/per_layer": {
        "head_dim": 8,
        "global_head_dim": 8,
        "sliding_window": 6,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 400,
        "num_kv_shared_layers": 1,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "granitemoehybrid": {**_LOCAL_EXPERTS, **_GRANITE, **_HYBRID, "layer_types": _MAMBA_LAYERS},
    "granitemoehybrid/dense": {
        **_HYBRID,
        "num_local_experts": 0,
        "layer_types": ["attention"] * 4,
        "shared_intermediate_size": 64,
    },
    "jamba": {**_EXPERTS, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8},
    "lfm2": {
        "block_auto_adjust_ff_dim": False,
        "layer_types": ["conv", "full_attention"] * 2,
    },
    "mamba": {"state_size": 8},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 2, "chunk_size": 8},
    "minimax": {**_LOCAL_EXPERTS, **_HEAD, "block_size": 8},
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention", "mamba", "moe"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "n_groups": 1,
        "ssm_state_size": 8,
        "chunk_size": 8,
        **_HEAD,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "moe_shared_expert_intermediate_size": 32,
    },
    "olmo_hybrid": {**_LINEAR, "num_key_value_heads": 4},
    "qwen3_5_text": _LINEAR,
    "qwen3_next": {**_LINEAR, **_EXPERTS, "shared_expert_intermediate_size": 48},
    "recurrent_gemma": {"lru_width": D_MODEL, "attention_window_size": 6, "num_hidden_layers": 6},
    "rwkv": {"attention_hidden_size": D_MODEL, "context_length": 512},
    # text models inside of multimodal ones
    "gemma3": {},
    "llava": {},
    "mistral3": {},
    "paligemma": {},
    "qwen2_5_vl": {},
    "qwen3_vl": {},
}
"""Configuration by name, beyond the common shape."""

_INSIDE: dict[str, tuple[str, Options, Options]] = {
    # the text model inside, what it asks for, and what the vision model does
    "gemma3": ("gemma3_text", _GEMMA, {}),
    "llava": ("llama", {}, {}),
    "mistral3": ("mistral", _WINDOW, {"head_dim": 8}),
    "paligemma": ("gemma", _HEAD, {"projection_dim": D_MODEL}),
    "qwen2_5_vl": ("", {}, {"depth": 2, "num_heads": 2, "out_hidden_size": D_MODEL}),
    "qwen3_vl": (
        "",
        _HEAD,
        {
            "depth": 2,
            "num_heads": 2,
            "out_hidden_size": D_MODEL,
            "deepstack_visual_indexes": [0, 1],
            "num_position_embeddings": 16,
        },
    ),
}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}


def build(name: str, seed: int = 0) -> PreTrainedModel:
    """A random model of the zoo, in evaluation mode."""
    kind = name.partition("/")[0]
    config = AutoConfig.for_model(kind, **(_nested(kind) if kind in _INSIDE else _flat(name)))
    auto = AutoModelForImageTextToText if kind in _INSIDE else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = auto.from_config(config, dtype=torch.float32)
        _stir(module)
    module.config._name_or_path = f"zoo-{name}"
    return module.eval()


def _flat(name: str) -> Options:
    given = MODELS[name]
    # a configuration with names of its own for the sizes is not given the common ones
    common = {} if "n_embd" in given or "d_model" in given else _COMMON
    return {key: value for key, value in (common | _tokens() | given).items() if value is not None}


def _nested(kind: str) -> Options:
    text, own, vision = _INSIDE[kind]
    inside = {**_COMMON, **_tokens(), **own}
    if text:
        inside["model_type"] = text
    else:
        inside["rope_parameters"] = _MROPE
    seen = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "patch_size": 4}
    seen |= {"num_attention_heads": 2, "image_size": 16, "initializer_range": 0.15, **vision}
    options: Options = {"text_config": inside, "vision_config": seen}
    if kind == "paligemma":
        options |= {"projection_dim": D_MODEL, "hidden_size": D_MODEL}
    image = "image_token_id" if kind.startswith("qwen") else "image_token_index"
    return options | {image: len(chatml_tokenizer()) - 1}


def _tokens() -> Options:
    tokenizer = chatml_tokenizer()
    return {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


@torch.no_grad()
def _stir(module: PreTrainedModel) -> None:
    """Move norms and biases away from 1 and 0, and scalars of whole layers too."""
    for weight in module.parameters():
        if weight.ndim == 1:
            weight += 0.1 * torch.randn_like(weight)
        elif not bool(weight.any()):
            weight += 0.15 * torch.randn_like(weight)
    for path, buffer in module.named_buffers():
        if path.endswith("layer_scalar"):
            buffer.fill_(0.7)
