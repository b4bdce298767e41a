"""A server in a process of its own, asked over HTTP as a client would."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
from warm_python import ADDRESS, OFFLINE, ForkedServer

from sglang_optimal.server_process import ServerProcess, free_port, running

__all__ = ["free_port"]

START_DEADLINE = 150  # seconds; a start takes half a minute on two cores


def as_argv(values: dict[str, Any]) -> list[str]:
    argv = []
    for name, value in values.items():
        flag = "--" + name.replace("_", "-")
        argv += [flag] if value is True else [flag, str(value)]
    return argv


@contextlib.contextmanager
def serve(
    module: str,
    argv: Sequence[str],
    log: Path,
    *,
    api_key: str | None = None,
    environment: dict[str, str] | None = None,
    fork: bool = True,
) -> Iterator[httpx.Client]:
    """Run ``python -m module argv --port <free>`` until the block ends; gives a client for it.

    Args:
        module: ``sglang_optimal.launch_server`` or SGLang's own.
        argv: its arguments.
        log: file for everything it prints; its end is shown when it does not start.
        api_key: start the server with it, and send it with every request of the client.
        environment: variables for the server, beside this process's own.
        fork: whether it may be a fork of `warm_python` where there is one; SGLang's own, which must not have our
            modules, and those with variables are none.
    """
    headers, arguments = {}, list(argv)
    if api_key is not None:
        arguments += ["--api-key", api_key]
        headers["Authorization"] = f"Bearer {api_key}"
    variables = {**OFFLINE, **(environment or {})}
    ours = module == "sglang_optimal.launch_server" and environment is None
    process = ForkedServer if fork and ours and ADDRESS in os.environ else ServerProcess
    started = running(
        module, arguments, log, seconds=START_DEADLINE, headers=headers, environment=variables, process=process
    )
    with (
        started as server,
        httpx.Client(base_url=server.url, headers=headers, timeout=60) as client,
    ):
        yield client


def start_process(
    module: str, argv: Sequence[str], log: Path, environment: dict[str, str] | None = None
) -> ServerProcess:
    """One that is not waited for."""
    return ServerProcess(module, argv, "", log, environment={**OFFLINE, **(environment or {})})


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
    guest = next(pool for pool in pools if "requests" in pool)
    assert guest["requests"] == 0
