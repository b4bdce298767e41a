"""The Slurm script and the Kubernetes file of docs/operations.md: the first run in a shell, with its signals, against
the stub server; the second read for its commands, routes and names."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from sglang_optimal import launch_server
from sglang_optimal.distill.cli import build_parser
from sglang_optimal.distill.store import find_shards, read_rows

REPOSITORY = Path(__file__).parents[2]
PAGE = (REPOSITORY / "docs" / "operations.md").read_text(encoding="utf-8")
(SLURM,) = re.findall(r"^```slurm\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
(KUBERNETES,) = re.findall(r"^```yaml\n(apiVersion.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
DEPLOYMENT, SERVICE, JOB = yaml.safe_load_all(KUBERNETES)
PROBLEMS = 40


@pytest.fixture
def cluster(tmp_path, stub):
    """A folder with a run's file, and commands of Slurm's and ours that come before all others."""
    rows = [{"problem": f"{i} + 1?", "answer": str(i + 1)} for i in range(PROBLEMS)]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "data": {"path": "problems.jsonl"},
        "contexts": {"student": "{problem}", "strategies": [{"teacher": "{problem} {answer}"}]},
        "client": {"concurrency": 1},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    (tmp_path / "job.sh").write_text(SLURM)
    ours = f'exec {sys.executable} -m sglang_optimal.distill "$@"'
    commands = {
        "scontrol": f'echo "$@" >> {tmp_path}/requeued',
        "sglang-optimal-distill": f"{ours} --endpoint {stub.url} --no-report",  # in place of a server of the run's own
    }
    (tmp_path / "bin").mkdir()
    for name, line in commands.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def started(folder: Path, part: int) -> subprocess.Popen:
    environment = {
        **os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(REPOSITORY),
        "SLURM_ARRAY_TASK_ID": str(part), "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_JOB_ID": "77",
    }  # fmt: skip
    return subprocess.Popen(["bash", "job.sh"], cwd=folder, env=environment)


def records(folder: Path) -> list[str]:
    run = folder / "runs" / "sharded"
    return [row["id"] for kind in ("accepted", "rejected") for row in read_rows(find_shards(run, kind))]


def test_slurm_s_time_is_up(cluster, stub):
    """SIGTERM goes to the batch shell alone, as `--signal=B:TERM@120` has it."""
    assert "#SBATCH --signal=B:TERM@120" in SLURM and "#SBATCH --array=0-3" in SLURM
    stub.delay = 0.5
    job = started(cluster, 1)
    deadline = time.monotonic() + 60
    while sum(stub.seen.values()) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    assert job.wait(30) == 143
    assert (cluster / "requeued").read_text().split() == ["requeue", "77_1"]
    before = records(cluster)
    assert 1 <= len(before) < PROBLEMS // 4
    stub.delay = 0.0
    assert started(cluster, 1).wait(60) == 0
    after = records(cluster)
    assert len(after) == len(set(after)) == PROBLEMS // 4 and set(before) < set(after)
    assert (cluster / "requeued").read_text().count("requeue") == 1
    asked = sum(stub.seen.values())
    assert started(cluster, 1).wait(60) == 0 and sum(stub.seen.values()) == asked  # nothing is left to do


def test_slurm_s_parts_are_the_whole(cluster):
    assert [started(cluster, part).wait(60) for part in range(4)] == [0] * 4
    assert len(set(records(cluster))) == len(records(cluster)) == PROBLEMS
    assert not (cluster / "requeued").exists()


def test_slurm_wrong_settings_are_not_queued_again(cluster):
    (cluster / "run.yaml").write_text("data: {paths: problems.jsonl}\n")
    assert started(cluster, 0).wait(60) == 2 and not (cluster / "requeued").exists()


def container(document: dict) -> dict:
    (found,) = document["spec"]["template"]["spec"]["containers"]
    return found


def test_kubernetes_server():
    server = container(DEPLOYMENT)
    assert server["command"] == ["python3", "-m", "sglang_optimal.launch_server"]
    launch_server.parse(server["args"])
    (port,) = [port["containerPort"] for port in server["ports"]]
    assert server["args"][server["args"].index("--port") + 1] == str(port)
    compatibility = (REPOSITORY / "docs" / "compatibility.md").read_text()
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        asked = server[probe]["httpGet"]
        assert asked["port"] == port and f"`{asked['path']}`" in compatibility
    start = server["startupProbe"]
    assert start["periodSeconds"] * start["failureThreshold"] == 900  # seconds for two models to load
    labels = DEPLOYMENT["spec"]["template"]["metadata"]["labels"]
    assert labels == DEPLOYMENT["spec"]["selector"]["matchLabels"] == SERVICE["spec"]["selector"]
    assert [entry["port"] for entry in SERVICE["spec"]["ports"]] == [port]


def test_kubernetes_run():
    run, spec = container(JOB), JOB["spec"]
    assert run["command"] == ["sh", "-c"] and spec["completionMode"] == "Indexed"
    (line,) = run["args"]
    executed, program, *argv = shlex.split(line.replace("$JOB_COMPLETION_INDEX", "3"))
    assert (executed, program) == ("exec", "sglang-optimal-distill")  # so that SIGTERM reaches it
    asked = build_parser().parse_args(argv)
    assert asked.shard == f"3/{spec['completions']}"
    service = SERVICE["metadata"]["name"], SERVICE["spec"]["ports"][0]["port"]
    assert asked.endpoint == ["http://{}:{}".format(*service)]
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] == "OnFailure"  # it goes on where it was
    for document in (DEPLOYMENT, JOB):
        inner = document["spec"]["template"]["spec"]
        mounted = {mount["name"] for mount in container(document)["volumeMounts"]}
        assert mounted == {volume["name"] for volume in inner["volumes"]}


def test_a_stop_fits_the_grace_that_both_files_give(cluster, stub):
    """A run's end on SIGTERM takes seconds."""
    stub.delay = 0.2
    job = started(cluster, 0)
    while not stub.seen:
        time.sleep(0.05)
    since = time.monotonic()
    job.send_signal(signal.SIGTERM)
    job.wait(60)
    grace = JOB["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert time.monotonic() - since < grace / 4 and grace == 120
