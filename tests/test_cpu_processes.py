"""Engines on a CPU: their processes are forked with SGLang imported, and their KV pools take memory when it is used."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys

import psutil
import pytest
import torch

from sglang_optimal.platforms import cpu_processes
from sglang_optimal.platforms.cpu_memory_pool import _LazyZeros
from sglang_optimal.platforms.cpu_processes import ForkServer, InChild

PROGRAM = """
import json, os, sys
import psutil
from sglang_optimal import OptimalSampler

def parents(sampler):
    pids = sampler.engine._scheduler_init_result.all_child_pids
    return {pid: psutil.Process(pid).ppid() for pid in pids}

if __name__ == "__main__":
    os.environ["READ_BY_NOBODY"] = "1"
    arguments = dict(dtype="float32", max_total_tokens=500, context_length=128, mem_fraction_static=0.3)
    first = OptimalSampler(*sys.argv[1:3], **arguments)
    texts = [first.generate("ab", "b", max_new_tokens=2, temperature=0).token_ids]
    found = [parents(first)]
    if sys.argv[3] == "two engines":
        os.environ["READ_BY_NOBODY"] = "2"
        second = OptimalSampler(*sys.argv[1:3], **arguments)
        texts.append(second.generate("ab", "b", max_new_tokens=2, temperature=0).token_ids)
        found.append(parents(second))
    print(json.dumps([texts, found]), flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize(
    "engines, end",
    [
        pytest.param("two engines", "the program is killed", marks=pytest.mark.slow),
        ("one engine", "a process failed"),
    ],
)
def test_processes_of_engines(tiny_pair, tmp_path, engines, end):
    """They are forked, the second engine's from a server with the environment that has changed.

    None outlives the program, and the program hears of one that fails, as SGLang lets it tell its parent.
    """
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    process = subprocess.Popen(
        [sys.executable, str(program), *map(str, tiny_pair), engines],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    line = process.stdout.readline()
    assert line, process.communicate()[1]
    texts, found = json.loads(line)
    assert texts == texts[:1] * (2 if engines == "two engines" else 1) and len(texts[0]) == 2
    assert all(len(each) == 2 and len(set(each.values())) == 1 for each in found)
    servers = [next(iter(each.values())) for each in found]
    assert len(set(servers)) == len(found) == len(texts)
    assert all(psutil.Process(server).ppid() == process.pid for server in servers)
    everyone = [psutil.Process(int(pid)) for each in found for pid in each] + list(map(psutil.Process, servers))
    if end == "the program is killed":
        process.send_signal(signal.SIGKILL)
    else:
        os.kill(servers[0], signal.SIGQUIT)
    process.wait(timeout=30)
    _, alive = psutil.wait_procs(everyone, timeout=30)
    assert not alive
    process.communicate()


def test_another_environment_is_another_fork_server_s(monkeypatch):
    """What the start of engines sets is not another, nor what others set and have taken back."""
    server, started = ForkServer(), []

    def start() -> bool:
        started.append(dict(os.environ))
        server.pid = len(started)
        return True

    monkeypatch.setattr(server, "_start", start)
    monkeypatch.setattr(server, "_leave", lambda: vars(server).update(pid=None, fits=False))
    ended: list[int] = []
    monkeypatch.setattr(cpu_processes, "_has_ended", ended.__contains__)
    monkeypatch.setenv("OF_OTHERS", "1")

    def starts(**values: str) -> int:
        with server.begun():
            for name, value in values.items():
                monkeypatch.setenv(name, value)
            assert server.fits
            return len(started)

    assert starts(OF_THE_START="a") == 1
    assert starts() == 1
    monkeypatch.setenv("PYTEST_CURRENT_TEST", "another")
    assert starts(OF_THE_START="b") == 1
    monkeypatch.setenv("OF_OTHERS", "2")
    monkeypatch.setenv("OF_OTHERS", "1")
    assert starts() == 1
    monkeypatch.setenv("OF_OTHERS", "2")
    assert starts() == 2 and started[1]["OF_OTHERS"] == "2"
    monkeypatch.delenv("OF_OTHERS")
    assert starts() == 3 and starts() == 3
    ended.append(3)
    assert starts() == 4


def test_a_fork_server_that_ended_is_noticed():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert not cpu_processes._has_ended(child.pid)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert cpu_processes._has_ended(child.pid) and cpu_processes._has_ended(child.pid)
    child.wait()


def _environment(name: str) -> tuple[str | None, object]:
    return os.environ.get(name), signal.getsignal(signal.SIGQUIT)


def test_a_forked_process_sees_the_environment_of_now(monkeypatch):
    """And not of when the process began that it was forked from, nor that one's signal handler."""
    monkeypatch.setenv("ASKED_FOR", "new")
    pickled = pickle.dumps(InChild(_environment))
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.environ["ASKED_FOR"] = "old"
        signal.signal(signal.SIGQUIT, lambda *_: None)
        value, handler = pickle.loads(pickled)("ASKED_FOR")
        os.write(write, f"{value} {handler == signal.SIG_DFL}".encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(read, 100) == b"new True"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8])
def test_zeros_that_take_no_memory(dtype):
    process = psutil.Process()
    before = process.memory_full_info().uss
    with _LazyZeros():
        large = torch.zeros((2, 1 << 14, 1 << 14), dtype=dtype, device="cpu")
        small = torch.zeros((3, 2), dtype=dtype, device="cpu")
        other = torch.zeros(4)
    assert process.memory_full_info().uss - before < 64 << 20 < large.nbytes
    assert large.shape == (2, 1 << 14, 1 << 14) and large.dtype == small.dtype == dtype and other.dtype == torch.float32
    assert not large[1, -1].any() and not small.any() and not other.any()
    large[1, 5] = 7
    assert large[1, 5].eq(7).all() and not large[1, 6].any() and large.data_ptr() % 64 == 0


def test_a_pool_that_nobody_uses(tiny_pair):
    """As large as memory allows, it is there at once."""
    from sglang_optimal import OptimalSampler

    with OptimalSampler(*map(str, tiny_pair), dtype="float32", context_length=128) as sampler:
        state = sampler.engine.get_server_info()["internal_states"][0]["mixing"]
        pids = sampler.engine._scheduler_init_result.all_child_pids
        resident = sum(psutil.Process(pid).memory_full_info().uss for pid in pids)
        assert sampler.generate("ab", "b", max_new_tokens=4).token_ids
    token = 2 * 2 * 2 * 64 * 4  # bytes of K and V: 2 layers, 2 heads, 64 wide, float32
    reserved = token * (state["teacher_pool"]["size"] + state["student_pool"]["size"])
    assert resident < reserved / 2, (resident, reserved)
