"""SIGTERM to a run with a server of its own: both end in order. The server is a stub in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
import yaml
from test_own_server import records, servers_of, wait_for

SERVER = """
import sys, time, yaml
sys.path.insert(0, {tests!r})
from stub_server import StubServer
settings = yaml.safe_load(open(sys.argv[2]))["server"]
if settings["model_path"] == "slow":
    time.sleep(1000)
stub = StubServer(delay=0.05, port=settings["port"])
time.sleep(1000)
"""
CLIENT = """
import sys
from sglang_optimal.distill import server
started = server.ServerProcess
server.ServerProcess = lambda module, *arguments: started("stub_of_a_server", *arguments)
from sglang_optimal.distill.cli import main
sys.exit(main(sys.argv[1:]))
"""


def command(tmp_path: Path, model: str) -> list[str]:
    (tmp_path / "stub_of_a_server.py").write_text(SERVER.format(tests=str(Path(__file__).parent)))
    (tmp_path / "problems.jsonl").write_text("".join(f'{{"problem": "{i}?", "answer": "x"}}\n' for i in range(40)))
    content = {
        "data": {"path": str(tmp_path / "problems.jsonl")},
        "contexts": {"student": "{problem}", "strategies": [{"teacher": "{problem} {answer}"}]},
        "sampling": {"n": 4},
        "client": {"concurrency": 4},
        "filters": [{"type": "finish"}],
        "mixing": {"student_model_path": "student"},
        "server": {"model_path": model},
        "output": {"dir": str(tmp_path / "out"), "shard_records": 30},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    return [sys.executable, "-c", CLIENT, "run", str(tmp_path / "run.yaml"), "--no-report"]


def started(tmp_path: Path, model: str) -> subprocess.Popen:
    paths = os.pathsep.join([str(tmp_path), *sys.path])
    return subprocess.Popen(
        command(tmp_path, model), stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": paths}
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_while_it_samples(tmp_path, number):
    out = tmp_path / "out"
    process = started(tmp_path, "quick")
    try:
        wait_for(lambda: (out / "run.json").exists() and len(records(out)) >= 50, 60)
        assert servers_of(out)
        process.send_signal(number)
        process.send_signal(number)  # as Slurm may, again
        _, error = process.communicate(timeout=30)
        assert process.returncode == 128 + number and "goes on from here" in error, error
    finally:
        process.kill()
    assert not servers_of(out)
    manifest = json.loads((out / "run.json").read_text())
    there = records(out)
    assert manifest["state"] == "stopped" and manifest["accepted"] + manifest["rejected"] == len(there) < 160
    accepted = datasets.load_dataset(str(out), split="train")
    assert set(accepted["id"]) == {row["id"] for row in there if row["accepted"]}
    assert "| state | not complete: run the same command again |" in (out / "README.md").read_text()
    process = started(tmp_path, "quick")
    _, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert len(records(out)) == len({row["id"] for row in records(out)}) == 160 and not servers_of(out)


def test_while_it_starts(tmp_path):
    """A large model may be an hour on its way."""
    out = tmp_path / "out"
    process = started(tmp_path, "slow")
    try:
        wait_for(lambda: servers_of(out), 60)
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=30)
        assert process.returncode == 143, error
    finally:
        process.kill()
    assert not servers_of(out)
    assert json.loads((out / "run.json").read_text())["state"] == "stopped"
