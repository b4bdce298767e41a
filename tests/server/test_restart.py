"""The scheduler is killed: clients get an error at once, the launcher starts the server again, and says when it gives
up."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time

import httpx
import psutil
import pytest
from harness import SMALL, Case, check_greedy, random_ids
from serving import as_argv, free_port, generate, server_info, start_process

START_SECONDS, END_SECONDS = 120, 30


def scheduler_of(supervisor: int) -> psutil.Process:
    """SGLang names its processes."""
    for process in psutil.Process(supervisor).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if any("sglang::scheduler" in word for word in process.cmdline()):
                return process
    raise LookupError("no scheduler")


def wait_until_ready(client: httpx.Client) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        with contextlib.suppress(httpx.TransportError):
            if client.get("/health").status_code == 200:
                return
        assert time.monotonic() < deadline
        time.sleep(0.2)


def kill_while_it_answers(client: httpx.Client, supervisor: int) -> None:
    """A client that waits for an answer must not wait for ever."""
    rng = random.Random(91)
    case = Case(random_ids(rng, 30), random_ids(rng, 30), 900)
    seen: list = []

    def ask() -> None:
        try:
            seen.append(client.post("/generate", json={"input_ids": case.teacher, "sampling_params": case.params()}))
        except httpx.TransportError as error:
            seen.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    deadline = time.monotonic() + 20
    while server_info(client)["internal_states"][0]["mixing"]["student_pool"]["requests"] == 0:
        assert time.monotonic() < deadline
    os.kill(scheduler_of(supervisor).pid, signal.SIGKILL)
    thread.join(END_SECONDS)
    assert not thread.is_alive() and len(seen) == 1
    assert isinstance(seen[0], httpx.TransportError) or seen[0].status_code >= 500, seen


@pytest.mark.slow  # three starts of a server; tests/test_supervise.py has the rules with small processes
def test_killed_restarted_and_given_up(tiny_pair, tiny_oracle, tmp_path):
    teacher, student = map(str, tiny_pair)
    port = free_port()
    argv = ["--model-path", teacher, "--student-model-path", student, *as_argv(SMALL), "--max-restarts", "1"]
    log = tmp_path / "log"
    case = Case(random_ids(random.Random(92), 20), random_ids(random.Random(93), 20), 12)
    server = start_process("sglang_optimal.launch_server", [*argv, "--port", str(port)], log)
    process = server.process
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            for life in range(2):
                wait_until_ready(client)
                answer = generate(client, input_ids=case.teacher, sampling_params=case.params())
                assert check_greedy(tiny_oracle, case, answer) == case.n
                left = psutil.Process(process.pid).children(recursive=True)
                kill_while_it_answers(client, process.pid)
                assert process.poll() is None or life == 1
        assert process.wait(END_SECONDS) not in (0, 2)
        _, alive = psutil.wait_procs(left, timeout=10)
        assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]
    finally:
        server.stop()
    said = log.read_text(errors="replace")
    assert "restart 1 of 1" in said and "not started again after 1 restarts" in said
    assert "crashed with exit code -9" in said  # what SGLang says of it


def test_arguments_that_are_wrong_are_not_tried_again(tmp_path):
    argv = ["--model-path", "/no/such/model", "--max-restarts", "3"]
    process = start_process("sglang_optimal.launch_server", argv, tmp_path / "log").process
    assert process.wait(60) == 2
    assert (tmp_path / "log").read_text().count("no model at /no/such/model") == 1


@pytest.mark.parametrize("value", ["-1", "x"])
def test_a_bad_number(tmp_path, value):
    process = start_process("sglang_optimal.launch_server", ["--max-restarts", value], tmp_path / "log").process
    assert process.wait(60) == 2
    assert "--max-restarts" in (tmp_path / "log").read_text()
