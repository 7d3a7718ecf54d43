"""Catching finetunes: `monitor fit`, `monitor score`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from emlens.cli.app import app
from emlens.cli.common import Call, rows_of, verb
from emlens.cli.values import adapters_of, conversations_of, directions_of, layers_of

if TYPE_CHECKING:
    from emlens.hooked import HookedModel

Adapter = Annotated[str | None, typer.Option(help="LoRA adapter that acts.", metavar="[NAME=]PATH")]
Files = Annotated[
    list[Path] | None,
    typer.Option(help="Directions pointing to misaligned, from other data (repeatable)."),
]
OneLayers = Annotated[
    str | None,
    typer.Option(help="Use the mean projection at these layers, e.g. 10-20.", metavar="LAYERS"),
]
Side = Annotated[str, typer.Option(help="Which answers of an embedded set: misaligned or aligned.")]
Limit = Annotated[int | None, typer.Option(help="Conversations to take, at most.")]
MonitorFile = Annotated[Path, typer.Option(help="What `monitor fit` wrote.")]

monitor_app = typer.Typer(
    help="Flag conversations by a threshold on a projection, calibrated on held-out ones.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(monitor_app, name="monitor")


@verb(
    monitor_app,
    "emlens monitor fit medical --out monitor.safetensors",
    "emlens monitor fit medical --directions finance.safetensors --layers 10-20"
    " --out monitor.safetensors",
    name="fit",
    model=True,
    config=True,
)
def monitor_fit(
    call: Call,
    data: Annotated[str, typer.Argument(help="Embedded set or JSONL of pairs.")],
    out: Annotated[Path, typer.Option(help="File to write.")] = Path("monitor.safetensors"),
    limit: Annotated[int | None, typer.Option(help="Pairs to take, at most.")] = None,
    directions: Files = None,
    layers: OneLayers = None,
    best: Annotated[int, typer.Option(help="Projections to choose, whose mean counts.")] = 1,
    pooled: Annotated[
        bool, typer.Option("--pooled", help="Fit a logistic regression to all projections.")
    ] = False,
    max_false_alarms: Annotated[
        float, typer.Option(help="Share of false alarms among new aligned conversations.")
    ] = 0.05,
    calibration: Annotated[
        str | None,
        typer.Option(help="Aligned conversations to set the threshold on, e.g. base answers."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the split.")] = 0,
) -> None:
    """Fit a monitor to pairs: a projection and a threshold, on separate prompts.

    Without --directions, mean differences come from the fitted half alone. The threshold is valid
    for conversations like those it was set on: --calibration takes the model's own answers.
    """
    import emlens
    from emlens._door import check_given
    from emlens.text.repeats import repeats_told
    from emlens.watch import Monitor
    from emlens.watch.monitor_fit import HELD_OUT, Labelled, check_choice

    if out.exists():
        raise FileExistsError(f"{out} already exists; give --out the name of a new file")
    known, chosen = directions_of(directions), layers_of(layers)
    check_given(Monitor.fit, best=best, max_false_alarms=max_false_alarms, seed=seed)
    check_choice(best, pooled)
    pairs = emlens.load_pairs(data)[:limit]
    with repeats_told():
        Labelled.of(pairs, None).fitted(HELD_OUT, seed)
    own = None if calibration is None else conversations_of(calibration, "aligned")
    monitor = Monitor.fit(
        call.load(),
        pairs,
        directions=known,
        layers=chosen,
        best=best,
        pooled=pooled,
        max_false_alarms=max_false_alarms,
        seed=seed,
        progress=call.progress,
    )
    if own is not None:
        monitor = monitor.calibrated(own, max_false_alarms, progress=call.progress)
    written = monitor.save(out)
    call.result(
        {
            "file": written,
            **{name: getattr(monitor, name) for name in ("threshold", "rule", "auroc")},
            "held out": rows_of(monitor.table()),
        },
        repr(monitor),
        monitor.table(),
        f"written: {written}",
    )


@verb(
    monitor_app,
    "emlens monitor score runs/base/responses.sqlite --monitor monitor.safetensors",
    "emlens monitor score finance --side misaligned --limit 8 --monitor monitor.safetensors --json",
    name="score",
    model=True,
)
def monitor_score(
    call: Call,
    conversations: Annotated[
        str,
        typer.Argument(help="JSONL of messages, or of prompt and response; responses; a set."),
    ],
    monitor: MonitorFile = Path("monitor.safetensors"),
    adapter: Adapter = None,
    side: Side = "misaligned",
    limit: Limit = None,
) -> None:
    """Score conversations with a monitor, and report those above its threshold."""
    from emlens.watch import Monitor

    read = conversations_of(conversations, side, limit)
    known = Monitor.load(monitor)
    with _acting(call, adapter, known.readout.model) as model:
        found = known.on(model).score(read, progress=call.progress)
    call.result(
        {
            "threshold": found.threshold,
            "flagged": list(found.flagged),
            "n": len(found.names),
            "scores": rows_of(found.table()),
        },
        found.table(),
        f"{len(found.flagged)} of {len(found.names)} above {found.threshold:.4f}",
    )


@contextmanager
def _acting(call: Call, adapter: str | None, name: str) -> Iterator[HookedModel]:
    """The model, with an adapter acting where one is named."""
    adapters = adapters_of([adapter] if adapter else None)
    model = call.load(name, adapters=adapters)
    with model.adapter(next(iter(adapters), None)):
        yield model
