"""Reading tables: Parquet, and data sets of `datasets`, with the file in every error."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from emlens._reading import expanded, readable

_TIMES, _FREE = 200, 256 * 2**20
"""Characters that a Parquet file may unpack to: so many times its size, and so many besides."""


def parquet_rows(path: Path, column: str) -> Iterator[dict]:
    """Yield the rows of a Parquet file in small batches: one column, or all if it is missing.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is damaged, or holds far more than its size allows.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = readable(path)
    size, characters = path.stat().st_size, 0
    try:
        with pq.ParquetFile(path) as file:
            if file.metadata.num_rows > size:
                raise ValueError(f"it declares {file.metadata.num_rows:,} rows in {size:,} bytes")
            names = file.schema_arrow.names
            columns = [column] if column in names else None
            for batch in file.iter_batches(batch_size=64, columns=columns):
                for row in batch.to_pylist():
                    characters += len(row.get(column) or "")
                    if characters > _TIMES * size + _FREE:
                        raise ValueError(f"its texts unpack to over {_TIMES} times its size")
                    yield row
    except (pa.ArrowException, OSError, ValueError, TypeError, OverflowError) as error:
        raise ValueError(
            f"{path} is not a readable Parquet file ({_first_line(error)}); was the download "
            "complete?"
        ) from error


def dataset_rows(
    source: str | os.PathLike[str], config: str | None, split: str, *, streaming: bool
) -> Iterator[dict]:
    """Yield the rows of a data set of the hub, or of a folder, that `datasets` loads.

    Raises:
        FileNotFoundError: If it does not exist.
        OSError: If it cannot be reached.
        ValueError: If `datasets` cannot read it.
    """
    from datasets import load_dataset

    name = str(expanded(source)) if expanded(source).exists() else str(source)
    try:
        rows = iter(load_dataset(name, config, split=split, streaming=streaming))
    except Exception as error:
        raise _of_datasets(error, source) from error
    while True:
        try:
            row = dict(next(rows))
        except StopIteration:
            return
        except Exception as error:
            raise _of_datasets(error, source) from error
        yield row


def _of_datasets(error: Exception, source: object) -> Exception:
    said = _first_line(error)
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(f"no file, folder or data set {str(source)!r} ({said})")
    kind = OSError if isinstance(error, (OSError, ConnectionError)) else ValueError
    return kind(f"the data set {str(source)!r} cannot be read by `datasets` ({said})")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:300] or type(error).__name__
