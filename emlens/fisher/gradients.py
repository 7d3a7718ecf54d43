"""The pass of a Fisher profile: gradients of every document at every layer, batch by batch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from emlens._distributed import world
from emlens.fisher.sums import ACTIVATIONS, Documents, TokenSample
from emlens.hooked import HookedModel
from emlens.hooked.edit import Where
from emlens.hooked.finite import check_finite
from emlens.hooked.losses import Targets
from emlens.hooked.sites import Site
from emlens.text import Corpus, TokenBatch, pack
from emlens.text.tokens import tokenize_documents

WINDOW = 256
"""Documents that are tokenised and packed together."""

CHUNK_BYTES = 256 * 2**20
"""Size that what the LM head makes of one chunk of tokens may have."""

SHORTEST = 2
"""Tokens of the shortest document in which anything is predicted."""

_LAST_KEY = torch.iinfo(torch.long).max


@dataclass(frozen=True)
class Window:
    """Documents of a corpus that are read together; the unit that processes share.

    Attributes:
        index: Their places in the corpus.
        input_ids: A fingerprint of each, by which processes check that they share the same corpus.
    """

    index: tuple[int, ...]
    input_ids: Int[Tensor, "n 1"]


def windows(corpus: Corpus) -> list[Window]:
    """Return the windows of a corpus: enough of them for every process to have its share."""
    size = max(1, min(WINDOW, -(-len(corpus) // world()[1])))
    found = []
    for start in range(0, len(corpus), size):
        index = tuple(range(start, min(start + size, len(corpus))))
        prints = [_number(corpus.documents[place].text.encode()) for place in index]
        found.append(Window(index, torch.tensor(prints)[:, None]))
    return found


class Stream:
    """Batches of the documents of some windows; only one window is tokenised at a time.

    Args:
        model: Model whose tokenizer is used.
        corpus: The corpus.
        max_tokens: Tokens that a document is cut to.
        token_budget: Padded tokens of a batch.

    Attributes:
        skipped: Documents that were too short to predict anything in, so far.
    """

    def __init__(
        self, model: HookedModel, corpus: Corpus, max_tokens: int, token_budget: int
    ) -> None:
        self._model, self._corpus = model, corpus
        self._max_tokens, self._budget = max_tokens, token_budget
        self.skipped = 0

    def batches(self, windows: Sequence[Window]) -> Iterator[tuple[TokenBatch, list[int]]]:
        """Yield each batch with the places of its documents in the corpus."""
        for window in windows:
            documents = [self._corpus.documents[place] for place in window.index]
            rows = tokenize_documents(documents, self._model.tokenizer, max_tokens=self._max_tokens)
            kept = [i for i, row in enumerate(rows) if len(row.input_ids) >= SHORTEST]
            self.skipped += len(rows) - len(kept)
            packed = pack(
                [rows[i] for i in kept], token_budget=self._budget, pad_id=self._model.pad_id
            )
            for batch in packed:
                yield batch, [window.index[kept[i]] for i in batch.index]


@dataclass(frozen=True)
class _Dice:
    """Random numbers of a document, derived from its tokens so that batching does not matter.

    Attributes:
        key: Its place among documents that are sampled.
        uniforms: Numbers in 0..1 that targets are drawn by, `[draws, pos]`.
        tokens: The places of its tokens among tokens that are sampled, `[pos]`.
    """

    key: int
    uniforms: Float[Tensor, "draws pos"]
    tokens: Int[Tensor, " pos"]

    @classmethod
    def of(cls, ids: Int[Tensor, " pos"], draws: int, seed: int) -> _Dice:
        key = _number(f"{seed} ".encode() + ids.cpu().numpy().tobytes())
        random = np.random.default_rng(key)
        tokens = random.integers(_LAST_KEY, size=len(ids))
        uniforms = random.random((draws, len(ids)))
        return cls(key, torch.from_numpy(uniforms), torch.from_numpy(tokens))


class _Tap:
    """An edit that adds nothing: zeros for each row and layer, through which gradients flow.

    The gradient of such a vector is that of the residual, summed over the positions of its row.
    On the way the tap reads norms and activations.
    """

    site: Site = "resid_post"
    where: Where = "all"

    def __init__(
        self,
        layers: tuple[int, ...],
        zeros: Float[Tensor, "batch d_model"],
        real: Bool[Tensor, "batch pos"],
        picked: Bool[Tensor, "batch pos"],
    ) -> None:
        self.layers = layers
        self.vectors = {layer: zeros.clone().requires_grad_() for layer in layers}
        self.norms: dict[int, Tensor] = {}
        self.activations: dict[int, Tensor] = {}
        self._real, self._picked = real, picked

    def delta(
        self, residual: Float[Tensor, "batch pos d_model"], layer: int
    ) -> Float[Tensor, "batch pos d_model"]:
        values = residual.detach()
        self.norms[layer] = values[self._real.to(values.device)].float().norm(dim=-1).cpu()
        self.activations[layer] = values[self._picked.to(values.device)].float().cpu()
        return self.vectors[layer].to(residual.device)[:, None].expand_as(residual)


@torch.enable_grad()
def batch_gradients(
    model: HookedModel,
    batch: TokenBatch,
    layers: tuple[int, ...],
    *,
    draws: int,
    seed: int,
    halves: Sequence[int],
    threshold: int = _LAST_KEY,
) -> tuple[Documents, TokenSample]:
    """Return the gradients of each document of a batch, and a sample of its tokens.

    One forward pass, and one backward pass for each draw and for the real text; all layers come
    from the same passes. Padding is neither predicted nor attended to, so its gradient is zero.

    Args:
        model: The model.
        batch: Documents of at least two tokens.
        layers: Layers at whose output gradients are taken.
        draws: Independent draws of all targets.
        seed: Seed of the draws.
        halves: The half that each document belongs to.
        threshold: Only tokens with keys below it are worth picking.

    Raises:
        NonFiniteError: If a gradient is not finite; the document and the layer are named.
    """
    batch = batch.to(model.device)
    real = batch.mask("all")
    dice = [_Dice.of(ids[m], draws, seed) for ids, m in zip(batch.input_ids, real, strict=True)]
    keys = torch.cat([die.tokens for die in dice])
    picked, picked_keys = _pick(batch, keys, threshold)
    zeros = torch.zeros(len(batch), model.d_model, device=model.device)
    tap = _Tap(layers, zeros, real, picked)
    targets = Targets.of(batch, "all")
    uniforms = torch.cat([die.uniforms[:, 1:] for die in dice], dim=1)
    with model.frozen():
        states = targets.predictors(model.hidden(batch, [tap], grad=True))
        outer = head_gradients(model, states.detach(), targets.ids, uniforms)
        vectors = list(tap.vectors.values())
        found = []
        for place, gradient in enumerate(outer):
            more = place + 1 < len(outer)
            parts = torch.autograd.grad(states, vectors, gradient, retain_graph=more)
            found.append(torch.stack([part.cpu() for part in parts]))
    gradients = torch.stack(found, dim=2)
    # gradients flow downwards, so the deepest bad layer is nearest to the cause
    values = {
        f"the gradient of {{}} at layer {layer}": gradients[place].sum((-1, -2))
        for place, layer in reversed(list(enumerate(layers)))
    }
    check_finite(model, values, batch.names)
    documents = Documents(
        torch.tensor([die.key for die in dice]),
        torch.tensor(list(halves)),
        targets.counts(len(batch)).cpu(),
        gradients[:, :, :-1],
        gradients[:, :, -1],
    )
    norms = torch.stack([tap.norms[layer] for layer in layers])
    activations = torch.stack([tap.activations[layer] for layer in layers])
    return documents, TokenSample(keys, norms, picked_keys, activations)


@torch.enable_grad()
def head_gradients(
    model: HookedModel,
    states: Float[Tensor, "n d_model"],
    ids: Int[Tensor, " n"],
    uniforms: Float[Tensor, "draws n"],
) -> list[Float[Tensor, "n d_model"]]:
    """Return the gradients at final hidden states that the backward passes begin with.

    For each draw that of `log p(y)`, with `y` the token at which the model's own distribution
    function passes the uniform number; and, last, that of the loss of the real targets. The LM
    head runs on a chunk of tokens at a time.
    """
    n, n_draws = len(states), len(uniforms)
    found = [torch.zeros_like(states) for _ in range(n_draws + 1)]
    size = max(1, CHUNK_BYTES // (4 * 4 * model.n_vocab))
    for at in (slice(start, start + size) for start in range(0, n, size)):
        part = states[at].detach().requires_grad_()
        logits = model.unembed(part)
        p = torch.softmax(logits.detach(), dim=-1)
        drawn = _draw(p, uniforms[:, at].to(p.device))
        for place, tokens in enumerate((*drawn, ids[at].to(p.device))):
            sign = 1.0 if place < n_draws else -1.0
            outer = (-sign * p).scatter_add_(1, tokens[:, None], p.new_full((len(p), 1), sign))
            more = place < n_draws
            (found[place][at],) = torch.autograd.grad(logits, part, outer, retain_graph=more)
    return found


def _draw(
    p: Float[Tensor, "n vocab"], uniforms: Float[Tensor, "draws n"]
) -> Int[Tensor, "draws n"]:
    """The token at which the distribution function passes a number, for each number."""
    passed = p.cumsum(-1)
    # rounding must not lead beyond the last token that has a probability at all
    wanted = uniforms.T.to(p.dtype).clamp(max=1 - 2**-20) * passed[:, -1:]
    found = torch.searchsorted(passed, wanted.contiguous(), right=True)
    # where a probability is not finite there is none; the gradient check reports it
    return found.clamp(max=p.shape[1] - 1).T


def _pick(
    batch: TokenBatch, keys: Int[Tensor, " n"], threshold: int
) -> tuple[Bool[Tensor, "batch pos"], Int[Tensor, " a"]]:
    """The tokens of a batch whose activations may be kept, and their keys.

    Never the first of a document, where many models put an activation that no other token has.
    """
    real = batch.mask("all").cpu()
    later = batch.position_ids.cpu()[real] > 0
    candidates = torch.where(later, keys, _LAST_KEY)
    order = torch.argsort(candidates, stable=True)[:ACTIVATIONS]
    order = order[candidates[order] < threshold].sort().values
    chosen = torch.zeros(len(keys), dtype=torch.bool)
    chosen[order] = True
    picked = torch.zeros_like(real)
    picked[real] = chosen
    return picked, keys[order]


def _number(data: bytes) -> int:
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big") >> 1
