"""A run as a dataset for others: layout, card, and nothing of this machine in it. No hub is asked."""

from __future__ import annotations

import json
import types
from pathlib import Path

import datasets
import pyarrow.parquet as parquet
import pytest
import yaml
from huggingface_hub import DatasetCard
from tiny_models import build_small_tokenizer
from transformers import AutoTokenizer

from sglang_optimal.distill import push as module
from sglang_optimal.distill.cli import main
from sglang_optimal.distill.push import Labels, hub_id, push
from sglang_optimal.distill.records import Record, sha256
from sglang_optimal.distill.store import RecordStore, find_shards, read_rows
from sglang_optimal.names import SERIES

READ = [{"role": "user", "content": "3 + 4?"}]


def run_of(
    folder: Path,
    *,
    accepted=3,
    rejected=2,
    models=None,
    format="parquet",
    shard=(0, 1),
    seal=True,
    text=None,
    **manifest,
):
    """With a server's own folders in settings and records, as `distill run` would leave them."""
    home = folder.parent / "home"
    (home / "student").mkdir(parents=True, exist_ok=True)
    models = models or {"teacher_model": str(home / "teacher"), "student_model": str(home / "student")}
    store = RecordStore(folder, shard, format=format, shard_records=2)
    for i in range(accepted + rejected):
        good = i < accepted
        store.append(
            Record(
                f"p{shard[0]}{i}/s/0", f"p{shard[0]}{i}", "s", 0, {"problem": "3 + 4?"}, READ, READ,
                text or f"sì {i}", [20], "stop", accepted=good, rejected_by=None if good else "answer",
                models=models, student_prompt_ids=[1],
                reject_reason=None if good else "wrong", **{name: [0.5] for name in SERIES},
            )
        )  # fmt: skip
    if seal:
        store.finalize()
    config = {
        "data": {"path": str(home / "problems.jsonl"), "split": "train"},
        "contexts": {"student": "/no_think {problem}"},
        "filters": [{"type": "function", "function": "mine:keep", "arguments": {"table": str(home / "t.csv")}}],
        "mixing": {"student_model_path": str(home / "student")},
        "server": {"model_path": str(home / "teacher"), "json": {"draft": str(home / "draft")}},
        "client": {"endpoints": ["http://machine:1"]},
        "output": {"dir": str(folder), "format": format},
    }
    store.write_json(
        store.manifest_path, {"state": "complete", "run_id": sha256(str(folder)), "config": config, **manifest}
    )
    store.close()
    return folder


def header(folder: Path) -> dict:
    return yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])


def everything(folder: Path) -> str:
    """All that its files say, the columns of the records among it."""
    texts = [path.read_text() for path in folder.rglob("*") if path.suffix in (".md", ".json", ".html")]
    tables = [str(parquet.read_table(path).to_pylist()) for path in folder.rglob("*.parquet")]
    return "\n".join([*texts, *tables])


@pytest.mark.parametrize("format", ["parquet", "jsonl"])
def test_to_a_folder(tmp_path, format, capsys):
    run = run_of(tmp_path / "run", format=format)
    argv = [
        "push",
        str(run),
        "--to",
        str(tmp_path / "hub" / "my-sums"),
        "--license",
        "cc-by-4.0",
        "--language",
        "it",
        "en",
    ]
    assert main([*argv, "--teacher", "Qwen/Qwen3-8B"]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/hub/my-sums (a folder of this machine): 5 records\n"
    made = tmp_path / "hub" / "my-sums"
    assert sorted(str(path.relative_to(made)) for path in made.rglob("*") if path.is_file()) == [
        "README.md", "data/accepted-00000.parquet", "data/accepted-00001.parquet", "rejected/rejected-00000.parquet",
        "run.json",
    ]  # fmt: skip
    assert [path.name for path in made.parent.iterdir()] == ["my-sums"]
    told = header(made)
    assert {key: told[key] for key in told if key not in ("configs", "tags")} == {
        "pretty_name": "my-sums", "license": "cc-by-4.0", "language": ["it", "en"],
        "task_categories": ["text-generation"], "size_categories": ["n<1K"], "base_model": ["Qwen/Qwen3-8B"],
    }  # fmt: skip
    card = DatasetCard.load(made / "README.md")
    assert card.data.license == "cc-by-4.0" and "# my-sums\n\nLicense: cc-by-4.0. Language: it, en.\n" in card.text
    assert "| teacher, student | Qwen/Qwen3-8B, student |" in card.text
    accepted = datasets.load_dataset(str(made), split="train")
    rejected = datasets.load_dataset(str(made), "rejected", split="train")
    assert accepted["text"][:] == ["sì 0", "sì 1", "sì 2"] and rejected["reject_reason"][:] == ["wrong"] * 2
    assert set(accepted["teacher_model"]) == {"Qwen/Qwen3-8B"} and set(accepted["student_model"]) == {"student"}
    assert str(tmp_path) not in everything(made) and "machine" not in everything(made)
    config = json.loads((made / "run.json").read_text())["config"]
    assert config["contexts"]["student"] == "/no_think {problem}"
    assert config["data"]["path"] == "problems.jsonl" and config["filters"][0]["arguments"] == {"table": "t.csv"}
    before = [row["teacher_model"] for row in read_rows(find_shards(run, "accepted"))]
    assert before == [str(tmp_path / "home" / "teacher")] * 3  # the run itself is as it was


def test_nothing_is_invented(tmp_path, capsys):
    run = run_of(tmp_path / "run")
    assert main(["push", str(run), "--to", str(tmp_path / "out"), "--title", "Sums: 1, 2"]) == 0
    said = capsys.readouterr().out
    assert "no license is given, and the card says so" in said and "no language is given" in said
    told = header(tmp_path / "out")
    assert not {"license", "language", "base_model"} & set(told) and told["pretty_name"] == "Sums: 1, 2"
    assert "License: none given. Language: none given." in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"), ("gpt2", "gpt2"), ("/srv/m/Qwen3", "Qwen3"), ("~/m/Qwen3/", "Qwen3"),
        ("./Qwen3", "Qwen3"), ("../m/Qwen3", "Qwen3"), ("a/b/Qwen3", "Qwen3"), ("C:\\m\\Qwen3", "Qwen3"),
        ("models/mine", "mine"),
    ],
)  # fmt: skip
def test_names_of_models(tmp_path, name, shown):
    (tmp_path / "models" / "mine").mkdir(parents=True)  # beside the run, wherever one is now
    models = {"teacher_model": name, "student_model": name}
    push(run_of(tmp_path / "run", models=models), str(tmp_path / "out"))
    (first, *_) = datasets.load_dataset(str(tmp_path / "out"), split="train")
    assert first["teacher_model"] == first["student_model"] == shown
    assert header(tmp_path / "out").get("base_model") == ([name] if "Qwen/" in shown else None)


def test_of_two_machines_stopped_killed_and_without_rejected(tmp_path):
    run = tmp_path / "run"
    run_of(run, shard=(0, 2))
    run_of(run, shard=(1, 2), accepted=4, rejected=1, state="running", seal=False)  # killed: its journal is there
    assert list((run / "journal").iterdir())
    done = push(run, str(tmp_path / "out"), Labels("mit", ("en",)), rejected=False)
    assert (done.records, done.remarks) == (7, ("the run is not complete",))
    assert len(datasets.load_dataset(str(tmp_path / "out"), split="train")) == 7
    assert not (tmp_path / "out" / "rejected").exists() and (tmp_path / "out" / "run-1-of-2.json").exists()
    assert "| accepted records | 7 |" in (tmp_path / "out" / "README.md").read_text()


def test_of_a_run_with_nothing_accepted(tmp_path):
    run = run_of(tmp_path / "run", accepted=0)
    push(run, str(tmp_path / "out"))
    with pytest.raises(ValueError, match="corresponds to no data"):
        datasets.load_dataset(str(tmp_path / "out"), split="train")
    assert len(datasets.load_dataset(str(tmp_path / "out"), "rejected", split="train")) == 2
    with pytest.raises(ValueError, match="the run has no accepted records"):
        push(run, str(tmp_path / "other"), rejected=False)
    assert not (tmp_path / "other").exists()


def test_with_its_report(tmp_path):
    """With the student's tokenizer where it is that of the samples."""
    build_small_tokenizer(tmp_path / "home" / "student")
    text = AutoTokenizer.from_pretrained(tmp_path / "home" / "student").decode([20])
    for name, said in (("sums", text), ("others", "sì")):
        push(run_of(tmp_path / name, text=said), str(tmp_path / "out" / name), report=True)
        report = (tmp_path / "out" / name / "report.html").read_text()
        assert name in report and str(tmp_path) not in everything(tmp_path / "out")


@pytest.mark.parametrize(
    ("count", "size"), [(999, "n<1K"), (1000, "1K<n<10K"), (10**6, "1M<n<10M"), (10**12, "n>1T"), (10**11, "100B<n<1T")]
)
def test_sizes(count, size):
    assert module._size(count) == size


def test_where_to(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    assert hub_id("me/sums") == hub_id("hf://datasets/me/sums") == "me/sums" == hub_id("me/sums")
    assert hub_id("hf://datasets/out/sums") == "out/sums"
    assert [hub_id(to) for to in ("sums", "out/sums", "./me/sums", "/me/sums", "~/sums", "a/b/c", "me/sums/")] == [
        None
    ] * 7
    with pytest.raises(ValueError, match="^--to: 'hf://me/sums' is no dataset's address"):
        hub_id("hf://me/sums")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--license", "Apache 2.0"], "--license: 'Apache 2.0' is no id of the hub's; write it as apache-2.0."),
        (["--language", "en", "English"], "--language: 'English' is no id"),
        (["--teacher", "/home/me/Qwen3"], "--teacher: '/home/me/Qwen3' is no id"),
        (["--task", "Text Generation"], "--task: 'Text Generation' is no id"),
    ],
)
def test_wrong_labels(tmp_path, argv, message, capsys):
    assert main(["push", str(run_of(tmp_path / "run")), "--to", str(tmp_path / "out"), *argv]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_where_nothing_is_overwritten(tmp_path):
    run = run_of(tmp_path / "run")
    (tmp_path / "out" / ".git").mkdir(parents=True)
    push(run, str(tmp_path / "out"))
    assert (tmp_path / "out" / ".git").exists()
    for to, message in (
        ("out", "has 'README.md' in it"),
        ("run", "in it; give a new folder"),
        ("run/run.json", "is a file"),
    ):
        with pytest.raises(ValueError, match=f"^--to: .*{message}"):
            push(run, str(tmp_path / to))
    store = RecordStore(run)
    store.write_json(store.manifest_path, {"state": "running"})
    with pytest.raises(ValueError, match="the run is being written"):
        push(run, str(tmp_path / "new"))
    store.close()
    with pytest.raises(ValueError, match="has no run in it"):
        push(tmp_path, str(tmp_path / "new"))


class Hub:
    """What a hub would be told. public: of a repository that is there."""

    def __init__(self, public: bool | None = None):
        self.public, self.created, self.sent = public, None, None

    def create_repo(self, name, *, repo_type, private, exist_ok):
        assert repo_type == "dataset" and exist_ok
        self.created = name, private
        self.public = not private if self.public is None else self.public

    def repo_info(self, name, *, repo_type):
        return types.SimpleNamespace(private=not self.public)

    def upload_folder(self, *, repo_id, repo_type, folder_path, commit_message, delete_patterns):
        assert repo_type == "dataset" and commit_message and "data/*" in delete_patterns
        made = Path(folder_path)
        self.sent = repo_id, {str(p.relative_to(made)) for p in made.rglob("*") if p.is_file()}, everything(made)


@pytest.mark.parametrize("public", [False, True])
def test_to_the_hub(tmp_path, public, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    hub = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    argv = ["push", str(run_of(tmp_path / "run")), "--to", "me/sums", *(["--public"] if public else [])]
    assert main(argv) == 0
    assert hub.created == ("me/sums", not public)
    name, files, text = hub.sent
    assert name == "me/sums" and {"README.md", "run.json", "data/accepted-00000.parquet"} <= files
    assert "# sums\n" in text and 'load_dataset("me/sums", split="train")' in text and str(tmp_path) not in text
    assert f"me/sums ({'public' if public else 'private'} on the hub): 5 records" in capsys.readouterr().out
    assert not (tmp_path / "me").exists()


def test_a_public_repository_is_not_written_to_unasked(tmp_path):
    run = run_of(tmp_path / "run")
    hub = Hub(public=True)
    with pytest.raises(ValueError, match="^--to: me/sums is there, and public; nothing was sent."):
        push(run, "me/sums", api=hub)
    assert hub.sent is None
    assert push(run, "me/sums", api=hub, public=True).where == "me/sums" and hub.sent is not None


def test_a_hub_that_cannot_be_reached(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(["push", str(run_of(tmp_path / "run")), "--to", "me/sums"]) == 1
    assert "offline" in capsys.readouterr().err.lower()
