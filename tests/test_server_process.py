"""A server in a process of its own: what its starter is told when it does not start, and when it does not end."""

from __future__ import annotations

import contextlib
import logging
import socket
import subprocess
import sys
import time

import pytest

from sglang_optimal.server_process import TAIL, PortTaken, ServerFailed, ServerProcess, free_port, hold_port, running


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Makes a module out of a program, for a process to run."""

    def make(program: str) -> str:
        (tmp_path / "a_server.py").write_text(program)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        return "a_server"

    return make


def test_one_that_does_not_start_says_why_and_what_came_before(module, tmp_path):
    name = module("print('x' * 9000)\nprint('loading')\nprint('error: no such model')\nraise SystemExit(2)")
    (tmp_path / "log").write_text("error: of an earlier server\n")
    failing = pytest.raises(ServerFailed, match="status 2: error: no such model")
    with failing as failed, running(name, [], tmp_path / "log", seconds=30):
        pass
    words = str(failed.value)
    assert words.endswith("x\nloading\nerror: no such model") and "earlier" not in words
    assert TAIL < len(words) < TAIL + 200


def test_one_that_is_not_ready_in_time(module, tmp_path):
    name = module("import time\nprint('still loading', flush=True)\ntime.sleep(60)")
    failing = pytest.raises(ServerFailed, match="not ready after 2 s")
    with failing as failed, running(name, [], tmp_path / "log", seconds=2, grace=5):
        pass
    assert "still loading" in str(failed.value)


STUBBORN = "import signal, time\nsignal.signal(15, signal.SIG_IGN)\nprint('up', flush=True)\ntime.sleep(60)"


@pytest.mark.parametrize("program,went", [(STUBBORN, False), (STUBBORN.replace("SIG_IGN", "SIG_DFL"), True)])
def test_one_that_has_to_be_killed_is_told_of(module, tmp_path, caplog, program, went):
    server = ServerProcess(module(program), [], "http://127.0.0.1:9", tmp_path / "log")
    deadline = time.monotonic() + 20
    while server.said() != "up":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    with caplog.at_level(logging.WARNING):
        assert server.stop(0.5) is went
    assert ("did not end within" in caplog.text) is not went
    assert server.process.poll() is not None


WITH_A_CHILD = """
import signal, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"])

def end(*_):
    time.sleep(0.5)
    print("child", child.poll(), flush=True)
    sys.exit(0)

signal.signal(signal.SIGTERM, end)
time.sleep(60)
"""


def test_it_ends_its_own_processes_itself(module, tmp_path):
    """SGLang's schedulers give memory back when the server tells them to, not when they are killed by a signal."""
    server = ServerProcess(module(WITH_A_CHILD), [], "http://127.0.0.1:9", tmp_path / "log")
    deadline = time.monotonic() + 20
    while server.said() != "up":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert server.stop(10)
    assert server.said() == "up\nchild None" and server.process.returncode == 0


@contextlib.contextmanager
def listening(port: int):
    """As a server does."""
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("127.0.0.1", port))
        server.listen()
        yield server


def test_a_port_that_is_held():
    port = free_port()
    with hold_port("127.0.0.1", port):
        with socket.socket() as connection, pytest.raises(OSError, match="in use"):
            connection.bind(("127.0.0.1", port))  # as of a connection, which does not ask to share it
        with listening(port) as server, socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(b"hello")
            assert server.accept()[0].recv(5) == b"hello"
            taken = pytest.raises(PortTaken, match=f"--port: cannot listen on 127.0.0.1:{port}: Address already in use")
            with taken, hold_port("127.0.0.1", port):
                pass
    with listening(port):
        pass
    with pytest.raises(PortTaken, match="--port: cannot listen on 192.0.2.1:"), hold_port("192.0.2.1", port):
        pass


def test_a_free_port_is_none_that_connections_take():
    with open("/proc/sys/net/ipv4/ip_local_port_range") as file:
        first = int(file.read().split()[0])
    ports = {free_port() for _ in range(50)}
    assert len(ports) > 40 and max(ports) < first and min(ports) >= 10_000


def test_a_server_is_refused_a_port_that_is_taken(tiny_pair):
    """Before it loads a model."""
    port = free_port()
    command = [sys.executable, "-m", "sglang_optimal.launch_server", "--port", str(port)]
    command += ["--model-path", str(tiny_pair[0]), "--student-model-path", str(tiny_pair[1])]
    with listening(port):
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    said = f"error: --port: cannot listen on 127.0.0.1:{port}: Address already in use; choose another.\n"
    assert said in done.stderr
    assert "Load weight" not in done.stderr
