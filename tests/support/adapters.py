"""LoRA adapters made and saved by PEFT itself, with weights that do something."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from emlens.text import TokenBatch, TokenRow, pack


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
