"""A server of remote requests in a process of its own, where emlens cannot be imported.

It does with a request what NDIF does: rebuild the traced block, run it on the model that it
holds, and give back what the block saved. Requests come in and answers go out as pickles with
their length in front.
"""

from __future__ import annotations

import io
import os
import pickle
import struct
import subprocess
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import IO, Any

ABSENT = ("emlens", "tests", "jaxtyping", "typer", "inspect_ai", "transformer_lens")
"""What a server does not have."""


class Server:
    """Starts the process, sends it requests and counts the bytes that come back."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        self.sent: list[bytes] = []
        self.came_back: list[int] = []

    def run(self, folder: Path, blob: bytes, compress: bool, env: dict) -> Any:
        """Run a request on the model of a folder; return what its block saved."""
        import torch

        assert self._process.stdin and self._process.stdout
        self.sent.append(blob)
        _put(self._process.stdin, (str(folder), blob, compress, env))
        fine, answer = _get(self._process.stdout)
        if not fine:
            raise AssertionError(f"the server failed:\n{answer}")
        self.came_back.append(len(answer))
        return torch.load(io.BytesIO(answer), weights_only=False)

    def stop(self) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.wait(timeout=120)
        self._process.stdout.close()


def load_served(name: str, remote: bool | str = True, **options: Any) -> Any:
    """A remote model without a check; nnsight would ask the hub for the task."""
    import emlens

    return emlens.load(name, remote=remote, check=False, task="text-generation", **options)


class _Absent(MetaPathFinder):
    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        if fullname.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"{fullname} is not on the server", name=fullname)


def _serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    import traceback

    from nnsight import TransformersModel

    models: dict[str, Any] = {}
    while (request := _get(requests)) is not None:
        folder, blob, compress, env = request
        try:
            if folder not in models:
                model = TransformersModel(folder, task="text-generation", dispatch=True)
                model._module.requires_grad_(False)
                models[folder] = model
            models[folder]._remoteable_set_env(env)
            _put(answers, (True, _execute(models[folder], blob, compress)))
        except Exception:
            _put(answers, (False, traceback.format_exc()))


def _execute(model: Any, blob: bytes, compress: bool) -> bytes:
    import torch
    from nnsight.schema.request import RequestModel
    from nnsight.tracing.tracer import _saves, dec, inc

    persistent = model._remoteable_persistent_objects()
    tracer = RequestModel.deserialize(blob, persistent, compress=compress)
    inc()
    try:
        tracer.execute(tracer.info.code)
        found = tracer.info.frame.f_locals
        saved = {name: value for name, value in found.items() if id(value) in _saves()}
    finally:
        dec()
    answer = io.BytesIO()
    torch.save(saved, answer)
    return answer.getvalue()


def _put(stream: IO[bytes], message: object) -> None:
    data = pickle.dumps(message)
    stream.write(struct.pack(">Q", len(data)) + data)
    stream.flush()


def _get(stream: IO[bytes]) -> Any:
    head = stream.read(8)
    return pickle.loads(stream.read(struct.unpack(">Q", head)[0])) if head else None


if __name__ == "__main__":
    sys.meta_path.insert(0, _Absent())
    # the folder of this file is on the path of a script, and tests' modules would be too
    sys.path.pop(0)
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    _serve(sys.stdin.buffer, answers)
