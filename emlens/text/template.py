"""A chat template with the arguments it is rendered with: the one place where it is applied."""

from __future__ import annotations

import datetime
import hashlib
import json
import re
import warnings
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from emlens.text.conversation import Message
from emlens.text.thinking import CLOSE, OPEN

REFUSALS = (TemplateError, ValueError, TypeError)
"""What a template raises on messages that it does not take."""

DATE = "2024-07-26"
"""The date that a template is given in place of today's: the one Llama's templates fall back on."""


_OWN = ("weight", "train", "tools")
"""Keys of a message that are not for the template's eyes, or reach it by another way."""
_TAKEN = frozenset(
    {
        *("conversation", "messages", "chat_template", "tools", "documents", "tokenize"),
        *("add_generation_prompt", "continue_final_message", "padding", "truncation"),
        *("max_length", "return_tensors", "return_dict", "tokenizer_kwargs"),
        *("return_assistant_tokens_mask", "sanitize_control_tokens"),
    }
)
_CODES = ("-d", "-m", "-H", "-I", "-M", "-S", "-j", *"aAbBdmyYHIpMSjUwWuVGecxXDFTRhZz")
_ASKED: Message = {"role": "user", "content": "\ue002"}
_ANSWERED: Message = {"role": "assistant", "content": "\ue003"}


@dataclass(frozen=True)
class Template:
    """A tokenizer's chat template and what it is given beside the messages.

    Attributes:
        tokenizer: The tokenizer.
        arguments: Variables of the template, such as `enable_thinking`. `strftime_now` is a date,
            `"2024-07-26"`, which stands for today's.
    """

    tokenizer: PreTrainedTokenizerBase
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, template: Template | PreTrainedTokenizerBase) -> Template:
        """A template as it is; that of a tokenizer without arguments."""
        return template if isinstance(template, Template) else cls(template)

    @property
    def name(self) -> str:
        """What errors call the tokenizer."""
        return getattr(self.tokenizer, "name_or_path", "") or "this tokenizer"

    @property
    def hash(self) -> str:
        """Hash of the template and its arguments; 16 hexadecimal digits."""
        text = str(self.tokenizer.chat_template)
        if self.arguments:
            text += json.dumps(dict(self.arguments), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def record(self) -> dict[str, Any]:
        """What provenance says of the arguments; nothing where there are none."""
        return {"template_arguments": dict(self.arguments)} if self.arguments else {}

    def apply(
        self, messages: Sequence[Message], *, opening: bool = False, continued: bool = False
    ) -> str:
        """Render messages.

        Args:
            messages: The messages. Their `tools` are given to the template together.
            opening: Ask for the opening of an answer, where the template has one.
            continued: Stop within the last message, so that it can be continued.

        Raises:
            TemplateError, ValueError, TypeError: If the template does not take them.
        """
        plain: Any = [{k: v for k, v in m.items() if k not in _OWN} for m in messages]
        tools: Any = [tool for m in messages for tool in m.get("tools", ())] or None
        source, given = None, dict(self.arguments)
        date = given.pop("strftime_now", None)
        if date is not None:
            source = _dated(self.tokenizer.get_chat_template(None, tools), date)
        return str(
            self.tokenizer.apply_chat_template(
                plain,
                tools=tools,
                chat_template=source,
                tokenize=False,
                add_generation_prompt=opening,
                continue_final_message=continued,
                **given,
            )
        )

    def opened(self, messages: Sequence[Message], *, thinking: bool = True) -> str:
        """Render messages with the opening of an answer.

        A template that ignores `add_generation_prompt` gets the header that it puts before
        answers.

        Args:
            messages: The messages.
            thinking: Without it the thinking is over: the answer itself comes next.
        """
        if thinking:
            return self.apply(messages, opening=True) + self.missing_opening
        quiet = replace(self, arguments={**self.arguments, "enable_thinking": False})
        text, closed = quiet.opened(messages), quiet.apply(messages)
        opening = text.removeprefix(closed)
        if opening.rstrip().endswith(OPEN):
            return f"{text.rstrip()}\n\n{CLOSE}\n\n"
        header, _ = quiet.around()
        if CLOSE not in opening and CLOSE in header and header.startswith(opening):
            return closed + header
        return text

    @property
    def opened_thinking(self) -> str:
        """The thinking tag that the opening of an answer ends with, where it does."""
        try:
            text = self.opened([_ASKED])
        except REFUSALS:
            return ""
        return text[text.rfind(OPEN) :] if text.rstrip().endswith(OPEN) else ""

    @property
    def missing_opening(self) -> str:
        """The header of answers, where the template does not open one when asked to."""
        header, _ = self.around()
        if not header.strip():
            # the answer follows the question, as in Mistral's
            return ""
        try:
            opened = self.apply([_ASKED], opening=True)
        except REFUSALS:
            return ""
        return header if opened == self.apply([_ASKED]) else ""

    def around(self) -> tuple[str, str]:
        """What the template puts before an answer, after the question, and what after it.

        Nothing where that cannot be told.
        """
        try:
            asked = self.apply([_ASKED])
            before, found, after = self.apply([_ASKED, _ANSWERED]).partition(_ANSWERED["content"])
        except REFUSALS:
            return "", ""
        if not found:
            return "", ""
        return before.removeprefix(asked) if before.startswith(asked) else "", after

    @property
    def end_of_turn(self) -> int | None:
        """The token of its own that ends an answer; None where there is none."""
        try:
            text = self.apply([_ASKED, _ANSWERED])
        except REFUSALS:
            return None
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        done = text.rfind(_ANSWERED["content"]) + 1
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        closing = closing_tokens(closing_ids(self.tokenizer), text, ids, offsets)
        rows = zip(ids, offsets, closing, strict=True)
        return next((i for i, (start, _), closes in rows if closes and start >= done > 0), None)


def settled(
    tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any] | None = None
) -> Template:
    """The template of a model that is being loaded, with its date fixed; warns of what is odd.

    Raises:
        TypeError: If the arguments are no mapping from names to plain values.
        ValueError: If the template does not use one of them, or emlens sets it.
    """
    template = Template(tokenizer, _checked(tokenizer, arguments))
    if not getattr(tokenizer, "chat_template", None):
        return template
    if "strftime_now" not in template.arguments and _depends_on_date(template):
        template = replace(template, arguments={**template.arguments, "strftime_now": DATE})
        warnings.warn(
            f"the chat template of {template.name} writes today's date; emlens fixes it to {DATE}, "
            "so that the same text is the same tokens tomorrow. Choose another with "
            "template_arguments={'strftime_now': 'YYYY-MM-DD'}",
            stacklevel=3,
        )
    _warn_of_turns(template)
    return template


def closing_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that may end a turn: special and added ones."""
    return set(tokenizer.all_special_ids) | set(getattr(tokenizer, "added_tokens_decoder", ()))


def closing_tokens(
    closers: Container[int],
    text: str,
    ids: Sequence[int],
    offsets: Sequence[tuple[int, int]],
) -> list[bool]:
    """Which tokens may end a turn, `[pos]`, given those of the tokenizer that may."""
    # some tokenizers add runs of spaces as tokens; those end no turn
    return [
        token in closers and bool(text[start:end].strip())
        for token, (start, end) in zip(ids, offsets, strict=True)
    ]


def _warn_of_turns(template: Template) -> None:
    """Warn of a template that does not open answers, or does not end them with a token."""
    header = template.missing_opening
    if header:
        warnings.warn(
            f"the chat template of {template.name} ignores add_generation_prompt; emlens opens "
            f"answers with the header that it puts before them, {header!r}",
            stacklevel=4,
        )
    _, after = template.around()
    if getattr(template.tokenizer, "is_fast", False) and template.end_of_turn is None:
        warnings.warn(
            f"the chat template of {template.name} ends an answer with {after!r}, which is no "
            "token of its own; generation stops only at the model's end-of-text token or at "
            "max_new_tokens",
            stacklevel=4,
        )


def _checked(
    tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any] | None
) -> dict[str, Any]:
    if arguments is None:
        return {}
    if not isinstance(arguments, Mapping) or not all(isinstance(key, str) for key in arguments):
        raise TypeError(
            "template_arguments must map names of the chat template's variables to values, as "
            f"{{'enable_thinking': False}}, not {arguments!r:.80}"
        )
    source, known = _source(tokenizer), dict(arguments)
    for key, value in known.items():
        if key in _TAKEN:
            raise ValueError(f"template_arguments cannot set {key!r}; emlens sets it")
        if not re.search(rf"\b{re.escape(key)}\b", source):
            name = getattr(tokenizer, "name_or_path", "") or "this tokenizer"
            raise ValueError(
                f"the chat template of {name} does not use {key!r} of template_arguments; leave "
                "it out"
            )
        if key == "strftime_now":
            known[key] = _date(value)
        try:
            json.dumps(value if key != "strftime_now" else known[key])
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"{key!r} of template_arguments is a {type(value).__name__}; give text, numbers, "
                "booleans, or lists and mappings of them"
            ) from error
    return known


def _date(value: object) -> str:
    try:
        day = value if isinstance(value, datetime.date) else datetime.date.fromisoformat(value)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"strftime_now of template_arguments must be a date like '{DATE}', not {value!r}"
        ) from error
    return f"{day:%Y-%m-%d}"


def _source(tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of the template, of all of them where there are several."""
    found = getattr(tokenizer, "chat_template", None)
    return "\n".join(found.values()) if isinstance(found, Mapping) else str(found or "")


def _depends_on_date(template: Template) -> bool:
    if "strftime_now" not in _source(template.tokenizer):
        return False
    system: Message = {"role": "system", "content": "\ue004"}
    tool = {"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}
    probes: list[list[Message]] = [[_ASKED], [system, _ASKED], [{**_ASKED, "tools": [tool]}]]
    dates = ("2001-02-03", "2012-11-19")
    for probe in probes:
        try:
            first, second = (
                replace(template, arguments={**template.arguments, "strftime_now": date}).apply(
                    probe, opening=True
                )
                for date in dates
            )
        except REFUSALS:
            continue
        if first != second:
            return True
    return False


def _dated(source: str, date: str) -> str:
    """The template with `strftime_now` of its own, which knows one date."""
    day = datetime.datetime.fromisoformat(date)
    steps = "".join(f".replace('%{code}', {day.strftime(f'%{code}')!r})" for code in _CODES)
    # the line break is the tag's, which the environment of transformers drops
    return f"{{% macro strftime_now(format) %}}{{{{ format{steps} }}}}{{% endmacro %}}\n{source}"
