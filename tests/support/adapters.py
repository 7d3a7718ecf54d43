"""LoRA adapters made and saved by PEFT itself, with weights that do something."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel


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
