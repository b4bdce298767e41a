"""A command is started again when it dies, not when it ends well, refuses, or is stopped."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sglang_optimal.supervise import supervise

# Appends a line to the file and then does the next of the given things.
CHILD = """
import os, signal, subprocess, sys, time
log, *plan = sys.argv[1:]
with open(log, "a") as f:
    f.write(str(os.getpid()) + "\\n")
number = len(open(log).readlines())
what = plan[min(number, len(plan)) - 1]
if what == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if what == "orphan":
    print(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]).pid, flush=True)
    sys.exit(7)
if what == "parent":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(time.sleep(0.3) or (3 if child.poll() is None else 4)))
    what = "runs"
if what == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    what = "runs"
if what == "runs":
    time.sleep(60)
sys.exit(int(what))
"""


def command(tmp_path: Path, *plan: str) -> list[str]:
    return [sys.executable, "-c", CHILD, str(tmp_path / "log"), *plan]


def starts(tmp_path: Path) -> int:
    return len((tmp_path / "log").read_text().splitlines())


@pytest.mark.parametrize(
    "plan,restarts,status,started",
    [
        (["0"], 3, 0, 1),
        (["2"], 3, 2, 1),  # wrong arguments
        (["5"], 0, 5, 1),
        (["5", "0"], 1, 0, 2),
        (["5"], 2, 5, 3),
        (["killed", "5", "0"], 5, 0, 3),
        (["killed"], 1, 128 + 9, 2),
    ],
)
def test_restarts(tmp_path, capfd, plan, restarts, status, started):
    assert supervise(command(tmp_path, *plan), restarts, pause=0.01) == status
    assert starts(tmp_path) == started
    said = capfd.readouterr().err
    assert said.count("restart ") == started - 1
    assert ("not started again" in said) == (status not in (0, 2))


def test_a_long_good_run_forgives(tmp_path, monkeypatch):
    monkeypatch.setattr("sglang_optimal.supervise.STEADY_SECONDS", 0.0)
    assert supervise(command(tmp_path, "5", "5", "5", "0"), 1, pause=0.01) == 0


def test_what_is_left_of_it_is_killed(tmp_path, capfd):
    assert supervise(command(tmp_path, "orphan"), 0) == 7
    orphan = int(capfd.readouterr().out)
    deadline = time.monotonic() + 5
    while Path(f"/proc/{orphan}").exists() and Path(f"/proc/{orphan}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.02)


SUPERVISOR = """
import sys
from sglang_optimal import supervise
supervise.GRACE_SECONDS = 0.5
sys.exit(supervise.supervise(sys.argv[1:], 5))
"""


def _hangs_up() -> None:
    """As from a terminal, also where the tests themselves run under nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def supervised(tmp_path: Path, child: str, *before: str) -> tuple[subprocess.Popen, int]:
    """A supervisor in a process of its own, and the id of its running child. ``before``: what starts both."""
    argv = [*before, sys.executable, "-c", SUPERVISOR, *command(tmp_path, child)]
    process = subprocess.Popen(argv, preexec_fn=_hangs_up)
    deadline = time.monotonic() + 20
    while not (tmp_path / "log").exists() or not (tmp_path / "log").read_text().endswith("\n"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.3)
    return process, int((tmp_path / "log").read_text())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("child", ["runs", "stubborn"])
def test_a_signal_ends_both(tmp_path, number, child):
    process, pid = supervised(tmp_path, child)
    try:
        process.send_signal(number)
        assert process.wait(20) == 128 + (signal.SIGTERM if child == "runs" else signal.SIGKILL)
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    finally:
        end(process, pid)


def test_a_signal_is_for_the_command_alone(tmp_path):
    """Which ends its own processes itself."""
    process, pid = supervised(tmp_path, "parent")
    try:
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 3
    finally:
        end(process, pid)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of its parent's death")
def test_a_killed_supervisor_leaves_nothing(tmp_path):
    process, pid = supervised(tmp_path, "stubborn")
    try:
        process.kill()
        process.wait(20)
        deadline = time.monotonic() + 5
        while Path(f"/proc/{pid}").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z":
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        end(process, pid)


def test_a_closed_terminal_is_nothing_under_nohup(tmp_path):
    process, pid = supervised(tmp_path, "runs", "nohup")
    try:
        process.send_signal(signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1)
        os.kill(pid, 0)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 128 + signal.SIGTERM
    finally:
        end(process, pid)


def end(process: subprocess.Popen, pid: int) -> None:
    """Kill what a failed test has left."""
    process.kill()
    process.wait()
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
