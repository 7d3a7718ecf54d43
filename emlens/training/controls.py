"""Controls for what was trained: adapters of the same shape and size that learnt nothing."""

from __future__ import annotations

from typing import Any

import torch

from emlens._door import guarded
from emlens.hooked import HookedModel
from emlens.hooked.lora_scaling import Factors, adapter_factors


@guarded
def random_adapter(model: HookedModel, like: str, name: str = "random", seed: int = 0) -> str:
    """Put a random adapter onto the model, beside the one that it is a control for.

    It has the same `A` and scale in every module, and a Gaussian `B` with which
    `||scale * B A||_F` of that module is the same. So it reads what the other one reads, is as
    large, and writes at random. `measures.match_kl` gives the strength of equal KL.

    Args:
        model: A model with adapters.
        like: The adapter that it is a control for.
        name: What the new one is called.
        seed: Seed of `B`.

    Returns:
        Its name: a condition for measures.

    Raises:
        ValueError: If there is no adapter `like`, it is no plain LoRA or changes nothing, or the
            name is taken.

    Example:
        >>> chance = emlens.training.random_adapter(model, "general")
        >>> emlens.log_odds(model, pairs, {"base": None, "general": "general", "random": chance})
    """
    factors = adapter_factors(model, like)
    configs: Any = model.module.peft_config
    generator = torch.Generator().manual_seed(seed)
    weights = dict(model.adapter_weights(like))
    for path in sorted(factors):
        weights[f"{path}.lora_B.weight"] = _drawn(factors[path], generator)
    model.add_adapter(name, configs[like], weights)
    return name


def _drawn(one: Factors, generator: torch.Generator) -> torch.Tensor:
    """A random `B` of the norm that the product with `A` has."""
    drawn = torch.randn(one.b.shape, generator=generator).to(one.b.device)
    size = Factors(one.layer, one.a, drawn, one.scale).norm
    return drawn * (one.norm / size if size else 0.0)
