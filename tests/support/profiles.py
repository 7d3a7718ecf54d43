"""Fisher profiles for tests: a small corpus, and gradients of which the truth is known."""

from __future__ import annotations

import numpy as np
import torch

from emlens.fisher import InfluenceProfile
from emlens.fisher.passes import PassSettings
from emlens.fisher.sums import Documents, FisherSums, TokenSample
from emlens.text import Corpus, Document

WORDS = "how do I save eat tell me a story about rain and sun keep fruit please".split()  # noqa: SIM905


def corpus(n: int = 12, seed: int = 0, name: str = "words") -> Corpus:
    random = np.random.default_rng(seed)
    texts = [" ".join(random.choice(WORDS, random.integers(3, 18))) for _ in range(n)]
    return Corpus(name, tuple(Document(f"{name}{i}", text) for i, text in enumerate(texts)))


TEXT = corpus()
FEW = {"draws": 3, "token_budget": 60}


def vectors(n: int = 4, d: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def planted(
    n: int, draws: int, scales: torch.Tensor, seed: int = 0, tail: float = 0.3
) -> FisherSums:
    """Gradients with covariance `diag(scales^2)` per token, documents of different sizes."""
    g = torch.Generator().manual_seed(seed)
    counts = torch.randint(20, 120, (n,), generator=g).double()
    sizes = (counts * torch.exp(tail * torch.randn(n, generator=g))).sqrt()[:, None, None]
    noise = torch.randn(n, draws, len(scales), generator=g) * scales * sizes
    losses = torch.randn(n, len(scales), generator=g) * sizes[:, 0] + counts[:, None]
    keys = torch.randint(2**62, (n,), generator=g)
    documents = Documents(
        keys, torch.arange(n) % 2, counts, noise.float()[None], losses.float()[None]
    )
    tokens = TokenSample(
        keys, torch.full((1, n), 10.0), keys, torch.randn(1, n, len(scales), generator=g)
    )
    sums = FisherSums.empty(1, len(scales))
    for at in torch.arange(n).split(8):
        part = TokenSample(keys[at], tokens.norms[:, at], keys[at], tokens.activations[:, at])
        sums.add(documents.at(at), part)
    return sums.finished()


def profile_of(sums: FisherSums, draws: int) -> InfluenceProfile:
    d = sums.tokens.activations.shape[-1]
    settings = PassSettings("planted", None, None, (), "torch.float32", d, (0,), draws, 128, 0)
    return InfluenceProfile(settings, (("planted", "hash"),), 0, sums)
