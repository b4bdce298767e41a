"""SGLang's multi-node flags, with both nodes on this machine: one command a node, one tensor-parallel rank each."""

from __future__ import annotations

import contextlib
import time

import httpx
import pytest
from harness import SMALL, check_greedy, random_cases
from serving import START_DEADLINE, as_argv, free_port, generate, start_process


@pytest.mark.slow
def test_two_nodes(tiny_pair, tiny_oracle, tmp_path):
    teacher, student = map(str, tiny_pair)
    argv = ["--model-path", teacher, "--student-model-path", student, *as_argv(SMALL)]
    argv += ["--tp-size", "2", "--nnodes", "2", "--dist-init-addr", f"127.0.0.1:{free_port()}"]
    ports = [free_port(), free_port()]
    logs = [tmp_path / f"{node}.log" for node in (0, 1)]
    nodes = [
        start_process("sglang_optimal.launch_server", [*argv, "--node-rank", str(i), "--port", str(ports[i])], logs[i])
        for i in (0, 1)
    ]
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{ports[0]}", timeout=60) as client:
            deadline = time.monotonic() + START_DEADLINE
            while True:
                with contextlib.suppress(httpx.TransportError):
                    if client.get("/health").status_code == 200:
                        break
                said = "\n".join(log.read_text(errors="replace")[-3000:] for log in logs)
                assert time.monotonic() < deadline and all(node.process.poll() is None for node in nodes), said
                time.sleep(0.3)
            for case in random_cases(78, 4, 1):
                answer = generate(client, input_ids=case.teacher, sampling_params=case.params())
                assert check_greedy(tiny_oracle, case, answer) > 0
    finally:
        for node in nodes:
            node.stop()
