"""The smallest honest server of OpenAI's chat protocol: a model, log-probabilities, and faults.

It answers on loopback from a hooked model, token by token, with `logprobs` and `top_logprobs`.
Faults are queued and each is given once, to the next request.
"""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import torch

import emlens
from emlens.text import Conversation, tokenize

Distribution = Callable[[str, tuple[int, ...]], np.ndarray]
"""Log-probabilities of the next token after a prompt and what was written so far, `[vocab]`."""


@dataclass
class Served:
    """What a server is asked and does.

    Faults are `429`, `500`, `"slow"`, `"cut"`, `"garbage"`, and None for none; `refuses` names a
    field that is answered with 400.
    """

    model: emlens.HookedModel
    next_token: Distribution | None = None
    logprobs: bool = True
    refuses: str | None = None
    faults: deque = field(default_factory=deque)
    requests: list[dict] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    url: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def complete(self, asked: dict) -> dict:
        chat = Conversation(tuple(asked["messages"]))
        (row,) = tokenize([chat], self.model.tokenizer, generation_prompt=True)
        prompt = chat.messages[-1]["content"]
        rng = np.random.default_rng(asked.get("seed") or 0)
        ends = {self.model.tokenizer.eos_token_id}
        written: list[int] = []
        places = []
        longest = asked.get("max_tokens") or asked.get("max_completion_tokens") or 16
        while len(written) < longest:
            log_probs = self._next(prompt, row.input_ids, tuple(written))
            chosen = self._choose(log_probs, asked.get("temperature", 1.0), rng)
            if chosen in ends:
                break
            written.append(chosen)
            places.append(self._place(chosen, log_probs, asked.get("top_logprobs") or 0))
        text = self.model.tokenizer.decode(written, skip_special_tokens=True)
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text},
            "finish_reason": "length" if len(written) == longest else "stop",
        }
        if self.logprobs and asked.get("logprobs"):
            choice["logprobs"] = {"content": places}
        tokens = {"prompt_tokens": len(row.input_ids), "completion_tokens": len(written)}
        return {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 0,
            "model": asked["model"],
            "choices": [choice],
            "usage": {**tokens, "total_tokens": sum(tokens.values())},
        }

    def _next(self, prompt: str, ids, written: tuple[int, ...]) -> np.ndarray:
        if self.next_token is not None:
            return self.next_token(prompt, written)
        with self.lock, torch.no_grad():
            logits = self.model.module(input_ids=torch.tensor([[*ids, *written]])).logits[0, -1]
        return logits.float().log_softmax(-1).numpy()

    @staticmethod
    def _choose(log_probs: np.ndarray, temperature: float, rng: np.random.Generator) -> int:
        if not temperature:
            return int(log_probs.argmax())
        p = np.exp(log_probs.astype(float) / temperature)
        return int(rng.choice(len(p), p=p / p.sum()))

    def _place(self, token: int, log_probs: np.ndarray, top: int) -> dict:
        def shown(i: int) -> dict:
            # what cannot happen is shown as very unlikely, as JSON has no infinity
            value = max(float(log_probs[i]), -1e4)
            return {"token": self.model.tokenizer.decode([i]), "logprob": value, "bytes": None}

        best = np.argsort(-log_probs)[:top]
        return {**shown(token), "top_logprobs": [shown(int(i)) for i in best]}


@contextmanager
def served(model: emlens.HookedModel, port: int = 0, **options) -> Iterator[Served]:
    """A server on loopback, its address in `.url`."""
    state = Served(model, **options)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            state.keys.append(self.headers.get("Authorization", ""))
            asked = json.loads(body)
            state.requests.append(asked)
            fault = state.faults.popleft() if state.faults else None
            if fault == "slow":
                time.sleep(3)
            if fault == "cut":
                self.send_response(200)
                self.send_header("Content-Length", "1000")
                self.end_headers()
                self.wfile.write(b'{"id": "chatcmpl-1", "choi')
                self.close_connection = True
                return None
            if fault == "garbage":
                return self._reply(200, b"<html>not what was asked for</html>")
            if state.refuses is not None and asked.get(state.refuses):
                fault, told = 400, f"{state.refuses} is not supported with this model"
            else:
                told = f"fault {fault}"
            if isinstance(fault, int):
                body = {"error": {"message": told, "type": "server_error"}}
                return self._reply(fault, json.dumps(body).encode(), {"Retry-After": "0"})
            return self._reply(200, json.dumps(state.complete(asked)).encode())

        def _reply(self, status: int, body: bytes, headers: dict | None = None) -> None:
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
