"""LoRA adapters made and saved by PEFT itself, with weights that do something."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from emlens.text import TokenBatch, pack
from emlens.text.tokens import TokenRow

TOKENS = [3, 40, 77]
PLAIN: dict[str, dict[str, Any]] = {
    "DoRA": {"use_dora": True, "r": 2},
    "DoRA on embedding and head": {
        "use_dora": True,
        "target_modules": ["embed_tokens", "q_proj", "lm_head"],
    },
    "rsLoRA": {"use_rslora": True, "r": 4},
    "a bias at B": {"lora_bias": True},
    "bias of a base without biases": {"bias": "all"},
    "patterns": {
        "r": 2,
        "rank_pattern": {"layers.1.mlp.down_proj": 5},
        "alpha_pattern": {"layers.0.mlp.down_proj": 64},
    },
    "one layer": {"layers_to_transform": [1], "lora_dropout": 0.5},
    "excluded modules": {
        "target_modules": ["q_proj", "v_proj"],
        "exclude_modules": ["layers.0.self_attn.q_proj"],
    },
    "a pattern of names": {"target_modules": r".*\.(q|v)_proj"},
    "all that is linear": {"target_modules": "all-linear", "r": 2},
    "a start from the data": {"init_lora_weights": "eva"},
    "an orthogonal start": {"init_lora_weights": "orthogonal", "r": 2},
    "MiCA": {"init_lora_weights": "mica", "r": 2},
    "a norm of its own": {"modules_to_save": ["model.norm"]},
    "MLPs of its own": {"modules_to_save": ["mlp"], "target_modules": ["q_proj"]},
}
EMBEDDINGS: dict[str, dict[str, Any]] = {
    "LoRA on the embedding": {"target_modules": ["embed_tokens"]},
    "LoRA on the head": {"target_modules": ["lm_head"]},
    "LoRA on both": {"target_modules": ["embed_tokens", "lm_head", "q_proj"], "r": 2},
    "LoRA on both, tied": {
        "target_modules": ["embed_tokens", "q_proj"],
        "ensure_weight_tying": True,
    },
    "a head of its own": {"modules_to_save": ["lm_head"]},
    "an embedding of its own": {"modules_to_save": ["embed_tokens"]},
    "both of its own": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "both of its own, tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "single tokens": {"trainable_token_indices": TOKENS},
    "single tokens of both": {
        "trainable_token_indices": {"embed_tokens": TOKENS[:2], "lm_head": TOKENS[1:]}
    },
}
CASES: list[tuple[str, dict[str, Any], bool]] = [
    *((kind, settings, False) for kind, settings in (PLAIN | EMBEDDINGS).items()),
    *((kind, settings, True) for kind, settings in EMBEDDINGS.items()),
]
"""Each kind of adapter that emlens runs: its name, PEFT's settings, whether weights are tied."""


def peft_model(module: PreTrainedModel, seed: int = 0, **settings) -> PeftModel:
    """A PEFT model on a copy of `module`, all that PEFT would train random."""
    config = LoraConfig(**({"r": 1, "lora_alpha": 16, "target_modules": ["down_proj"]} | settings))
    made = get_peft_model(copy.deepcopy(module), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if "lora_" in name or weight.requires_grad:
                weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    return made.eval()


def saved(folder: Path, module: PreTrainedModel, seed: int = 0, **settings) -> Path:
    """The folder that PEFT has written such an adapter into."""
    peft_model(module, seed, **settings).save_pretrained(str(folder))
    return folder


def rewrite(
    folder: Path,
    weights: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
    **config,
) -> None:
    """Change what an adapter's folder says."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    if weights is not None:
        kept = load_file(folder / "adapter_model.safetensors")
        save_file(weights(kept), folder / "adapter_model.safetensors")


def batch_of(tokens: Sequence[int]) -> TokenBatch:
    """Two rows of different lengths, padded on the left, that hold these tokens."""
    rows = []
    for length in (9, 6):
        ids = [*tokens, *range(10, 10 + length - len(tokens))]
        rows.append(TokenRow(tuple(ids), (False,) * length, (False,) * length, f"row {length}"))
    (batch,) = pack(rows, padding_side="left")
    return batch


@torch.no_grad()
def logits_of(module: nn.Module, batch: TokenBatch) -> Tensor:
    """The logits of a plain `transformers` or PEFT model."""
    return module(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
    ).logits


def peft_logits(module: PreTrainedModel, folder: Path, batch: TokenBatch) -> Tensor:
    """The logits under a saved adapter, by PEFT alone."""
    return logits_of(PeftModel.from_pretrained(module, str(folder)).eval(), batch)
