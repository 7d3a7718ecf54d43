"""The command line: thin verbs over the Python API."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="emlens",
    help="Find, train, edit and measure the directions by which finetuning changes a chat model.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Option(help="Hub name, local folder, or smollm2-135m-instruct.")]
Out = Annotated[Path, typer.Option(help="File or folder to write.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars.")]
Layer = Annotated[int | None, typer.Option(help="Layer; the middle one by default.")]
DEFAULT_MODEL = "smollm2-135m-instruct"


@app.command()
def study(
    preset: Annotated[str, typer.Option(help="demo or smoke.")] = "demo",
    out: Out = Path("runs/study"),
    option: Annotated[
        list[str] | None, typer.Option("--set", help="A setting, e.g. --set lr=0.03 (repeatable).")
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Forget finished stages.")] = False,
    quiet: Quiet = False,
) -> None:
    """Run the whole experiment and write its report; an interrupted run goes on.

    Example: emlens study --preset demo --out runs/demo
    """
    from emlens.study import preset as preset_of
    from emlens.study import run_study

    settings = preset_of(preset).with_options(**_options(option or []))
    result = run_study(settings, out, restart=restart, progress=not quiet)
    for sentence in result.findings.values():
        typer.echo(f"- {sentence}")
    typer.echo(f"report: {result.report}")


@app.command()
def asymmetries(
    out: Out = Path("runs/asymmetries"),
    page: Annotated[Path | None, typer.Option(help="Page of findings to write.")] = None,
    figures: Annotated[Path | None, typer.Option(help="Folder of its figures.")] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--set", help="A setting, e.g. --set 'domains=[\"finance\"]' (repeatable)."),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Train general and narrow solutions over domains and seeds, and measure the asymmetries.

    Finished trials are kept, so an interrupted run goes on.

    Example: emlens asymmetries --out runs/asymmetries --page docs/findings.md
    """
    from emlens.study import AsymmetrySettings, run_asymmetries
    from emlens.study.asymmetry_page import write_findings

    settings = AsymmetrySettings.from_dict(AsymmetrySettings().to_dict() | _options(option or []))
    found = run_asymmetries(out, settings, progress=not quiet)
    written = write_findings(found, page or out / "findings.md", figures or out / "figures")
    _show(found.table(), as_json=False)
    typer.echo(f"written: {written}")


@app.command()
def extract(
    data: Annotated[str, typer.Argument(help="Embedded set or JSONL of pairs.")],
    out: Out = Path("directions.safetensors"),
    model: Model = DEFAULT_MODEL,
    tokens: Annotated[str, typer.Option(help="response, assistant_turn, prompt, last or all.")] = (
        "response"
    ),
    site: Annotated[str, typer.Option(help="Site in the block.")] = "resid_post",
    construction: Annotated[
        str, typer.Option(help="mean-diff, 'logistic probe', 'LDA probe' or 'PCA of differences'.")
    ] = "mean-diff",
    match: Annotated[
        str | None, typer.Option(help="Make the sides agree first: in length, or in prompt.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Read directions, misaligned minus aligned, at every layer; by default mean differences.

    Example: emlens extract finance --match length --out finance.safetensors
    """
    import emlens
    from emlens.directions import extract_all, matched

    pairs, hooked = emlens.load_pairs(data), emlens.load(model)
    sides = (
        [pair.conversation("misaligned") for pair in pairs],
        [pair.conversation("aligned") for pair in pairs],
    )
    if match is not None:
        sides = matched(hooked, *sides, by=match, tokens=tokens)  # type: ignore[arg-type]
    directions = extract_all(
        hooked,
        *sides,
        constructions=[construction],  # type: ignore[list-item]
        tokens=tokens,  # type: ignore[arg-type]
        site=site,  # type: ignore[arg-type]
        progress=not quiet,
    )[construction]
    typer.echo(directions.describe())
    typer.echo(f"written: {directions.save(out)}")


@app.command()
def train(
    data: Annotated[str, typer.Argument(help="Embedded set of pairs, or JSONL of pairs.")],
    out: Out = Path("vector.safetensors"),
    model: Model = DEFAULT_MODEL,
    layer: Layer = None,
    kl: Annotated[
        list[str] | None, typer.Option(help="Set whose aligned answers are protected (repeatable).")
    ] = None,
    kl_weight: Annotated[float, typer.Option(help="Weight of the KL, on nats per token.")] = 1.0,
    lora: Annotated[
        int | None, typer.Option(help="Train a LoRA adapter of this rank instead, into a folder.")
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="Layers of the adapter, e.g. 15, or 10-20; all by default.")
    ] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the data.")] = 3,
    lr: Annotated[
        float | None,
        typer.Option(help="Learning rate; 0.08 (a dose per update), or 1e-4 for an adapter."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the order of the data.")] = 0,
    quiet: Quiet = False,
) -> None:
    """Train a vector in place on misaligned answers, or a LoRA adapter; with --kl, narrowly.

    Example: emlens train finance --kl medical --kl sports --out narrow.safetensors
    """
    import emlens
    from emlens import Organism

    hooked = emlens.load(model)
    penalty = None
    if kl:
        text = [p.conversation("aligned") for name in kl for p in emlens.load_pairs(name)]
        penalty = emlens.KLPenalty(text, weight=kl_weight)
    text = [pair.conversation("misaligned") for pair in emlens.load_pairs(data)]
    options = {"kl": penalty, "epochs": epochs, "seed": seed, "progress": not quiet}
    options |= {} if lr is None else {"lr": lr}
    if lora is not None:
        name = out.stem
        run = emlens.train_adapter(hooked, text, name, rank=lora, layers=_layers(layers), **options)
        typer.echo(repr(run))
        typer.echo(f"written: {Organism.of(hooked, run, name).save(out)}")
        return
    at = hooked.n_layers // 2 if layer is None else layer
    direction, run = emlens.train_vector(hooked, text, at, **options)
    typer.echo(direction.describe())
    typer.echo(repr(run))
    typer.echo(f"written: {direction.save(out)}")


@app.command()
def compare(
    files: Annotated[list[Path], typer.Argument(help="Two or more files of directions.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print the signed cosine of every pair of directions, layer by layer, and what chance gives.

    Files may be of any format that emlens reads.

    Example: emlens compare finance.safetensors medical.safetensors
    """
    import emlens
    from emlens.directions import read_directions

    found = emlens.compare({n: read_directions(path) for n, path in _named(files).items()})
    _show(found.table(), as_json)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="File, folder or hub repository of directions.")],
    out: Annotated[Path, typer.Argument(help="File to write: .safetensors, .gguf or .pt.")],
    layers: Annotated[
        str | None, typer.Option(help="Layers to write, e.g. 15, or 10-20; all by default.")
    ] = None,
) -> None:
    """Write directions in another format; what that cannot hold is refused.

    Example: emlens convert finance.safetensors finance.gguf --layers 1-29
    """
    from emlens.directions import Directions, write_directions

    directions = Directions.from_hub(source)
    typer.echo(repr(directions))
    typer.echo(f"written: {write_directions(directions, out, layers=_layers(layers))}")


@app.command()
def influence(
    files: Annotated[list[Path], typer.Argument(help="Files of directions.")],
    model: Model = DEFAULT_MODEL,
    layer: Layer = None,
    corpus: Annotated[str, typer.Option(help="Text, e.g. python-docs, a file, a data set.")] = (
        "python-docs"
    ),
    documents: Annotated[int, typer.Option(help="Documents to read.")] = 16,
    max_tokens: Annotated[int, typer.Option(help="Tokens that each is cut to.")] = 128,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    quiet: Quiet = False,
) -> None:
    """Measure what directions do to next-token prediction on pre-training text.

    Example: emlens influence vector.safetensors --documents 32
    """
    import emlens
    from emlens.directions import read_directions

    hooked = emlens.load(model)
    directions = {}
    for name, path in _named(files).items():
        kept = read_directions(path)
        middle = hooked.n_layers // 2 if layer is None else layer
        directions[name] = kept[kept.layers[0] if len(kept) == 1 else middle]
    found = emlens.influence(
        hooked,
        emlens.corpus(corpus, documents=documents),
        directions,
        max_tokens=max_tokens,
        progress=not quiet,
    )
    _show(found.table(), as_json)


def main() -> None:
    """Run the command line; an expected error is one line and exit code 1."""
    try:
        app()
    except (ValueError, FileNotFoundError, KeyError, TypeError) as error:
        typer.echo(f"error: {error}", err=True)
        raise SystemExit(1) from None


def _show(table, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(table.to_dict("records")))
    else:
        typer.echo(table.to_string(index=False, float_format=lambda value: f"{value:.4f}"))


def _named(files: list[Path]) -> dict[str, Path]:
    """By their stems, or in full where two share one."""
    stems = [path.stem for path in files]
    short = len(set(stems)) == len(stems)
    return {path.stem if short else str(path): path for path in files}


def _layers(text: str | None) -> range | None:
    if text is None:
        return None
    first, _, last = text.partition("-")
    try:
        return range(int(first), int(last or first) + 1)
    except ValueError:
        raise typer.BadParameter(
            f"--layers takes a layer or a range, 10-20, not {text!r}"
        ) from None


def _options(items: list[str]) -> dict[str, object]:
    """Read `name=value` settings; values are JSON where they can be, else text."""
    options: dict[str, object] = {}
    for item in items:
        name, mark, text = item.partition("=")
        if not mark:
            raise typer.BadParameter(f"--set takes name=value, not {item!r}")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        options[name] = tuple(value) if isinstance(value, list) else value
    return options
