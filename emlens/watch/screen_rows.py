"""Input and output of a screen: rows of a finetuning set, reference answers, scores."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from emlens._files import sha256_of
from emlens._reading import expanded, read_jsonl
from emlens._types import checked_row
from emlens.text import Conversation
from emlens.text.conversation import content_hash
from emlens.text.datasets import messages_of

Dataset = str | Path | Iterable[Conversation]
"""A JSON Lines file, or conversations, which may be a stream."""

Answers = str | Path | Mapping[str, str] | Iterable[Conversation]
"""Reference answers: by the text of the prompt, or a set that answers the same prompts."""


@dataclass(frozen=True, slots=True)
class Example:
    """A row of a finetuning set.

    Attributes:
        row: Its place in the set, from 0.
        name: Its id, or `line 7` of a file, or `row 6`.
        conversation: What it says.
    """

    row: int
    name: str
    conversation: Conversation

    @property
    def hash(self) -> str:
        """Hash of its messages."""
        return content_hash([self.conversation])


@dataclass(frozen=True)
class Scored:
    """The scores of an example.

    Attributes:
        row: Its place in the set, from 0.
        name: Its name.
        score: Projection of its answer minus that of the reference, in median residual norms;
            None where there was no reference answer.
        projection: Projection of its answer.
        reference: Projection of the reference answer.
        tokens: Tokens of its answer that counted.
        hash: Hash of its messages.
    """

    row: int
    name: str
    score: float | None
    projection: float
    reference: float | None
    tokens: int
    hash: str


def examples(dataset: Dataset, what: str = "") -> Iterator[Example]:
    """Read a set row by row.

    Rows of a file have `messages`, or `prompt` and `response`. Errors about rows that do
    not come from a file start with `what`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a row is not valid; its file and line, or its place, are named.
        TypeError: If something is not a conversation.
    """
    if isinstance(dataset, (str, Path)):
        path = expanded(dataset)
        for row, (number, record) in enumerate(read_jsonl(path)):
            found = _conversation(record, f"{path}, line {number}")
            yield _checked(Example(row, found.id or f"line {number}", found), f"{path}, ")
        return
    for row, item in enumerate(dataset):
        if not isinstance(item, Conversation):
            raise TypeError(
                f"row {row} is a {type(item).__name__}; give conversations, or the path of a file"
            )
        yield _checked(Example(row, item.id or f"row {row}", item), what)


def blocks(rows: Iterable[Example], size: int) -> Iterator[list[Example]]:
    """Rows in blocks; rows before a broken one are yielded before its error is raised."""
    block: list[Example] = []
    try:
        for example in rows:
            block.append(example)
            if len(block) == size:
                yield block
                block = []
    except (ValueError, TypeError):
        if block:
            yield block
        raise
    if block:
        yield block


class References:
    """Reference answers by prompt, held in memory.

    Args:
        given: Answers by the text of the prompt, or a set that answers the same prompts; the
            first answer to a prompt counts.
    """

    def __init__(self, given: Answers) -> None:
        self._by_text: dict[str, str] = {}
        self._by_prompt: dict[str, str] = {}
        if isinstance(given, Mapping):
            self._by_text.update(cast(Mapping[str, str], given))
        else:
            for example in examples(given, "reference "):
                key = prompt_key(example.conversation)
                self._by_prompt.setdefault(key, example.conversation.response)
        if not self._by_text and not self._by_prompt:
            raise ValueError("the reference has no answers")

    @property
    def hash(self) -> str:
        """Hash of all answers."""
        both = {**self._by_text, **self._by_prompt}
        return sha256_of(json.dumps(both, sort_keys=True).encode())[:16]

    def answer(self, prompt: Conversation) -> str:
        """The answer to one prompt.

        Raises:
            ValueError: If there is none.
        """
        text = prompt.messages[-1]["content"]
        found = self._by_prompt.get(prompt_key(prompt), self._by_text.get(text))
        if found is None or not found.strip():
            n = len(self._by_text) + len(self._by_prompt)
            raise ValueError(
                f"the reference has no answer to the prompt of {prompt.id} ({text!r:.80}); it "
                f"answers {n} prompts. Add one, or use reference='own'"
            )
        return found


def prompt_key(conversation: Conversation) -> str:
    """Key of a prompt, equal for all answers to it."""
    return content_hash([conversation.prompt])


def kept_rows(
    records: Iterable[Mapping], block: Sequence[Example], path: str | Path
) -> list[Scored]:
    """Stored scores of the first examples of a block, or of all.

    Raises:
        ValueError: If a record is not a score, or belongs to another set.
    """
    found = []
    for record, example in zip(records, block, strict=False):
        try:
            one = checked_row(Scored, record, "a score")
        except ValueError as error:
            raise ValueError(f"{path} holds a row that is not a score ({error})") from error
        if (one.row, one.hash) != (example.row, example.hash):
            raise ValueError(
                f"{path} holds scores of another set: its row {one.row} is {one.name!r}, here it "
                f"is {example.name!r} or says something else; choose another file"
            )
        found.append(one)
    return found


def _conversation(record: dict, where: str) -> Conversation:
    name = record.get("id")
    name = None if name is None else str(name)
    try:
        if "messages" in record:
            return Conversation(messages_of(record), name)
        if "prompt" in record and "response" in record:
            return Conversation.of(record["prompt"], record["response"], id=name)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error
    raise ValueError(
        f"{where}: neither 'messages' nor 'prompt' and 'response'; it has "
        f"{', '.join(map(str, record))}"
    )


def _checked(example: Example, where: str) -> Example:
    """The example, named, with an answer at its end."""
    messages = example.conversation.messages
    if messages[-1]["role"] != "assistant" or not messages[-1]["content"].strip():
        raise ValueError(f"{where}{example.name} does not end with an answer; leave it out")
    if all(message["role"] == "assistant" for message in messages):
        raise ValueError(f"{where}{example.name} has an answer but no prompt; leave it out")
    return Example(example.row, example.name, Conversation(messages, example.name))
