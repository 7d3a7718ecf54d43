"""Pre-training text: an embedded default, local files, and streamed data sets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import numpy as np

from emlens._door import check_fields, guarded
from emlens._reading import expanded, read_jsonl, read_text, readable
from emlens._tables import dataset_rows, parquet_rows
from emlens.text.conversation import content_hash

PYTHON_DOCS, LEE_NEWS = "python-docs", "lee-news"


@dataclass(frozen=True, slots=True)
class Document:
    """One text of a corpus; intervals are taken over documents."""

    id: str
    text: str

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, slots=True)
class Corpus:
    """Documents of raw text.

    Attributes:
        name: What it is called in results.
        documents: The documents.
    """

    name: str
    documents: tuple[Document, ...]

    def __post_init__(self) -> None:
        check_fields(self)

    def __len__(self) -> int:
        return len(self.documents)

    def __iter__(self) -> Iterator[Document]:
        return iter(self.documents)

    @property
    def hash(self) -> str:
        """Hash of the texts in their order."""
        return content_hash(self.documents)


@guarded
def corpus(
    source: str | Path | Sequence[str] = PYTHON_DOCS,
    config: str | None = None,
    *,
    documents: int = 100,
    min_characters: int = 100,
    split: str = "train",
    text_column: str = "text",
    seed: int = 0,
) -> Corpus:
    """Load pre-training text.

    Args:
        source: `"python-docs"` (English reference prose that CPython ships), `"lee-news"` (news,
            where gensim is installed), a `.txt`, `.jsonl` or `.parquet` file, or a data set that
            is streamed, e.g. `corpus("HuggingFaceFW/fineweb", "sample-10BT", documents=100)`; or
            a list of texts, which are taken as they are.
        config: Configuration of the data set.
        documents: Documents to take, at most.
        min_characters: Shorter texts are left out.
        split: Split of the data set.
        text_column: Key or column that holds the text.
        seed: Seed of the sample from the embedded and local texts; a stream is read in order.

    Returns:
        The corpus. Texts are cut to a number of tokens where they are used.

    Raises:
        FileNotFoundError: If a file or package is missing.
        ValueError: If a line is corrupt (its number is given), a text is missing, or no
            document is long enough.

    Examples:
        >>> text = emlens.corpus(documents=16)
        >>> text.documents[0].text[:60]
    """
    if documents < 1:
        raise ValueError(f"documents must be at least 1, not {documents}")
    if not isinstance(source, (str, Path)):
        return of_texts(source)
    path = expanded(source)
    if str(source) == PYTHON_DOCS:
        found = _sampled(_python_docs(), documents, min_characters, seed)
    elif str(source) == LEE_NEWS:
        found = _sampled(_lee_news(), documents, min_characters, seed)
    elif path.suffix in (".txt", ".jsonl", ".parquet"):
        found = _sampled(_file(path, text_column), documents, min_characters, seed)
    else:
        streamed = _streamed(str(source), config, split, text_column)
        found = list(islice(_long(streamed, min_characters), documents))
    if not found:
        raise ValueError(f"{source} has no document of at least {min_characters} characters")
    name = path.name if path.suffix in (".txt", ".jsonl", ".parquet") else str(source)
    return Corpus(name, tuple(found))


def of_texts(texts: Sequence[str]) -> Corpus:
    """A corpus of texts in memory."""
    return Corpus("texts", tuple(Document(f"texts/{i}", one) for i, one in enumerate(texts)))


def _long(documents: Iterable[Document], min_characters: int) -> Iterator[Document]:
    return (document for document in documents if len(document.text) >= min_characters)


def _sampled(
    documents: Iterable[Document], n: int, min_characters: int, seed: int
) -> list[Document]:
    kept = list(_long(documents, min_characters))
    chosen = np.random.default_rng(seed).permutation(len(kept))[:n]
    return [kept[i] for i in chosen]


def _python_docs() -> Iterator[Document]:
    from pydoc_data.topics import topics

    return (Document(f"{PYTHON_DOCS}/{name}", topics[name]) for name in sorted(topics))


def _lee_news() -> Iterator[Document]:
    spec = find_spec("gensim")
    places = list(spec.submodule_search_locations or []) if spec else []
    path = Path(places[0], "test", "test_data", "lee_background.cor") if places else None
    if path is None or not path.is_file():
        raise FileNotFoundError(
            f"{LEE_NEWS} needs the file that gensim ships: pip install --no-deps gensim"
        )
    lines = read_text(path).splitlines()
    return (Document(f"{LEE_NEWS}/{i}", line.strip()) for i, line in enumerate(lines))


def _file(path: Path, text_column: str) -> Iterator[Document]:
    readable(path)
    if path.suffix == ".jsonl":
        return (
            Document(f"{path.name}/{number}", _text(record, text_column, f"{path}, line {number}"))
            for number, record in read_jsonl(path)
        )
    if path.suffix == ".parquet":
        return (
            Document(f"{path.name}/{i}", _text(row, text_column, f"{path}, row {i}"))
            for i, row in enumerate(parquet_rows(path, text_column))
        )
    blocks = read_text(path).split("\n\n")
    return (Document(f"{path.name}/{i}", block.strip()) for i, block in enumerate(blocks))


def _streamed(source: str, config: str | None, split: str, text_column: str) -> Iterator[Document]:
    for i, record in enumerate(dataset_rows(source, config, split, streaming=True)):
        name = str(record.get("id", i))
        yield Document(name, _text(record, text_column, f"{source}, row {i}"))


def _text(record: dict, column: str, where: str) -> str:
    text = record.get(column)
    if not isinstance(text, str):
        raise ValueError(
            f"{where}: no text under {column!r}; it has {', '.join(map(str, record))} "
            "(text_column names another)"
        )
    return text
