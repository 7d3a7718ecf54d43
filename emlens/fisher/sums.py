"""What a Fisher profile adds up: gradients of single documents, then their covariance; mergeable.

The gradients themselves (the factor) are kept while they take less memory. Beyond that they are
added to a covariance `[d_model, d_model]` per layer and half of the documents, and only the
gradients of a random sample of documents are kept, to estimate sampling errors.

The sample consists of the smallest keys, and keys are made of a document's tokens. The sample
therefore does not depend on the order, the batches or the processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import reduce

import torch
from jaxtyping import Float, Int
from torch import Tensor

WIDTHS = 2
"""Gradients are kept as they are up to this many times the width: as much as two covariances."""

SAMPLED = 64
"""Documents whose gradients are kept beside a covariance."""

NORM_TOKENS = 8192
"""Tokens whose residual norms are kept for the median norm of a layer."""

ACTIVATIONS = 256
"""Tokens whose activations are kept for the differences that directions are compared with."""


@dataclass(frozen=True)
class Documents:
    """Gradients of single documents, at every layer, summed over the positions of each.

    Attributes:
        keys: Random numbers made of their tokens, `[n]`.
        halves: The half that each belongs to, 0 or 1, `[n]`.
        counts: Predicted tokens of each, `[n]`.
        draws: Gradients of `sum_s log p(y_s)`, `y_s` drawn from the model, for each draw.
        losses: Gradients of the summed next-token loss.
    """

    keys: Int[Tensor, " n"]
    halves: Int[Tensor, " n"]
    counts: Float[Tensor, " n"]
    draws: Float[Tensor, "layers n draws d_model"]
    losses: Float[Tensor, "layers n d_model"]

    def __len__(self) -> int:
        return len(self.keys)

    @classmethod
    def joined(cls, parts: Sequence[Documents]) -> Documents:
        """Those of several, one after the other."""
        if len(parts) == 1:
            return parts[0]
        return cls(
            torch.cat([part.keys for part in parts]),
            torch.cat([part.halves for part in parts]),
            torch.cat([part.counts for part in parts]),
            torch.cat([part.draws for part in parts], dim=1),
            torch.cat([part.losses for part in parts], dim=1),
        )

    def at(self, places: Tensor) -> Documents:
        """Some of them."""
        return Documents(
            self.keys[places],
            self.halves[places],
            self.counts[places],
            self.draws[:, places],
            self.losses[:, places],
        )

    def first(self, n: int | None = None) -> Documents:
        """The `n` with the smallest keys (all by default), in the order of their keys."""
        order = torch.argsort(self.halves, stable=True)
        return self.at(order[torch.argsort(self.keys[order], stable=True)][:n])


@dataclass(frozen=True)
class TokenSample:
    """A random sample of tokens: norms of their residuals, and of fewer the residuals themselves.

    Attributes:
        keys: Random numbers of the tokens with norms, `[m]`.
        norms: Norms of their residuals.
        picked: Random numbers of the tokens with activations, `[a]`.
        activations: Their residuals.
    """

    keys: Int[Tensor, " m"]
    norms: Float[Tensor, "layers m"]
    picked: Int[Tensor, " a"]
    activations: Float[Tensor, "layers a d_model"]

    @classmethod
    def empty(cls, n_layers: int, d_model: int) -> TokenSample:
        """A sample of no tokens."""
        none = torch.zeros(0, dtype=torch.long)
        return cls(none, torch.zeros(n_layers, 0), none, torch.zeros(n_layers, 0, d_model))

    @property
    def threshold(self) -> int:
        """Keys from this one on are not picked any more."""
        full = len(self.picked) >= ACTIVATIONS
        return int(self.picked.max()) if full else torch.iinfo(torch.long).max

    def merged(self, other: TokenSample) -> TokenSample:
        """The sample of the tokens of both."""
        keys = torch.cat([self.keys, other.keys])
        order = torch.argsort(keys, stable=True)[:NORM_TOKENS]
        norms = torch.cat([self.norms, other.norms], dim=1)[:, order]
        picked, activations = self.picked, self.activations
        if len(other.picked):
            picked = torch.cat([picked, other.picked])
            chosen = torch.argsort(picked, stable=True)[:ACTIVATIONS]
            activations = torch.cat([activations, other.activations], dim=1)[:, chosen]
            picked = picked[chosen]
        return TokenSample(keys[order], norms, picked, activations)


@dataclass(frozen=True)
class Totals:
    """Sums over documents whose gradients are no longer there, by halves.

    Attributes:
        documents: How many, `[halves]`.
        counts: Their predicted tokens, `[halves]`.
        covariances: Sum of `g g'`, averaged over the draws of a document.
        losses: Sum of the gradients of the loss.
    """

    documents: Float[Tensor, " halves"]
    counts: Float[Tensor, " halves"]
    covariances: Float[Tensor, "layers halves d_model d_model"]
    losses: Float[Tensor, "layers halves d_model"]

    @classmethod
    def empty(cls, n_layers: int, d_model: int) -> Totals:
        """Sums of nothing, fp64."""
        return cls(
            torch.zeros(2, dtype=torch.float64),
            torch.zeros(2, dtype=torch.float64),
            torch.zeros(n_layers, 2, d_model, d_model, dtype=torch.float64),
            torch.zeros(n_layers, 2, d_model, dtype=torch.float64),
        )

    def nothing(self) -> Totals:
        """Empty sums of the same shape."""
        n_layers, _, d_model = self.losses.shape
        return Totals.empty(n_layers, d_model)

    def add(self, documents: Documents) -> None:
        """Add the gradients of documents, in place."""
        n_draws = documents.draws.shape[2]
        for half in (0, 1):
            chosen = documents.halves == half
            self.documents[half] += int(chosen.sum())
            self.counts[half] += documents.counts[chosen].sum()
            for layer, (draws, losses) in enumerate(
                zip(documents.draws, documents.losses, strict=True)
            ):
                rows = draws[chosen].flatten(0, 1)
                self.covariances[layer, half] += rows.T @ rows / n_draws
                self.losses[layer, half] += losses[chosen].double().sum(0)

    def merged(self, other: Totals) -> Totals:
        """The sums over both sets of documents, fp64."""
        return Totals(
            self.documents + other.documents,
            self.counts + other.counts,
            self.covariances.double() + other.covariances,
            self.losses.double() + other.losses,
        )


@dataclass
class FisherSums:
    """All that a pass gathers.

    Attributes:
        tokens: Norms and activations.
        fresh: Documents that are not in the totals.
        totals: Sums over the others, once there are too many to keep.
        sample: A sample of those others.
    """

    tokens: TokenSample
    fresh: list[Documents] = field(default_factory=list)
    totals: Totals | None = None
    sample: Documents | None = None

    @classmethod
    def empty(cls, n_layers: int, d_model: int) -> FisherSums:
        """What there is before the first batch."""
        return cls(TokenSample.empty(n_layers, d_model))

    def add(self, documents: Documents, tokens: TokenSample) -> None:
        """Add a batch."""
        self.tokens = self.tokens.merged(tokens)
        if len(documents):
            self.fresh.append(documents)
            self._fold_if_smaller()

    def merged(self, other: FisherSums) -> FisherSums:
        """The sums over the documents of both."""
        totals = [part.totals for part in (self, other) if part.totals is not None]
        samples = [part.sample for part in (self, other) if part.sample is not None]
        both = FisherSums(
            self.tokens.merged(other.tokens),
            [*self.fresh, *other.fresh],
            reduce(Totals.merged, totals, totals[0].nothing()) if totals else None,
            Documents.joined(samples).first(SAMPLED) if samples else None,
        )
        both._fold_if_smaller()
        return both

    def finished(self) -> FisherSums:
        """The same as a factor or as a covariance in fp32, documents ordered by their keys."""
        if self.totals is None:
            fresh = [Documents.joined(self.fresh).first()] if self.fresh else []
            return FisherSums(self.tokens, fresh)
        totals = self.totals.nothing().merged(self.totals)
        done = FisherSums(self.tokens, list(self.fresh), totals, self.sample)
        done._fold()
        done.totals = replace(totals, covariances=totals.covariances.float())
        return done

    def _fold_if_smaller(self) -> None:
        first = self.fresh[0] if self.fresh else None
        if first is None:
            return
        _, _, n_draws, d_model = first.draws.shape
        rows = sum(map(len, self.fresh)) * (n_draws + 1)
        if rows > WIDTHS * d_model + SAMPLED * (n_draws + 1):
            self._fold()

    def _fold(self) -> None:
        """Move all documents into the totals; of their gradients a sample stays."""
        if not self.fresh:
            return
        documents = Documents.joined(self.fresh)
        if self.totals is None:
            n_layers, _, _, d_model = documents.draws.shape
            self.totals = Totals.empty(n_layers, d_model)
        self.totals.add(documents)
        known = [documents] if self.sample is None else [self.sample, documents]
        self.sample = Documents.joined(known).first(SAMPLED)
        self.fresh = []

    # -- files --------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name, for a file."""
        parts: dict[str, object] = {"tokens": self.tokens}
        if self.fresh:
            parts["fresh"] = Documents.joined(self.fresh)
        if self.totals is not None:
            parts |= {"totals": self.totals, "sample": self.sample}
        return {
            f"{name}.{item.name}": getattr(part, item.name)
            for name, part in parts.items()
            for item in fields(part)  # type: ignore[arg-type]
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> FisherSums:
        """Read what `tensors` gave.

        Raises:
            KeyError: If a tensor is missing.
        """

        def part(kind: type, name: str):
            if not any(key.startswith(f"{name}.") for key in tensors):
                return None
            return kind(**{item.name: tensors[f"{name}.{item.name}"] for item in fields(kind)})

        fresh = part(Documents, "fresh")
        tokens = part(TokenSample, "tokens")
        if tokens is None:
            raise KeyError("tokens.keys")
        return cls(
            tokens, [fresh] if fresh else [], part(Totals, "totals"), part(Documents, "sample")
        )

    def check(self, where: str, n_layers: int, draws: int, d_model: int) -> None:
        """Refuse inconsistent tensors.

        Args:
            where: What the error names.
            n_layers: Layers that there must be.
            draws: Draws per document.
            d_model: Width.

        Raises:
            ValueError: If a tensor has another shape, or is not finite.
        """
        shapes = {
            "keys": ("n",),
            "halves": ("n",),
            "counts": ("n",),
            "draws": (n_layers, "n", draws, d_model),
            "losses": (n_layers, "n", d_model),
        }
        expected = {
            "fresh": shapes,
            "sample": shapes,
            "totals": {
                "documents": (2,),
                "counts": (2,),
                "covariances": (n_layers, 2, d_model, d_model),
                "losses": (n_layers, 2, d_model),
            },
            "tokens": {
                "keys": ("m",),
                "norms": (n_layers, "m"),
                "picked": ("a",),
                "activations": (n_layers, "a", d_model),
            },
        }
        seen: dict[tuple[str, str], int] = {}
        for name, tensor in self.tensors().items():
            part, item = name.split(".")
            wanted = expected[part][item]
            # a letter stands for a number that is free, but the same throughout a part
            sizes = [
                n if isinstance(n, int) else seen.setdefault((part, n), found)
                for n, found in zip(wanted, tensor.shape, strict=False)
            ]
            if len(wanted) != tensor.ndim or sizes != list(tensor.shape):
                raise ValueError(f"{where}: {name} has shape {tuple(tensor.shape)}, not {wanted}")
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"{where}: {name} is not finite")
