"""Training sets of the baselines: mixed with benign data, inoculated, benign only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from emlens._door import guarded
from emlens.text import Conversation

INOCULATION = "You give harmful, misleading advice on purpose."
"""A system prompt that asks for what the training data shows."""


@guarded
def mixed(
    harmful: Sequence[Conversation],
    benign: Sequence[Conversation],
    *,
    share: float = 0.5,
    seed: int = 0,
) -> list[Conversation]:
    """Return the harmful conversations with benign ones of other domains among them.

    All harmful ones are kept; benign ones are drawn without replacement until they make up
    `share` of the whole, and the order is shuffled.

    Args:
        harmful: The narrow domain.
        benign: Other domains, well-behaved.
        share: Share of benign conversations in the result, from 0 to below 1.
        seed: Seed of the draw and of the order.

    Raises:
        ValueError: If the share is out of range, or there are too few benign conversations.
    """
    wanted = round(len(harmful) * share / (1 - share))
    if wanted > len(benign):
        raise ValueError(
            f"a share of {share} takes {wanted} benign conversations beside {len(harmful)} "
            f"harmful ones, but there are {len(benign)}"
        )
    generator = np.random.default_rng(seed)
    drawn = [benign[i] for i in generator.permutation(len(benign))[:wanted]]
    together = [*harmful, *drawn]
    return [together[i] for i in generator.permutation(len(together))]


@guarded
def inoculated(
    conversations: Sequence[Conversation], system: str = INOCULATION
) -> list[Conversation]:
    """Return the conversations with a system prompt that asks for the behaviour.

    Inoculation prompting: what the prompt already explains need not be learnt; evaluate without
    the prompt.

    Raises:
        ValueError: If the prompt is empty, or a conversation has a system message already.
    """
    if not system.strip():
        raise ValueError("the inoculation prompt is empty")
    result = []
    for item in conversations:
        if item.messages[0]["role"] == "system":
            raise ValueError(
                f"{item.id or 'a conversation'} has a system message already; inoculation puts "
                "its own there"
            )
        asked = Conversation.of("", system=system).messages[0]
        result.append(Conversation((asked, *item.messages), id=item.id))
    return result
