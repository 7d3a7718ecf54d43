"""Batched generation whose answers do not depend on how they were batched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import SupportsIndex

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from emlens._arguments import NOT_NEGATIVE, whole, wholes
from emlens._door import check_fields, guarded
from emlens.hooked.edit import Edit
from emlens.hooked.finite import check_finite, late_checks, look_at
from emlens.hooked.hook_plan import Visit
from emlens.hooked.interface import Hooked
from emlens.hooked.positions import check_positions
from emlens.hooked.state import evaluating, neutral_generation
from emlens.text import Conversation, TokenBatch, pack, tokenize
from emlens.text.thinking import CLOSE, OPEN
from emlens.text.tokens import TokenRow


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn; defaults of `SamplingOptions`."""

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | Sequence[int] = 0
    use_cache: bool = True

    def __post_init__(self) -> None:
        check_fields(self)
        one = isinstance(self.seed, SupportsIndex)
        seed = (
            whole("seed", self.seed, NOT_NEGATIVE)
            if one
            else wholes("seed", self.seed, NOT_NEGATIVE)
        )
        object.__setattr__(self, "seed", seed)

    def stream(self, place: int) -> np.random.Generator:
        """The random numbers of the answer at a place."""
        own = [self.seed, place] if isinstance(self.seed, int) else self.seed[place]
        return np.random.default_rng(own)


class RowSampler:
    """A `transformers` logits processor that draws each row from a random stream of its own.

    It leaves one token per row possible, so that greedy decoding picks the drawn one. The draw
    inverts the cumulative distribution at one uniform number per row and step, which makes an
    answer depend on its own seed and logits only, never on its neighbours in the batch.
    """

    def __init__(self, sampling: Sampling, places: Sequence[int]) -> None:
        self.temperature, self.top_p = sampling.temperature, sampling.top_p
        streams = [sampling.stream(place) for place in places]
        n = sampling.max_new_tokens
        self.uniforms = torch.from_numpy(np.stack([stream.random(n) for stream in streams]))
        self._step = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        uniform = self.uniforms[:, self._step]
        self._step += 1
        chosen = draw(scores.float(), uniform, self.temperature, self.top_p)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


class LogitWatch:
    """A `transformers` logits processor that raises where logits are not finite.

    Args:
        check: Takes the sum of each row's logits, `[batch]`.
        width: Length of the padded prompts.
        ends: Tokens that end an answer; what a row does after its end does not count.
    """

    def __init__(self, check: Callable[[Tensor], None], width: int, ends: Sequence[int]) -> None:
        self.check, self.width, self.ends = check, width, ends

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.see(input_ids, scores.sum(-1, dtype=torch.float32))
        return scores

    def see(self, input_ids: Tensor, sums: Tensor) -> None:
        """Check the sums of logits that were made from these tokens, `[batch]`."""

        def blame() -> None:
            new = input_ids[:, self.width :]
            ended = torch.isin(new, torch.tensor(self.ends, device=new.device)).any(1)
            self.check(sums.masked_fill(ended.to(sums.device), 0.0))

        look_at(sums.sum(), blame)


@dataclass(frozen=True, slots=True)
class Answer:
    """What was generated.

    Attributes:
        text: The answer, without special tokens. It begins with `<think>` where the template
            has opened the thinking.
        tokens: Its tokens, that which ends the turn left out.
        ended: Whether it ended by itself; otherwise it reached `max_new_tokens`.
        prompt_tokens: Tokens of the prompt, template included.
    """

    text: str
    tokens: int
    ended: bool
    prompt_tokens: int


# Plain functions of tensors, which remote execution runs where emlens is not installed.


def draw(
    scores: Float[Tensor, "batch vocab"],
    uniform: Float[Tensor, " batch"],
    temperature: float,
    top_p: float,
) -> Int[Tensor, "batch 1"]:
    """Draw a token per row from its scores and a number in `[0, 1)`."""
    probabilities = torch.softmax(scores / temperature, dim=-1)
    if top_p == 1:
        return _invert(probabilities, uniform)
    probabilities, order = probabilities.sort(dim=-1, descending=True, stable=True)
    before = probabilities.cumsum(-1) - probabilities
    nucleus = probabilities.masked_fill(before >= top_p, 0.0)
    return order.gather(1, _invert(nucleus, uniform))


def _invert(weights: Tensor, uniform: Tensor) -> Tensor:
    """The first place at which the cumulative weights pass a uniform share of the total."""
    cumulative = weights.double().cumsum(-1)
    target = uniform.to(weights.device).unsqueeze(1) * cumulative[:, -1:]
    place = torch.searchsorted(cumulative, target, right=True)
    return place.clamp(max=weights.shape[-1] - 1)


@guarded
def answer(
    model: Hooked,
    conversations: Sequence[Conversation],
    edits: Sequence[Edit],
    sampling: Sampling,
    batch_tokens: int = 4096,
    continue_final_message: bool = False,
) -> list[Answer]:
    """`HookedModel.generate`, with how long each answer is and whether it ended by itself.

    Conversations are answered in length-sorted batches; answers come in the order asked.

    Raises:
        TypeError: If the model cannot generate.
        ValueError: As `HookedModel.generate`.
    """
    edits = model.edits_in_force(edits)
    if not hasattr(model.module, "generate"):
        raise TypeError(f"{model.name} cannot generate: its module has no generate method")
    if not sampling.use_cache and not model.architecture.steady:
        raise ValueError(
            f"{model.name} cannot generate with use_cache=False: its attention is not causal "
            "throughout, so that new tokens would change those before them; generate with the cache"
        )
    if not isinstance(sampling.seed, int) and len(sampling.seed) != len(conversations):
        raise ValueError(
            f"{len(sampling.seed)} seeds were given for {len(conversations)} conversations; give "
            "one seed, or one for each"
        )
    answers: dict[int, Answer] = {}
    rows = tokenize(
        conversations,
        model.template,
        generation_prompt=True,
        continue_final_message=continue_final_message,
    )
    check_positions(model, [r.name for r in rows], list(map(len, rows)), sampling.max_new_tokens)
    thinking = model.template.opened_thinking if rows else ""
    for batch in _prompt_batches(model, rows, sampling, batch_tokens):
        visit = Visit.of_generation(batch, edits, sampling.max_new_tokens)
        settings = _settings(model, sampling, batch)
        condition = replace(model.condition_in_force, edits=edits)

        def check(sums: Tensor, batch: TokenBatch = batch, condition=condition) -> None:
            check_finite(model, {"a logit of {}": sums}, batch.names, condition=condition)

        watch = LogitWatch(check, batch.shape[1], settings["eos_token_id"])
        settings["logits_processor"] = [watch, *settings.get("logits_processor", [])]
        # a GPU is not waited for at every step; on a CPU there is nothing to wait for
        late = late_checks() if model.device.type == "cuda" else nullcontext()
        with torch.no_grad(), evaluating(model.module), neutral_generation(model.module), late:
            ids = model._decode(batch, visit, **settings)
        new = ids[:, batch.input_ids.shape[1] :]
        kept = _until_end(new, settings)
        check_finite(model, visit.found(), batch.names, _written(batch, kept), condition)
        texts = [_decoded(model.tokenizer, row) for row in kept]
        asked = batch.attention_mask.sum(1).tolist()
        for place, text, ids, n in zip(batch.index, texts, kept, asked, strict=True):
            begun = conversations[place].messages[-1]["role"] == "assistant"
            text = text if begun else thinking + text
            answers[place] = Answer(text, len(ids), len(ids) < sampling.max_new_tokens, n)
    return [answers[place] for place in range(len(conversations))]


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Text of an answer without special tokens; the tags of thinking stay."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    tags = {i: str(token) for i, token in added.items() if str(token) in (OPEN, CLOSE)}
    parts, run = [], []
    for token in [*ids, None]:
        if token is not None and token not in tags:
            run.append(token)
            continue
        parts += [tokenizer.decode(run, skip_special_tokens=True), tags.get(token, "")]
        run = []
    return "".join(parts)


def _prompt_batches(
    model: Hooked,
    rows: Sequence[TokenRow],
    sampling: Sampling,
    batch_tokens: int,
) -> list[TokenBatch]:
    together = "left" in model.architecture.padding
    longest = max((len(row.input_ids) for row in rows), default=0) + sampling.max_new_tokens
    batches = pack(
        rows,
        token_budget=batch_tokens,
        max_rows=max(1, batch_tokens // max(1, longest)) if together else 1,
        padding_side="left",
        pad_id=model.pad_id,
    )
    return [batch.to(model.device) for batch in batches]


def _settings(model: Hooked, sampling: Sampling, batch: TokenBatch) -> dict:
    settings = {
        "max_new_tokens": sampling.max_new_tokens,
        "do_sample": False,
        "use_cache": sampling.use_cache,
        "pad_token_id": model.pad_id,
        "eos_token_id": _end_ids(model),
    }
    if sampling.temperature > 0:
        settings["logits_processor"] = [RowSampler(sampling, batch.index)]
    return settings


def _end_ids(model: Hooked) -> list[int]:
    config = getattr(model.module, "generation_config", None)
    ends = getattr(config, "eos_token_id", None)
    known = ends if isinstance(ends, list) else [ends]
    # a checkpoint may not know the token that its chat template ends answers with
    own = [model.tokenizer.eos_token_id, model.template.end_of_turn]
    return sorted({int(i) for i in [*known, *own] if i is not None})


def _written(batch: TokenBatch, kept: Sequence[Sequence[int]]) -> Tensor:
    """The positions of prompts and of what was generated from them, `[batch, pos]`.

    The last token generated is never read.
    """
    longest = max(map(len, kept), default=0)
    lengths = torch.tensor([len(row) for row in kept])
    new = torch.arange(longest) < lengths[:, None]
    return torch.cat([batch.mask("all").cpu(), new], dim=1)


def _until_end(ids: Tensor, settings: dict) -> list[list[int]]:
    ends = set(settings["eos_token_id"])
    rows = []
    for row in ids.tolist():
        stop = next((i for i, token in enumerate(row) if token in ends), len(row))
        rows.append(row[:stop])
    return rows
