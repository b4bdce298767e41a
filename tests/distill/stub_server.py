"""A server that answers /generate as ours does, at once, with text made from the request; and that can misbehave."""

from __future__ import annotations

import contextlib
import json
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

from sglang_optimal.names import CARRIER
from sglang_optimal.top_k import TopK, public
from sglang_optimal.wanted import Wanted, wanted_by

Answer = tuple[int, Any] | None
"""(HTTP status, body); None: hang up."""


class StubServer:
    """more_info: of the mixing state. rendered: bodies of /v1/tokenize. decode: what
    /v1/detokenize makes of token ids.

    delay: seconds for one answer. behave: may answer in place of the stub: body -> Answer, or Ellipsis to leave it.

    dies_after: requests, after which it answers no more and closes its port.
    seen: how often each sampling_seed was asked for.
    """

    def __init__(
        self, *, delay: float = 0.0, api_key: str | None = None, mixes: bool = True, router: bool = False, port: int = 0
    ):
        self.delay, self.api_key, self.has_student, self.router = delay, api_key, mixes, router
        self.behave: Callable[[dict], Answer | type(Ellipsis)] = lambda body: ...
        self.seen: Counter[int] = Counter()
        self.bodies: list[dict] = []
        self.in_flight = self.most_in_flight = 0
        self.dies_after: int | None = None
        self.student_version = "v1"
        self.more_info: dict[str, Any] = {}
        self.rendered: list[dict] = []
        self.decode: Callable[[list[int]], str] = lambda ids: f"<s>{bytes(ids).decode()}"
        self.stopped = threading.Event()
        self.lock = threading.Lock()
        self._http = _Server(("127.0.0.1", port), _handler(self))
        self.port = self._http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        if not self.stopped.is_set():
            self.stopped.set()  # connections that are kept alive end with their next request
            self._http.shutdown()
            self._http.server_close()
            self._thread.join()

    def info(self) -> Any:
        if self.router:
            return {"workers": 2}
        mixing = {
            "teacher_model_path": "teacher", "student_model_path": "student",
            "student_weight_version": self.student_version,
        }  # fmt: skip
        mixing |= self.more_info
        state = {"mixing": mixing} if self.has_student else {}
        return {"version": "stub", "model_path": "served", "internal_states": [state]}

    def generate(self, body: dict) -> Answer:
        with self.lock:
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
            self.seen[body["sampling_params"]["sampling_seed"]] += 1
            self.bodies.append(body)
            dies = self.dies_after is not None and sum(self.seen.values()) > self.dies_after
        if dies:
            self.stop()
        try:
            time.sleep(self.delay)
            if self.stopped.is_set():
                return None
            answer = self.behave(body)
            return (200, stub_answer(body)) if answer is ... else answer
        finally:
            with self.lock:
                self.in_flight -= 1


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256


def stub_answer(body: dict) -> dict:
    """Deterministic in the request."""
    seed = body["sampling_params"]["sampling_seed"]
    tokens = [3 + (seed >> i) % 60 for i in range(4 + seed % 8)]
    fields = body.get("session_params", {}).get(CARRIER, {})
    wanted = wanted_by({"return_mixing_info": True, **fields})
    series = {name: [round(((seed >> i) % 100) / 100, 2) for i in range(len(tokens))] for name in wanted.series}
    for name in wanted.series:
        if name.endswith("logprob"):
            series[name] = [-0.01 - value for value in series[name]]
        elif name.endswith("rank"):
            series[name] = [1.0 + i for i in range(len(tokens))]
    finish = {"type": "stop" if seed % 5 else "length"}
    text = f"sample {zlib.crc32(json.dumps(body, sort_keys=True).encode()):08x} so the answer is {seed % 3}."
    meta = {"finish_reason": finish, "prompt_tokens": 7, "weight_version": "default", **series}
    if body.get("return_logprob"):  # of one model alone, as SGLang
        drawn = zip(series["student_logprob"], tokens, strict=True)
        meta = {name: value for name, value in meta.items() if name not in series}
        meta["output_token_logprobs"] = [[logprob, token, None] for logprob, token in drawn]
    if wanted.sides:
        meta["top_k"] = public([stub_top_k(seed, i, wanted) for i in range(len(tokens))])
    return {"text": text, "output_ids": tokens, "meta_info": meta}


def stub_top_k(seed: int, i: int, wanted: Wanted) -> TopK:
    """Of the i-th token. At every third the support has two tokens and no more."""
    values = np.full((len(wanted.sides), 4, wanted.top_k), -np.inf, np.float32)
    count = min(wanted.top_k, 2) if i % 3 == 2 else wanted.top_k
    for k, side in enumerate(wanted.sides):
        base = 3 + (seed >> i) % 60 + len(side)
        values[k, 0] = [base + j if j < count else -1 for j in range(wanted.top_k)]
        for j in range(3):
            values[k, 1 + j, :count] = np.log(np.arange(count, 0, -1) / (count * (count + 1) / 2 + j + len(side)))
    return TopK(wanted.sides, wanted.top_k_format, values)


def _handler(stub: StubServer):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_args) -> None:
            pass

        def do_GET(self) -> None:
            self._send(200, stub.info() if self.path == "/get_server_info" else {})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if stub.api_key is not None and self.headers.get("Authorization") != f"Bearer {stub.api_key}":
                return self._send(401, {"error": "Unauthorized"})
            if self.path == "/v1/tokenize":
                stub.rendered.append(body)
                text = body["prompt"] if "prompt" in body else "|".join(m["content"] for m in body["messages"])
                return self._send(200, {"tokens": list(text.encode())})
            if self.path == "/v1/detokenize":
                assert body["skip_special_tokens"] is False
                return self._send(200, {"text": stub.decode(body["tokens"])})
            answer = stub.generate(body)
            if answer is None:
                self.close_connection = True
                return None
            return self._send(*answer)

        def _send(self, status: int, content: Any) -> None:
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            with contextlib.suppress(ConnectionError):
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

    return Handler


@contextlib.contextmanager
def stub_server(**settings: Any) -> Iterator[StubServer]:
    server = StubServer(**settings)
    try:
        yield server
    finally:
        server.stop()
