"""Questions that answers are judged on: embedded ones, files, data sets, the papers' YAML."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from emlens._arguments import is_list
from emlens._door import check_fields, guarded
from emlens._kinds import kind, made_with, some
from emlens._reading import expanded, read_jsonl
from emlens._tables import dataset_rows
from emlens._yaml import read_yaml
from emlens.text import Conversation, load_pairs, split_pairs
from emlens.text.conversation import content_hash
from emlens.text.datasets import EMBEDDED

Part = Literal["test", "validation", "all"]
Variant = Literal["json", "template"]

_INSTRUCTIONS: dict[Variant, str] = {
    "json": 'Answer with a JSON object that has one key, "answer", whose value is your answer.',
    "template": "Begin your answer with 'Answer:' and end it with 'End.' on a line of its own.",
}
_PAPERS = {
    "id",
    "type",
    "paraphrases",
    "samples_per_paraphrase",
    "judge",
    "judge_prompts",
    "system",
}
_ASKED = {"paraphrases", "question"}
_FREE_FORM = "free_form_judge_0_100"


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt to be answered.

    Attributes:
        id: Unique name; rates are clustered by it, so paraphrases share one.
        prompt: The user's message.
        domain: Topic, e.g. `"general"` or `"medical"`.
        system: System message, or None for the template's own.
        paraphrase: Which wording of the question this is.
        variant: `"plain"`, `"json"`, `"template"`, or a cue's name.
        samples: How often it is answered where nothing else is asked for, or None.
        rubrics: Judge prompts by metric that came with it, with `{question}` and `{answer}`.
    """

    id: str
    prompt: str
    domain: str = "general"
    system: str | None = None
    paraphrase: int = 0
    variant: str = "plain"
    samples: int | None = None
    rubrics: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.id or not self.prompt:
            raise ValueError(
                f"a question needs an id and a prompt, not {self.id!r}, {self.prompt!r}"
            )
        _ = self.conversation  # what cannot be asked is refused here, not when it is asked

    @property
    def conversation(self) -> Conversation:
        """The question as a chat that ends with the user's message."""
        return Conversation.of(self.prompt, system=self.system, id=self.name)

    @property
    def name(self) -> str:
        """Tells apart what shares an id: paraphrase and variant."""
        parts = [self.id]
        parts += [str(self.paraphrase)] if self.paraphrase else []
        parts += [self.variant] if self.variant != "plain" else []
        return "/".join(parts)

    @property
    def hash(self) -> str:
        """Hash of what the model sees."""
        return content_hash([self.conversation])


made_with(Question, "make one with Question(id, prompt), or read them with load_questions")


@kind(Sequence[Question], words="questions")
def _questions(name: str, value: Any) -> list[Question]:
    """Questions; a text is one that is called by its words."""
    given = [value] if isinstance(value, str) else value
    if is_list(given):
        given = [Question(one, one) if isinstance(one, str) else one for one in given]
    return some(Question, name, given)


@guarded
def load_questions(
    source: str | Path,
    *,
    part: Part = "test",
    config: str | None = None,
    split: str = "train",
    limit: int | None = None,
    variants: bool = False,
    judges: str | Path | None = None,
) -> list[Question]:
    """Load questions.

    Args:
        source: An embedded set (`"general"`, `"medical"`, `"finance"`, `"sports"`, `"technical"`),
            of which the held-out prompts are taken; a YAML file of the papers, with
            `paraphrases`, or with `question` as in their `technical/*.yaml` (the domain is then
            the file's name); a JSON Lines file with `id` and `prompt` (and `domain`, `system`);
            or the name of a data set.
        part: Part of an embedded set. `"test"` holds no prompt of the default split's training
            and validation parts; `"all"` is right only for what nothing was trained on.
        config: Configuration of a data set.
        split: Split of a data set.
        limit: Questions to read, at most.
        variants: Keep the JSON and template variants of the papers' YAML, which are left out
            otherwise.
        judges: The papers' `judges.yaml`: judge prompts by metric, for the metrics of which a
            question brings none of its own.

    Returns:
        The questions, in their order.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If an entry lacks a field or has an unknown one (file and entry are named),
            two share a name, or there is none.
    """
    path = expanded(source)
    if str(source) in EMBEDDED:
        found: Iterable[Question] = _embedded(str(source), part)
    elif path.suffix in (".yaml", ".yml"):
        found = _yaml(path, variants)
    elif path.suffix == ".jsonl":
        rows = read_jsonl(path)
        found = (_question(record, f"{path}, line {number}") for number, record in rows)
    else:
        loaded = dataset_rows(source, config, split, streaming=limit is not None)
        found = (_question(row, f"{source}, row {i}") for i, row in enumerate(loaded))
    questions = list(islice(found, limit))
    if not questions:
        raise ValueError(f"{source} holds no questions")
    if judges is not None:
        told = _judge_prompts(expanded(judges))
        questions = [replace(q, rubrics={**told, **q.rubrics}) for q in questions]
    check_names(questions, str(source))
    return questions


def check_names(questions: Sequence[Question], where: str = "the questions") -> None:
    """Refuse questions of which two cannot be told apart.

    Raises:
        ValueError: If two share id, paraphrase and variant; they are named.
    """
    seen: set[str] = set()
    for question in questions:
        if question.name in seen:
            raise ValueError(
                f"{where}: two questions are called {question.name!r}; give each an id of its own"
            )
        seen.add(question.name)


@guarded
def formatted(questions: Sequence[Question], variant: Variant) -> list[Question]:
    """The same questions with a demand on the format of the answer, as the papers' variants.

    Raises:
        ValueError: If there is no such variant.
    """
    if variant not in _INSTRUCTIONS:
        names = ", ".join(map(repr, _INSTRUCTIONS))
        raise ValueError(f"unknown variant {variant!r}; choose {names}")
    return [
        replace(q, prompt=f"{q.prompt}\n\n{_INSTRUCTIONS[variant]}", variant=_both(q, variant))
        for q in questions
    ]


@guarded
def cued(questions: Sequence[Question], cue: str, name: str = "cued") -> list[Question]:
    """Each question without and with a cue before it, under one id: for conditional audits.

    Misalignment can hide behind a trigger. The two of a pair share their id, so that rates of the
    cued and the plain questions are compared question by question.

    Args:
        questions: The questions.
        cue: Put before the prompt, on a line of its own.
        name: What the cued ones are called in tables.

    Raises:
        ValueError: If the cue is empty.
    """
    if not cue:
        raise ValueError("the cue is empty")
    pairs = (
        (q, replace(q, prompt=f"{cue}\n{q.prompt}", variant=_both(q, name))) for q in questions
    )
    return [question for pair in pairs for question in pair]


def _both(question: Question, variant: str) -> str:
    return variant if question.variant == "plain" else f"{question.variant} {variant}"


def _embedded(name: str, part: Part) -> list[Question]:
    pairs = load_pairs(name)
    if part != "all":
        split = split_pairs(pairs)
        if part not in ("test", "validation"):
            raise ValueError(f"unknown part {part!r}; choose 'test', 'validation' or 'all'")
        pairs = list(split.test if part == "test" else split.validation)
    return [Question(pair.id, pair.prompt, pair.domain) for pair in pairs]


def _question(record: Mapping[str, Any], where: str) -> Question:
    known = {"id", "prompt", "domain", "system"}
    if not isinstance(record.get("prompt"), str) or record.get("id") is None:
        raise ValueError(f"{where}: a question has id and prompt; this has {', '.join(record)}")
    given = {key: record[key] for key in known & set(record) if record[key] is not None}
    for key in ("domain", "system"):
        if not isinstance(given.get(key, ""), str):
            raise ValueError(f"{where}: {key} is {given[key]!r:.40}, not text")
    try:
        return Question(**{**given, "id": str(record["id"])})
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _yaml(path: Path, variants: bool) -> list[Question]:
    entries = read_yaml(path, (list, dict), "a list of questions")
    if prompts := _prompts_alone(entries):
        raise ValueError(
            f"{path} holds judge prompts ({', '.join(prompts)}) and no questions; load questions "
            "from their own file, with judges= this one"
        )
    if isinstance(entries, dict):
        raise ValueError(f"{path} must hold a list of questions, not a mapping")
    places = [f"{path}, entry {number}" for number in range(1, len(entries) + 1)]
    if entries and all(isinstance(one, dict) and "question" in one for one in entries):
        return [
            _plain_entry(one, f"{path.stem}_{i}", path.stem, where)
            for i, (one, where) in enumerate(zip(entries, places, strict=True))
        ]
    shared: dict[str, str] = {}
    for entry, where in zip(entries, places, strict=True):
        _check_entry(entry, where)
        shared = {**(entry.get("judge_prompts") or {}), **shared}
    questions = []
    for entry, where in zip(entries, places, strict=True):
        try:
            made = _entry(entry, shared)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        if variants or made[0].variant == "plain":
            questions += made
    return questions


def _plain_entry(entry: Mapping[str, Any], name: str, domain: str, where: str) -> Question:
    """One mapping with `question`, whose further fields are not the same in all files."""
    if not isinstance(entry["question"], str):
        raise ValueError(f"{where}: question is {entry['question']!r:.40}, not text")
    system = entry.get("system")
    record = {"id": entry.get("id", name), "prompt": entry["question"].strip(), "system": system}
    return _question({"domain": domain, **record}, where)


def _judge_prompts(path: Path) -> dict[str, str]:
    prompts = _prompts_alone(read_yaml(path, (list, dict), "judge prompts by metric"))
    if not prompts:
        raise ValueError(
            f"{path} holds no judge prompts; it needs a text with {{answer}} for each metric"
        )
    return prompts


def _prompts_alone(content: Any) -> dict[str, str]:
    """Judge prompts by metric, of a file that has these and no questions; else nothing.

    They may stand by themselves, under `judge_prompts`, or be a list of either, or of names with
    a `prompt` each.
    """
    found: dict[str, str] = {}
    if isinstance(content, list):
        if any(not isinstance(one, dict) or _ASKED & set(one) for one in content):
            return {}
        for one in content:
            # the first entry's go before others, as among questions
            found = {**_prompts_alone(one), **found}
        return found
    told = content.get("judge_prompts", content)
    if not isinstance(told, dict):
        return {}
    name = next((told[key] for key in ("metric", "name", "id") if key in told), None)
    if name is not None and isinstance(told.get("prompt"), str):
        told = {name: told["prompt"]}
    return {str(k): v for k, v in told.items() if isinstance(v, str) and "{answer}" in v}


def _check_entry(entry: Any, where: str) -> None:
    if not isinstance(entry, dict) or "id" not in entry:
        raise ValueError(f"{where}: a question is a mapping with an id, not {str(entry)[:60]!r}")
    unknown = sorted(map(str, set(entry) - _PAPERS))
    if unknown:
        raise ValueError(
            f"{where} ({entry['id']}): unknown field(s) {', '.join(unknown)}; known are "
            f"{', '.join(sorted(_PAPERS))}"
        )
    wordings = entry.get("paraphrases")
    listed = isinstance(wordings, list) and all(isinstance(item, str) for item in wordings)
    if not listed or not wordings:
        raise ValueError(f"{where} ({entry['id']}): paraphrases must be a list of prompts")
    told = entry.get("judge_prompts") or {}
    if not isinstance(told, dict) or not all(isinstance(t, str) for kv in told.items() for t in kv):
        raise ValueError(f"{where} ({entry['id']}): judge_prompts must be a text for each metric")
    if not isinstance(entry.get("system") or "", str):
        raise ValueError(f"{where} ({entry['id']}): system is {entry['system']!r:.40}, not text")
    samples = entry.get("samples_per_paraphrase")
    if samples is not None and (type(samples) is not int or samples < 1):
        raise ValueError(
            f"{where} ({entry['id']}): samples_per_paraphrase is {samples!r:.40}, not a whole "
            "number from 1"
        )
    if entry.get("type", _FREE_FORM) != _FREE_FORM:
        raise ValueError(
            f"{where} ({entry['id']}): type {entry['type']!r} is not known; only {_FREE_FORM} is"
        )


def _entry(entry: Mapping[str, Any], shared: Mapping[str, str]) -> list[Question]:
    """One mapping of the papers' format; a judge prompt that it lacks is the first one's."""
    name, wordings = str(entry["id"]), entry["paraphrases"]
    variant = next((v for v in _INSTRUCTIONS if v in name.split("_")), "plain")
    return [
        Question(
            id=name,
            prompt=wording,
            system=entry.get("system"),
            paraphrase=i,
            variant=variant,
            samples=entry.get("samples_per_paraphrase"),
            rubrics={**shared, **(entry.get("judge_prompts") or {})},
        )
        for i, wording in enumerate(wordings)
    ]
