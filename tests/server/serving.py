"""A server in a process of its own, asked over HTTP as a client would."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx

START_DEADLINE, STOP_DEADLINE = 150, 20  # seconds; a start takes half a minute on two cores


def as_argv(values: dict[str, Any]) -> list[str]:
    argv = []
    for name, value in values.items():
        flag = "--" + name.replace("_", "-")
        argv += [flag] if value is True else [flag, str(value)]
    return argv


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def serve(
    module: str,
    argv: Sequence[str],
    log: Path,
    *,
    api_key: str | None = None,
    environment: dict[str, str] | None = None,
) -> Iterator[httpx.Client]:
    """Run ``python -m module argv --port <free>`` until the block ends; gives a client for it.

    Args:
        module: ``sglang_optimal.launch_server`` or SGLang's own.
        argv: its arguments.
        log: file for everything it prints; its end is shown when it does not start.
        api_key: start the server with it, and send it with every request of the client.
        environment: variables for the server, beside this process's own.
    """
    port = free_port()
    headers = {}
    arguments = [*argv, "--port", str(port)]
    if api_key is not None:
        arguments += ["--api-key", api_key]
        headers["Authorization"] = f"Bearer {api_key}"
    process = start_process(module, arguments, log, environment)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=60) as client:
            _wait_until_ready(client, process, log)
            yield client
    finally:
        stop_process(process)


def start_process(
    module: str, argv: Sequence[str], log: Path, environment: dict[str, str] | None = None
) -> subprocess.Popen:
    """``python -m module argv`` in a session of its own, so that whatever it starts can be ended with it."""
    command = [sys.executable, "-m", module, *argv]
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **(environment or {})}
    with log.open("w") as output:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=variables, start_new_session=True)


def _wait_until_ready(client: httpx.Client, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + START_DEADLINE
    while True:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with status {process.returncode}:\n{_tail(log)}")
        with contextlib.suppress(httpx.TransportError):
            if client.get("/health").status_code == 200:
                return
        if time.monotonic() > deadline:
            raise RuntimeError(f"the server was not ready after {START_DEADLINE} s:\n{_tail(log)}")
        time.sleep(0.2)


def stop_process(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_DEADLINE)
    with contextlib.suppress(ProcessLookupError):  # whatever of the group did not go by itself
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _tail(log: Path, characters: int = 6000) -> str:
    return log.read_text(errors="replace")[-characters:]


def generate(client: httpx.Client, **body: Any) -> Any:
    """POST /generate; the decoded answer, which must be a success."""
    response = client.post("/generate", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def events(client: httpx.Client, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """POST with a server-sent-event stream as the answer; every event but the closing [DONE]."""
    with client.stream("POST", path, json=body) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        data = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
    assert data[-1] == "[DONE]"
    return [json.loads(event) for event in data[:-1]]


def message_of(response: httpx.Response) -> str:
    """The text of a refusal, which must be a 400 of SGLang's form."""
    assert response.status_code == 400, (response.status_code, response.text)
    return response.json()["error"]["message"]


def server_info(client: httpx.Client) -> dict[str, Any]:
    response = client.get("/get_server_info")
    assert response.status_code == 200, response.text
    return response.json()


def wait_until_free(client: httpx.Client, seconds: float = 20) -> None:
    """Flush both caches; every slot of both pools must be free then."""
    deadline = time.monotonic() + seconds
    while True:
        # Refused while something runs; the requests of the tests before have all been answered.
        flushed = client.post("/flush_cache").status_code == 200
        mixing = server_info(client)["internal_states"][0]["mixing"]
        pools = mixing["teacher_pool"], mixing["student_pool"]
        if flushed and all(pool["free"] == pool["size"] for pool in pools):
            break
        assert time.monotonic() < deadline, f"slots are missing: {mixing}"
        time.sleep(0.2)
    assert mixing["student_pool"]["requests"] == 0
