"""Training sets of the baselines: mixed with benign data."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from emlens._door import guarded
from emlens.text import Conversation


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
