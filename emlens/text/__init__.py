"""Conversations and corpora, turned into token batches with masks."""

from emlens.text.batches import PaddingSide, TokenBatch, pack, restore
from emlens.text.conversation import Conversation, Message, Pair, Side, content_hash
from emlens.text.corpus import Corpus, Document, corpus
from emlens.text.datasets import EMBEDDED, Split, load_conversations, load_pairs, split_pairs
from emlens.text.given import conversations_of
from emlens.text.repeats import repeats, repeats_told, warn_of_repeats
from emlens.text.template import Template
from emlens.text.thinking import parted, without_thinking
from emlens.text.tokens import (
    TokenMask,
    TokenRow,
    template_hash,
    tokenize,
    tokenize_documents,
)

__all__ = [
    "EMBEDDED",
    "Conversation",
    "Corpus",
    "Document",
    "Message",
    "PaddingSide",
    "Pair",
    "Side",
    "Split",
    "Template",
    "TokenBatch",
    "TokenMask",
    "TokenRow",
    "content_hash",
    "conversations_of",
    "corpus",
    "load_conversations",
    "load_pairs",
    "pack",
    "parted",
    "repeats",
    "repeats_told",
    "restore",
    "split_pairs",
    "template_hash",
    "tokenize",
    "tokenize_documents",
    "warn_of_repeats",
    "without_thinking",
]
