"""Help: fast, with examples that the verbs understand."""

from __future__ import annotations

import shlex
import subprocess
import sys

import pytest
import typer

from emlens import cli

HEAVY = {"torch", "transformers", "matplotlib", "numpy", "pandas", "nnsight", "datasets", "yaml"}
GROUP = typer.main.get_command(cli.app)


def commands(group=GROUP, path=()):
    """Every verb by its words."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


VERBS = dict(commands())


def examples(command) -> list[str]:
    lines = command.epilog.splitlines()
    return [line.strip() for line in lines if line.startswith("  ")]


ALL = [(words, line) for words, command in VERBS.items() for line in examples(command)]


def test_python_m_emlens_is_the_command_line():
    command = [sys.executable, "-m", "emlens", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "monitor" in shown.stdout
    assert "Usage: emlens " in shown.stdout


def test_help_names_every_verb_and_the_exit_codes(run):
    overview = run("--help")
    assert len(VERBS) == 14
    for words in VERBS:
        assert f"\n  {words[0]} " in overview
        assert len(words) == 1 or f"\n  {words[1]} " in run(words[0], "--help")
    assert "0 done; 1 failed; 2 wrong usage" in overview
    assert "130 interrupted" in overview


@pytest.mark.parametrize("words", VERBS, ids=" ".join)
def test_each_verb_has_examples_and_the_shared_options_in_its_help(run, words):
    text = run(*words, "--help")
    for option in ("--quiet", "--json", "--traceback"):
        assert option in text
    assert examples(VERBS[words])
    for line in examples(VERBS[words]):
        # as it is typed, never folded
        assert line in text


@pytest.mark.parametrize(("words", "line"), ALL, ids=[line for _, line in ALL])
def test_an_example_is_understood_by_its_verb(words, line, tmp_path, monkeypatch):
    program, *arguments = shlex.split(line)
    assert program == "emlens"
    assert tuple(arguments[: len(words)]) == words
    rest = arguments[len(words) :]
    if "--config" in rest:
        monkeypatch.chdir(tmp_path)
        path = tmp_path / rest[rest.index("--config") + 1]
        path.parent.mkdir(parents=True)
        path.write_text("preset: smoke\n")
    VERBS[words].make_context(" ".join(words), rest)


def test_showing_help_imports_nothing_heavy():
    code = f"""
import sys
from typer.testing import CliRunner
from emlens.cli import app
for words in {list(VERBS)!r}:
    done = CliRunner().invoke(app, [*words, "--help"])
    assert done.exit_code == 0, words
print(*sorted({HEAVY} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_the_version_is_that_of_the_package(run):
    import emlens

    assert run("--version") == f"emlens {emlens.__version__}\n"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_gets_a_completion_that_knows_the_verbs(shell):
    base = {"_EMLENS_COMPLETE": f"source_{shell}"}
    program = [sys.executable, "-c", "from emlens.cli import main; main()"]
    made = subprocess.run(program, env=base, capture_output=True, text=True, check=False)
    assert "_EMLENS_COMPLETE" in made.stdout
    asked = {"_EMLENS_COMPLETE": "complete_bash", "COMP_WORDS": "emlens e", "COMP_CWORD": "1"}
    found = subprocess.run(program, env=asked, capture_output=True, text=True, check=False)
    assert set(found.stdout.split()) == {"extract", "evaluate", "export"}
