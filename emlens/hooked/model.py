"""`HookedModel`: the one interface to a model whose residual stream can be read and edited."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from html import escape
from typing import TYPE_CHECKING, Any, Never, Unpack, cast

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from emlens._door import guarded
from emlens._guesses import no_attribute
from emlens._kinds import made_with
from emlens.hooked.conditioned import Conditioned
from emlens.hooked.edit import Edit, deepest_prefix
from emlens.hooked.finite import check_finite
from emlens.hooked.generation import Sampling, answer
from emlens.hooked.head import Head
from emlens.hooked.hook_plan import Pool, Visit
from emlens.hooked.options import BatchSettings, SamplingOptions
from emlens.hooked.positions import check_positions, max_positions
from emlens.hooked.rows import by_rows, to_end
from emlens.hooked.sites import Layers, Site, SiteName, check_layers
from emlens.hooked.state import evaluating, frozen_weights
from emlens.hooked.truth import input_device
from emlens.text import Conversation, Corpus, TokenBatch, pack, tokenize
from emlens.text.tokens import TokenRow, tokenize_documents

Resume = tuple[int, Float[Tensor, "batch pos d_model"]]
"""A layer, and the output of that layer to resume from: blocks `0 .. layer` do not run."""


class HookedModel(Conditioned, ABC):
    """A causal chat model whose residual stream can be read and edited while it runs.

    Made by `emlens.load` or `emlens.wrap`. The engines are its only implementations; everything
    else works with either. The attention mask and position ids are always passed, so results do not
    depend on padding side, batch size or KV cache.

    Attributes:
        name: Name of the model (hub name or folder name).
        revision: Revision on the hub, where known.
        tokenizer: Its tokenizer; emlens pads by itself and never changes it.
        engine: The library that places the hooks.
        sites: The sites that its blocks have.
        n_layers: Number of decoder blocks.
        d_model: Width of the residual stream.

    Examples:
        >>> model = emlens.load("smollm2-135m-instruct")
        >>> isinstance(model, emlens.HookedModel)
        True
        >>> (batch,) = model.batches(emlens.Conversation.of("How do I save money?"))
        >>> residual = model.residuals(batch, 15)[15]
        >>> residual.shape == (*batch.input_ids.shape, model.d_model)
        True
    """

    engine: str

    # -- what it is ---------------------------------------------------------------------------

    @property
    def n_vocab(self) -> int:
        return int(self._head.weight.shape[0])

    @property
    def max_positions(self) -> int | None:
        """How many tokens a text may have; None where the model sets no limit."""
        return max_positions(self.module.config)

    @property
    def device(self) -> torch.device:
        """The device of the inputs: the one that the embedding runs on."""
        return input_device(self.module)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.module.parameters()).dtype

    @property
    def _head(self) -> nn.Linear:
        return cast(nn.Linear, self.module.get_output_embeddings())

    @property
    def pad_id(self) -> int:
        """The padding token; it is never attended to and never counts."""
        embedding: Any = self.module.get_input_embeddings()
        n_tokens = getattr(embedding, "num_embeddings", self.n_vocab)
        for found in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            # a token that was added to the tokenizer alone has no row in the embedding
            if isinstance(found, int) and found < n_tokens:
                return found
        return 0

    # -- the interface ------------------------------------------------------------------------

    @guarded
    def batches(
        self,
        data: Sequence[Conversation] | Corpus,
        *,
        token_budget: int = BatchSettings.token_budget,
        max_tokens: int | None = None,
        truncate: bool = False,
    ) -> list[TokenBatch]:
        """Tokenise conversations or a corpus and pack them, length-sorted, to a token budget.

        Args:
            data: Conversations (through the chat template) or a corpus (raw text).
            token_budget: Padded tokens a batch may have.
            max_tokens: Tokens a conversation may have, or that documents are cut to.
            truncate: Cut a conversation that is too long instead of raising an error.

        Raises:
            ValueError: If a row is longer than `max_tokens` or than the model's positions.
        """
        if isinstance(data, Corpus):
            rows = tokenize_documents(data.documents, self.tokenizer, max_tokens=max_tokens)
        else:
            rows = tokenize(data, self.template, max_tokens=max_tokens, truncate=truncate)
        self.check_lengths(rows)
        return pack(rows, token_budget=token_budget, pad_id=self.pad_id)

    def check_lengths(self, rows: Sequence[TokenRow], new_tokens: int = 0) -> None:
        """Refuse rows that are longer than the model's positions, new tokens included.

        Raises:
            ValueError: Naming the longest row and its length.
        """
        check_positions(self, [row.name for row in rows], list(map(len, rows)), new_tokens)

    @torch.no_grad()
    @guarded
    def residuals(
        self,
        batch: TokenBatch,
        layers: Layers,
        site: SiteName = "resid_post",
        pool: Pool | None = None,
        edits: Sequence[Edit] = (),
    ) -> dict[int, Tensor]:
        """Read the residual stream; stops after the deepest layer, never runs the LM head.

        Args:
            batch: Tokens, `[batch, pos]`.
            layers: One layer, several, or `"all"`.
            site: Where in each block; names of TransformerLens also work.
            pool: Reduces each residual `[batch, pos, d_model]` on the device, in the hook.
            edits: Edits that act; a read at the same point sees their effect.

        Returns:
            `{layer: [batch, pos, d_model]}`, or what `pool` returns.

        Raises:
            ValueError: If a layer or site does not exist, or a row is longer than the model's
                positions.
            NonFiniteError: If a residual is not finite; condition, row and layer are named.
        """
        wanted = check_layers(layers, self.n_layers)
        at = self.check_site(site, wanted)
        active = self.edits_in_force(edits)
        self._check_length(batch)
        batch = batch.to(self.device)
        visit = Visit.of(batch, active, wanted, at, pool)
        with evaluating(self.module):
            self._pass(batch, visit, last=max(wanted))
        self._check_finite(batch, visit, active)
        return {layer: visit.read[layer] for layer in wanted}

    @guarded
    def hidden(
        self,
        batch: TokenBatch,
        edits: Sequence[Edit] = (),
        resume: Resume | None = None,
        *,
        grad: bool = False,
    ) -> Float[Tensor, "batch pos d_model"]:
        """Return the hidden states after the final norm, without running the LM head.

        Args:
            batch: Tokens, `[batch, pos]`.
            edits: Edits in force.
            resume: `(layer, residual)` with the unedited output of that layer; blocks
                `0 .. layer` are skipped. An edit at `resid_post` of that layer still acts.
            grad: Keep the graph, for the gradient of an edit's tensors.

        Raises:
            ValueError: If an edit lies below the layer resumed from, the residual's shape does
                not fit the batch, or a row is longer than the model's positions.
            NonFiniteError: If they are not finite; condition and row are named.
        """
        active = self.edits_in_force(edits)
        if resume is not None:
            self._check_resume(batch, active, resume)
        self._check_length(batch)
        batch = batch.to(self.device)
        with torch.set_grad_enabled(grad), evaluating(self.module):
            visit = Visit.of(batch, active)
            hidden = self._pass(batch, visit, None, resume)
        self._check_finite(batch, visit, active, hidden)
        return hidden

    def normalize(self, residual: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_model"]:
        """Return residuals after the final norm: what `unembed` takes."""
        norm = self.module.get_submodule(self.architecture.norm)
        with evaluating(self.module):
            return norm(residual.to(self.dtype))

    def unembed(self, hidden: Float[Tensor, "n d_model"]) -> Float[Tensor, "n vocab"]:
        """Return the logits of final hidden states in fp32, soft cap and scale included.

        Uses the LM head of the adapters that act now; `head` keeps one for later.
        """
        head = self._head
        placed = hidden.to(head.weight.dtype if head.weight.is_meta else head.weight)
        return self.architecture.finish_logits(head(placed))

    @guarded
    @torch.no_grad()
    def logits(
        self, batch: TokenBatch, edits: Sequence[Edit] = ()
    ) -> Float[Tensor, "batch pos vocab"]:
        """Return the logits at every position, in fp32.

        This takes `batch * pos * vocab * 4` bytes. Measures run the head in chunks instead.

        Args:
            batch: Tokens, `[batch, pos]`, as `batches` makes them.
            edits: Edits in force.

        Examples:
            >>> import emlens
            >>> model = emlens.load()
            >>> (batch,) = model.batches(["How do I save money?"])
            >>> model.logits(batch).shape[-1] == model.n_vocab
            True
        """
        hidden = self.hidden(batch, edits)
        logits = self.unembed(rearrange(hidden, "batch pos d -> (batch pos) d"))
        return rearrange(logits, "(batch pos) vocab -> batch pos vocab", batch=len(hidden))

    @guarded
    def generate(
        self,
        conversations: Sequence[Conversation],
        edits: Sequence[Edit] = (),
        *,
        seed: int | Sequence[int] = 0,
        batch_tokens: int = 4096,
        use_cache: bool = True,
        continue_final_message: bool = False,
        **options: Unpack[SamplingOptions],
    ) -> list[str]:
        """Answer each conversation, batched, with edits acting at every step.

        Args:
            conversations: Prompts; each ends with a user message, or with a begun answer.
            edits: Edits that act, on prompt and generated tokens according to their `where`.
            seed: Each answer has its own random stream, from this seed and its index in
                `conversations`; or from its own seed if one per conversation is given.
            batch_tokens: Padded tokens of a batch, answers included.
            use_cache: Use the KV cache. Without it every step runs the whole sequence.
            continue_final_message: Continue the answers that conversations end with, instead of
                raising an error.
            **options: See `SamplingOptions`.

        Returns:
            The generated text; for a continued answer, only the new part. If the template opens the
            thinking, the answer begins with `<think>`.

        Raises:
            ValueError: If a conversation ends with an answer and `continue_final_message` is off, a
                prompt leaves no room for `max_new_tokens` in the model's positions, or a setting is
                out of range.
            NonFiniteError: If logits are not finite; condition and conversation are named.
        """
        sampling = Sampling(seed=seed, use_cache=use_cache, **options)
        answers = answer(self, conversations, edits, sampling, batch_tokens, continue_final_message)
        return [found.text for found in answers]

    def head(self) -> Head:
        """The LM head that acts now, for hidden states computed now."""
        return Head(self)

    @contextmanager
    def frozen(self) -> Iterator[HookedModel]:
        """Switch off the gradients of all weights inside the block."""
        with frozen_weights(self.module):
            yield self

    def prefix(self, batch: TokenBatch, layers: Layers) -> dict[int, Tensor]:
        """Return `resid_post` of `layers` as if no edit were in force: what `resume` takes.

        Valid at or below `prefix_layer`, where the edits have not acted yet.
        """
        before, self._edits = self._edits, ()
        try:
            return self.residuals(batch, layers)
        finally:
            self._edits = before

    def prefix_layer(self, edits: Sequence[Edit]) -> int | None:
        """The deepest layer whose output is the same with and without the edits in force.

        None for no edits, -1 when the first block is already affected.
        """
        return deepest_prefix(self.edits_in_force(edits))

    def _pass(
        self, batch: TokenBatch, visit: Visit, last: int | None, resume: Resume | None = None
    ) -> Tensor:
        """Run a batch at once if that gives the same numbers as its rows alone, else row by row."""
        alone = self.architecture.norm_runs == 1 or last is not None
        run = self._run if alone else partial(to_end, self)
        if self.architecture.runs_whole(batch):
            return run(batch, visit, last, resume)
        return by_rows(run, batch, visit, last, resume)

    # -- what an engine provides --------------------------------------------------------------

    @abstractmethod
    def _run(
        self, batch: TokenBatch, visit: Visit, last: int | None, resume: Resume | None = None
    ) -> Tensor:
        """Run a forward pass with `visit`; stop after block `last`, or after the final norm."""

    @abstractmethod
    def _decode(self, batch: TokenBatch, visit: Visit, **settings) -> Tensor:
        """Generate from a left-padded batch with `visit` at every step; token ids."""

    def _lacks(self, site: Site) -> str:
        """Why the engine cannot reach a site in every block; empty where it can."""
        return self.architecture.missing.get(site, "") if site != "resid_mid" else ""

    # -- checks -------------------------------------------------------------------------------

    def _check_length(self, batch: TokenBatch) -> None:
        limit = self.max_positions
        if limit is not None and batch.shape[1] > limit:
            check_positions(self, batch.names, batch.attention_mask.sum(1).tolist())

    def _check_finite(
        self,
        batch: TokenBatch,
        visit: Visit,
        edits: Sequence[Edit],
        hidden: Tensor | None = None,
    ) -> None:
        values = visit.found()
        if hidden is not None:
            values["the final hidden state of {}"] = hidden.detach().sum(-1, dtype=torch.float32)
        condition = replace(self.condition_in_force, edits=tuple(edits))
        check_finite(self, values, batch.names, batch.mask("all"), condition)

    def _check_resume(self, batch: TokenBatch, edits: Sequence[Edit], resume: Resume) -> None:
        layer, residual = resume
        check_layers(layer, self.n_layers)
        expected = (*batch.input_ids.shape, self.d_model)
        if tuple(residual.shape) != expected:
            raise ValueError(
                f"the residual to resume from has shape {tuple(residual.shape)}; "
                f"this batch needs {expected}"
            )
        prefix = deepest_prefix(edits)
        if prefix is not None and prefix < layer:
            raise ValueError(
                f"cannot resume after layer {layer}: an edit acts before it; resume after "
                f"layer {prefix} or below"
            )

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Never:
            raise AttributeError(no_attribute(self, name))

    def __call__(self, *_: object, **__: object) -> Never:
        raise TypeError(
            "a hooked model is not called itself; model.generate(conversations) answers, "
            "model.logits(batch) runs a batch of model.batches(conversations)"
        )

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.name!r}, n_layers={self.n_layers}, "
            f"d_model={self.d_model}, n_vocab={self.n_vocab}, dtype={self.dtype}, "
            f"device={self.device})"
        )

    def _repr_html_(self) -> str:
        facts = {
            "engine": self.engine,
            "layers": self.n_layers,
            "d_model": self.d_model,
            "vocabulary": self.n_vocab,
            "dtype": str(self.dtype),
            "device": str(self.device),
            "sites": ", ".join(self.sites),
        }
        rows = "".join(f"<tr><th>{k}</th><td>{escape(str(v))}</td></tr>" for k, v in facts.items())
        return f"<table><caption>{escape(self.name)}</caption>{rows}</table>"


made_with(HookedModel, "make one with emlens.load(name) or emlens.wrap(model)")
