"""Conversations and corpora, turned into token batches with masks."""

from emlens.text import given as given
from emlens.text.batches import TokenBatch, TokenMask, pack
from emlens.text.conversation import Conversation, Pair
from emlens.text.corpus import Corpus, Document, corpus
from emlens.text.datasets import load_conversations, load_pairs, split_pairs
from emlens.text.tokens import tokenize

__all__ = [
    "Conversation",
    "Corpus",
    "Document",
    "Pair",
    "TokenBatch",
    "TokenMask",
    "corpus",
    "load_conversations",
    "load_pairs",
    "pack",
    "split_pairs",
    "tokenize",
]


def __dir__() -> list[str]:
    return list(__all__)
