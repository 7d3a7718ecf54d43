"""Shared parts of the verbs: options, output, errors and exit codes."""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from inspect import Parameter, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

if TYPE_CHECKING:
    import pandas as pd

    from emlens.hooked import HookedModel

DEFAULT_MODEL = "smollm2-135m-instruct"
FAILED, BAD_INPUT, INTERRUPTED, UNREAD = 1, 2, 130, 141
"""Exit codes beside 0."""


class _Unread(Exception):
    """Standard output was closed by whoever read it; other broken pipes are errors."""


_INPUT_ERRORS = (
    ValueError,
    TypeError,
    KeyError,
    FileNotFoundError,
    FileExistsError,
    IsADirectoryError,
    NotADirectoryError,
)

Layer = Annotated[int | None, typer.Option(help="Layer; the middle one by default.")]
Layers = Annotated[
    str | None, typer.Option(help="Layers, e.g. 15, or 10-20; all by default.", metavar="LAYERS")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="A setting, e.g. --set lr=0.03 (repeatable).", metavar="NAME=VALUE"),
]


@dataclass
class Call:
    """One call of a verb: its options, and its output.

    Standard output holds only the result; everything else goes to standard error.

    Attributes:
        verb: Its name.
        command: The whole command line.
        options: Every option with its value.
        stdout: Where the result goes.
        quiet: No progress.
        as_json: The result is one JSON object.
        model: Name of the model that was asked for, or None.
        placed: Further options of `emlens.load` that were given.
        config: Settings of `--config` that are not options.
        kept: What an interrupted call keeps.
    """

    verb: str
    command: str
    options: dict[str, Any]
    stdout: TextIO
    quiet: bool = False
    as_json: bool = False
    model: str | None = None
    placed: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    kept: str = "nothing was kept"

    @property
    def progress(self) -> bool:
        return not self.quiet

    def note(self, text: str) -> None:
        """Print a message to standard error."""
        if not self.quiet:
            typer.echo(text, err=True)

    def result(self, record: Mapping[str, Any], *parts: str | pd.DataFrame | None) -> None:
        """Give the result: the record as JSON, or else the parts as text."""
        if self.as_json:
            lines = [json.dumps(_plain({"verb": self.verb, **record}), ensure_ascii=False)]
        else:
            known = (part for part in parts if part is not None)
            lines = [part if isinstance(part, str) else table_text(part) for part in known]
        try:
            for line in lines:
                print(line, file=self.stdout, flush=True)
        except BrokenPipeError:
            raise _Unread from None

    def load(self, name: str | None = None, adapters: Mapping[str, str] | None = None):
        """The model that was asked for, or the one named."""
        import emlens

        if self.quiet:
            from transformers.utils import logging

            logging.disable_progress_bar()
        options = {**self.placed, **({"adapters": dict(adapters)} if adapters else {})}
        return emlens.load(self.model or name or DEFAULT_MODEL, **options)

    def placed_model(self, name: str) -> HookedModel | None:
        """The model if loading options were given; else None."""
        return self.load(name) if self.placed else None


_SHARED = {
    "quiet": (bool, False, typer.Option("--quiet", help="No progress: nothing but the result.")),
    "as_json": (
        bool,
        False,
        typer.Option("--json", help="The result as one JSON object on standard output."),
    ),
    "traceback": (
        bool,
        False,
        typer.Option(
            "--traceback", envvar="EMLENS_TRACEBACK", help="Show where an error came from."
        ),
    ),
}
_MODEL = {
    "model": (
        str | None,
        None,
        typer.Option(help=f"Hub name or local folder; {DEFAULT_MODEL} by default."),
    ),
    "dtype": (str | None, None, typer.Option(help="Of the weights, e.g. bfloat16.")),
    "device_map": (str | None, None, typer.Option(help="E.g. auto, or cuda; the CPU by default.")),
    "engine": (str | None, None, typer.Option(help="nnsight or transformer_lens.")),
}


def verb(
    app: typer.Typer,
    *examples: str,
    name: str | None = None,
    model: bool = False,
    config: bool = False,
    settings: Callable[[], Iterable[str]] | None = None,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function of a `Call` and options as a verb, and add the shared options.

    Args:
        app: The application.
        *examples: Command lines that its help shows.
        name: Its name; the function's by default.
        model: Give it `--model` and how that is loaded.
        config: Give it `--config`, a YAML file with values for its options.
        settings: Names that such a file may have beside the options.
    """
    shared = {**(_MODEL if model else {}), **_SHARED}

    def register(function: Callable[..., None]) -> Callable[..., None]:
        own = list(signature(function, eval_str=True).parameters.values())[1:]
        added = [_parameter(key, *value) for key, value in shared.items()]
        if config:
            added.insert(0, _config_parameter(settings))
        title = (name or function.__name__).replace("_", " ")

        def run(ctx: typer.Context, **given: Any) -> None:
            _answer(ctx, function, given)

        context = Parameter("ctx", Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
        parameters = [context, *own, *added]
        run.__signature__ = signature(run).replace(parameters=parameters)  # type: ignore
        run.__annotations__ = {one.name: one.annotation for one in parameters}
        run.__doc__ = function.__doc__
        lines = "\n".join(f"  {example}" for example in examples)
        short = (function.__doc__ or "").partition("\n")[0].partition(";")[0].rstrip(".")
        epilog = f"\b\nExamples:\n{lines}"
        app.command(title, epilog=epilog, short_help=f"{short}.")(run)
        return function

    return register


def _parameter(name: str, kind: Any, default: Any, option: Any) -> Parameter:
    annotation = Annotated[kind, option]
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _config_parameter(settings: Callable[[], Iterable[str]] | None) -> Parameter:
    def read(ctx: typer.Context, value: Path | None) -> Path | None:
        if value is not None:
            _take_config(ctx, value, settings)
        return value

    option = typer.Option(
        callback=read, is_eager=True, help="YAML file with values; the command line goes first."
    )
    return _parameter("config", Path | None, None, option)


def _take_config(
    ctx: typer.Context, path: Path, settings: Callable[[], Iterable[str]] | None
) -> None:
    """Take values from a file for options that are not given."""
    from emlens.study.folder import read_config

    try:
        found = {name.replace("-", "_"): value for name, value in read_config(path).items()}
    except (ValueError, FileNotFoundError) as error:
        raise typer.BadParameter(str(error)) from None
    options = {item.name: item for item in ctx.command.params if item.name not in _NO_VALUES}
    others = set(settings()) if settings is not None else set()
    unknown = sorted(set(found) - set(options) - others)
    if unknown:
        raise typer.BadParameter(
            f"{path}: unknown key(s) {', '.join(unknown)}; known are "
            f"{', '.join(sorted({*options, *others}))}"
        )
    chosen = {}
    for name in set(found) & set(options):
        value, many = found[name], getattr(options[name], "multiple", False)
        many = many or options[name].nargs == -1
        if value is not None:
            chosen[name] = [value] if many and not isinstance(value, list) else value
    ctx.default_map = {**(ctx.default_map or {}), **chosen}
    ctx.meta["emlens.config"] = {k: v for k, v in found.items() if k not in options}


_NO_VALUES = {"config", "help", "install_completion", "show_completion", *_SHARED}


def _answer(ctx: typer.Context, function: Callable[..., None], given: dict[str, Any]) -> None:
    """Call a verb; an error becomes one message and an exit code."""
    shared = {key: given.pop(key) for key in _SHARED}
    given.pop("config", None)
    try:
        given = {name: _at_home(value) for name, value in given.items()}
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    options = dict(given)
    placed = {key: given.pop(key) for key in _MODEL if key in given}
    call = Call(
        verb=ctx.command_path.partition(" ")[2],
        command=shlex.join(["emlens", *sys.argv[1:]]),
        options=options,
        stdout=sys.stdout,
        quiet=shared["quiet"],
        as_json=shared["as_json"],
        model=placed.pop("model", None),
        placed={key: value for key, value in placed.items() if value is not None},
        config=ctx.meta.get("emlens.config", {}),
    )
    try:
        with redirect_stdout(sys.stderr):
            function(call, **given)
    except KeyboardInterrupt:
        typer.echo(f"\ninterrupted: {call.kept}", err=True)
        raise typer.Exit(INTERRUPTED) from None
    except _Unread:
        # whoever reads has seen enough, as `| head` does; what is left must not fail at exit
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        raise typer.Exit(UNREAD) from None
    except (typer.Exit, typer.Abort, typer.BadParameter):
        raise
    except Exception as error:
        if shared["traceback"]:
            traceback.print_exc()
        expected = isinstance(error, _INPUT_ERRORS)
        typer.echo(f"error: {_message(error, expected)}", err=True)
        raise typer.Exit(BAD_INPUT if expected else FAILED) from None


def _at_home(value: Any) -> Any:
    """Paths with `~` put out, which a shell leaves in `--out=~/a`."""
    from emlens._reading import expanded

    if isinstance(value, (list, tuple)):
        return type(value)(map(_at_home, value))
    return expanded(value) if isinstance(value, Path) else value


def _message(error: Exception, expected: bool) -> str:
    # the text of a KeyError is its argument in quotes
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error).strip()
    known = expected or isinstance(error, (ImportError, ConnectionError))
    if known and text:
        return text
    return f"{type(error).__name__}: {text or 'no message'} (--traceback shows where)"


def table_text(table: pd.DataFrame) -> str:
    """A table for the terminal."""
    return table.to_string(index=False, float_format=lambda value: f"{value:.4f}")


def rows_of(table: pd.DataFrame) -> list[dict]:
    """A table for JSON."""
    return table.to_dict("records")


def show_config(call: Call, config: Mapping[str, Any]) -> None:
    """Print the settings that a run was resolved to."""
    from emlens.study.folder import config_text

    call.note(f"settings:\n{config_text(config).rstrip()}")


def _plain(value: Any) -> Any:
    """JSON's own values: no NaN, no numpy, no paths."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return str(value)
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
