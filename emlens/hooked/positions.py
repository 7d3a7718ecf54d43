"""How many positions a model has, and the refusal of text beyond them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from emlens.hooked.interface import Hooked


def max_positions(config: Any) -> int | None:
    """How many positions a model of this configuration has; None where there is no end.

    A sliding window is no limit, and ALiBi has none. Rotary embeddings that are stretched (YaRN,
    LongRoPE, dynamic) reach as far as their factor says.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    limit = getattr(text, "max_position_embeddings", None) or getattr(text, "max_seq_len", None)
    if not limit or getattr(text, "alibi", False):
        return None
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    # some models have one per kind of layer
    kinds = [rope] if "rope_type" in rope or "factor" in rope else list(rope.values())
    return max([int(limit), *(_stretched(kind, limit) for kind in kinds if kind)])


def check_positions(
    model: Hooked, names: Sequence[str], lengths: Sequence[int], new_tokens: int = 0
) -> None:
    """Refuse rows that go beyond the model's positions.

    Args:
        model: The model.
        names: What each row is called.
        lengths: Its tokens, padding left out.
        new_tokens: Tokens that may be generated after each.

    Raises:
        ValueError: Naming the longest row, its length and the limit.
    """
    limit = max_positions(model.module.config)
    if limit is None or max(lengths, default=0) + new_tokens <= limit:
        return
    beyond = sum(n + new_tokens > limit for n in lengths)
    longest = max(range(len(lengths)), key=lambda place: lengths[place])
    found = f"{names[longest]} has {lengths[longest]} tokens"
    if new_tokens:
        found += f", and {new_tokens} new ones may follow"
    others = f" ({beyond} rows do)" if beyond > 1 else ""
    advice = "ask for fewer new tokens, or shorten the prompt"
    if not new_tokens:
        advice = f"leave it out, shorten it, or cut it with max_tokens={limit} where that is taken"
    raise ValueError(
        f"{found}; that goes beyond the {limit} positions of {model.name}{others}: {advice}"
    )


def _stretched(rope: Any, limit: int) -> int:
    kind = rope.get("rope_type", rope.get("type"))
    if kind == "dynamic":
        return int(limit * float(rope.get("factor") or 1))
    original = rope.get("original_max_position_embeddings")
    if kind in ("yarn", "longrope") and original:
        return int(original * float(rope.get("factor") or 1))
    return 0
