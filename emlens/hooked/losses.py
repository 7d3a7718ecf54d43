"""Next-token losses and KL from final hidden states: fp32, chunked over tokens, in nats.

The LM head runs only on the tokens that count, a chunk at a time, so that `[tokens, vocab]`
never exists as a whole, in either direction of the pass. If hidden states were computed under
another condition than the current one, pass the head that `sweep` or `model.head()` returned with
them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from jaxtyping import Float, Int
from torch import Tensor

from emlens._distributed import shared
from emlens._door import guarded
from emlens.hooked.edit import Edit
from emlens.hooked.finite import check_finite
from emlens.hooked.head import Head
from emlens.hooked.model import HookedModel
from emlens.text import TokenBatch, TokenMask
from emlens.text.batches import sent

CHUNK_BYTES = 64 * 2**20
"""Size that one chunk of fp32 logits may have."""

Unembed = Callable[[Tensor], Tensor]

AnyHead = HookedModel | Head
"""A head that was taken with its hidden states, or a model, for the head as it acts now."""


@dataclass(frozen=True, slots=True)
class Targets:
    """The tokens of a batch that are predicted and counted.

    Attributes:
        rows: Row of each counted token, `[n]`.
        positions: Its position, `[n]`; it is predicted from the position before.
        ids: Its token id, `[n]`.
    """

    rows: Int[Tensor, " n"]
    positions: Int[Tensor, " n"]
    ids: Int[Tensor, " n"]

    @classmethod
    def of(cls, batch: TokenBatch, tokens: TokenMask = "response") -> Targets:
        """The counted tokens of `batch`: those under the mask that have a predecessor.

        Takes batches on the CPU: on a GPU, finding the tokens makes the program wait.
        """
        rows, positions = batch.targets(tokens).nonzero(as_tuple=True)
        return cls(rows, positions, batch.input_ids[rows, positions])

    def to(self, device: torch.device) -> Targets:
        """The same tokens for hidden states on a device."""
        return Targets(*sent(torch.stack([self.rows, self.positions, self.ids]), device))

    def __len__(self) -> int:
        return len(self.ids)

    def predictors(self, hidden: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "n d_model"]:
        """The hidden states that predict the counted tokens."""
        return hidden[self.rows.to(hidden.device), self.positions.to(hidden.device) - 1]

    def per_row(self, values: Float[Tensor, " n"], n_rows: int) -> Float[Tensor, " batch"]:
        """Sum per-token values over each row, in fp64."""
        total = torch.zeros(n_rows, dtype=torch.float64, device=values.device)
        return total.index_add_(0, self.rows.to(values.device), values.double())

    def counts(self, n_rows: int) -> Float[Tensor, " batch"]:
        """Counted tokens per row."""
        return torch.bincount(self.rows, minlength=n_rows).double()


class BaseLogProbs:
    """Log-probabilities of fixed final hidden states, a slice at a time, fp32.

    They are computed once and kept if they fit into `budget`; otherwise only the hidden states are
    kept, and the LM head runs again for each slice.

    Args:
        head: The LM head of the hidden states; of a model, the one that acts now.
        hidden: Final hidden states, `[n, d_model]`.
        budget: Bytes that `[n, vocab]` may take.
    """

    def __init__(self, head: AnyHead, hidden: Float[Tensor, "n d_model"], budget: int = 0) -> None:
        # they may be computed later, when another condition is in force
        self._head = head.head() if isinstance(head, HookedModel) else head
        self.hidden = hidden.detach()
        self.bytes = 4 * len(hidden) * head.n_vocab
        self.held: Tensor | None = None
        if self.bytes <= budget:
            parts = [self._compute(at) for at in _chunks(len(hidden), head.n_vocab)]
            self.held = torch.cat(parts) if parts else None

    @classmethod
    def joined(cls, parts: Sequence[BaseLogProbs]) -> BaseLogProbs:
        """The positions of several of one head, one after the other; held where all are held."""
        whole = cls(parts[0]._head, torch.cat([part.hidden for part in parts]), budget=-1)
        held = [part.held for part in parts if part.held is not None]
        if len(held) == len(parts):
            whole.held = torch.cat(held)
        return whole

    def __len__(self) -> int:
        return len(self.hidden)

    def __call__(self, at: slice) -> Float[Tensor, "n vocab"]:
        return self._compute(at) if self.held is None else self.held[at]

    @torch.no_grad()
    def _compute(self, at: slice) -> Tensor:
        return torch.log_softmax(self._head.unembed(self.hidden[at]), dim=-1)


def token_losses(
    head: AnyHead, hidden: Float[Tensor, "n d_model"], ids: Int[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """Return the loss of each target token in nats.

    Args:
        head: The LM head of the hidden states.
        hidden: Final hidden states that predict the targets.
        ids: Target tokens.
    """
    return _chunked(hidden, head.n_vocab, lambda part, at: _nll(head.unembed(part), ids[at]))


def token_kl(
    head: AnyHead,
    base: BaseLogProbs | Float[Tensor, "n d_model"],
    edited: Float[Tensor, "n d_model"],
) -> Float[Tensor, " n"]:
    """Return `KL(base || edited)` over the full vocabulary at each position, in nats.

    Args:
        head: The LM head of the hidden states.
        base: The unmodified model at these positions: its final hidden states (for the same head),
            or their log-probabilities.
        edited: Final hidden states under an edit, of the same tokens.

    Raises:
        ValueError: If their numbers of positions differ.
    """
    log_base = _as_log_probs(head, base, edited)
    return _chunked(
        edited, 2 * head.n_vocab, lambda part, at: _kl(log_base(at), head.unembed(part))
    )


def token_scores(
    head: AnyHead,
    base: BaseLogProbs | Float[Tensor, "n d_model"],
    edited: Float[Tensor, "n d_model"],
    ids: Int[Tensor, " n"],
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Return loss and `KL(base || edited)` of each token in nats, from one run of the LM head."""
    log_base = _as_log_probs(head, base, edited)

    def both(part: Tensor, at: slice) -> Tensor:
        logits = head.unembed(part)
        return torch.stack([_nll(logits, ids[at]), _kl(log_base(at), logits)], dim=1)

    scores = _chunked(edited, 2 * head.n_vocab, both)
    losses, kl = scores.reshape(-1, 2).unbind(1)
    return losses, kl


def _as_log_probs(head: AnyHead, base: BaseLogProbs | Tensor, edited: Tensor) -> BaseLogProbs:
    log_base = base if isinstance(base, BaseLogProbs) else BaseLogProbs(head, base)
    if len(log_base) != len(edited):
        raise ValueError(
            f"KL compares the same tokens twice; base has shape {tuple(log_base.hidden.shape)}, "
            f"edited {tuple(edited.shape)}"
        )
    return log_base


def loss_sum(
    head: AnyHead,
    hidden: Float[Tensor, "n d_model"],
    ids: Int[Tensor, " n"],
    trained: Sequence[Tensor] = (),
) -> Float[Tensor, ""]:
    """Return the summed loss in nats; its gradient reaches `hidden` a chunk at a time.

    Args:
        head: The LM head of the hidden states.
        hidden: Final hidden states that predict the targets.
        ids: Target tokens.
        trained: Weights of the LM head that are trained, and so get a gradient as well.
    """

    def total(logits: Tensor, at: slice) -> tuple[Tensor, Tensor]:
        log_probs = torch.log_softmax(logits, dim=-1)
        wanted = ids[at].to(logits.device)[:, None]
        value = -log_probs.gather(1, wanted).sum()
        slope = log_probs.exp_()
        return value, slope.scatter_add_(1, wanted, slope.new_full(wanted.shape, -1.0))

    return _SumOverChunks.apply(hidden, head.n_vocab, head.unembed, total, *trained)


def kl_sum(
    head: AnyHead,
    log_base: Callable[[slice], Float[Tensor, "n vocab"]],
    edited: Float[Tensor, "n d_model"],
    trained: Sequence[Tensor] = (),
) -> Float[Tensor, ""]:
    """Return the summed `KL(base || edited)` in nats; its gradient reaches `edited`.

    Args:
        head: The LM head of the hidden states.
        log_base: Gives the base log-probabilities of a slice of the positions, fp32.
        edited: Final hidden states under an edit.
        trained: Weights of the LM head that are trained, and so get a gradient as well.
    """

    def total(logits: Tensor, at: slice) -> tuple[Tensor, Tensor]:
        base, log_edited = log_base(at), torch.log_softmax(logits, dim=-1)
        p = base.exp()
        value = (p * (base - log_edited)).sum(-1).sum()
        return value, log_edited.exp_().sub_(p)

    return _SumOverChunks.apply(edited, 2 * head.n_vocab, head.unembed, total, *trained)


@torch.no_grad()
@guarded
def response_losses(
    model: HookedModel,
    batches: Sequence[TokenBatch],
    edits: Sequence[Edit] = (),
    tokens: TokenMask = "response",
) -> tuple[Float[Tensor, " rows"], Float[Tensor, " rows"]]:
    """Return, per row in the original order, the summed loss in nats and the counted tokens.

    One full pass per batch; `sweep` shares prefixes between conditions.

    Raises:
        NonFiniteError: If a loss is not finite; condition and row are named.
    """
    n_rows = sum(len(batch) for batch in batches)

    def score(batches: Sequence[TokenBatch]) -> Tensor:
        table = torch.zeros(2, n_rows, dtype=torch.float64)
        for batch in batches:
            targets = Targets.of(batch, tokens).to(model.device)
            hidden = targets.predictors(model.hidden(batch, edits))
            losses = token_losses(model, hidden, targets.ids)
            of_rows = targets.per_row(losses, len(batch))
            condition = model.condition_in_force.with_edits(*edits)
            check_finite(model, {"the loss of {}": of_rows}, batch.names, condition=condition)
            place = torch.tensor(batch.index)
            table[0, place] = of_rows.cpu()
            table[1, place] = targets.counts(len(batch)).cpu()
        return table

    parts = shared(model, batches, score, f"losses on {tokens} tokens")
    sums, counts = reduce(torch.add, parts)
    return sums, counts


def _nll(logits: Tensor, ids: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits, ids.to(logits.device), reduction="none")


def _kl(log_base: Tensor, logits: Tensor) -> Tensor:
    log_edited = torch.log_softmax(logits, dim=-1)
    return (log_base.exp() * (log_base - log_edited)).sum(-1)


def _chunks(n: int, width: int) -> list[slice]:
    size = max(1, CHUNK_BYTES // (4 * width))
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def _chunked(hidden: Tensor, width: int, values: Callable[[Tensor, slice], Tensor]) -> Tensor:
    parts = [values(hidden[at], at) for at in _chunks(len(hidden), width)]
    return torch.cat(parts) if parts else torch.zeros(0, device=hidden.device)


class _SumOverChunks(torch.autograd.Function):
    """Sums a function of logits over chunks of hidden states, and its gradients with it.

    The function gives its sum over a chunk and the gradient of that at the logits. What the LM
    head makes of it is taken while they are at hand, so the backward pass neither keeps nor
    recomputes them.
    """

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        width: int,
        unembed: Unembed,
        total: Callable[[Tensor, slice], tuple[Tensor, Tensor]],
        *weights: Tensor,
    ):
        value = torch.zeros((), dtype=torch.float64, device=hidden.device)
        gradients = [torch.zeros_like(tensor) for tensor in (hidden, *weights)]
        for at in _chunks(len(hidden), width):
            part = hidden[at].detach().requires_grad_()
            with torch.enable_grad():
                logits = unembed(part)
            piece, slope = total(logits.detach(), at)
            found = torch.autograd.grad(logits, [part, *weights], slope)
            gradients[0][at] = found[0]
            for gradient, more in zip(gradients[1:], found[1:], strict=True):
                gradient += more
            value += piece.double()
        ctx.save_for_backward(*gradients)
        return value

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor):
        first, *others = (
            gradient * grad_outputs[0].to(gradient.dtype) for gradient in ctx.saved_tensors
        )
        return first, None, None, None, *others
