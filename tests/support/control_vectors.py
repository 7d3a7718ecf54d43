"""Control vectors as llama.cpp keeps them, written without emlens."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np


def plain_file(
    path: Path, tensors: dict[str, np.ndarray], arch="controlvector", hint="llama", **keys: str
) -> Path:
    """A file in llama.cpp's layout, by the `gguf` package alone."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_string("controlvector.model_hint", hint)
    writer.add_uint32("controlvector.layer_count", len(tensors))
    for key, value in keys.items():
        writer.add_string(key.replace("_", "."), value)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
