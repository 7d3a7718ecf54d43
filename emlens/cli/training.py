"""Training: `train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from emlens.cli.app import app
from emlens.cli.common import Call, Layer, Layers, verb
from emlens.cli.values import layers_of


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
