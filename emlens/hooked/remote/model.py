"""The nnsight engine without the weights: every forward pass runs on a server (NDIF)."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import nnsight
import torch
from nnsight import TransformersModel
from nnsight.intervention.backends.remote import RemoteError
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from emlens.hooked.edit import Edit, Formula, Where
from emlens.hooked.hook_plan import Pool, Visit, of_rows
from emlens.hooked.model import HookedModel, Resume
from emlens.hooked.remote.payload import by_value, carried, check_travels
from emlens.hooked.remote.trace import envoy, on_cpu, walk, walk_steps
from emlens.hooked.sites import Layers, Site, SiteName
from emlens.text import TokenBatch, pack
from emlens.text.template import settled
from emlens.text.tokens import TokenRow

# What a checkpoint's own generation defaults may set, to the effect that decoding is no longer
# plain; given as None, it is set aside on the server too.
_SET_ASIDE = (
    "repetition_penalty",
    "encoder_repetition_penalty",
    "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size",
    "sequence_bias",
    "bad_words_ids",
    "suppress_tokens",
    "begin_suppress_tokens",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "exponential_decay_length_penalty",
    "min_length",
    "min_new_tokens",
    "guidance_scale",
    "penalty_alpha",
    "prompt_lookup_num_tokens",
    "watermarking_config",
)


class RemoteModel(HookedModel):
    """A hooked model whose weights are on a server that runs nnsight's traces.

    The architecture is here, on the meta device, and nothing else. A call is one request per
    batch, so that large batches save time: the tokens, the edits and the pool go there, and what
    was asked for comes back, pooled where a pool is given. `residuals`, `hidden`, edits and
    `generate` work; what needs weights here (`unembed` and thus losses and KL, gradients,
    training) is refused. `dtype` is that of the checkpoint; a server may hold it in another.

    Attributes:
        remote: Where it runs: True (NDIF, or the host in nnsight's configuration), a host's URL,
            or `"local"`.
    """

    engine = "nnsight"

    def __init__(
        self,
        traced: TransformersModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        revision: str | None = None,
        remote: bool | str = True,
    ) -> None:
        module: Any = traced._module
        super().__init__(module, tokenizer, name, revision)
        self.remote = remote
        self._traced = traced
        found = self.architecture
        self._parts = SimpleNamespace(
            blocks=found.blocks,
            norm=found.norm,
            attn_out=found.attn_out,
            mlp_out=found.mlp_out,
            skips=found.skips,
            returns=found.returns,
            head=next(path for path, part in module.named_modules() if part is self._head),
            soft_cap=found.soft_cap,
            logit_scale=found.logit_scale,
        )

    @property
    def device(self) -> torch.device:
        """Where inputs start from and results arrive: the CPU."""
        return torch.device("cpu")

    # -- what is asked of the server ----------------------------------------------------------

    def residuals(
        self,
        batch: TokenBatch,
        layers: Layers,
        site: SiteName = "resid_post",
        pool: Pool | None = None,
        edits: Sequence[Edit] = (),
    ) -> dict[int, Tensor]:
        """Read the residual stream on the server; as `HookedModel.residuals`.

        `pool` runs there: it must be a pure function, with torch alone, and what it returns is
        all that comes back.

        Raises:
            TypeError: If `pool` or an edit needs what a server does not have.
        """
        if pool is not None:
            check_travels(pool, "the pool", "write the pool with torch alone")
        return super().residuals(batch, layers, site, pool, edits)

    def _pass(
        self, batch: TokenBatch, visit: Visit, last: int | None, resume: Resume | None = None
    ) -> Tensor:
        if not self.architecture.runs_whole(batch):
            raise ValueError(
                f"padded rows of {self.name} have other numbers than single ones; send rows of one "
                "length in a batch, or one at a time"
            )
        return self._run(batch, visit, last, resume)

    def _run(
        self, batch: TokenBatch, visit: Visit, last: int | None, resume: Resume | None = None
    ) -> Tensor:
        model, parts, plan = self._traced, self._parts, visit.plain()
        inputs = {
            "input_ids": batch.input_ids,
            "attention_mask": batch.attention_mask,
            "position_ids": batch.position_ids,
        }
        if resume is not None:
            resume = (resume[0], on_cpu(resume[1]))
        with self._sending(), model.trace(**inputs, use_cache=False, remote=self.remote) as tracer:
            walk(model, parts, plan, resume, last)
            hidden = envoy(model, parts.norm).output if last is None else None
            norms = of_rows(plan.norms, inputs["attention_mask"])
            found = nnsight.save(on_cpu({"read": plan.read, "norms": norms, "hidden": hidden}))
            tracer.stop()
        visit.read.update(found["read"])
        visit.norms.update(found["norms"])
        return torch.empty(0) if last is not None else found["hidden"]

    def _decode(self, batch: TokenBatch, visit: Visit, **settings) -> Tensor:
        model, parts, plan = self._traced, self._parts, visit.plain()
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        width = batch.input_ids.shape[1]
        steps = (width, settings["max_new_tokens"], settings["use_cache"])
        watch, *samplers = settings.pop("logits_processor")
        dice = None
        for sampler in samplers:
            dice = SimpleNamespace(
                uniforms=sampler.uniforms, temperature=sampler.temperature, top_p=sampler.top_p
            )
        plan.logits = []
        settings |= {"num_beams": 1, **dict.fromkeys(_SET_ASIDE)}
        # no comment may stand in here: nnsight counts the lines of a block that has blocks inside
        with self._sending(), model.generate(**settings, remote=self.remote) as tracer:
            with tracer.invoke(**inputs):
                walk_steps(tracer, model, parts, plan, steps, dice)
            with tracer.invoke():
                new, sums = tracer.result[:, width:], plan.logits
                found = nnsight.save(on_cpu({"new": new, "sums": sums, "norms": plan.norms}))
        visit.norms.update(found["norms"])
        ids = torch.cat([batch.input_ids, found["new"]], dim=1)
        for step, sums in enumerate(found["sums"]):
            watch.see(ids[:, : width + step], sums)
        return ids

    @contextmanager
    def _sending(self) -> Iterator[None]:
        """Serialise emlens' functions as source, and name what failed on the way."""
        import httpx
        from websocket import WebSocketException

        with by_value(), warnings.catch_warnings():
            # a loop over decoding steps warns where all answers end before it does
            warnings.filterwarnings("ignore", message=".*was never reached.*")
            try:
                yield
            except RemoteError as error:
                if isinstance(error.__cause__, httpx.HTTPError):
                    raise self._unreachable(error) from error
                raise
            except (OSError, WebSocketException, httpx.HTTPError) as error:
                if self.remote == "local":
                    raise
                raise self._unreachable(error) from error

    def _unreachable(self, error: Exception) -> ConnectionError:
        host = self.remote if isinstance(self.remote, str) else nnsight.CONFIG.API.HOST
        return ConnectionError(
            f"no answer for {self.name} from {host} ({type(error).__name__}: {error}). Look "
            "whether the host is up and serves this model (nnsight.status()), and whether your "
            "key is set (nnsight.login()); remote='local' tries the same request here, and "
            "without remote= the model is loaded here"
        )

    def edits_in_force(self, edits: Sequence[Edit]) -> tuple[Edit, ...]:
        return tuple(carried(edit) for edit in super().edits_in_force(edits))

    # -- what needs the weights ---------------------------------------------------------------

    def hidden(
        self,
        batch: TokenBatch,
        edits: Sequence[Edit] = (),
        resume: Resume | None = None,
        *,
        grad: bool = False,
    ) -> Tensor:
        """Return the hidden states after the final norm; as `HookedModel.hidden`.

        Raises:
            RuntimeError: If `grad` is set: no graph comes back from a server.
        """
        if grad:
            self._refuse("a gradient")
        return super().hidden(batch, edits, resume)

    def normalize(self, residual: Tensor) -> NoReturn:
        """Refuse: the final norm is on the server.

        Raises:
            RuntimeError: Always.
        """
        self._refuse("normalize")

    def unembed(self, hidden: Tensor) -> NoReturn:
        """Refuse: the LM head is on the server.

        Raises:
            RuntimeError: Always.
        """
        self._refuse("unembed (and every loss and KL, which rest on it)")

    def frozen(self) -> NoReturn:
        """Refuse: there are no weights here.

        Raises:
            RuntimeError: Always.
        """
        self._refuse("training")

    def check_adapter(self, name: str) -> NoReturn:
        """Refuse: an adapter's weights go with the model's.

        Raises:
            RuntimeError: Always.
        """
        self._refuse("an adapter")

    def _refuse(self, what: str) -> NoReturn:
        raise RuntimeError(
            f"{what} needs the weights, and those of {self.name} are on a server. residuals "
            "(pooled too), hidden, edits and generate work remotely; for the rest load the model "
            "without remote="
        )


def load_remote(
    source: str | Path,
    remote: bool | str,
    *,
    name: str,
    provenance: str | None = None,
    engine: str = "nnsight",
    dtype: torch.dtype | str = "auto",
    device_map: str | dict | None = None,
    revision: str | None = None,
    check: bool = True,
    template_arguments: Mapping[str, Any] | None = None,
    **model_options,
) -> RemoteModel:
    """Set up a model that runs on a server; `emlens.load(..., remote=...)` calls it.

    Args:
        source: Hub name; a folder with `remote="local"`.
        remote: Where it runs, see `RemoteModel`.
        name: Name of the model.
        provenance: What results name as its revision.
        engine: Only `"nnsight"` has servers.
        dtype: For `remote="local"` alone.
        device_map: For `remote="local"` alone.
        revision: Revision on the hub; part of what the server looks for.
        check: Send one small request and look at the answer.
        template_arguments: Variables of the chat template, as in `load`.
        **model_options: Passed on to nnsight's `TransformersModel`, e.g. `task` and
            `trust_remote_code`, which are part of what the server looks for.

    Raises:
        ValueError: If the name means nothing to a server, or an option is the server's to choose.
        ConnectionError: If the check finds no server.
        RuntimeError: If the check fails.
    """
    folder = Path(source).exists()
    if engine != "nnsight":
        raise ValueError(f"remote= runs with engine='nnsight' alone, not {engine!r}")
    if remote == "local":
        model_options |= {"dtype": dtype, "device_map": device_map}
    elif folder:
        raise ValueError(
            f"{name} is a folder here, which a server does not know; give the name that the model "
            "has on the hub, or remote='local' to run the same requests here"
        )
    elif dtype != "auto" or device_map is not None:
        raise ValueError(
            "dtype and device_map are for weights that are loaded here; with remote= the server "
            "has chosen them"
        )
    if folder:
        model_options.setdefault("task", "text-generation")
    tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
    # nnsight sets the padding side of the tokenizer it is given
    traced = TransformersModel(
        str(source), tokenizer=copy.copy(tokenizer), revision=revision, **model_options
    )
    module: Any = traced._module
    # where the ends of an answer are written down; a checkpoint may come without
    with suppress(OSError):
        module.generation_config = GenerationConfig.from_pretrained(
            source, revision=revision or "main"
        )
    model = RemoteModel(traced, tokenizer, name, provenance, remote)
    model._template = settled(tokenizer, template_arguments)
    if check:
        check_remote(model)
    return model


def check_remote(model: RemoteModel) -> None:
    """Send one small request, and look whether an edit changes every row of its batch.

    The batch holds two rows twice, and the second time they are edited.

    Raises:
        RuntimeError: Naming what was wrong with the answer.
    """
    generator = torch.Generator().manual_seed(0)
    lengths = (8, 5)
    ids = [torch.randint(0, model.n_vocab, (n,), generator=generator).tolist() for n in lengths]
    rows = [
        TokenRow(tuple(row), (nothing := (False,) * len(row)), nothing, f"{len(row)} tokens")
        for row in [*ids, *ids]
    ]
    (batch,) = pack(rows, pad_id=model.pad_id)
    edited = torch.tensor([place >= len(ids) for place in batch.index])
    vector = torch.randn(model.d_model, generator=generator)
    push = _Push(edited[:, None] * vector / vector.norm(), model.n_layers // 2)
    hidden = model.hidden(batch, [push]).float()
    expected = (*batch.input_ids.shape, model.d_model)
    if tuple(hidden.shape) != expected:
        raise RuntimeError(
            f"{model.name}: final hidden states came back with shape {tuple(hidden.shape)}, "
            f"expected {expected}; the architecture is not supported"
        )
    by_place = {place: hidden[i] for i, place in enumerate(batch.index)}
    for place, row in enumerate(ids):
        plain, moved = by_place[place], by_place[place + len(ids)]
        if not bool(torch.isfinite(plain).all()) or torch.equal(plain, moved):
            raise RuntimeError(
                f"{model.name}: an edit at layer {push.layer} left a row of {len(row)} tokens as "
                "it was, or the row is not finite; the hook does not reach the whole batch there"
            )


class _Push:
    """Adds a vector per row, as long as the residual is: what the check steers with."""

    site: Site = "resid_post"
    where: Where = "all"

    def __init__(self, units: Tensor, layer: int) -> None:
        self.layer, self.layers, self.units = layer, (layer,), units

    def delta(self, residual: Tensor, layer: int) -> Tensor:
        return _push(residual, self.units)

    def formula(self, layer: int) -> Formula:
        return _push, (self.units,)


def _push(residual: Tensor, units: Tensor) -> Tensor:
    return residual.float().norm(dim=-1, keepdim=True) * units.unsqueeze(1)
