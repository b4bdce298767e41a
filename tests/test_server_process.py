"""A server in a process of its own: what its starter is told when it does not start, and when it does not end."""

from __future__ import annotations

import logging
import time

import pytest

from sglang_optimal.server_process import TAIL, ServerFailed, ServerProcess, running


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
