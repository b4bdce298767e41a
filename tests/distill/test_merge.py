"""`distill merge`: the records of several runs in one."""

from __future__ import annotations

import datasets
import pytest
import yaml
from made_runs import config_of, contents, make_run, manifest_of, record, refused, rows_of
from stub_server import stub_server
from test_run import Folder

from sglang_optimal.distill.cli import main
from sglang_optimal.distill.store import find_shards


@pytest.fixture
def merged(tmp_path, capsys):
    def merge(*folders, out: str = "all", report: bool = False):
        before = [contents(folder) for folder in folders]
        flags = [] if report else ["--no-report"]
        capsys.readouterr()
        status = main(["merge", *map(str, folders), "--out", str(tmp_path / out), *flags])
        assert [contents(folder) for folder in folders] == before
        if status:
            assert not (tmp_path / out).exists()
            return status, capsys.readouterr().err
        return status, rows_of(tmp_path / out)

    return merge


def test_shards_with_folders_of_their_own_become_the_run(tmp_path, merged, capsys):
    """As if one machine had done it: the same command adds to it, and draws what is missing alone."""
    folder = Folder(tmp_path)
    with stub_server() as stub:
        for i in range(2):
            out = ("--out", str(tmp_path / f"shard-{i}"))
            assert folder.run(stub.url, more=("--shard", f"{i}/2", *out)) == 0
        status, rows = merged(tmp_path / "shard-0", tmp_path / "shard-1", out="out")
        assert status == 0 and rows == folder.check_complete()
        assert "sources" not in manifest_of(folder.out)
        assert folder.run(stub.url, more=("--n", "4")) == 0
        assert set(stub.seen.values()) == {1}
        folder.check_complete(n=4)


def test_different_settings_are_kept_and_not_gone_on_with(tmp_path, merged, capsys):
    a = make_run(tmp_path / "a", [record("p", k) for k in range(3)], config_of(mixing={"alpha_method": "kl_symmetry"}))
    config = config_of(
        contexts={"student": "{problem}", "strategies": [{"name": "b", "teacher": "{answer}"}]},
        mixing={"alpha_method": "fixed", "fixed_alpha": 0.75}, output={"format": "jsonl", "series": False},
    )  # fmt: skip
    models = {"teacher_model": "T2", "student_model": "S", "student_weight_version": "v2"}
    b = make_run(tmp_path / "b", [record("p", 0, strategy="b", models=models), refused("q", strategy="b")], config)
    status, rows = merged(a, b, report=True)
    assert status == 0 and rows == rows_of(a) | rows_of(b)
    assert rows["p/b/0"]["teacher_model"] == "T2" and rows["p/b/0"]["student_logprob"] == []
    manifest = manifest_of(tmp_path / "all")
    assert [source["folder"] for source in manifest["sources"]] == ["a", "b"]
    assert manifest["sources"][1]["config"]["mixing"]["fixed_alpha"] == 0.75
    assert "alpha_method" not in manifest["config"]["mixing"] and manifest["config"]["sampling"]["n"] == 1
    assert (manifest["planned"], manifest["accepted"], manifest["rejected"], manifest["tokens"]) == (5, 4, 1, 8)
    page = (tmp_path / "all" / "report.html").read_text()
    assert "differs between the runs that were merged" in page
    assert "have different settings of α" in page
    card = (tmp_path / "all" / "README.md").read_text()
    assert "| teacher, student | T2, S |" in card and "| teacher, student | T, S |" in card
    assert len(datasets.load_dataset(str(tmp_path / "all"), split="train")) == 4
    folder = Folder(tmp_path)
    folder.out = tmp_path / "all"
    assert folder.run("http://127.0.0.1:9") == 2
    assert "runs of different settings that were merged" in capsys.readouterr().err
    # And merged and filtered again, it still says where each came from.
    c = make_run(tmp_path / "c", [record("r", strategy="c")], config_of(sampling={"temperature": 0.5}))
    assert merged(tmp_path / "all", c, out="more")[0] == 0
    assert [s["folder"] for s in manifest_of(tmp_path / "more")["sources"]] == ["a", "b", "c"]
    (tmp_path / "new.yaml").write_text(yaml.safe_dump({"filters": [{"type": "length", "max_tokens": 1}]}))
    flags = ["--config", str(tmp_path / "new.yaml"), "--out", str(tmp_path / "none"), "--no-report"]
    assert main(["filter", str(tmp_path / "more"), *flags]) == 0
    assert not any(row["accepted"] for row in rows_of(tmp_path / "none").values())
    assert [s["folder"] for s in manifest_of(tmp_path / "none")["sources"]] == ["a", "b", "c"]
    (tmp_path / "new.yaml").write_text(yaml.safe_dump({"filters": [], "mixing": {"alpha_method": "fixed"}}))
    flags[3] = str(tmp_path / "none2")
    assert main(["filter", str(tmp_path / "more"), *flags]) == 2
    assert "mixing: " in capsys.readouterr().err
    assert main(["filter", str(tmp_path / "more"), "--best", "1", "--out", str(tmp_path / "best"), "--no-report"]) == 0
    assert {name for name, row in rows_of(tmp_path / "best").items() if row["accepted"]} == {"p/a/0", "r/c/0"}


@pytest.mark.parametrize("format", ["parquet", "jsonl"])
def test_the_same_record_once(tmp_path, merged, capsys, format):
    """A copy that went on; in whichever format, with numbers that float32 rounds."""
    records = [record("p", k, student=[-0.1 * (k + 1), -1 / 3], latency=0.25 + k) for k in range(4)]
    a = make_run(tmp_path / "a", records[:3])
    records[0].latency = 9.0
    b = make_run(tmp_path / "b", records, config_of(output={"format": format}))
    status, rows = merged(a, b)
    assert status == 0 and set(rows) == {f"p/a/{k}" for k in range(4)}
    assert rows["p/a/0"]["latency"] == 0.25  # the first one's
    assert manifest_of(tmp_path / "all")["planned"] == 4
    assert main(["merge", str(a), str(b), "--out", str(tmp_path / "again"), "--no-report"]) == 0
    assert "3 records were in several runs, and are there once" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"text": "another"}, "record 'p/a/0' of {b} is another than in {a} (text)"),
        ({"accepted": False}, "(accepted, rejected_by, reject_reason)"),
        ({"student": [-1.0, -1.5]}, "(student_logprob, mean_student_logprob, log_weight_student)"),
        ({"models": {"student_model": "S2", "teacher_model": "T"}}, "(student_model)"),
        ({"fields": {"problem": "Another?", "answer": "1"}}, "problem 'p' of {b} has other fields than in {a}"),
        ({"fields": {"problem": "Another?"}, "strategy": "b"}, "problem 'p' of {b} has other fields than in {a}"),
    ],
)
def test_another_record_of_one_id(tmp_path, merged, more, said):
    a, b = make_run(tmp_path / "a", [record()]), make_run(tmp_path / "b", [record("o"), record(**more)])
    status, error = merged(a, b)
    assert status == 2 and said.format(a=a, b=b) in error


def test_what_cannot_be_merged(tmp_path, merged, capsys):
    a, b = make_run(tmp_path / "a", [record()]), make_run(tmp_path / "b", [record("o")])
    for folders in ((a,), (a, a), (a, b, tmp_path / "a" / ".." / "b")):
        status, error = merged(*folders)
        assert status == 2 and "two or more runs, each once" in error
    assert main(["merge", str(a), str(b), "--out", str(b / "c")]) == 2
    assert "which stays as it is" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["merge", str(a), str(tmp_path / "empty"), "--out", str(tmp_path / "c")]) == 2
    assert "has no run in it" in capsys.readouterr().err


def test_runs_without_records_or_not_whole(tmp_path, merged):
    a = make_run(tmp_path / "a", [record()], planned=7, state="stopped", finish=False)
    b = make_run(tmp_path / "b", [], config_of(sampling={"top_p": 0.5}), planned=2)
    status, rows = merged(a, b)
    manifest = manifest_of(tmp_path / "all")
    assert status == 0 and set(rows) == {"p/a/0"} and manifest["planned"] == 9 and manifest["state"] == "stopped"
    assert merged(b, make_run(tmp_path / "c", []), out="nothing")[1] == {}
    assert not find_shards(tmp_path / "nothing", "rejected")
