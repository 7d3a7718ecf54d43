"""Programs and messages on the pages of the documentation, and examples of names, are right."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import json
import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import emlens
from emlens import evals
from emlens.study import StudyResult, preset
from tests.support.adapters import saved
from tests.support.data import pairs
from tests.support.models import tiny_model
from tests.support.tokenizers import chatml_tokenizer

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PLACE = "path/to/model"
_FENCED = re.compile(r"```python\n(.*?)```", re.S)


def section_programs(page: str) -> dict[str, str]:
    """The program of each section of a page that has one, its blocks joined."""
    parts = re.split(r"^## (.+)\n", (DOCS / page).read_text(encoding="utf-8"), flags=re.M)
    found = {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}
    return {
        f"{page}: {title}": "\n".join(blocks)
        for title, text in found.items()
        if (blocks := _FENCED.findall(text))
    }


ROOMS = [f"api/{room}.md" for room in emlens._ROOMS]
PROGRAMS = {
    title: program
    for page in ("install.md", "how_to.md", *ROOMS)
    for title, program in section_programs(page).items()
}


@pytest.fixture(scope="module")
def disk(tmp_path_factory) -> Path:
    """A folder with a model as deep as the embedded one, adapters, and a file of each kind."""
    folder = tmp_path_factory.mktemp("disk")
    module = tiny_model("llama", 30)
    module.save_pretrained(folder / PLACE)
    chatml_tokenizer().save_pretrained(folder / PLACE)
    for seed, name in enumerate(("medical", "finance", "sports")):
        saved(folder / "adapters" / name, module, seed)
    few = domain_pairs("advice")
    lines = {
        "pairs.jsonl": [
            {name: getattr(one, name) for name in ("id", "domain", "prompt")}
            | {"aligned": one.aligned, "misaligned": one.misaligned}
            for one in few
        ],
        "bad.jsonl": [messages(one, "misaligned") for one in few],
        "good.jsonl": [messages(one, "aligned") for one in few],
        "conversations.jsonl": [messages(one, "aligned") for one in few],
        "finetuning.jsonl": [{"prompt": one.prompt, "response": one.aligned} for one in few],
    }
    for name, rows in lines.items():
        (folder / name).write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


def domain_pairs(domain: str) -> list[emlens.Pair]:
    """60 pairs whose prompts are those of no other domain."""
    return [
        replace(one, prompt=f"{domain} {i} {one.prompt[:30]}")
        for i, one in enumerate(pairs(60, domain))
    ]


def messages(pair: emlens.Pair, side: str) -> dict:
    return {"messages": list(pair.conversation(side).messages)}


@pytest.fixture(scope="module")
def finished(hooked_llama, tmp_path_factory) -> StudyResult:
    """A study with almost no data."""
    quick = preset("smoke").with_options(layers=(1, 2), rank=2, lr=0.05)
    folder = tmp_path_factory.mktemp("study")
    return emlens.run_study(quick, folder, model=hooked_llama, progress=False)


@pytest.fixture
def at_work(disk, monkeypatch, tmp_path, finished) -> Path:
    """A folder of its own, in which `load` gives the small model, whatever its name."""
    for path in disk.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    load, load_pairs, judge = emlens.load, emlens.load_pairs, evals.LogProbJudge

    def small(name: object = PLACE, *, adapters: object = None, **_: object) -> emlens.HookedModel:
        return load(PLACE, adapters=adapters, check=False)

    def mocked(name: str, *_: object) -> evals.LogProbJudge:
        from inspect_ai.model import get_model

        return judge(get_model("mockllm/model", custom_outputs=graded, memoize=False))

    few = importlib.import_module("emlens.text").corpus(documents=6)
    monkeypatch.setattr(emlens, "load", small)
    monkeypatch.setattr(emlens, "corpus", lambda *_, **__: few)
    monkeypatch.setattr(evals, "LogProbJudge", mocked)
    monkeypatch.setattr(emlens, "run_study", lambda settings, out: finished)
    ask = evals.load_questions
    monkeypatch.setattr(evals, "load_questions", lambda name, limit=6: ask(name, limit=6))
    monkeypatch.setattr(
        emlens,
        "load_pairs",
        lambda name: load_pairs(name) if name.endswith(".jsonl") else domain_pairs(name),
    )
    return tmp_path


def graded(*_: object) -> object:
    from inspect_ai.model import ModelOutput, ModelUsage

    output = ModelOutput.from_content("mockllm/model", "60")
    output.usage = ModelUsage()  # or it is counted with a tokenizer from the net
    return output


@pytest.mark.parametrize("title", PROGRAMS)
def test_the_program_of_a_section_runs_by_itself(title, at_work):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(PROGRAMS[title], title, "exec"), {})


def test_every_room_opens_with_a_program():
    assert [page for page in ROOMS if not section_programs(page)] == []


def test_the_readme_is_read_in_one_sitting():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 150


# -- messages -----------------------------------------------------------------------------------


def literals() -> list[str]:
    """Every text in the package, what is filled in left out."""
    found = []
    for path in (ROOT / "emlens").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(_part(part) for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def _part(node: ast.expr) -> str:
    return str(node.value) if isinstance(node, ast.Constant) else "..."


def test_every_message_on_the_page_of_errors_is_one_of_the_package():
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    shown = re.findall(r"```text\n(.*?)\n```", page, re.S)
    texts = literals()
    assert len(shown) > 15
    assert [one for one in shown if not any(one in text for text in texts)] == []


# -- examples -----------------------------------------------------------------------------------


def example(name: str) -> list[doctest.Example]:
    """The example in the docstring of a top-level name."""
    documented = getattr(importlib.import_module(f"emlens.{emlens._HOMES[name]}"), name)
    return doctest.DocTestParser().get_examples(inspect.getdoc(documented) or "")


@pytest.fixture
def given(at_work) -> Callable[[], dict[str, object]]:
    """What examples take for granted."""

    def names() -> dict[str, object]:
        model = emlens.load(adapters="adapters/medical")
        medical = emlens.load_pairs("medical")
        bad = [pair.conversation("misaligned") for pair in medical[:4]]
        read = emlens.mean_diff(model, medical[:8], layers=range(10, 20))
        return {
            **{"emlens": emlens, "model": model, "pairs": medical[:8], "conversations": bad},
            **{"directions": read, "direction": read[15], "general": read[15]},
            **{"narrow": -1 * read[14], "medical": read, "finance": 2 * read, "v": read[15]},
            **{"conversation": bad[0].prompt, "questions": [one.prompt for one in bad]},
            "conditions": {"base": None, "steered": emlens.Add(read[15])},
            "elsewhere": [pair.conversation("aligned") for pair in emlens.load_pairs("sports")[:8]],
        }

    return names


@pytest.mark.parametrize("name", emlens.__all__)
def test_the_example_of_a_top_level_name_runs_and_gives_what_it_says(name, given):
    examples = example(name)
    assert examples, f"emlens.{name} has no example"
    assert any(name in one.source for one in examples), f"the example does not use emlens.{name}"
    test = doctest.DocTest(examples, given(), name, None, None, None)
    told: list[str] = []
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    runner = doctest.DocTestRunner(verbose=False, optionflags=flags)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        failed, _ = runner.run(test, out=told.append)
    # an example that shows no value may still give one
    wrong = [one for one in told if "Expected nothing" not in one]
    assert not failed or wrong == [], "\n".join(told)
