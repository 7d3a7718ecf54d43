"""Catching finetuning sets: `screen`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from emlens.cli.app import app
from emlens.cli.common import Call, rows_of, show_config, verb
from emlens.cli.values import conversations_of, directions_of, is_embedded, layers_of
from emlens.cli.watching import Files, Limit, OneLayers, Side

if TYPE_CHECKING:
    from emlens.directions import Directions
    from emlens.watch import Monitor, Screen

Data = Annotated[
    str, typer.Argument(help="JSONL of messages, or of prompt and response; or an embedded set.")
]
Out = Annotated[Path, typer.Option(help="Folder of the screen; a rerun resumes it.")]
MonitorFile = Annotated[
    Path | None, typer.Option(help="Use the projections of this monitor instead.")
]
Reference = Annotated[
    str, typer.Option(help="own (the model answers), a file, or a set's aligned answers.")
]
Trusted = Annotated[
    str | None, typer.Option(help="JSONL of harmless examples that set the threshold.")
]
Share = Annotated[float, typer.Option(help="Share of those above the threshold.")]
Tokens = Annotated[int, typer.Option(help="Tokens of each answer that count.")]
Top = Annotated[int, typer.Option(help="Worst examples to show.")]


@verb(
    app,
    "emlens screen finance --directions medical.safetensors --reference finance --limit 16"
    " --out runs/screen",
    "emlens screen finance --monitor monitor.safetensors --limit 4 --answer-tokens 16"
    " --out runs/screen-own",
    model=True,
    config=True,
)
def screen(
    call: Call,
    data: Data,
    out: Out = Path("runs/screen"),
    directions: Files = None,
    monitor: MonitorFile = None,
    layers: OneLayers = None,
    reference: Reference = "own",
    trusted: Trusted = None,
    flag_share: Share = 0.01,
    answer_tokens: Tokens = 64,
    side: Side = "misaligned",
    limit: Limit = None,
    top: Top = 10,
) -> None:
    """Score a finetuning set before training, by the shift of its answers along a projection.

    Scores are written block by block, so an interrupted screen resumes.
    """
    from emlens._door import check_given
    from emlens.study.folder import SCREEN
    from emlens.watch import Monitor
    from emlens.watch import screen as screen_set

    acting = _readout(directions, monitor)
    harmless = None if trusted is None else conversations_of(trusted, "aligned")
    # a file is read as it is needed, a part of one at once
    whole = limit is None and not is_embedded(data)
    rows = data if whole else conversations_of(data, side, limit)
    answers = conversations_of(reference, "aligned") if is_embedded(reference) else reference
    chosen = layers_of(layers)
    check_given(screen_set, answer_tokens=answer_tokens, flag_share=flag_share)
    model = call.load()
    if isinstance(acting, Monitor):
        acting = acting.on(model)
    config = {key: value for key, value in call.options.items() if key != "out"}
    show_config(call, config)
    SCREEN.write(out, config, call.command)
    call.kept = f"scores so far are in {out}; run the same command again to resume"
    found = screen_set(
        model,
        rows,
        acting,
        reference=answers,
        layers=chosen,
        answer_tokens=answer_tokens,
        trusted=harmless,
        flag_share=flag_share,
        out=out / "scores.sqlite",
        progress=call.progress,
    )
    _keep(found, out)
    _tell(call, found, out, top)


def _readout(
    directions: list[Path] | None, monitor: Path | None
) -> Directions | dict[str, Directions] | Monitor:
    from emlens.watch import Monitor

    found = directions_of(directions)
    if (found is None) == (monitor is None):
        raise ValueError("screen projects on --directions, or on those of a --monitor; give one")
    return found if monitor is None else Monitor.load(monitor)  # type: ignore[return-value]


def _keep(found: Screen, out: Path) -> None:
    import matplotlib.pyplot as plt

    from emlens.figures import house_style, save_figure

    found.save(out / "screen.json")
    with house_style():
        axes = found.plot()
        save_figure(axes, out / "figures" / "screen")
        plt.close(axes.get_figure(root=True))


def _tell(call: Call, found: Screen, out: Path, top: int) -> None:
    shift, table = found.shift, found.table().head(top)
    record = {
        "folder": out,
        "n": found.n,
        "unscored": found.unscored,
        "expected shift": [shift.estimate, shift.low, shift.high],
        "unit": found.unit,
        "threshold": found.threshold,
        "flagged": found.n_flagged,
        "worst": rows_of(table),
    }
    call.result(record, repr(found), table, f"folder: {out}")
