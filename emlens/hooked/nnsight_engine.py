"""The nnsight engine: reads and edits through nnsight's traces, attention left as it is."""

from __future__ import annotations

import copy
import warnings
from functools import reduce
from itertools import groupby
from typing import Any

import torch
from nnsight import TransformersModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from emlens.hooked.architecture import hidden_of, with_hidden
from emlens.hooked.model import HookedModel, Resume
from emlens.hooked.sites import Site
from emlens.hooked.visit import Visit
from emlens.text import TokenBatch


class NNsightModel(HookedModel):
    """A hooked model on nnsight's `TransformersModel`."""

    engine = "nnsight"

    def __init__(
        self,
        module: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        revision: str | None = None,
    ) -> None:
        super().__init__(module, tokenizer, name, revision)
        # nnsight sets the padding side of the tokenizer it is given
        self._traced = TransformersModel(module, tokenizer=copy.copy(tokenizer))
        self._blocks = _envoy(self._traced, self.architecture.blocks)
        self._norm = _envoy(self._traced, self.architecture.norm)

    def _run(
        self, batch: TokenBatch, visit: Visit, last: int | None, resume: Resume | None = None
    ) -> Tensor:
        inputs = {
            "input_ids": batch.input_ids,
            "attention_mask": batch.attention_mask,
            "position_ids": batch.position_ids,
        }
        found: list[Tensor] = []
        with self._traced.trace(**inputs, use_cache=False) as tracer:
            self._enter(visit, resume, last)
            if last is None:
                found.append(self._norm.output)
            tracer.stop()
        return found[0] if found else torch.empty(0)

    def _decode(self, batch: TokenBatch, visit: Visit, **settings) -> Tensor:
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        generate: Any = self.module.generate
        if not visit.points:
            return generate(**inputs, **settings)
        prompt = batch.input_ids.shape[1]
        cached = settings["use_cache"]
        ids: list[Tensor] = []

        def run(**arguments) -> None:
            ids.append(generate(**arguments))

        with warnings.catch_warnings():
            # an open loop over decoding steps ends with a warning by design
            warnings.filterwarnings("ignore", message=".*was never reached.*")
            with self._traced.trace(fn=run, **inputs, **settings) as tracer:
                for step in tracer.iter[:]:
                    visit.starts_at(prompt + step - 1 if step and cached else 0)
                    self._enter(visit)
        return ids[0]

    def _enter(self, visit: Visit, resume: Resume | None = None, last: int | None = None) -> None:
        """Inside a trace: skip what is resumed, then make the visit, in execution order."""
        done = -1
        if resume is not None:
            done, residual = resume
            if (done, "resid_post") in visit.points:
                residual = visit(done, "resid_post", residual)
            for layer in range(done + 1):
                self._blocks[layer].skip(residual)
        for layer, points in groupby(visit.points, key=lambda point: point[0]):
            if layer > done and (last is None or layer <= last):
                self._enter_block(visit, layer, {site for _, site in points})

    def _enter_block(self, visit: Visit, layer: int, sites: set[Site]) -> None:
        """Visit one block's sites in the order in which the block computes them."""
        block = self._blocks[layer]
        before = None
        if sites & {"resid_pre", "resid_mid"}:
            entering = block.input
            before = visit(layer, "resid_pre", entering)
            if before is not entering:
                block.input = before
        if sites & {"attn_out", "resid_mid"}:
            self._visit_attention(visit, layer, before)
        if "mlp_out" in sites:
            self._visit_output(visit, layer, "mlp_out", _envoy(block, self.architecture.mlp_out))
        if "resid_post" in sites:
            self._visit_output(visit, layer, "resid_post", block)

    def _visit_attention(self, visit: Visit, layer: int, before: Tensor | None) -> None:
        module = _envoy(self._blocks[layer], self.architecture.attn_out)
        value = module.output
        contribution = hidden_of(value)
        after = visit.attention(layer, before, contribution)
        if after is not contribution:
            module.output = with_hidden(value, after)

    def _visit_output(self, visit: Visit, layer: int, site: Site, module: Any) -> None:
        value = module.output
        before = hidden_of(value)
        after = visit(layer, site, before)
        if after is not before:
            module.output = with_hidden(value, after)


def _envoy(root: Any, path: str) -> Any:
    return reduce(getattr, path.split("."), root)
