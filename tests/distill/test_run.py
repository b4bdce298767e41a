"""Whole runs against stub servers: complete, resumed, killed, and with servers that misbehave."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import datasets
import pyarrow.parquet as parquet
import pytest
import yaml
from stub_server import StubServer, stub_answer, stub_server

from sglang_optimal.distill import client, pipeline
from sglang_optimal.distill.card import public_name
from sglang_optimal.distill.cli import main
from sglang_optimal.distill.manifests import read_manifests
from sglang_optimal.distill.pipeline import seed_of
from sglang_optimal.distill.records import COLUMNS
from sglang_optimal.distill.store import find_shards, read_rows

PROBLEMS = 40
SETTINGS = {
    "data": {"fields": {"id": "key"}},
    "contexts": {
        "student": "{problem}",
        "strategies": [{"name": "a", "teacher": "{problem} {answer}"}, {"name": "b", "teacher": "{answer} {problem}"}],
    },
    "sampling": {"n": 3, "max_new_tokens": 16},
    "filters": [{"type": "finish"}, {"type": "answer", "match": "numeric"}],
    "output": {"shard_records": 16},
    "client": {"concurrency": 8, "timeout": 20, "retries": 3, "max_downtime": 20},
}

pytestmark = pytest.mark.usefixtures("impatient")


def _hear_interrupts() -> None:
    """A shell's background jobs ignore SIGINT, and so would their children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Folder:
    """A run's file and data, and what has come out of it."""

    def __init__(self, root: Path):
        self.root, self.out = root, root / "out"
        rows = [{"key": f"p{i}", "problem": f"{i} + 1?", "answer": str(i % 3)} for i in range(PROBLEMS)]
        (root / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.configure()

    def configure(self, *, filters: list[dict] | None = None, **sections) -> None:
        settings = {**SETTINGS, **{name: {**SETTINGS.get(name, {}), **s} for name, s in sections.items()}}
        if filters is not None:
            settings["filters"] = filters
        (self.root / "run.yaml").write_text(yaml.safe_dump(settings))

    def command(self, *urls: str) -> list[str]:
        argv = ["run", str(self.root / "run.yaml"), "--data", str(self.root / "problems.jsonl"), "--out", str(self.out)]
        return [*argv, *(part for url in urls for part in ("--endpoint", url)), "--no-report"]

    def run(self, *urls: str, more: tuple[str, ...] = ()) -> int:
        return main([*self.command(*urls), *more])

    def process(self, *urls: str, more: tuple[str, ...] = ()) -> subprocess.Popen:
        command = [sys.executable, "-m", "sglang_optimal.distill", *self.command(*urls), *more]
        return subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, preexec_fn=_hear_interrupts
        )

    def rows(self) -> dict[str, dict]:
        rows = [row for kind in ("accepted", "rejected") for row in read_rows(find_shards(self.out, kind))]
        assert len({row["id"] for row in rows}) == len(rows), "a record is there twice"
        return {row["id"]: row for row in rows}

    def check_complete(self, *, problems: int = PROBLEMS, n: int = 3) -> dict[str, dict]:
        rows = self.rows()
        pairs = {tuple(name.split("/")[::2]) for name in rows}
        assert pairs == {(f"p{i}", str(k)) for i in range(problems) for k in range(n)} and len(rows) == problems * n
        for name, row in rows.items():
            strategy = name.split("/")[1]
            body = {"sampling_params": {"sampling_seed": seed_of(0, name)}}
            assert row["token_ids"] == stub_answer(body)["output_ids"]
            assert row["student_messages"][0]["content"] == row["problem"]
            teacher = row["teacher_messages"][0]["content"]
            parts = (row["problem"], row["answer"])
            assert teacher == " ".join(parts if strategy == "a" else parts[::-1])
        assert not (self.out / "journal").exists()
        assert json.loads((self.out / "run.json").read_text())["state"] == "complete"
        return rows


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path)


def test_complete(folder, stub, capsys):
    assert folder.run(stub.url) == 0
    rows = folder.check_complete()
    assert set(stub.seen.values()) == {1} and stub.most_in_flight <= 8
    finished = [r for r in rows.values() if r["finish_reason"] == "stop"]
    right = [r for r in finished if r["text"].endswith(f"answer is {r['answer']}.")]
    accepted = {name for name, row in rows.items() if row["accepted"]}
    assert accepted == {row["id"] for row in right}
    reasons = {(row["rejected_by"], row["reject_reason"]) for row in rows.values() if not row["accepted"]}
    assert reasons == {("finish", "ended by length"), ("answer", "wrong answer")}
    assert f"{len(right)} accepted" in capsys.readouterr().out
    row = rows[min(accepted)]
    assert row["teacher_model"] == "teacher" and row["student_weight_version"] == "v1" and row["seed"]
    assert json.loads(row["sampling"])["max_new_tokens"] == 16
    body = stub.bodies[0]["session_params"]["mixing"]
    assert body["return_mixing_info"] is True and body["student_messages"][0]["role"] == "user"


def test_ids_name_no_files(folder, stub, tmp_path_factory):
    """What a data file says becomes a value in a record, never a path."""
    ids = ["../../evil", "/tmp/evil", "a/b/../c", "..", "~", "con\\evil", "x" * 500, "\u202e", "nul\0"]
    lines = [json.dumps({"key": name, "problem": f"{i} + 1?", "answer": "1"}) + "\n" for i, name in enumerate(ids)]
    (folder.root / "problems.jsonl").write_text("".join(lines))
    before = {path for path in folder.root.parent.rglob("*")}
    assert folder.run(stub.url) == 0
    assert {name.rsplit("/", 2)[0] for name in folder.rows()} == set(ids)
    new = {path for path in folder.root.parent.rglob("*")} - before
    assert new and all(path == folder.out or folder.out in path.parents for path in new)
    names = {path.name for path in new}
    assert not [name for name in names if "evil" in name or "x" * 20 in name]


def test_read_by_load_dataset(folder, stub):
    assert folder.run(stub.url) == 0
    rows = folder.rows()
    accepted = datasets.load_dataset(str(folder.out), split="train")
    rejected = datasets.load_dataset(str(folder.out), "rejected", split="train")
    assert set(accepted["id"]) == {name for name, row in rows.items() if row["accepted"]}
    assert set(rejected["id"]) == {name for name, row in rows.items() if not row["accepted"]}
    card = (folder.out / "README.md").read_text()
    assert "wrong answer" in card and "| `log_weight_student` |" in card


def test_load_dataset_gives_no_rejected_records_where_none_was_accepted(folder, stub):
    folder.configure(filters=[{"type": "length", "min_tokens": 10**6}])
    assert folder.run(stub.url) == 0
    with pytest.raises(ValueError, match="corresponds to no data"):  # as datasets says it of a split without rows
        datasets.load_dataset(str(folder.out), split="train")
    (empty,) = (folder.out / "data").glob("*.parquet")
    assert parquet.read_schema(empty).names == list(COLUMNS)
    assert len(datasets.load_dataset(str(folder.out), "rejected", split="train")) == 3 * PROBLEMS


def test_load_dataset_does_not_mistake_one_run_for_another(folder, stub, tmp_path):
    """datasets has a cache, and two runs may have folders of one name."""

    def ids(run: Folder) -> list[str]:
        return sorted(datasets.load_dataset(str(run.out), split="train")["id"])

    (tmp_path / "other").mkdir()
    other = Folder(tmp_path / "other")
    assert folder.run(stub.url, more=("--limit", "10")) == 0
    before = ids(folder)
    assert folder.run(stub.url) == 0
    assert len(ids(folder)) > len(before)
    settings = yaml.safe_load((other.root / "run.yaml").read_text())
    (other.root / "run.yaml").write_text(yaml.safe_dump({**settings, "filters": []}))
    assert other.run(stub.url) == 0
    assert len(ids(other)) == 3 * PROBLEMS and len(ids(folder)) < 3 * PROBLEMS


def test_jsonl_by_load_dataset(folder, stub):
    folder.configure(output={"format": "jsonl", "shard_records": 16})
    assert folder.run(stub.url) == 0
    accepted = datasets.load_dataset(str(folder.out), split="train")
    assert len(accepted) == sum(row["accepted"] for row in folder.check_complete().values())


def test_again_does_nothing(folder, stub):
    assert folder.run(stub.url) == 0
    asked = sum(stub.seen.values())
    before = folder.rows()
    assert folder.run(stub.url) == 0
    assert sum(stub.seen.values()) == asked and folder.rows() == before


def test_more_samples_and_problems(folder, stub):
    folder.configure(data={"limit": 5, "fields": {"id": "key"}}, sampling={"n": 1, "max_new_tokens": 16})
    assert folder.run(stub.url) == 0
    folder.check_complete(problems=5, n=1)
    assert folder.run(stub.url, more=("--n", "3", "--limit", "100")) == 0
    folder.check_complete()
    assert set(stub.seen.values()) == {1}


def test_other_settings_are_another_run(folder, stub, capsys):
    assert folder.run(stub.url, more=("--limit", "2")) == 0
    folder.configure(sampling={"n": 3, "max_new_tokens": 17})
    assert folder.run(stub.url) == 2
    assert "holds a run with other settings (sampling.max_new_tokens)" in capsys.readouterr().err
    folder.configure(client={"concurrency": 2})
    assert folder.run(stub.url) == 0


def test_machines_with_shards_of_their_own(folder, stub):
    assert folder.run(stub.url, more=("--shard", "0/2")) == 0
    assert folder.run(stub.url, more=("--shard", "1/2")) == 0
    assert len(folder.rows()) == PROBLEMS * 3 and set(stub.seen.values()) == {1}
    card = (folder.out / "README.md").read_text()
    assert f"| rejected records | {sum(not r['accepted'] for r in folder.rows().values())} |" in card
    assert len(datasets.load_dataset(str(folder.out), split="train")) == sum(
        row["accepted"] for row in folder.rows().values()
    )


def test_more_machines_than_problems(folder, stub):
    assert folder.run(stub.url, more=("--limit", "2", "--shard", "2/3")) == 0
    assert not folder.rows() and not stub.seen


def test_disk_full(folder, stub, monkeypatch, capsys):
    write, written = os.write, []

    def full_after_a_while(descriptor, data):
        if len(data) > 200:
            written.append(len(data))
            if len(written) > 30:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", full_after_a_while)
    assert folder.run(stub.url) == 1
    assert "No space left on device; what was sampled is kept." in capsys.readouterr().err
    monkeypatch.undo()
    assert len(folder.rows()) == 30
    assert folder.run(stub.url) == 0
    folder.check_complete()


@pytest.mark.parametrize("shard", ["2", "2/2", "-1/2", "a/b", "0/0"])
def test_wrong_shard(folder, stub, shard, capsys):
    assert folder.run(stub.url, more=(f"--shard={shard}",)) == 2
    assert "--shard" in capsys.readouterr().err


def test_killed_again_and_again(folder, stub):
    """kill -9 at random moments; the same command in between; at the end nothing is missing and nothing doubled."""
    stub.delay = 0.1
    generator = random.Random(7)
    kills = 0
    for _ in range(4):
        process = folder.process(stub.url)
        began = sum(stub.seen.values())
        while process.poll() is None and sum(stub.seen.values()) == began:
            time.sleep(0.01)  # it has come to asking
        time.sleep(generator.uniform(0.0, 0.5))
        if process.poll() is not None:
            break
        process.kill()
        process.wait()
        kills += 1
    stub.delay = 0
    assert folder.run(stub.url) == 0
    assert kills >= 2
    folder.check_complete()
    assert set(stub.seen) == {seed_of(0, name) for name in folder.rows()}
    repeated = sum(count - 1 for count in stub.seen.values())
    assert repeated <= 8 * kills  # at most what was in flight


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted(folder, stub, number):
    stub.delay = 0.1
    process = folder.process(stub.url)
    while sum(stub.seen.values()) < 40 and process.poll() is None:  # some are accepted by then, on a busy machine too
        time.sleep(0.01)
    process.send_signal(number)
    _, error = process.communicate(timeout=20)
    assert process.returncode == 128 + number and "goes on from here" in error
    assert json.loads((folder.out / "run.json").read_text())["state"] == "stopped"
    # What is there can be read already.
    accepted = datasets.load_dataset(str(folder.out), split="train")
    assert set(accepted["id"]) == {name for name, row in folder.rows().items() if row["accepted"]}
    stub.delay = 0
    assert folder.run(stub.url) == 0
    folder.check_complete()


@pytest.mark.parametrize("format", ["parquet", "jsonl"])
def test_load_dataset_of_a_run_that_was_killed(folder, stub, format):
    """The accepted records of finished shards, also of those that came since; never a rejected one."""
    folder.configure(output={"format": format, "shard_records": 8})
    assert folder.run(stub.url, more=("--shard", "0/2")) == 0
    stub.delay = 0.4
    process = folder.process(stub.url, more=("--shard", "1/2"))
    before = finished(folder.out)
    while process.poll() is None and not (more := finished(folder.out) - before):
        time.sleep(0.05)
    assert process.poll() is None and loaded(folder.out) <= finished(folder.out)
    while process.poll() is None and not before | more <= loaded(folder.out):
        time.sleep(0.2)  # the card is renewed once a second
    assert process.poll() is None
    process.kill()
    process.wait()
    assert before | more <= loaded(folder.out) <= finished(folder.out)
    stub.delay = 0
    assert folder.run(stub.url, more=("--shard", "1/2")) == 0
    assert loaded(folder.out) == {row["id"] for row in folder.rows().values() if row["accepted"]}


def loaded(out) -> set[str]:
    return set(datasets.load_dataset(str(out), split="train")["id"])


def finished(out) -> set[str]:
    shards = [path for suffix in ("parquet", "jsonl") for path in sorted((out / "data").glob(f"*-of-*.{suffix}"))]
    return {row["id"] for row in read_rows(shards)}


@pytest.mark.parametrize("format", ["parquet", "jsonl"])
def test_load_dataset_of_a_run_that_was_killed_before_its_first_shard(folder, stub, format):
    folder.configure(output={"format": format})
    stub.delay = 0.1
    process = folder.process(stub.url)
    while sum(stub.seen.values()) < 40 and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert list((folder.out / "journal").glob("rejected-*"))
    with pytest.raises(ValueError, match="corresponds to no data"):
        datasets.load_dataset(str(folder.out), split="train")


def started_with(ignored: signal.Signals, folder, stub):
    """A run whose parent ignores a signal."""
    before = signal.signal(ignored, signal.SIG_IGN)
    try:
        process = folder.process(stub.url)
    finally:
        signal.signal(ignored, before)
    while sum(stub.seen.values()) < 8 and process.poll() is None:
        time.sleep(0.01)
    return process


def test_a_script_s_background_run_is_stopped_too(folder, stub):
    """A shell without job control ignores SIGINT in what it starts with "&": Slurm's batch script, for one."""
    stub.delay = 0.1
    process = started_with(signal.SIGINT, folder, stub)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143
    assert json.loads((folder.out / "run.json").read_text())["state"] == "stopped"


def test_nohup_goes_on(folder, stub):
    process = started_with(signal.SIGHUP, folder, stub)
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 0
    folder.check_complete()


def test_one_of_two_servers_dies(folder, stub):
    doomed = StubServer()
    doomed.dies_after = 20
    assert folder.run(doomed.url, stub.url) == 0
    folder.check_complete()
    assert sum(doomed.seen.values()) >= 20 and sum(stub.seen.values()) >= 3 * PROBLEMS - 20


def test_the_only_server_dies_and_comes_back(folder):
    first = StubServer()
    first.dies_after = 50
    revived = []

    def restart():
        first.stopped.wait()
        time.sleep(0.5)
        revived.append(StubServer(port=first.port))

    thread = threading.Thread(target=restart)
    thread.start()
    assert folder.run(first.url) == 0
    thread.join()
    folder.check_complete()
    assert sum(revived[0].seen.values()) >= 3 * PROBLEMS - 50
    revived[0].stop()


def test_a_connection_that_is_closed_at_once_is_no_server(folder, capsys, monkeypatch):
    """httpx then looks at a socket that uvloop no longer has, which is no TransportError."""

    async def post(self, *args, **kwargs):
        raise AttributeError("'NoneType' object has no attribute 'family'")

    folder.configure(client={"max_downtime": 0.5, "concurrency": 2})
    monkeypatch.setattr(client.httpx.AsyncClient, "post", post)
    with stub_server() as server:
        assert folder.run(server.url) == 1
    assert "stopped: no server has answered" in capsys.readouterr().err


def test_no_server_any_more(folder, capsys):
    folder.configure(client={"max_downtime": 0.5, "concurrency": 8})
    first = StubServer()
    first.dies_after = 50
    assert folder.run(first.url) == 1
    assert "stopped: no server has answered" in capsys.readouterr().err
    kept = len(folder.rows())
    assert 0 < kept < 3 * PROBLEMS
    with stub_server() as second:
        assert folder.run(second.url) == 0
        assert sum(second.seen.values()) == 3 * PROBLEMS - kept
    folder.check_complete()


def test_never_a_server(folder, capsys):
    folder.configure(client={"max_downtime": 0.2})
    assert folder.run("http://127.0.0.1:9") == 1
    assert "no server answers at http://127.0.0.1:9" in capsys.readouterr().err


def test_new_student_weights_while_it_runs(folder, stub, monkeypatch):
    monkeypatch.setattr(pipeline, "LOOK_EVERY", 0.05)
    stub.delay = 0.02

    def behave(body):
        if sum(stub.seen.values()) > 60:
            stub.student_version = "v2"
        return ...

    stub.behave = behave
    assert folder.run(stub.url) == 0
    versions = [row["student_weight_version"] for row in folder.check_complete().values()]
    assert set(versions) == {"v1", "v2"} and versions.count("v1") >= 50


def test_round_robin_and_concurrency(folder):
    with stub_server(delay=0.02) as one, stub_server(delay=0.02) as two:
        assert folder.run(one.url, two.url) == 0
        counts = sum(one.seen.values()), sum(two.seen.values())
        assert sum(counts) == 3 * PROBLEMS and abs(counts[0] - counts[1]) <= 8
        assert 4 <= one.most_in_flight + two.most_in_flight <= 16


TROUBLE = {
    "500": (500, {"error": "boom"}),
    "503": (503, b"<html>busy</html>"),
    "429": (429, {}),
    "hangs up": None,
    "no JSON": (200, b"<html>"),
    "aborts": (200, {"text": "", "output_ids": [], "meta_info": {"finish_reason": {"type": "abort"}}}),
}


@pytest.mark.parametrize("trouble", list(TROUBLE))
def test_now_and_then(folder, stub, trouble):
    """Every third request fails once."""

    def behave(body):
        seed = body["sampling_params"]["sampling_seed"]
        return TROUBLE[trouble] if seed % 3 == 0 and stub.seen[seed] == 1 else ...

    stub.behave = behave
    assert folder.run(stub.url) == 0
    folder.check_complete()
    assert max(stub.seen.values()) == 2


def test_slow_answers_are_given_up_and_asked_again(folder, stub):
    folder.configure(client={"timeout": 0.3, "concurrency": 8})

    def behave(body):
        seed = body["sampling_params"]["sampling_seed"]
        if seed % 7 == 0 and stub.seen[seed] == 1:
            time.sleep(1)
        return ...

    stub.behave = behave
    assert folder.run(stub.url) == 0
    folder.check_complete()


def test_a_request_that_always_fails(folder, stub, capsys):
    bad = seed_of(0, "p3/a/0"), seed_of(0, "p3/b/0")
    stub.behave = lambda body: (500, {}) if body["sampling_params"]["sampling_seed"] in bad else ...
    stub.delay = 0.01
    assert folder.run(stub.url) == 1
    output = capsys.readouterr()
    assert "1 samples failed" in output.err and "HTTP 500" in output.err
    assert len(folder.rows()) == 3 * PROBLEMS - 1
    stub.behave = lambda body: ...
    assert folder.run(stub.url) == 0
    folder.check_complete()


def test_a_request_that_is_refused(folder, stub):
    bad = seed_of(0, "p3/a/0"), seed_of(0, "p3/b/0")
    refusal = (400, {"error": {"message": "too long by 3 tokens"}})
    stub.behave = lambda body: refusal if body["sampling_params"]["sampling_seed"] in bad else ...
    assert folder.run(stub.url) == 0
    (row,) = [row for row in folder.rows().values() if row["rejected_by"] == "server"]
    assert row["reject_reason"] == "too long by 3 tokens" and row["token_ids"] == [] and row["id"].startswith("p3/")


def test_every_request_is_refused(folder, stub, capsys):
    stub.behave = lambda body: (400, {"error": {"message": "alpha_methud: unknown"}})
    assert folder.run(stub.url) == 2
    assert "the server refuses every request: alpha_methud: unknown" in capsys.readouterr().err
    assert sum(stub.seen.values()) < 3 * PROBLEMS
    assert folder.rows() == {}
    stub.behave = lambda body: ...  # the server is mended
    assert folder.run(stub.url) == 0
    assert len(folder.check_complete()) == 3 * PROBLEMS


def test_a_server_that_does_not_mix(folder, capsys):
    with stub_server(mixes=False) as plain:
        assert folder.run(plain.url) == 2
    assert "runs no student" in capsys.readouterr().err


def test_a_router_does_not_tell_what_is_behind_it(folder):
    with stub_server(router=True) as router:
        assert folder.run(router.url) == 0
    rows = folder.check_complete()
    assert {row["teacher_model"] for row in rows.values()} == {None}


def test_answers_without_the_series(folder, stub, capsys):
    meta = {"finish_reason": {"type": "stop"}}
    stub.behave = lambda body: (200, {"text": "x", "output_ids": [1], "meta_info": meta})
    assert folder.run(stub.url) == 1
    assert "without alpha for every token" in capsys.readouterr().err


def test_api_key(folder, monkeypatch, capsys):
    with stub_server(api_key="secret") as server:
        assert folder.run(server.url) == 1
        assert "wants an API key; set client.api_key_env" in capsys.readouterr().err
        folder.configure(client={"api_key_env": "STUB_KEY"})
        monkeypatch.delenv("STUB_KEY", raising=False)
        assert folder.run(server.url) == 2
        assert "the environment has no STUB_KEY" in capsys.readouterr().err
        monkeypatch.setenv("STUB_KEY", "secret")
        assert folder.run(server.url) == 0
    folder.check_complete()
    assert "secret" not in "".join(path.read_text(errors="replace") for path in folder.out.rglob("*") if path.is_file())


def test_a_run_in_use(folder, stub, capsys):
    stub.delay = 0.2
    process = folder.process(stub.url)
    while not stub.seen:
        time.sleep(0.01)
    assert folder.run(stub.url) == 2
    assert "another run is writing here" in capsys.readouterr().err
    process.kill()
    process.wait()


def test_duplicates_are_remembered_when_resuming(folder, stub):
    settings = {**SETTINGS, "filters": [{"type": "deduplicate", "scope": "run"}]}
    (folder.root / "run.yaml").write_text(yaml.safe_dump(settings))
    answer = stub_answer({"sampling_params": {"sampling_seed": 1}})
    stub.behave = lambda body: (200, answer)
    assert folder.run(stub.url, more=("--limit", "2")) == 0
    assert folder.run(stub.url, more=("--limit", "4")) == 0
    assert sum(row["accepted"] for row in folder.rows().values()) == 1


def test_nothing_to_ask(folder, capsys):
    assert folder.run() == 2
    assert "client.endpoints, server.model_path: give the servers to ask" in capsys.readouterr().err


def test_guard_before_anything_is_asked(folder, stub, capsys):
    folder.configure(contexts={"student": "{problem} {answer}"})
    assert folder.run(stub.url) == 2
    assert "shows the student 'answer'" in capsys.readouterr().err
    assert not stub.seen and not folder.out.exists()


def test_every_problem_is_rendered_before_anything_is_asked(folder, stub, capsys):
    folder.configure(contexts={"student": "{{ problem }} {{ 1 // (39 - (id | replace('p', '') | int)) }}"})
    assert folder.run(stub.url) == 2
    assert "contexts.student: fails on problem p39" in capsys.readouterr().err
    assert not stub.seen


def test_a_folder_that_cannot_be_written(folder, stub, capsys):
    folder.out.write_text("a file")
    assert folder.run(stub.url) == 1
    assert "Not a directory" in capsys.readouterr().err
    assert not stub.seen


def test_preview(folder, capsys):
    config, data = str(folder.root / "run.yaml"), str(folder.root / "problems.jsonl")
    assert main(["preview", config, "--data", data, "--problems", "1"]) == 0
    output = capsys.readouterr().out
    assert "p0/" in output and "0 + 1?" in output and "40 problems, 120 samples; the file is valid." in output


@pytest.mark.parametrize("name", ["distillation", "math_qa", "demo", "example_loop"])
def test_shipped_configs(tmp_path, name, capsys):
    configs = Path(__file__).parents[2] / "configs"
    row = {
        "id": "1",
        "unique_id": "1",
        "problem": "What is 1 + 1?",
        "solution": "It is 1 + 1 = 2, I think.",
        "answer": "2",
    }
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps(row) + "\n")
    split = yaml.safe_load((configs / f"{name}.yaml").read_text()).get("data", {}).get("split", "train")
    path = str(data)
    if split != "train":  # a folder, with the split's name in the file's
        data.rename(tmp_path / f"{split}.jsonl")
        path = str(tmp_path)
    assert main(["preview", str(configs / f"{name}.yaml"), "--data", path]) == 0
    output = capsys.readouterr().out
    assert "What is 1 + 1?" in output and "the file is valid" in output
    if name == "math_qa":
        assert "final answer within \\boxed{}" in " ".join(output.split()) and "is \\boxed{2}." in output


def test_the_event_loop_goes_on_while_a_filter_thinks(folder, stub, monkeypatch):
    (folder.root / "slow_filter.py").write_text("import time\n\ndef slow(record):\n    time.sleep(1)\n")
    monkeypatch.syspath_prepend(folder.root)
    folder.configure(filters=[{"type": "function", "function": "slow_filter:slow"}])
    monkeypatch.setattr(pipeline, "SYNC_EVERY", 0.05)
    syncs = []
    monkeypatch.setattr(pipeline.RecordStore, "sync", lambda store: syncs.append(time.monotonic()))
    assert folder.run(stub.url, more=("--limit", "1", "--n", "1")) == 0
    assert len(folder.rows()) == 1 and len(syncs) >= 8


def test_other_data_under_the_same_ids(folder, stub, capsys):
    assert folder.run(stub.url, more=("--limit", "3")) == 0
    lines = (folder.root / "problems.jsonl").read_text().splitlines()
    lines[1] = json.dumps({"key": "p1", "problem": "1 + 2?", "answer": "1"})
    (folder.root / "problems.jsonl").write_text("\n".join(lines) + "\n")
    assert folder.run(stub.url) == 2
    assert "problem 'p1' is not what it was when it was sampled" in capsys.readouterr().err
    assert len(folder.rows()) == 9


def test_problems_that_are_gone_stay_and_are_counted(folder, stub, capsys):
    assert folder.run(stub.url, more=("--limit", "3")) == 0
    lines = (folder.root / "problems.jsonl").read_text().splitlines()
    (folder.root / "problems.jsonl").write_text("\n".join(lines[2:5]) + "\n")
    assert folder.run(stub.url) == 0
    assert "6 samples are of problems that are not among these any more" in capsys.readouterr().err
    assert {row["problem_id"] for row in folder.rows().values()} == {"p0", "p1", "p2", "p3", "p4"}


def test_a_killed_run_is_not_said_to_be_running(folder):
    with stub_server(delay=0.2) as stub:
        process = folder.process(stub.url)
        while sum(stub.seen.values()) < 20:
            time.sleep(0.05)
        assert [manifest["state"] for manifest in read_manifests(folder.out)] == ["running"]
        process.kill()
        process.wait()
    process.stderr.close()
    assert [manifest["state"] for manifest in read_manifests(folder.out)] == ["stopped"]


def test_the_card_names_no_folder_of_this_machine(folder, stub, monkeypatch):
    info = stub.info()
    info["internal_states"][0]["mixing"]["teacher_model_path"] = "/home/someone/models/teacher-7b"
    monkeypatch.setattr(stub, "info", lambda: info)
    assert folder.run(stub.url) == 0
    card = (folder.out / "README.md").read_text()
    assert "| teacher, student | teacher-7b, student |" in card and "path: problems.jsonl" in card
    for private in ("/home/someone", str(folder.root), stub.url, "127.0.0.1"):
        assert private not in card


@pytest.mark.parametrize(
    ("name", "public"),
    [
        ("/data/models/Qwen3-8B", "Qwen3-8B"), ("/data/models/Qwen3-8B/", "Qwen3-8B"), ("~/x.jsonl", "x.jsonl"),
        ("Qwen/Qwen3-8B", "Qwen/Qwen3-8B"), ("openai/gsm8k", "openai/gsm8k"), ("./here/data.jsonl", "data.jsonl"),
    ],
)  # fmt: skip
def test_public_names(name, public):
    assert public_name(name) == public
