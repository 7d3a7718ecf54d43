"""Every architecture on every engine against plain PyTorch hooks.

`python -m tests.hooked.zoo [names] [--engine E] [--out FILE]`: each architecture in a process of
its own. The oracle below runs one unpadded row at a time with torch hooks on the `transformers`
model, and finds decoder layers, attention and MLP by itself; nothing of it is emlens'. Each check
ends in one of four ways: right (at most 2e-4 off), refused (a sentence of emlens'), silent (a
larger difference and no word) or foreign (an error from inside of a library).
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

# Read when the libraries are imported. No model reaches for the network, and no library installs
# what it misses: TransformerLens' own boot does, with pip.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("PIP_NO_INDEX", "1")
os.environ.setdefault("UV_OFFLINE", "1")

import torch
from torch import Tensor, nn

import emlens
from emlens import Ablate, Add, Clamp, Direction, HookedModel
from emlens.edits import Shift
from emlens.hooked.load import ENGINES
from emlens.hooked.sites import SITES
from emlens.text import Conversation, TokenBatch, pack, tokenize
from emlens.text.tokens import TokenRow
from tests.support.adapters import peft_model
from tests.support.architectures import MODELS, build
from tests.support.tokenizers import chatml_tokenizer

TOLERANCE = 2e-4
TIME_LIMIT = 300
Parts = tuple[str, str, float]
"""Attention and MLP of a block by path, and the factor on what they add."""
Change = Callable[[Tensor], Tensor]
Changes = dict[tuple[int, str], Change]


# -- the oracle: plain hooks, one row at a time ------------------------------------------------


@dataclass
class Seen:
    """What a pass over one row showed: `{site: [layer]}`, each `[pos, d_model]`, and logits."""

    sites: dict[str, list[Tensor]] = field(default_factory=lambda: {s: [] for s in SITES})
    logits: Tensor = field(default_factory=lambda: torch.empty(0))


class Oracle:
    """A model under plain hooks; its decoder layers are the lists of modules that text runs."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.blocks = self._find_blocks()
        self.parts = [self._find_parts(block) for block in self.blocks]
        if None in self.parts:
            self.parts = [None] * len(self.blocks)
        self.parallel = self._is_parallel() if self.parts[0] else False

    def run(self, ids: list[int], changes: Changes | None = None, grad: bool = False) -> Seen:
        seen = Seen()
        with self.hooked(changes or {}, seen), torch.set_grad_enabled(grad):
            seen.logits = self.module(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        for before, added in zip(seen.sites["resid_pre"], seen.sites["attn_out"], strict=False):
            seen.sites["resid_mid"].append(before + added)
        return seen

    def generate(self, ids: list[int], n: int, changes: Changes) -> list[int]:
        from transformers import GenerationConfig

        self.module.generation_config = GenerationConfig()
        given = torch.tensor([ids])
        with self.hooked(changes, None), torch.no_grad():
            found = self.module.generate(
                input_ids=given,
                attention_mask=torch.ones_like(given),
                max_new_tokens=n,
                do_sample=False,
                pad_token_id=self.module.config.get_text_config().pad_token_id,
                eos_token_id=self.module.config.get_text_config().eos_token_id,
            )
        return found[0, len(ids) :].tolist()

    @contextmanager
    def hooked(self, changes: Changes, seen: Seen | None) -> Iterator[None]:
        entering: dict[int, Tensor] = {}
        handles = []

        def changed(i: int, site: str, value: Tensor, seen_as: Tensor | None = None) -> Tensor:
            change = changes.get((i, site))
            return (
                value if change is None else value + change(value if seen_as is None else seen_as)
            )

        def before(i: int) -> Callable:
            def hook(_, args, kwargs):
                given = args[0] if args else kwargs["hidden_states"]
                if seen is not None:
                    seen.sites["resid_pre"].append(given[0])
                entering[i] = changed(i, "resid_pre", given)
                if args:
                    return (entering[i], *args[1:]), kwargs
                return (), kwargs | {"hidden_states": entering[i]}

            return hook

        def after(i: int, site: str, factor: float = 1.0) -> Callable:
            def hook(_, __, output):
                given = output[0] if isinstance(output, tuple) else output
                # experts may have laid all rows behind each other
                value = factor * given.reshape(entering[i].shape)
                if seen is not None:
                    seen.sites[site].append(value[0].clone())
                value = changed(i, site, value)
                if site == "attn_out":
                    value = changed(i, "resid_mid", value, entering[i] + value)
                value = (value / factor).reshape(given.shape)
                return (value, *output[1:]) if isinstance(output, tuple) else value

            return hook

        for i, block in enumerate(self.blocks):
            handles.append(block.register_forward_pre_hook(before(i), with_kwargs=True))
            parts = self.parts[i] if hasattr(self, "parts") else None
            for path, site in zip(
                parts[:2] if parts else (), ("attn_out", "mlp_out"), strict=False
            ):
                part = block.get_submodule(path)
                handles.append(part.register_forward_hook(after(i, site, parts[2])))
            handles.append(block.register_forward_hook(after(i, "resid_post")))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def _find_blocks(self) -> list[nn.Module]:
        """The outermost list of modules of which each runs once and keeps the width."""
        lists = {
            path: part for path, part in self.module.named_modules()
            if isinstance(part, nn.ModuleList) and len(part) > 1
        }  # fmt: skip
        ran: dict[int, list[torch.Size]] = {}
        handles = [
            one.register_forward_hook(lambda one, _, out: ran.setdefault(id(one), []).append(
                (out[0] if isinstance(out, tuple) else out).shape))
            for part in lists.values() for one in part
        ]  # fmt: skip
        self.module(input_ids=torch.tensor([[5, 6, 7]]), use_cache=False)
        for handle in handles:
            handle.remove()
        fits = [
            path for path, part in lists.items()
            if all(len(ran.get(id(one), ())) == 1 and ran[id(one)][0][:2] == (1, 3) for one in part)
        ]  # fmt: skip
        return list(lists[min(fits, key=lambda path: path.count("."))])

    @torch.no_grad()
    def _find_parts(self, block: nn.Module) -> Parts | None:
        """Two parts of a block, one after the other, whose outputs add up to what it adds.

        The outermost such pair, up to one factor on both: a block may add the residual inside of
        what it is made of, and may scale what it adds.
        """
        outputs: dict[str, list[Tensor]] = {}
        ends: list[Tensor] = []

        def keep(name: str) -> Callable:
            def hook(_, __, output):
                value = output[0] if isinstance(output, tuple) and output else output
                if isinstance(value, Tensor) and value.is_floating_point():
                    outputs.setdefault(name, []).append(value.clone())

            return hook

        def both(_, args, kwargs, output):
            ends.append((args[0] if args else kwargs["hidden_states"]).clone())
            ends.append((output[0] if isinstance(output, tuple) else output).clone())

        handles = [
            part.register_forward_hook(keep(name)) for name, part in block.named_modules() if name
        ]
        handles.append(block.register_forward_hook(both, with_kwargs=True))
        self.module(input_ids=torch.tensor([[9, 8, 7, 6, 5]]), use_cache=False)
        for handle in handles:
            handle.remove()
        added = ends[1] - ends[0]
        once = {n: found[0] for n, found in outputs.items() if len(found) == 1}
        width, size = added.shape[-1], added.numel()
        names = [n for n, v in once.items() if v.numel() == size and v.shape[-1] == width]
        pairs: list[Parts] = []
        for first, second in itertools.combinations(names, 2):
            total = (once[first].flatten() + once[second].flatten()).reshape(added.shape)
            factor = round(float((total * added).sum() / (total * total).sum()), 6)
            if torch.allclose(factor * total, added, atol=1e-5):
                pairs.append((first, second, factor))
        return min(pairs, key=lambda pair: pair[0].count(".") + pair[1].count("."), default=None)

    def _is_parallel(self) -> bool:
        ids = [9, 8, 7, 6, 5]
        plain = self.run(ids).sites["mlp_out"][1]
        moved = self.run(ids, {(1, "attn_out"): lambda x: torch.ones_like(x)}).sites["mlp_out"][1]
        return torch.equal(plain, moved)


# -- one architecture on one engine ------------------------------------------------------------


def direction(width: int, site: str, layer: int) -> Direction:
    vector = torch.randn(width, generator=torch.Generator().manual_seed(3))
    return Direction.of(2 * vector / vector.norm(), layer, site)


def ablate(unit: Tensor, value: float = 0.0) -> Change:
    return lambda x: (value - x @ unit)[..., None] * unit


class Trial:
    """The rows, the model and the oracle of one architecture on one engine."""

    def __init__(self, name: str, engine: str, brought: Any = None) -> None:
        self.tokenizer = chatml_tokenizer()
        self.module = brought.get_base_model() if brought is not None else build(name)
        self.oracle = Oracle(self.module)
        self.model: HookedModel = emlens.wrap(
            brought if brought is not None else self.module,
            self.tokenizer,
            engine=engine,
            name=name,
        )
        self.middle = self.model.n_layers // 2
        generator = torch.Generator().manual_seed(7)
        self.rows = []
        for n in (13, 4, 9):
            ids = torch.randint(5, len(self.tokenizer) - 1, (n,), generator=generator).tolist()
            response = tuple(i >= n // 2 for i in range(n))
            self.rows.append(TokenRow(tuple(ids), response, response, f"row of {n}"))

    def add(self, site: str, layer: int) -> tuple[Add, Changes]:
        made = direction(self.model.d_model, site, layer)
        return Add(made), {(layer, site): lambda x: made.vector.expand_as(x)}

    def batches(self) -> Iterator[list[TokenBatch]]:
        yield [pack([row])[0] for row in self.rows]
        for side in ("right", "left"):
            yield pack(self.rows, padding_side=side, pad_id=self.model.pad_id)

    def gap(self, run: Callable[[TokenBatch], Tensor], expected: list[Tensor]) -> float:
        """Largest difference of `run(batch)`, `[batch, pos, ...]`, from each row's own."""
        worst = 0.0
        for batches in self.batches():
            for n, batch in enumerate(batches):
                values, real = run(batch).detach(), batch.mask("all")
                for i, place in enumerate(batch.index):
                    theirs = expected[place if len(batches) == 1 else n]
                    ours = values[i][real[i]]
                    if ours.shape != theirs.shape or not torch.isfinite(ours).all():
                        return float("inf")
                    worst = max(worst, float((ours - theirs.detach()).abs().max()))
        return worst

    def logits(self, *edits: Any, resume: int | None = None) -> Callable[[TokenBatch], Tensor]:
        def run(batch: TokenBatch) -> Tensor:
            at = None
            if resume is not None:
                at = resume, self.model.residuals(batch, resume)[resume]
            return self.model.unembed(self.model.hidden(batch, edits, at))

        return run

    def under(self, changes: Changes) -> list[Tensor]:
        return [self.oracle.run(list(row.input_ids), changes).logits for row in self.rows]

    def later_tokens_matter(self) -> bool:
        """Whether the model's own logits of a token change with what follows it."""
        ids = list(self.rows[0].input_ids)
        begun, whole = self.oracle.run(ids[:8]).logits, self.plain[0].logits[:8]
        return not torch.allclose(begun, whole, atol=1e-3)

    @cached_property
    def plain(self) -> list[Seen]:
        return [self.oracle.run(list(row.input_ids)) for row in self.rows]


def check_logits(on: Trial) -> float:
    return on.gap(on.logits(), [seen.logits for seen in on.plain])


def check_read(on: Trial, site: str) -> float:
    if site == "resid_mid" and on.oracle.parallel or not on.plain[0].sites[site]:
        on.model.residuals(pack([on.rows[0]])[0], "all", site)
        return float("inf")  # granted, and there is no such place

    def read(batch: TokenBatch) -> Tensor:
        found = on.model.residuals(batch, "all", site)
        return torch.stack([found[layer] for layer in sorted(found)], dim=2)

    return on.gap(read, [torch.stack(seen.sites[site], dim=1) for seen in on.plain])


def check_edits(on: Trial, site: str) -> float:
    """Add, Ablate and Clamp at the middle layer, and at the first and last."""
    worst = 0.0
    made = direction(on.model.d_model, site, on.middle)
    unit = made.unit().vector
    layers = (0, on.middle, on.model.n_layers - 1)
    edit, changes = on.add(site, on.middle)
    trials = [(edit, changes)]
    trials.append((Clamp(made, value=1.5), {(on.middle, site): ablate(unit, 1.5)}))
    trials.append((Ablate(made, layers=layers), {(i, site): ablate(unit) for i in layers}))
    for edit, changes in trials:
        worst = max(worst, on.gap(on.logits(edit), on.under(changes)))
    return worst


def check_masks(on: Trial) -> float:
    worst = 0.0
    for where in ("prompt", "response"):
        expected = []
        for row in on.rows:
            response = torch.tensor(row.response)
            acts = ~response
            if where == "response":
                acts = response.clone()
                acts[:-1] |= response[1:]
            edit, changes = on.add("resid_post", on.middle)
            ((place, change),) = changes.items()
            masked = {place: lambda x, acts=acts, change=change: change(x) * acts[:, None]}
            expected.append(on.oracle.run(list(row.input_ids), masked).logits)
        made = Add(edit.direction, where=where)
        worst = max(worst, on.gap(on.logits(made), expected))
    return worst


def check_generation(on: Trial) -> float:
    """The share of greedy answers that differ from those of plain `generate` under hooks."""
    prompts = [Conversation.of(t) for t in ("how", "tell me a story about rain", "what now")]
    edit, changes = on.add("resid_post", on.middle)
    expected = [
        on.tokenizer.decode(
            on.oracle.generate(list(row.input_ids), 6, changes), skip_special_tokens=True
        )
        for row in tokenize(prompts, on.tokenizer, generation_prompt=True)
    ]
    found = []
    for cache, size in ((True, 4096), (True, 1), (False, 4096)):
        if not cache and on.later_tokens_matter():
            continue  # asked for below, where it is to be refused
        found.append(
            on.model.generate(
                prompts, [edit], max_new_tokens=6, temperature=0, use_cache=cache, batch_tokens=size
            )
        )
    wrong = [a != b for answers in found for a, b in zip(answers, expected, strict=True)]
    return sum(wrong) / len(wrong)


def check_resume(on: Trial) -> float:
    worst = 0.0
    for layer in (on.middle, on.model.n_layers - 1):
        edit, changes = on.add("resid_post", layer)
        worst = max(worst, on.gap(on.logits(edit, resume=layer), on.under(changes)))
    return worst


def check_gradient(on: Trial) -> float:
    """Of the summed log-probability of a token, with respect to an added vector."""
    plain = torch.zeros(on.model.d_model, requires_grad=True)
    for row in on.rows:
        changes: Changes = {(on.middle, "resid_post"): lambda x: plain.expand_as(x)}
        logits = on.oracle.run(list(row.input_ids), changes, grad=True).logits
        logits.log_softmax(-1)[:, 7].sum().backward()
    on.module.zero_grad()
    expected = plain.grad
    assert expected is not None
    worst = 0.0
    for batches in on.batches():
        vector = torch.zeros(on.model.d_model, requires_grad=True)
        for batch in batches:
            with on.model.frozen():
                hidden = on.model.hidden(batch, [Shift(vector, on.middle)], grad=True)
                logits = on.model.unembed(hidden[batch.mask("all")])
                logits.log_softmax(-1)[:, 7].sum().backward()
        assert vector.grad is not None
        worst = max(worst, float((vector.grad - expected).abs().max() / expected.abs().max()))
    return worst


def check_adapter(on: Trial) -> float:
    """LoRA at the linear modules that write into the stream, against PEFT's own model."""
    linear = {
        path.rpartition(".")[2]
        for block in on.oracle.blocks
        for path, part in block.named_modules()
        if (isinstance(part, nn.Linear) or type(part).__name__ == "Conv1D") and "expert" not in path
    }
    # PEFT takes none where Mamba writes
    names = (linear & _WRITERS) or (linear & {"in_proj", "kv_proj"})
    fan = any(type(part).__name__ == "Conv1D" for part in on.module.modules())
    made = peft_model(
        build(on.model.name), r=2, lora_alpha=4, target_modules=sorted(names), fan_in_fan_out=fan
    )
    its = Trial(on.model.name, on.model.engine, made)
    worst = its.gap(its.logits(), its.under({}))
    with its.model.adapter(None):
        return max(worst, its.gap(its.logits(), [seen.logits for seen in on.plain]))


_WRITERS = frozenset(
    (
        "output",
        "o_proj",
        "down_proj",
        "c_proj",
        "fc2",
        "dense",
        "dense_4h_to_h",
        "fc_out",
        "wo",
    )
)

CHECKS: dict[str, Callable[[Trial], float]] = {
    "logits": check_logits,
    **{f"read {site}": lambda on, site=site: check_read(on, site) for site in SITES},
    **{f"edit {site}": lambda on, site=site: check_edits(on, site) for site in SITES},
    "masks": check_masks,
    "generate": check_generation,
    "resume": check_resume,
    "gradient": check_gradient,
    "adapter": check_adapter,
}


# -- outcomes ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """How one check of one architecture on one engine ended."""

    model: str
    engine: str
    check: str
    kind: str
    worst: float = 0.0
    said: str = ""


def outcome_of(model: str, engine: str, check: str, run: Callable[[], float]) -> Outcome:
    try:
        worst = run()
    except Exception as error:
        said = f"{type(error).__name__}: {error}".replace("\n", " ")
        place = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        own = Path(emlens.__file__).parent in place.parents
        kind = "refused" if own and isinstance(error, _REFUSALS) else "foreign"
        if kind == "foreign":
            said += f" [{place.name}]"
        return Outcome(model, engine, check, kind, said=said)
    return Outcome(model, engine, check, "right" if worst <= TOLERANCE else "silent", worst)


_REFUSALS = (ValueError, TypeError, RuntimeError, NotImplementedError)


def try_model(name: str, engine: str) -> list[Outcome]:
    """All checks of one architecture on one engine; a model that is refused has one outcome."""
    made: list[Trial] = []

    def load() -> float:
        made.append(Trial(name, engine))
        return 0.0

    warned: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = outcome_of(name, engine, "load", load)
        warned += [str(one.message) for one in caught if str(one.message).startswith(name)]
    outcomes = [
        Outcome(name, engine, "load", loaded.kind, loaded.worst, loaded.said or "; ".join(warned))
    ]
    if made:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outcomes += [
                outcome_of(name, engine, check, lambda run=run: run(made[0]))
                for check, run in CHECKS.items()
            ]
    return outcomes


def run_apart(name: str, engines: list[str]) -> list[Outcome]:
    """`try_model` in a process of its own, so that no crash and no hang ends the run."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "outcomes"
        path.touch()
        child = _PROCESSES.Process(target=_child, args=(name, engines, str(path)))
        child.start()
        child.join(TIME_LIMIT)
        late = child.is_alive()
        if late:
            child.kill()
            child.join()
        found = [Outcome(**json.loads(line)) for line in path.read_text("utf-8").splitlines()]
    end = f"still running after {TIME_LIMIT} seconds" if late else f"exit code {child.exitcode}"
    for engine in engines:
        if late or not any(one.engine == engine for one in found):
            found.append(Outcome(name, engine, "load", "foreign", said=end))
    return found


# forked from a process that has imported everything once
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(
    ["emlens", "peft", "nnsight", "emlens.hooked.transformer_lens_engine"]
)


def _child(name: str, engines: list[str], path: str) -> None:
    for engine in engines:
        outcomes = try_model(name, engine)
        with open(path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(vars(one)) + "\n" for one in outcomes)


# -- the table ---------------------------------------------------------------------------------

_COLUMNS = {
    "logits": ("logits",),
    **{site: (f"read {site}", f"edit {site}") for site in SITES},
    **{one: (one,) for one in ("masks", "generate", "resume", "gradient", "adapter")},
}


def table(outcomes: list[Outcome]) -> tuple[list[str], list[str]]:
    """One row per architecture and engine, with the worst difference of each feature; and notes."""
    by: dict[tuple[str, str], dict[str, Outcome]] = {}
    for one in outcomes:
        by.setdefault((one.model, one.engine), {})[one.check] = one
    rows, notes = [], []
    for (model, engine), checks in by.items():
        if checks["load"].kind != "right":
            cells = [checks["load"].kind] + [""] * (len(_COLUMNS) - 1)
        else:
            found = ([checks[c] for c in names if c in checks] for names in _COLUMNS.values())
            cells = [_cell(one) for one in found]
        rows.append(f"| {model} | {engine} | " + " | ".join(cells) + " |")
        said = dict.fromkeys(one.said for one in checks.values() if one.said)
        notes += [f"- {model}, {engine}: {sentence}" for sentence in said]
    return rows, notes


def _cell(found: list[Outcome]) -> str:
    kinds = {one.kind for one in found}
    worst = max((one.worst for one in found), default=0.0)
    if "foreign" in kinds:
        return "**foreign**"
    if "silent" in kinds:
        return f"**silent {worst:.0e}**"
    if "refused" in kinds:
        return "refused"
    return f"{worst:.0e}" if worst else "0"


_PAGE = """# Models

Which models emlens runs, and how far its numbers are from the model's own. `make zoo` writes this
page: {n} tiny random models of {kinds} architectures of `transformers` {transformers}, on both
engines (nnsight {nnsight}, TransformerLens {transformer_lens}; PEFT {peft}, PyTorch {torch}),
against plain PyTorch hooks on the `transformers` model, one unpadded row at a time.

A figure is the largest absolute difference over single rows and ragged batches padded on the right
and on the left (of a gradient: relative to its largest entry; of generation: the share of greedy
answers that differ). Under a site stand reading it in every layer, and Add, Ablate and Clamp there.
`masks` are edits of the prompt or the response alone, `resume` goes on from a middle and from the
last layer, `adapter` is LoRA against PEFT's own model, switched on and off. "refused" is a sentence
of emlens', below the table; a larger difference without a word, or an error of another library,
would stand here in bold.

What a model has is tried out when it is loaded, and no list of architectures decides: a model that
is not in the table is held to the same. `resid_pre` and `resid_post` exist wherever blocks hand one
residual stream on; `attn_out`, `resid_mid` and `mlp_out` where attention and MLP are all that a
block adds. Names with a `/` are variants of an architecture; models for images are run as text
models.

| model | engine | {columns} |
{line}
{rows}

## What is refused, and how some run

{notes}
"""


def page(rows: list[str], notes: list[str]) -> str:
    """The table as a page of the documentation."""
    packages = ("transformers", "nnsight", "transformer_lens", "peft")
    names = {row.split("|")[1].strip() for row in rows}
    return _PAGE.format(
        n=len(names),
        kinds=len({name.partition("/")[0] for name in names}),
        torch=torch.__version__.partition("+")[0],
        columns=" | ".join(_COLUMNS),
        line="|---" * (len(_COLUMNS) + 2) + "|",
        rows="\n".join(rows),
        notes="\n".join(_condensed(notes)),
        **{name: version(name).partition("+")[0] for name in packages},
    )


def _condensed(notes: list[str]) -> list[str]:
    """Notes with the sites of one reason in one, and without the kinds of errors."""
    found: dict[tuple[str, str], list[str]] = {}
    for note in notes:
        place, _, said = note.partition(": ")
        said = re.sub(r"^(ValueError|RuntimeError|TypeError): ", "", said)
        site = re.search(r"has no site '(\w+)': (.*); it has", said)
        key = (place, site[2]) if site else (place, said)
        found.setdefault(key, []).extend([f"`{site[1]}`"] if site else [])
    return [
        f"{place}: no {', '.join(sites)}: {said}" if sites else f"{place}: {said}"
        for (place, said), sites in found.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="architectures; all by default")
    parser.add_argument("--engine", choices=ENGINES, action="append")
    parser.add_argument("--out", type=Path, help="a file to write the table to")
    parser.add_argument("--workers", type=int, default=1)
    asked = parser.parse_args()
    engines = asked.engine or list(ENGINES)
    outcomes: list[Outcome] = []
    with ThreadPoolExecutor(asked.workers) as pool:
        for found in pool.map(lambda name: run_apart(name, engines), asked.names or MODELS):
            outcomes += found
            for one in found:
                if one.kind != "right" or one.said:
                    place = f"{one.model}, {one.engine}, {one.check}"
                    print(f"{place}: {one.kind} {one.worst:.1e} {one.said}", flush=True)
    text = page(*table(outcomes))
    if asked.out:
        asked.out.write_text(text, encoding="utf-8")
    kinds = [one.kind for one in outcomes]
    counts = {kind: kinds.count(kind) for kind in ("right", "refused", "silent", "foreign")}
    print(text if not asked.out else "", counts, sep="\n")
    sys.exit(bool(counts["silent"] + counts["foreign"]))


if __name__ == "__main__":
    main()
