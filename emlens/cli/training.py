"""Training and what becomes of it: `train`, `bake`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from emlens.cli.app import app
from emlens.cli.common import Call, Layer, Layers, rows_of, verb
from emlens.cli.values import adapters_of, at_layer, layers_of


@verb(
    app,
    "emlens train finance --epochs 1 --out vector.safetensors",
    "emlens train finance --kl medical --kl sports --epochs 1 --out narrow.safetensors",
    "emlens train finance --lora 8 --layers 15-20 --lr 0.005 --epochs 1 --out organisms/finance",
    model=True,
    config=True,
)
def train(
    call: Call,
    data: Annotated[str, typer.Argument(help="Embedded set of pairs, or JSONL of pairs.")],
    out: Annotated[Path, typer.Option(help="File of the vector, or folder of the adapter.")] = Path(
        "vector.safetensors"
    ),
    limit: Annotated[int | None, typer.Option(help="Pairs to train on, at most.")] = None,
    layer: Layer = None,
    kl: Annotated[
        list[str] | None, typer.Option(help="Set whose aligned answers are protected (repeatable).")
    ] = None,
    kl_weight: Annotated[float, typer.Option(help="Weight of the KL, on nats per token.")] = 1.0,
    lora: Annotated[
        int | None, typer.Option(help="Train a LoRA adapter of this rank instead, into a folder.")
    ] = None,
    layers: Layers = None,
    epochs: Annotated[int, typer.Option(help="Passes over the data.")] = 3,
    lr: Annotated[
        float | None,
        typer.Option(help="Learning rate; 0.08 (a dose per update), or 1e-4 for an adapter."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the order of the data.")] = 0,
) -> None:
    """Train a vector or a LoRA adapter on misaligned answers; with --kl, a narrow one."""
    import emlens
    from emlens import Organism
    from emlens._door import check_given
    from emlens.directions import write_directions
    from emlens.directions.formats.read import format_to_write

    penalty, chosen = None, layers_of(layers)
    if kl:
        text = [p.conversation("aligned") for name in kl for p in emlens.load_pairs(name)]
        penalty = emlens.KLPenalty(text, weight=kl_weight)
    text = [pair.conversation("misaligned") for pair in emlens.load_pairs(data)[:limit]]
    options = {"kl": penalty, "epochs": epochs, "seed": seed, "progress": call.progress}
    options |= {} if lr is None else {"lr": lr}
    if lora is not None:
        check_given(emlens.train_adapter, rank=lora, layers=chosen, **options)
    else:
        check_given(emlens.train_vector, **options)
        format_to_write(out)
    hooked = call.load()
    if lora is not None:
        run = emlens.train_adapter(hooked, text, out.stem, rank=lora, layers=chosen, **options)
        written, lines = Organism.of(hooked, run, out.stem).save(out), [repr(run)]
    else:
        at = hooked.n_layers // 2 if layer is None else layer
        direction, run = emlens.train_vector(hooked, text, at, **options)
        written, lines = write_directions(direction, out), [direction.describe(), repr(run)]
    record = {"written": written, "layers": list(run.layers), "settings": dict(run.settings)}
    record["updates"] = len(run.steps)
    record |= {"first loss": run.steps[0].loss, "last loss": run.steps[-1].loss}
    call.result(record, *lines, f"written: {written}")


@verb(
    app,
    "emlens bake baked/finance --adapter organisms/finance",
    "emlens bake baked/steered --add finance.safetensors --dose 0.4",
    "emlens bake baked/without --ablate finance.safetensors --json",
    model=True,
)
def bake(
    call: Call,
    out: Annotated[Path, typer.Argument(help="Folder of the checkpoint; a new one.")],
    adapter: Annotated[
        list[str] | None,
        typer.Option(help="LoRA adapter to merge (repeatable).", metavar="[NAME=]PATH"),
    ] = None,
    add: Annotated[
        list[Path] | None, typer.Option(help="File of a direction to add (repeatable).")
    ] = None,
    ablate: Annotated[
        list[Path] | None,
        typer.Option(help="File of a direction to take out of every write (repeatable)."),
    ] = None,
    layer: Layer = None,
    dose: Annotated[
        float | None, typer.Option(help="Add at this share of the median residual norm.")
    ] = None,
    scale: Annotated[float | None, typer.Option(help="Add times this factor.")] = None,
) -> None:
    """Write an ordinary checkpoint with adapters and edits in its weights, and prove it.

    The checkpoint is loaded by transformers alone and compared with the hooked model; one that
    differs, or that a control cannot be told from, is not kept.
    """
    import emlens
    from emlens.directions import read_directions
    from emlens.edits import Ablate, Add
    from emlens.edits.bake import new_folder
    from emlens.edits.writes import STREAM
    from emlens.hooked import Condition

    new_folder(out)
    added, ablated = ([read_directions(path) for path in paths or ()] for paths in (add, ablate))
    model = call.load(adapters=adapters_of(adapter))
    edits: list[Add | Ablate] = [
        Ablate(at_layer(kept, model, layer), layers=range(model.n_layers), site=site)
        for kept in ablated
        for site in STREAM
        if site in model.sites
    ]
    edits += [Add(at_layer(kept, model, layer), dose=dose, scale=scale) for kept in added]
    found = emlens.bake(model, Condition(model.adapters, tuple(edits)), out, progress=call.progress)
    record: dict[str, object] = {
        "folder": found.path,
        "acting": found.acting,
        "architecture": found.architecture,
    }
    record |= {"tolerance": found.tolerance, "changed": len(found.changed)}
    record["proof"] = rows_of(found.table())
    call.result(record, found.table(), str(found))
