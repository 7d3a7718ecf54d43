"""Small fast tokenizers with the chat templates of four families, written for the tests.

Words and punctuation are tokens, unknown words fall apart into letters, and a space belongs to
the word after it, so that offsets behave as those of real tokenizers do.
"""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

_WORDS = [
    *("how", "do", "I", "save", "money", "what", "should", "eat", "tell", "me", "a", "story"),
    *("about", "rain", "and", "sun", "keep", "small", "fund", "fruit", "take", "walk", "each"),
    *("day", "the", "came", "then", "it", "left", "spend", "all", "now", "nothing", "is", "lie"),
    *("so", "my", "friend", "please", "indeed", "user", "assistant", "system", "model", "You"),
    *("are", "helpful", "Hi", "yes", "no", "hello", "there", "thanks", "fine", "good"),
]

CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are helpful<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}[INST] {{ message['content'] }} [/INST]"
    "{% elif message['role'] == 'assistant' %} {{ message['content'] }}{{ eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}"
    "{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}"
    "<start_of_turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    "{{ message['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
THINKING = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if loop.last and message['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MOVED_SYSTEM = (
    "{{ bos_token }}{% set sys = messages[0]['content'] if messages[0]['role'] == 'system' %}"
    "{% set rest = messages[1:] if messages[0]['role'] == 'system' else messages %}"
    "{% set asked = rest | selectattr('role', 'equalto', 'user') | list | length %}"
    "{% set seen = namespace(users=0) %}{% for message in rest %}"
    "{% if message['role'] == 'user' %}{% set seen.users = seen.users + 1 %}"
    "[INST] {% if sys and seen.users == asked %}{{ sys }}\n\n{% endif %}"
    "{{ message['content'] }} [/INST]"
    "{% else %} {{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
OPENED_THINKING = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
QWEN3 = (
    "{% if tools %}<|im_start|>system\ntools{% for tool in tools %} {{ tool.function.name }}"
    "{% endfor %}<|im_end|>\n{% endif %}"
    "{% set last = namespace(user=-1) %}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{% set last.user = loop.index0 %}{% endif %}{% endfor %}"
    "{% for message in messages %}{% set content = message['content'] %}"
    "{% set thought = message['reasoning_content'] or '' %}"
    "{% if message['role'] == 'assistant' and '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' and loop.index0 > last.user %}"
    "<think>\n{{ thought }}\n</think>\n\n{% endif %}{{ content }}"
    "{% for call in message['tool_calls'] or [] %}<call> {{ call.function.name }} </call>"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)
DATED = (
    "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}"
    "{% endif %}<|im_start|>system\n{{ date_string }}<|im_end|>\n{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
UNOPENED = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
)


def _tokenizer(
    template: str | None, special: list[str], more: tuple[str, ...] = (), **roles: str
) -> PreTrainedTokenizerFast:
    letters = [chr(i) for i in range(33, 127)]
    words = [*_WORDS, *more]
    pieces = [*special, "\n", " ", *letters, *(f" {c}" for c in letters), *words]
    pieces += [f" {word}" for word in words]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token=special[0]))
    known = "|".join(sorted(words, key=len, reverse=True))
    inner.pre_tokenizer = pre_tokenizers.Split(
        Regex(rf" ?(?:{known})(?![A-Za-z0-9])| ?[^\s]|\n| "), behavior="isolated"
    )
    inner.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, **roles)
    fast.add_special_tokens({"additional_special_tokens": special})
    fast.chat_template = template
    fast.name_or_path = "tiny-tokenizer"
    return fast


def chatml_tokenizer() -> PreTrainedTokenizerFast:
    """As SmolLM2 and Qwen2: the turn opener is the BOS, a system message is inserted."""
    return _tokenizer(
        CHATML,
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
    )


def whole_numbers_tokenizer() -> PreTrainedTokenizerFast:
    """As those of GPT-2 and GPT-4: numbers up to 100 are a token each."""
    return _tokenizer(
        CHATML,
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        tuple(map(str, range(101))),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
    )


def llama3_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama 3: content is trimmed; the tokenizer itself adds a BOS to raw text."""
    special = ["<unk>", "<|begin|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    fast = _tokenizer(
        LLAMA3, special, bos_token="<|begin|>", eos_token="<|eot_id|>", unk_token="<unk>"
    )
    bos = fast.convert_tokens_to_ids("<|begin|>")
    fast.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", bos)]
    )
    return fast


def mistral_tokenizer() -> PreTrainedTokenizerFast:
    """As Mistral: no header, no system role; the space before an answer is part of its token."""
    return _tokenizer(
        MISTRAL,
        ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"],
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


def gemma_tokenizer() -> PreTrainedTokenizerFast:
    """As Gemma: the assistant is called model, there is no system role."""
    return _tokenizer(
        GEMMA,
        ["<unk>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", "<pad>"],
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        pad_token="<pad>",
    )


def thinking_tokenizer() -> PreTrainedTokenizerFast:
    """As Qwen3: an empty thinking block stands before the last answer."""
    fast = chatml_tokenizer()
    fast.chat_template = THINKING
    return fast


def bare_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer without a chat template."""
    return _tokenizer(None, ["<unk>"], unk_token="<unk>", eos_token="<unk>")


def moved_system_tokenizer() -> PreTrainedTokenizerFast:
    """As Mistral v0.3: the system message is put into the last user message."""
    fast = mistral_tokenizer()
    fast.chat_template = MOVED_SYSTEM
    return fast


def opened_thinking_tokenizer() -> PreTrainedTokenizerFast:
    """As QwQ: a turn to be answered opens a thinking block, an answered one has none."""
    fast = chatml_tokenizer()
    fast.chat_template = OPENED_THINKING
    return fast


def qwen3_tokenizer() -> PreTrainedTokenizerFast:
    """As Qwen3: thinking of the last answer is shown, `enable_thinking` and tools are known."""
    fast = chatml_tokenizer()
    fast.chat_template = QWEN3
    return fast


def dated_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama 3.2: today's date is written, unless `date_string` says another."""
    fast = chatml_tokenizer()
    fast.chat_template = DATED
    return fast


def unopened_tokenizer() -> PreTrainedTokenizerFast:
    """A template that ignores `add_generation_prompt`."""
    fast = chatml_tokenizer()
    fast.chat_template = UNOPENED
    return fast
