"""Two servers behind sglang-router: mixed requests arrive, stay on the server that knows their prefix, and survive one
server's end in a distillation run."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from harness import SMALL, Case, check_greedy, random_ids
from serving import as_argv, events, free_port, generate, message_of, serve, server_info
from tiny_models import small_text

from sglang_optimal.distill.cli import main
from sglang_optimal.distill.store import find_shards, read_rows

pytestmark = pytest.mark.slow  # two servers and a router


@pytest.fixture(scope="module")
def servers(tiny_pair, tmp_path_factory) -> Iterator[list[httpx.Client]]:
    teacher, student = map(str, tiny_pair)
    argv = ["--model-path", teacher, "--student-model-path", student, "--plain-requests", "refuse", *as_argv(SMALL)]
    folder = tmp_path_factory.mktemp("servers")
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(serve("sglang_optimal.launch_server", argv, folder / f"{i}.log")) for i in range(2)]


@contextlib.contextmanager
def routed(servers: list[httpx.Client], policy: str, log: Path) -> Iterator[httpx.Client]:
    """A client of a router over the servers."""
    port = free_port()
    urls = [str(server.base_url).rstrip("/") for server in servers]
    command = [sys.executable, "-m", "sglang_router.launch_router", "--worker-urls", *urls, "--policy", policy]
    command += ["--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(free_port())]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            deadline = time.monotonic() + 60
            while True:
                with contextlib.suppress(httpx.TransportError):
                    if client.get("/readiness").status_code == 200:
                        workers = client.get("/workers").json()
                        if workers.get("total", 0) == 2:
                            break
                assert time.monotonic() < deadline and process.poll() is None, log.read_text()[-3000:]
                time.sleep(0.2)
            yield client
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def router(servers, tmp_path_factory):
    with routed(servers, "cache_aware", tmp_path_factory.mktemp("router") / "log") as client:
        yield client


def body(case: Case, **more) -> dict:
    params = case.params()
    return {
        "text": small_text(case.teacher),
        "sampling_params": {k: v for k, v in params.items() if k != "custom_params"},
        "session_params": {"mixing": params["custom_params"]},
        **more,
    }


def cases(count: int, seed: int = 81) -> list[Case]:
    rng = random.Random(seed)
    return [Case(random_ids(rng, 30), random_ids(rng, 20), 12) for _ in range(count)]


def test_mixed_requests(router, tiny_oracle):
    for case in cases(6):
        assert check_greedy(tiny_oracle, case, generate(router, **body(case))) == case.n
    case = cases(1, 82)[0]
    assert check_greedy(tiny_oracle, case, events(router, "/generate", body(case, stream=True))[-1]) == case.n


def test_chats(router, tiny_oracle):
    request = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "what is 2+2?"}],
        "temperature": 0,
        "max_tokens": 8,
        "ignore_eos": True,
        "session_params": {"mixing": {"teacher_system_prompt": "it is 4", "return_mixing_info": True}},
    }
    response = router.post("/v1/chat/completions", json=request)
    assert response.status_code == 200, response.text
    assert len(response.json()["sglext"]["mixing"][0]["alpha"]) == 8


def test_what_the_router_drops_is_no_plain_answer(router):
    """custom_params does not arrive; a server with --plain-requests refuse says so."""
    request = {"text": "what", "sampling_params": {"max_new_tokens": 4, "custom_params": {"student_text": "x"}}}
    assert "behind sglang-router, in session_params.mixing" in message_of(router.post("/generate", json=request))


def cached(servers: list[httpx.Client]) -> tuple[int, int]:
    """(student prompt tokens, those that a radix cache had), of all servers."""
    pools = [server_info(server)["internal_states"][0]["mixing"]["student_pool"] for server in servers]
    return sum(p["prompt_tokens_total"] for p in pools), sum(p["cached_prompt_tokens_total"] for p in pools)


def hit_rates(client, servers, seed: int) -> tuple[float, float]:
    """(teacher's, student's) cache hit rates of requests in groups that share long prefixes on both sides."""
    rng = random.Random(seed)
    groups = [(random_ids(rng, 150), random_ids(rng, 100)) for _ in range(6)]
    order = [group for group in groups for _ in range(8)]
    rng.shuffle(order)
    before = cached(servers)
    prompt_tokens = cached_tokens = 0
    for teacher, student in order:
        case = Case(teacher + random_ids(rng, 8), student + random_ids(rng, 8), 2)
        meta = generate(client, **body(case))["meta_info"]
        prompt_tokens += meta["prompt_tokens"]
        cached_tokens += meta["cached_tokens"]
    after = cached(servers)
    return cached_tokens / prompt_tokens, (after[1] - before[1]) / (after[0] - before[0])


def test_cache_aware_routing_keeps_its_hit_rate(servers, router, tmp_path):
    teacher, student = hit_rates(router, servers, 83)
    with routed(servers, "round_robin", tmp_path / "log") as other:
        blind_teacher, blind_student = hit_rates(other, servers, 84)
    print(f"hit rates: cache-aware {teacher:.3f} {student:.3f}, round robin {blind_teacher:.3f} {blind_student:.3f}")
    # 7 of 8 requests of a group can hit its prefix on one server, and 6 of 8 on two.
    assert teacher > 0.75 and student > 0.75
    assert teacher > blind_teacher + 0.05 and student > blind_student + 0.05


def test_distillation_with_one_server_dying(servers, router, tmp_path, monkeypatch, capfd):
    """The last test of this module: one of the servers is gone after it."""
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"problem": f"what is {i}+2?", "answer": str(i + 2)}) + "\n" for i in range(30)]
    (tmp_path / "problems.jsonl").write_text("".join(lines))
    run_file = {
        "data": {"path": "problems.jsonl"},
        "contexts": {"student": "{problem}", "strategies": [{"teacher": "{problem} {answer}"}]},
        "sampling": {"n": 6, "max_new_tokens": 60},
        "client": {"concurrency": 8, "endpoints": [str(server.base_url).rstrip("/") for server in servers]},
        "output": {"dir": "out"},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(run_file))  # JSON is YAML
    port = str(servers[1].base_url.port)
    victim = next(p for p in psutil.process_iter(["cmdline"]) if port in (p.info["cmdline"] or []))

    def kill_halfway() -> None:
        while len(list(read_rows(find_shards(Path("out"), "accepted")))) < 40:
            time.sleep(0.05)
        os.killpg(victim.pid, signal.SIGKILL)

    thread = threading.Thread(target=kill_halfway, daemon=True)
    thread.start()
    assert main(["run", "run.yaml", "--no-report"]) == 0
    thread.join(5)
    assert not thread.is_alive()
    rows = [row for kind in ("accepted", "rejected") for row in read_rows(find_shards(Path("out"), kind))]
    assert len(rows) == len({row["id"] for row in rows}) == 180
    # Nothing is left behind on the other.
    assert server_info(servers[0])["internal_states"][0]["mixing"]["student_pool"]["requests"] == 0
