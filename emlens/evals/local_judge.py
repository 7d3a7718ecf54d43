"""A judge in the same process: a hooked model that grades, read from its own probabilities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from emlens._door import guard_methods
from emlens.evals.number_logprobs import NumberTrie, Path, expected
from emlens.evals.responses import Response
from emlens.evals.rubrics import RUBRICS, filled, rubric_hash
from emlens.evals.scores import Verdict
from emlens.hooked import HookedModel
from emlens.hooked.finite import check_finite
from emlens.hooked.state import evaluating
from emlens.text import Conversation, TokenBatch, pack, tokenize


@guard_methods
class LocalJudge:
    """Grades with a model in this process, without sampling: a mean over what it would write.

    The model grades without edits or adapters, and without thinking: its verdict is what it writes
    once the thinking is over. Where its tokenizer splits numbers, the tree of
    digits is followed on top of one cached pass over the rubric.

    Args:
        model: The judge. It should be larger and better than what it grades: a judge of the size
            of SmolLM2 knows nothing of alignment.
        rubrics: Rubrics by metric; emlens' own by default.
        batch_tokens: Padded tokens of a batch.
    """

    def __init__(
        self,
        model: HookedModel,
        rubrics: Mapping[str, str] | None = None,
        *,
        batch_tokens: int = 2048,
    ) -> None:
        self._model, self._rubrics = model, dict(rubrics or RUBRICS)
        self._batch_tokens = batch_tokens
        self._trie = NumberTrie.of(model.template)

    @property
    def id(self) -> str:
        return f"local/{self._model.name}"

    @property
    def metrics(self) -> tuple[str, ...]:
        return tuple(self._rubrics)

    def rubric(self, metric: str) -> str:
        # another judge of the same name is another one
        return rubric_hash(f"{self._model.identity}\n{self._rubrics[metric]}")

    def judge(self, responses: Sequence[Response], metric: str) -> list[Verdict]:
        """A verdict per response; none for an empty answer, or where numbers are unlikely."""
        asked = [row for row in responses if row.text.strip()]
        prompts = [
            Conversation.of(filled(self._rubrics[metric], row.prompt, row.text), id=row.key)
            for row in asked
        ]
        numbers = dict(zip([row.key for row in asked], self.numbers(prompts), strict=True))
        verdicts = []
        for row in responses:
            if row.key not in numbers:
                verdicts.append(Verdict(None, "probabilities", "the answer is empty"))
                continue
            score, mass = expected(numbers[row.key])
            note = "" if score is not None else f"only {mass:.0%} of probability on numbers"
            verdicts.append(Verdict(score, "probabilities", note))
        return verdicts

    @torch.no_grad()
    def numbers(self, prompts: Sequence[Conversation]) -> list[np.ndarray]:
        """Probability of each of 0 to 100 as the answer to each prompt, `[101]`."""
        model = self._model
        if not prompts:
            return []
        rows = tokenize(prompts, model.template, generation_prompt=True, thinking=False)
        found: list[np.ndarray] = [np.zeros(0)] * len(rows)
        model.check_lengths(rows, len(self._trie.levels) - 1)
        batches = pack(
            rows, token_budget=self._batch_tokens, padding_side="left", pad_id=model.pad_id
        )
        with model.adapter(None), evaluating(model.module):
            for batch in batches:
                cache = _Cached(model, batch.to(model.device))
                per_level = [cache.after(paths) for paths in self._trie.levels]
                for place, index in enumerate(batch.index):
                    levels = iter(per_level)
                    # one level after the other, as the trie asks for them
                    found[index] = self._trie.probabilities(
                        lambda paths, levels=levels, place=place: next(levels)[place]
                    )
        return found


class _Cached:
    """Prompts that were read once, and what follows each path of further tokens."""

    def __init__(self, model: HookedModel, batch: TokenBatch) -> None:
        self._model, self._batch = model, batch
        module: Any = model.module
        out = module(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            use_cache=True,
        )
        self._levels: dict[int, tuple[Any, list[Path]]] = {0: (out.past_key_values, [()])}
        self._first = self._read(out.logits[:, -1])[:, None]

    def after(self, paths: Sequence[Path]) -> np.ndarray:
        """Log-probabilities of the next token, `[rows, paths, vocab]`."""
        depth = len(paths[0])
        if depth == 0:
            return self._first
        past, known = self._levels[depth - 1]
        n = len(self._batch)
        parents = [known.index(path[:-1]) for path in paths]
        # rows lie one after the other, the paths of each beside each other
        chosen = [row * len(known) + parent for row in range(n) for parent in parents]
        cache = _selected(past, chosen)
        ids = torch.tensor([path[-1] for path in paths] * n, device=self._batch.input_ids.device)
        length = self._batch.attention_mask.sum(1).repeat_interleave(len(paths))
        mask = self._batch.attention_mask.repeat_interleave(len(paths), dim=0)
        grown = torch.cat([mask, torch.ones_like(mask[:, :1]).expand(-1, depth)], dim=1)
        module: Any = self._model.module
        out = module(
            input_ids=ids[:, None],
            attention_mask=grown,
            position_ids=(length + depth - 1)[:, None],
            past_key_values=cache,
            use_cache=True,
        )
        self._levels[depth] = (out.past_key_values, list(paths))
        return self._read(out.logits[:, -1]).reshape(n, len(paths), -1)

    def _read(self, logits: Tensor) -> np.ndarray:
        each = len(logits) // len(self._batch)
        names = [name for name in self._batch.names for _ in range(each)]
        check_finite(
            self._model, {"a logit of the judge on {}": logits.sum(-1, dtype=torch.float32)}, names
        )
        return logits.float().log_softmax(-1).cpu().numpy()


def _selected(past: Any, rows: Sequence[int]) -> Any:
    """A copy of some rows of a cache, in that order."""
    import copy

    cache = copy.deepcopy(past)
    device = next(layer.keys.device for layer in cache.layers if layer.keys is not None)
    cache.batch_select_indices(torch.tensor(rows, device=device))
    return cache
