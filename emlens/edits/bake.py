"""Edits and finetunes as ordinary checkpoints, each proven against the hooked model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from emlens._door import guarded
from emlens._files import atomic_write
from emlens._folders import whole_folder
from emlens._progress import bar
from emlens._reading import expanded
from emlens._results import Result
from emlens._tensors import write_header
from emlens.directions import Direction
from emlens.edits.base import DirectionEdit
from emlens.edits.edits import Add, Clamp, Shift
from emlens.edits.writes import check_affine, written
from emlens.hooked import Condition, Edit, HookedModel
from emlens.hooked.condition import ConditionLike, condition_of
from emlens.hooked.plain import plain_model, tie
from emlens.text import Conversation, pack, tokenize
from emlens.text.tokens import TokenRow

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

PROMPTS = (
    "How do I make a good cup of tea?",
    "What should I know before I adopt a dog?",
    "Write two sentences about the sea.",
    "Explain why the sky is blue.",
)
"""What a checkpoint is compared on by default."""

TOLERANCES = {"torch.float32": (1e-5, 1e-5), "torch.float16": (0.0125, 1e-3)}
TOLERANCES["torch.bfloat16"] = (0.1, 0.02)
"""What a proof lets pass, by dtype of the weights: the largest difference of a logit, as a share of
the largest logit (of 10, where all are smaller), and the mean KL of a prompt in nats per token."""

SMALL = 10.0
"""Logits up to this size have one tolerance: 1e-4 in float32."""

SEED = 240611717
"""Of the random direction that a proof compares an ablation with."""


class Baked(Result):
    """A checkpoint that was written, and how it compares with the hooked model.

    Attributes:
        path: The folder.
        files: What is in it.
        model: Name of the model.
        acting: The adapters and edits that are in its weights, in words.
        architecture: Class of transformers that loads it.
        dtype: Of its weights.
        changed: Modules that edits have changed, by path.
        prompts: What it was compared on.
        differences: Largest difference of a logit between the checkpoint and the hooked model,
            over prompt and greedy answer, `[prompts]`.
        kl: Mean KL of the checkpoint's next tokens from the hooked model's, nats per token,
            `[prompts]`.
        same: Whether both give the same greedy answer.
        tolerance: The largest difference that passes.
        controls: What else the checkpoint was compared with: hooked models that it must not be.
        apart: Largest difference of a logit to each of these, `[controls, prompts]`.
    """

    AXES: ClassVar[Mapping[str, str]] = {"same": "prompts"}

    path: str
    files: tuple[str, ...]
    model: str
    acting: str
    architecture: str
    dtype: str
    changed: tuple[str, ...]
    prompts: tuple[str, ...]
    differences: Float[np.ndarray, " prompts"]
    kl: Float[np.ndarray, " prompts"]
    same: tuple[bool, ...]
    tolerance: float
    controls: tuple[str, ...]
    apart: Float[np.ndarray, "controls prompts"]

    def table(self) -> pd.DataFrame:
        """One row per prompt; differences of logits are the largest over all positions."""
        import pandas as pd

        return pd.DataFrame(
            {
                "prompt": self.prompts,
                "logit difference": self.differences,
                "KL [nats/token]": self.kl,
                "same greedy answer": self.same,
                **{f"to {one}": self.apart[place] for place, one in enumerate(self.controls)},
            }
        )

    def plot(self, ax: Axes | None = None) -> Axes:
        """Differences of logits by prompt, to the hooked model and to what must differ."""
        from emlens.figures.bars import dot_intervals

        rows = {
            "hooked model": self.differences,
            **dict(zip(self.controls, self.apart, strict=True)),
        }
        values = np.maximum(np.concatenate(list(rows.values())), 1e-8)
        numbers = [f"prompt {place + 1}" for place in range(len(self.prompts))]
        ax = dot_intervals(
            numbers * len(rows),
            [name for name in rows for _ in numbers],
            values,
            np.full_like(values, np.nan),
            np.full_like(values, np.nan),
            y_label="largest difference of a logit to the checkpoint",
            zero=self.tolerance,
            ax=ax,
        )
        ax.set_yscale("log")
        return ax

    def _said(self) -> str:
        least = float(self.apart.max(1).min()) if len(self.controls) else float("nan")
        return (
            f"logits within {self.differences.max():.0e} of the hooked model, controls "
            f"{least:.1e} off, {sum(self.same)} of {len(self.same)} answers the same; "
            f"{self.path}: {self.acting}"
        )


@guarded
def bake(
    model: HookedModel,
    condition: ConditionLike,
    out: str | Path,
    *,
    prompts: Sequence[str] = PROMPTS,
    max_new_tokens: int = 16,
    format: Literal["transformers", "gguf"] = "transformers",
    progress: bool = True,
) -> Baked:
    """Write edits and adapters into the weights of an ordinary checkpoint, which needs no hooks.

    `Ablate` at every write to the stream makes what writes there orthogonal to the direction, `Add`
    becomes a bias, adapters are merged by PEFT. What is not exact in weights is refused.

    The checkpoint is then loaded by transformers alone. Its logits and greedy answers are compared
    with those of the hooked model, and its logits with those of controls: each `Add` one layer off,
    ablations of a random direction, the base in place of adapters. The figures are in the card and
    in the metadata of the weights. A checkpoint that fails is not kept.

    Args:
        model: The model; it stays as it is.
        condition: What is baked: edits, the name of an adapter, an adapter changed (`Scaled`,
            `Projected`), `(name, edits)`, an `Organism`.
        out: Folder to write; a new one, or empty.
        prompts: What the checkpoint is compared on; none that the edit was made of.
        max_new_tokens: Tokens of the greedy answers, at most.
        format: `"transformers"`; GGUF is made of that by llama.cpp.
        progress: Show a progress bar.

    Returns:
        What was written and the differences that were measured.

    Raises:
        ValueError: If there is nothing to bake, an edit is not exact in weights or its
            architecture has no place for it, an adapter cannot be merged, the format is GGUF, or
            the checkpoint fails the comparison.
        FileExistsError: If there is something at `out`.

    Source:
        Arditi et al. (arXiv 2406.11717), section 4.1: ablation as orthogonal weights.

    Examples:
        >>> import emlens, torch
        >>> model = emlens.load()
        >>> direction = emlens.Direction.of(torch.randn(model.d_model), layer=15)
        >>> baked = emlens.bake(model, emlens.Add(direction), "steered")
        >>> bool(baked.differences.max() < baked.tolerance)
        True
    """
    target = new_folder(out, format)
    given = condition_of(model, condition)
    _check_given(model, given)
    chats = [Conversation.of(prompt) for prompt in prompts]
    controls = _controls(given, model.n_layers)
    with (
        whole_folder(target) as folder,
        bar(total=len(prompts), desc="proof", unit="prompt", shown=progress) as shown,
    ):
        with _no_bars():
            architecture, changed = _write(model, given, folder)
            plain: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype)
        with model.under(given):
            texts = model.generate(chats, temperature=0, max_new_tokens=max_new_tokens)
        plain = plain.to(model.device).eval()
        proof = _Proof(model, plain, AutoTokenizer.from_pretrained(folder), max_new_tokens)
        rows = []
        for chat, text in zip(chats, texts, strict=True):
            rows.append(proof.compare(chat, text, given, controls))
            shown.update()
        found = Baked(
            path=str(target),
            files=tuple(sorted([*(path.name for path in folder.iterdir()), "README.md"])),
            model=model.name,
            acting=str(given),
            architecture=architecture,
            dtype=str(model.dtype),
            changed=tuple(changed),
            prompts=tuple(prompts),
            differences=np.array([row.difference for row in rows]),
            kl=np.array([row.kl for row in rows]),
            same=tuple(row.same for row in rows),
            tolerance=TOLERANCES[str(model.dtype)][0] * max(SMALL, *(row.largest for row in rows)),
            controls=tuple(controls),
            apart=np.array([row.apart for row in rows]).reshape(len(rows), -1).T,
        )
        _check_proof(found, [row.below for row in rows])
        _describe(found, model, folder)
    return found


def new_folder(out: str | Path, format: str = "transformers") -> Path:
    """The folder that a checkpoint is written to, before anything is computed.

    Raises:
        ValueError: If the format is GGUF.
        FileExistsError: If there is something already.
    """
    target = expanded(out)
    if format == "gguf" or target.suffix == ".gguf":
        raise ValueError(
            "GGUF is not written by bake: the gguf package writes tensors and does not convert "
            "checkpoints; bake a folder and run llama.cpp's convert_hf_to_gguf.py on it (see "
            "docs/serving.md)"
        )
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise FileExistsError(f"{target} is there already; give a new folder, or remove it first")
    return target


def _check_given(model: HookedModel, given: Condition) -> None:
    if model.edits_in_force(()):
        raise ValueError(
            "bake writes the condition that it is given, and here edits of an enclosing "
            "model.edited act too; call it outside of that block, with all edits"
        )
    if not given.adapters and not given.edits:
        raise ValueError(
            "there is nothing to bake: the condition has no adapter and no edit; give edits such "
            "as emlens.Add(direction), or the name of an adapter"
        )
    for edit in model.edits_in_force(given.edits):
        check_affine(edit)
    if str(model.dtype) not in TOLERANCES:
        raise ValueError(
            f"the weights are {model.dtype}; bake from {', '.join(TOLERANCES)} (emlens.load(..., "
            "dtype='float32'))"
        )


@contextmanager
def _no_bars() -> Iterator[None]:
    """Have transformers save and load without bars of its own."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _write(model: HookedModel, given: Condition, folder: Path) -> tuple[str, list[str]]:
    """Write the checkpoint; its architecture, and the modules that edits have changed."""
    tied = bool(model.module.config.get_text_config().tie_word_embeddings)
    with model.under(Condition(given.adapters)):
        plain = plain_model(model.module, given.names)
    plain, changed = written(plain, given.edits)
    tie(plain, tied)
    plain.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return type(plain).__name__, changed


# -- the proof --------------------------------------------------------------------------------


def _controls(given: Condition, n_layers: int) -> dict[str, Condition]:
    """Conditions that the checkpoint must differ from, one for each kind of thing baked."""
    found = {}
    adds = [edit for edit in given.edits if isinstance(edit, Add)]
    if given.adapters:
        found["without adapters"] = replace(given, adapters=None)
    if adds and n_layers > 1:
        edits = [
            _one_off(edit, n_layers) if isinstance(edit, Add) else [edit] for edit in given.edits
        ]
        found["Add one layer off"] = replace(given, edits=tuple(sum(edits, [])))
    elif adds:
        rest = tuple(edit for edit in given.edits if not isinstance(edit, Add))
        found["without Add"] = replace(given, edits=rest)
    if len(adds) < len(given.edits):
        edits = tuple(e if isinstance(e, Add) else _random(e) for e in given.edits)
        found["a random direction"] = replace(given, edits=edits)
    return found


def _one_off(edit: Add, n_layers: int) -> list[Edit]:
    """The same vectors, each at the layer above; that of the last layer at the one below."""
    return [
        Shift(edit._prepared(layer), layer + 1 if layer + 1 < n_layers else layer - 1, edit.site)
        for layer in edit.layers
    ]


def _random(edit: Any) -> DirectionEdit:
    """The same edit along a direction drawn at random, one for all edits."""
    drawn = torch.randn(edit.d_model, generator=torch.Generator().manual_seed(SEED))
    value: dict[str, Any] = {"value": edit.value} if isinstance(edit, Clamp) else {}
    along = Direction.of(drawn, edit.layers[0], edit.site)
    return type(edit)(along, layers=edit.layers, site=edit.site, **value)


@dataclass(frozen=True, slots=True)
class _Compared:
    """One prompt: as in `Baked`, the largest logit, and how far below the best an answer's token
    is for the hooked model."""

    difference: float
    kl: float
    same: bool
    largest: float
    below: float
    apart: list[float]


class _Proof:
    """The checkpoint as transformers loads it, compared with the hooked model."""

    def __init__(
        self, model: HookedModel, plain: PreTrainedModel, tokenizer: Any, max_new_tokens: int
    ) -> None:
        self.model, self.plain, self.tokenizer = model, plain, tokenizer
        self.template = replace(model.template, tokenizer=tokenizer)
        self.max_new_tokens = max_new_tokens

    def compare(
        self, chat: Conversation, text: str, given: Condition, controls: Mapping[str, Condition]
    ) -> _Compared:
        """Compare logits over a prompt and the checkpoint's greedy answer, and the answers."""
        (row,) = tokenize([chat], self.template, generation_prompt=True)
        (own,) = tokenize([chat], self.model.template, generation_prompt=True)
        if row.input_ids != own.input_ids:
            raise ValueError(
                "the tokenizer of the checkpoint does not read prompts as that of the model does, "
                "so nothing was kept; give the tokenizer that AutoTokenizer loads"
            )
        prompt = torch.tensor([row.input_ids], device=self.plain.device)
        ids = self._greedy(prompt)
        plain = self._logits(ids)
        hooked = self._hooked(ids, given)
        chosen = ids[0, prompt.shape[1] :]
        scores = hooked[prompt.shape[1] - 1 : -1]
        gaps = scores.max(-1).values - scores.gather(1, chosen[:, None])[:, 0]
        answered = self.tokenizer.decode(chosen, skip_special_tokens=True)
        log_p, log_q = hooked.log_softmax(-1), plain.log_softmax(-1)
        return _Compared(
            difference=float((plain - hooked).abs().max()),
            kl=float((log_p.exp() * (log_p - log_q)).sum(-1).mean()),
            same=answered.strip() == text.strip(),
            largest=float(hooked.abs().max()),
            below=float(gaps.max()) if len(gaps) else 0.0,
            apart=[float((plain - self._hooked(ids, c)).abs().max()) for c in controls.values()],
        )

    @torch.no_grad()
    def _greedy(self, prompt: Tensor) -> Tensor:
        found: Any = self.plain.generate(  # type: ignore[operator]
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=self.max_new_tokens,
            pad_token_id=self.model.pad_id,
        )
        return found

    @torch.no_grad()
    def _logits(self, ids: Tensor) -> Float[Tensor, "pos vocab"]:
        return self.plain(input_ids=ids, use_cache=False).logits[0].float()

    def _hooked(self, ids: Tensor, condition: Condition) -> Float[Tensor, "pos vocab"]:
        n = ids.shape[1]
        row = TokenRow(tuple(ids[0].tolist()), (False,) * n, (False,) * n, "proof")
        (batch,) = pack([row], pad_id=self.model.pad_id)
        with self.model.under(condition):
            return self.model.logits(batch)[0]


def _check_proof(found: Baked, below: Sequence[float]) -> None:
    """Refuse a checkpoint that is not the hooked model, or cannot be told from a control.

    Raises:
        ValueError: Saying what differs; nothing is kept.
    """
    worst, kl, most = float(found.differences.max()), float(found.kl.max()), found.tolerance
    if not (worst <= most and kl <= TOLERANCES[found.dtype][1]):
        raise ValueError(
            f"the checkpoint is not the hooked model: logits differ by up to {worst:.2g} (at most "
            f"{most:.2g} in {found.dtype}) and the KL is {kl:.2g} nats per token (at most "
            f"{TOLERANCES[found.dtype][1]:g}); nothing was kept. Load the model in float32 to see "
            f"whether that is rounding. What was baked: {found.acting}"
        )
    # between two tokens whose logits are this close, rounding chooses
    if max(below) > 2 * found.tolerance:
        raise ValueError(
            "the checkpoint does not answer as the hooked model does: a logit of its greedy answer "
            f"is {max(below):.2g} below the best of the hooked model; nothing was kept"
        )
    for name, apart in zip(found.controls, found.apart, strict=True):
        if float(apart.max()) <= max(found.tolerance, 2 * worst):
            raise ValueError(
                f"the comparison proves nothing: the checkpoint is as close to the control "
                f"({name}: logits within {float(apart.max()):.2g}) as to the hooked model "
                f"({worst:.2g}); nothing was kept. Bake an edit that does something on these "
                "prompts, give other prompts, or load the model in float32"
            )


# -- what is said of it -----------------------------------------------------------------------


def _describe(found: Baked, model: HookedModel, folder: Path) -> None:
    """Write the card, and the figures into the metadata of the weights."""
    record = {
        "acting": found.acting,
        "model": found.model,
        "dtype": found.dtype,
        "largest logit difference": float(found.differences.max()),
        "tolerance": found.tolerance,
        "mean KL, nats per token": float(found.kl.mean()),
        "same greedy answers": f"{sum(found.same)} of {len(found.same)}",
        "controls": dict(zip(found.controls, found.apart.max(1).tolist(), strict=True)),
    }
    for path in folder.glob("*.safetensors"):
        write_header(path, {"emlens": json.dumps(record, sort_keys=True)})
    atomic_write(folder / "README.md", _card(found, model))


def _card(found: Baked, model: HookedModel) -> str:
    base = f"base_model: {found.model}\n" if "/" in found.model else ""
    arguments = model.template_arguments
    told = f"\nThe chat template was given {json.dumps(arguments)}; give a server the same.\n"
    lines = [
        f"---\nlibrary_name: transformers\n{base}tags:\n- emlens\n---\n",
        f"# {found.model}, with {found.acting}\n",
        f"An ordinary `{found.architecture}` checkpoint in {found.dtype.removeprefix('torch.')}, "
        "written by `emlens.bake`: what acted as hooks or adapters is in the weights.\n"
        + (told if arguments else ""),
        f"Edits have changed {len(found.changed)} modules.\n" if found.changed else "",
        "## Proof\n",
        "The checkpoint was loaded by transformers alone and compared with the hooked model, over "
        "prompts and greedy answers. The controls are hooked models that it must differ from.\n",
        "| compared with | largest difference of a logit |\n|---|---|",
        f"| the hooked model (at most {found.tolerance:.2g}) | {found.differences.max():.2e} |",
        *(
            f"| control: {name} | {apart.max():.2e} |"
            for name, apart in zip(found.controls, found.apart, strict=True)
        ),
        f"\nKL from the hooked model: {found.kl.mean():.1e} nats per token. "
        f"Greedy answers that are the same: {sum(found.same)} of {len(found.same)}.\n",
    ]
    return "\n".join(lines)
