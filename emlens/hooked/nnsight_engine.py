"""The nnsight engine: reads and edits through nnsight's traces, attention left as it is."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from nnsight import NNsight
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from emlens.hooked.adapters import Weights
from emlens.hooked.hook_plan import Visit
from emlens.hooked.model import HookedModel, Resume
from emlens.hooked.remote.trace import envoy, walk, walk_steps
from emlens.text import TokenBatch

if TYPE_CHECKING:
    from peft import LoraConfig


class NNsightModel(HookedModel):
    """A hooked model on nnsight."""

    engine = "nnsight"

    def __init__(
        self,
        module: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        revision: str | None = None,
    ) -> None:
        super().__init__(module, tokenizer, name, revision)
        # the bare wrapper: batches come tokenised and padded, which the others would do again
        self._traced: Any = NNsight(module)

    def add_adapter(self, name: str, config: LoraConfig, weights: Weights | None = None) -> None:
        super().add_adapter(name, config, weights)
        self._traced = NNsight(self.module)  # a module that is traced may have been replaced

    def remove_adapter(self, name: str) -> None:
        super().remove_adapter(name)
        self._traced = NNsight(self.module)

    def _run(
        self, batch: TokenBatch, visit: Visit, last: int | None, resume: Resume | None = None
    ) -> Tensor:
        found: list[Tensor] = []
        with self._traced.trace(**self.architecture.inputs(batch)) as tracer:
            walk(self._traced, self.architecture, visit, resume, last)
            if last is None:
                found.append(envoy(self._traced, self.architecture.norm).output)
            tracer.stop()
        return found[0] if found else torch.empty(0)

    def _decode(self, batch: TokenBatch, visit: Visit, **settings) -> Tensor:
        inputs = self.architecture.prompt(batch)
        generate: Any = self.module.generate
        if not visit.points:
            return generate(**inputs, **settings)
        steps = (batch.input_ids.shape[1], settings["max_new_tokens"], settings["use_cache"])
        ids: list[Tensor] = []

        def run(**arguments) -> None:
            ids.append(generate(**arguments))

        with warnings.catch_warnings():
            # a loop over decoding steps warns where all answers end before it does
            warnings.filterwarnings("ignore", message=".*was never reached.*")
            with self._traced.trace(fn=run, **inputs, **settings) as tracer:
                walk_steps(tracer, self._traced, self.architecture, visit, steps)
        return ids[0]
