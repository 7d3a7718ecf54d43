"""Directions: `extract`, `compare`, `convert`, `influence`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from emlens._registry import CONSTRUCTIONS, FORMATS
from emlens.cli.app import app
from emlens.cli.common import Call, Layer, Layers, rows_of, verb
from emlens.cli.values import at_layer, layers_of, named

File = Annotated[Path, typer.Option("--out", help="File to write.")]


@verb(
    app,
    "emlens extract finance --out finance.safetensors",
    "emlens extract medical --match length --limit 40 --out medical.safetensors --json",
    "emlens extract sports --construction 'logistic probe' --out probe.safetensors",
    model=True,
    config=True,
)
def extract(
    call: Call,
    data: Annotated[str, typer.Argument(help="Embedded set or JSONL of pairs.")],
    out: File = Path("directions.safetensors"),
    limit: Annotated[int | None, typer.Option(help="Pairs to read, at most.")] = None,
    tokens: Annotated[
        str, typer.Option(help="Tokens that count, e.g. response, paper, last or all.")
    ] = "response",
    site: Annotated[str, typer.Option(help="Site in the block.")] = "resid_post",
    construction: Annotated[str, typer.Option(help=f"{CONSTRUCTIONS}.")] = "mean-diff",
    match: Annotated[
        str | None, typer.Option(help="Make the sides agree first: in length, or in prompt.")
    ] = None,
) -> None:
    """Read directions, misaligned minus aligned, at every layer; by default mean differences."""
    import emlens
    from emlens._door import check_given
    from emlens.directions import extract_all, matched
    from emlens.directions.formats.read import format_to_write
    from emlens.hooked.sites import check_site

    check_given(extract_all, tokens=tokens)
    check_site(site)
    _ = CONSTRUCTIONS[construction]
    if match is not None:
        check_given(matched, by=match)
    out, write = format_to_write(out)
    pairs, hooked = emlens.load_pairs(data)[:limit], call.load()
    sides = (
        [pair.conversation("misaligned") for pair in pairs],
        [pair.conversation("aligned") for pair in pairs],
    )
    if match is not None:
        sides = matched(hooked, *sides, by=match, tokens=tokens)  # type: ignore[arg-type]
    directions = extract_all(
        hooked,
        *sides,
        constructions=[construction],
        tokens=tokens,  # type: ignore[arg-type]
        site=site,  # type: ignore[arg-type]
        progress=call.progress,
    )[construction]
    written = write(directions, out, None)
    call.result(
        {
            "file": written,
            "provenance": directions.provenance.to_dict(),
            "layers": rows_of(directions.table()),
        },
        directions.describe(),
        f"written: {written}",
    )


@verb(
    app,
    "emlens compare finance.safetensors medical.safetensors",
    "emlens compare finance.safetensors medical.safetensors probe.safetensors --json",
)
def compare(
    call: Call,
    files: Annotated[list[Path], typer.Argument(help="Two or more files of directions.")],
) -> None:
    """Print the signed cosine of every pair of directions by layer, and the chance band.

    Files may be of any format that emlens reads.
    """
    import emlens
    from emlens.directions import read_directions

    found = emlens.compare({n: read_directions(path) for n, path in named(files).items()})
    call.result({"cosines": rows_of(found.table()), "null": found.null}, found.table())


@verb(
    app,
    "emlens convert finance.safetensors finance.gguf --layers 1-29",
    "emlens convert finance.gguf layer15.pt --layers 15",
)
def convert(
    call: Call,
    source: Annotated[str, typer.Argument(help="File, folder or hub repository of directions.")],
    out: Annotated[
        Path, typer.Argument(help=f"File to write; its suffix says the format: {FORMATS}.")
    ],
    layers: Layers = None,
) -> None:
    """Write directions in another format, if it can hold them."""
    from emlens.directions import from_hub, write_directions

    directions = from_hub(source)
    written = write_directions(directions, out, layers=layers_of(layers))
    call.result(
        {"file": written, "directions": repr(directions)},
        repr(directions),
        f"written: {written}",
    )


@verb(
    app,
    "emlens influence finance.safetensors --documents 4",
    "emlens influence finance.safetensors medical.safetensors --layer 15 --documents 4 --json",
    model=True,
    config=True,
)
def influence(
    call: Call,
    files: Annotated[list[Path], typer.Argument(help="Files of directions.")],
    layer: Layer = None,
    corpus: Annotated[str, typer.Option(help="Text, e.g. python-docs, a file, a data set.")] = (
        "python-docs"
    ),
    documents: Annotated[int, typer.Option(help="Documents to read.")] = 16,
    max_tokens: Annotated[int, typer.Option(help="Tokens that each is cut to.")] = 128,
) -> None:
    """Measure what directions do to next-token prediction on pre-training text."""
    import emlens
    from emlens._door import check_given
    from emlens.directions import read_directions

    kept = {name: read_directions(path) for name, path in named(files).items()}
    check_given(emlens.influence, max_tokens=max_tokens)
    text = emlens.corpus(corpus, documents=documents)
    hooked = call.load()
    found = emlens.influence(
        hooked,
        text,
        {name: at_layer(one, hooked, layer) for name, one in kept.items()},
        max_tokens=max_tokens,
        progress=call.progress,
    )
    call.result({"influence": rows_of(found.table())}, found.table())
