"""`distill filter`: a run's samples judged anew, into a run of its own."""

from __future__ import annotations

import json
import math
from pathlib import Path

import datasets
import pytest
import yaml
from made_runs import MINUS_INFINITY, config_of, contents, make_run, manifest_of, record, refused, rows_of
from stub_server import stub_server
from test_run import Folder
from tiny_models import build_small_tokenizer, small_ids

from sglang_optimal.distill.cli import main
from sglang_optimal.distill.manifests import lock_name
from sglang_optimal.distill.records import OPTIONAL_COLUMNS, Record
from sglang_optimal.distill.selection import Select
from sglang_optimal.distill.store import RecordStore, find_shards
from sglang_optimal.distill.stored import all_rows, record_of

VERDICT = ("accepted", "rejected_by", "reject_reason")


@pytest.fixture
def again(tmp_path, capsys):
    """Runs the command: (exit status, the rows or what was said)."""

    def run(folder: Path, values: dict | None = None, *flags: str, out: str = "again"):
        command = ["filter", str(folder), "--out", str(tmp_path / out), "--no-report", *flags]
        if values is not None:
            (tmp_path / "new.yaml").write_text(yaml.safe_dump(values))
            command += ["--config", str(tmp_path / "new.yaml")]
        capsys.readouterr()
        before = contents(folder)
        status = main(command)
        assert contents(folder) == before, "something was written into the run"
        assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
        if status:
            assert not (tmp_path / out).exists() or not any((tmp_path / out).iterdir())
            return status, capsys.readouterr().err
        return status, rows_of(tmp_path / out)

    return run


def accepted(rows: dict) -> set[str]:
    return {name for name, row in rows.items() if row["accepted"]}


def same_but_verdict(rows: dict, others: dict) -> bool:
    def rest(row):
        return {name: value for name, value in row.items() if name not in VERDICT}

    return rows.keys() == others.keys() and all(rest(row) == rest(others[name]) for name, row in rows.items())


MORE = {"series": ["behaviour_logprob", "student_rank"], "return_top_k": 3, "top_k_of": ["student", "mixture"]}


@pytest.mark.parametrize("format", ["parquet", "jsonl"])
@pytest.mark.parametrize("output", [{}, MORE, {"series": False}])
def test_same_filters_same_run(tmp_path, again, format, output):
    """In a run of two machines, with a shard for every 16 records; deduplicate has a memory."""
    folder = Folder(tmp_path)
    folder.configure(
        filters=[{"type": "finish"}, {"type": "answer", "match": "numeric"}, {"type": "deduplicate", "scope": "run"}],
        output={"format": format, "shard_records": 16, **output},
    )
    with stub_server() as stub:
        assert folder.run(stub.url, more=("--shard", "0/2")) == 0
        assert folder.run(stub.url, more=("--shard", "1/2")) == 0
        asked = sum(stub.seen.values())
        status, rows = again(folder.out, yaml.safe_load((folder.root / "run.yaml").read_text()))
        assert sum(stub.seen.values()) == asked
    assert status == 0 and rows == folder.rows() and len(accepted(rows)) > 10
    assert any(row["rejected_by"] == "answer" for row in rows.values())
    optional = set(OPTIONAL_COLUMNS) & set(next(iter(rows.values())))
    assert len(optional) == (16 if output is MORE else 0)
    shards = find_shards(tmp_path / "again", "rejected")
    assert len(shards) > 2 and {path.suffix for path in shards} == {f".{format}"}
    loaded = datasets.load_dataset(str(tmp_path / "again"), split="train")
    assert set(loaded["id"]) == accepted(rows)


def test_other_filters(tmp_path, again):
    records = [record("p", k, tokens=2 + k, accepted=k == 0) for k in range(4)] + [refused("q")]
    run = make_run(tmp_path / "run", records)
    status, rows = again(run, {"filters": [{"type": "length", "name": "three", "min_tokens": 3, "max_tokens": 4}]})
    assert status == 0 and same_but_verdict(rows, rows_of(run))
    assert accepted(rows) == {"p/a/1", "p/a/2"}
    reasons = {name: (row["rejected_by"], row["reject_reason"]) for name, row in rows.items() if not row["accepted"]}
    assert reasons["p/a/0"][0] == reasons["p/a/3"][0] == "three"
    assert reasons["q/a/0"] == ("server", "too long")
    manifest = manifest_of(tmp_path / "again")
    assert (manifest["accepted"], manifest["rejected"], manifest["tokens"]) == (2, 3, 2 + 3 + 4 + 5)
    assert manifest["filters"] == ["three"] and manifest["state"] == "complete" and manifest["planned"] == 5
    assert manifest["filtered"] == {"folder": "run", "run_ids": ["run"]}
    assert "# again" in (tmp_path / "again" / "README.md").read_text()


def test_no_filters_accept_what_was_sampled(tmp_path, again):
    run = make_run(tmp_path / "run", [record("p", 0, accepted=False), refused("p", 1), record("p", 2, text="\ufffd")])
    status, rows = again(run, {"filters": []})
    assert status == 0 and accepted(rows) == {"p/a/0"} and rows["p/a/2"]["rejected_by"] == "characters"


def test_a_run_without_records(tmp_path, again):
    run = make_run(tmp_path / "run", [])
    status, rows = again(run, {"filters": [{"type": "finish"}]})
    assert status == 0 and rows == {} and manifest_of(tmp_path / "again")["accepted"] == 0


def test_journals_of_a_killed_run_are_read(tmp_path, again):
    config = config_of(output={"shard_records": 2})
    run = make_run(tmp_path / "run", [record("p", k) for k in range(5)], config, finish=False)
    assert any((run / "journal").iterdir())
    with next((run / "journal").iterdir()).open("a") as journal:
        journal.write('{"id": "p/a/9", "text": "cut')
    status, rows = again(run, {"filters": [{"type": "length", "min_tokens": 1}]})
    assert status == 0 and len(rows) == 5 and manifest_of(tmp_path / "again")["state"] == "stopped"


def test_a_run_that_goes_on_is_left_alone(tmp_path, again):
    run = make_run(tmp_path / "run", [record()])
    store = RecordStore(run)
    try:
        status, said = again(run, {"filters": []})
    finally:
        store.close()
    assert status == 2 and "a run is writing here" in said
    (run / lock_name("")).unlink(missing_ok=True)  # a copy may lack it
    assert again(run, {"filters": []})[0] == 0


@pytest.mark.parametrize(
    ("filters", "needs"),
    [
        ([{"type": "coverage", "min_mean_logprob": -1}], "filters[0] (coverage): needs student_logprob"),
        ([{"type": "finish", "reasons": ["length"]}, {"type": "kl", "name": "near", "max_mean_to_teacher": 1}],
         "filters[1] (near): needs kl_to_teacher"),
        ([{"type": "function", "function": "reads:mixture"}], "filters[0] (function): needs mixture_logprob"),
        ([{"type": "function", "function": "reads:entropy"}], "filters[0] (function): needs student_entropy"),
        ([{"type": "function", "function": "reads:likely"}], "filters[0] (function): needs top_k of the student"),
    ],
)  # fmt: skip
def test_series_that_were_not_stored(tmp_path, again, monkeypatch, filters, needs):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reads.py").write_text(
        "def mixture(record):\n    return sum(record.mixture_logprob) > -9\n"
        "def entropy(record):\n    return sum(record.more_series['student_entropy']) > 9\n"
        "def likely(record):\n    return record.top_k.get('student') is None\n"
    )
    run = make_run(tmp_path / "run", [record()], config_of(output={"series": False}))
    status, said = again(run, {"filters": filters})
    assert status == 2 and needs in said
    assert ("output.return_top_k" if "top_k" in needs else "output.series") in said


def test_alpha_is_always_stored(tmp_path, again):
    run = make_run(tmp_path / "run", [record(alpha=[0.75, 0.5])], config_of(output={"series": False}))
    assert accepted(again(run, {"filters": [{"type": "alpha", "min_mean": 0.6}]})[1]) == {"p/a/0"}
    assert not accepted(again(run, {"filters": [{"type": "alpha", "min_mean": 0.7}]}, out="b")[1])


def test_no_support_is_minus_infinity_again(tmp_path, again):
    """A log-probability that JSON cannot write comes back as null."""
    run = make_run(
        tmp_path / "run", [record("p", 0, student=[-0.5, MINUS_INFINITY]), record("p", 1, student=[-0.5, -1])]
    )
    rows = rows_of(run)
    assert rows["p/a/0"]["student_logprob"] == [-0.5, None] and rows["p/a/0"]["log_weight_student"] is None
    status, rows = again(run, {"filters": [{"type": "coverage", "floor": 0.1}]})
    assert status == 0 and accepted(rows) == {"p/a/1"} and same_but_verdict(rows, rows_of(run))


def test_records_come_back_as_they_were(tmp_path):
    fields = {"problem": "½ \u202e 7", "answer": 0.1, "list": [1, {"a": None}], "big": 10**30}
    made = record(student=[-0.5, MINUS_INFINITY, -2.0], fields=fields, seed=7, latency=0.5, sampling={"top_p": 0.5})
    (back,) = map(record_of, all_rows(make_run(tmp_path / "run", [made])))
    assert isinstance(back, Record)
    for name in ("id", "fields", "teacher_context", "token_ids", "alpha", "student_logprob", "seed", "sampling"):
        assert getattr(back, name) == getattr(made, name), name
    assert str(back.fields["answer"]) == "0.1" and back.student_logprob[1] == -math.inf


def test_whole_files_and_what_they_must_not_change(tmp_path, again):
    run = make_run(tmp_path / "run", [record()], config_of(sampling={"temperature": 0.5}))
    whole = config_of(sampling={"temperature": 0.5, "n": 9}, client={"concurrency": 3}).model_dump(mode="json")
    assert again(run, whole | {"filters": [{"type": "finish"}]})[0] == 0
    assert manifest_of(tmp_path / "again")["config"]["sampling"]["n"] == 1
    for section, values, names in (
        ("sampling", {"temperature": 0.7}, "sampling.temperature"),
        ("mixing", {"alpha_method": "entropy"}, "mixing.alpha_method"),
        ("contexts", {"student": "{problem}!"}, "contexts.student"),
        ("output", {"return_top_k": 4}, "output.return_top_k"),
    ):
        status, said = again(run, {"filters": [], section: values}, out="b")
        assert status == 2 and f"new.yaml: {names}: other than in" in said
    assert again(run, {"filters": [], "output": {"format": "jsonl", "shard_records": 7}}, out="b")[0] == 0
    assert {path.suffix for path in find_shards(tmp_path / "b", "accepted")} == {".jsonl"}
    status, said = again(run, {"filter": []}, out="c")
    assert status == 2 and "has neither filters nor select" in said
    status, said = again(run, {"filters": [{"type": "lenght"}]}, out="c")
    assert status == 2 and "unknown filter 'lenght'. Did you mean 'length'?" in said
    status, said = again(run, out="c")
    assert status == 2 and "--config" in said


def test_where_it_may_not_write(tmp_path, again, capsys):
    run = make_run(tmp_path / "run", [record()])
    for out in ("run", "run/again", "run/../run"):
        assert main(["filter", str(run), "--best", "1", "--out", str(tmp_path / out)]) == 2
        assert "which stays as it is" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    assert main(["filter", str(run), "--best", "1", "--out", str(tmp_path / "full")]) == 2
    assert "is not empty" in capsys.readouterr().err and contents(tmp_path / "full") == {"notes.txt": b"mine"}
    (tmp_path / "empty").mkdir()
    assert again(run, None, "--best", "1", out="empty")[0] == 0
    assert main(["filter", str(tmp_path / "nowhere"), "--best", "1", "--out", str(tmp_path / "x")]) == 2
    assert "has no run in it" in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_an_error_leaves_nothing(tmp_path, again):
    """The second record has no number to be ordered by."""
    run = make_run(tmp_path / "run", [record("p", 0), record("p", 1, fields={"answer": "1", "score": "high"})])
    status, said = again(run, {"select": {"by": "reward", "reward": "score"}})
    assert status == 2 and "p/a/0 has neither a column nor a field 'score'" in said
    status, said = again(
        make_run(tmp_path / "b", [record(fields={"score": "high"})]), None, "--by", "reward", "--reward", "score"
    )
    assert status == 2 and "score of p/a/0 must be a number, got 'high'" in said


def test_the_answer_s_probability_is_worked_out_anew(tmp_path, again):
    """The new filters say what the expected answer is. ln 0.25 + ln 0.1 = ln 0.025 of the two digits of 18."""
    tokenizer = str(build_small_tokenizer(tmp_path / "tokenizer"))
    text = "so 12 + 6 = 18"
    logprobs = [math.log(0.5)] * len(text)
    logprobs[-2:] = [math.log(0.25), math.log(0.1)]
    fields = {"problem": "?", "answer": "12", "result": "so it is 18"}
    made = record(student=logprobs, text=text, fields=fields)
    made.token_ids = small_ids(text)
    run = make_run(tmp_path / "run", [made])
    assert rows_of(run)["p/a/0"]["answer_probability"] is None
    surprise = {"type": "surprise", "min_answer_probability": 0.02}
    values = {"filters": [{"type": "answer", "match": "numeric", "field": "result"}, surprise]}
    status, said = again(run, values)
    assert status == 2 and "surprise: min_answer_probability needs a tokenizer" in said
    values["client"] = {"tokenizer": tokenizer}
    for best in ((), ("--best", "1")):
        status, rows = again(run, values, *best, out=f"out{len(best)}")
        assert status == 0 and accepted(rows) == {"p/a/0"}
        assert rows["p/a/0"]["answer_probability"] == pytest.approx(0.025)
    surprise["min_answer_probability"] = 0.03
    assert again(run, values, out="b")[1]["p/a/0"]["reject_reason"] == "a leap to the answer"
    run = make_run(tmp_path / "bare", [made], config_of(output={"series": False}))
    status, said = again(run, values, out="c")
    assert status == 2 and "filters[1] (surprise): needs student_logprob" in said


# -- select --------------------------------------------------------------------------------------------------------


def four() -> list[Record]:
    """Of p: log weights under the student −1, −3, −1 and −1 (the last one rejected); of q one, with none (−inf)."""
    return [
        record("p", 0, student=[-1.0, -1.0], mixture=[-0.5, -0.5]),
        record("p", 1, student=[-2.0], mixture=[1.0]),
        record("p", 2, student=[-1.0, -1.0, 0.0], mixture=[-0.5, -0.5, 0.0]),
        record("p", 3, student=[0.0], mixture=[1.0], accepted=False),
        record("q", 0, student=[MINUS_INFINITY]),
    ]


@pytest.mark.parametrize(
    ("select", "kept"),
    [
        ({}, {"p/a/0", "q/a/0"}),  # p/a/0 and p/a/2 tie
        ({"best": 2}, {"p/a/0", "p/a/2", "q/a/0"}),
        ({"best": 9}, {"p/a/0", "p/a/1", "p/a/2", "q/a/0"}),
        ({"by": "length"}, {"p/a/1", "q/a/0"}),
        ({"by": "reward", "reward": "num_tokens"}, {"p/a/2", "q/a/0"}),
        ({"by": "reward", "reward": "mean_student_logprob"}, {"p/a/2", "q/a/0"}),
        ({"by": "reward", "reward": "scores:index"}, {"p/a/2", "q/a/0"}),
        ({"by": "reward", "reward": "level"}, {"p/a/0", "q/a/0"}),
    ],
)
def test_select(tmp_path, again, monkeypatch, select, kept):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scores.py").write_text("def index(record):\n    return record.sample_index - 10\n")
    records = four()
    for made in records:
        made.fields["level"] = 3
    run = make_run(tmp_path / "run", records)
    status, rows = again(run, {"select": select})
    assert status == 0 and accepted(rows) == kept and same_but_verdict(rows, rows_of(run))
    best, by = select.get("best", 1), select.get("by", "importance_weight").replace("_", " ")
    for name in {"p/a/0", "p/a/1", "p/a/2", "q/a/0"} - kept:
        assert rows[name]["rejected_by"] == "select"
        assert rows[name]["reject_reason"] == f"not among the best {best} of its problem by {by}"
    assert rows["p/a/3"]["rejected_by"] == "answer"


def test_select_among_what_the_new_filters_accept(tmp_path, again):
    run = make_run(tmp_path / "run", four())
    values = {"filters": [{"type": "length", "max_tokens": 2}], "select": {"best": 2, "by": "length"}}
    status, rows = again(run, values)
    # p/a/3 is accepted now; of one token as p/a/1.
    assert status == 0 and accepted(rows) == {"p/a/1", "p/a/3", "q/a/0"}
    flags = ("--best", "1", "--by", "importance_weight")  # over the file's
    assert accepted(again(run, values, *flags, out="b")[1]) == {"p/a/0", "q/a/0"}


def test_resampling_draws_by_weight(tmp_path):
    """Of three samples with weights 1, 2 and 5 under the student, over many problems: 1/8, 2/8 and 5/8 of the time."""
    select = Select(by="importance_resampling")
    score = select.score()
    counts = [0, 0, 0]
    for i in range(4000):
        rows = [({"log_weight_student": math.log(w)}, record(f"p{i}", k)) for k, w in enumerate((1, 2, 5))]
        best = max(rows, key=lambda pair: score(pair[1], pair[0]))[1]
        counts[best.sample_index] += 1
    for count, share in zip(counts, (1 / 8, 2 / 8, 5 / 8), strict=True):
        assert abs(count / 4000 - share) < 4 * math.sqrt(share * (1 - share) / 4000)
    other = Select(by="importance_resampling", seed=1).score()
    assert score(record(), {"log_weight_student": 0.0}) != other(record(), {"log_weight_student": 0.0})
    assert score(record(), {"log_weight_student": None}) == -math.inf


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"select": {"by": "reward"}}, "reward: goes with `by: reward`"),
        ({"select": {"reward": "num_tokens"}}, "reward: goes with `by: reward`"),
        ({"select": {"best": 0}}, "select.best"),
        ({"select": {"by": "luck"}}, "select.by"),
        ({"select": {"top": 1}}, "unknown key 'top'"),
        ({"select": {"by": "reward", "reward": "no_such:thing"}}, "select.reward: cannot import 'no_such:thing'"),
    ],
)
def test_wrong_select(tmp_path, again, values, message):
    status, said = again(make_run(tmp_path / "run", [record()]), values)
    assert status == 2 and message in said


def test_run_refuses_select(tmp_path, capsys):
    folder = Folder(tmp_path)
    folder.configure(select={"best": 1})
    with stub_server() as stub:
        assert folder.run(stub.url) == 2
        assert not stub.seen
    assert "select: is not read by `run`" in capsys.readouterr().err and not folder.out.exists()


# -- and then ------------------------------------------------------------------------------------------------------


def test_goes_on_with_the_new_filters(tmp_path, capsys):
    """It is a run like any other: the same command with its filters draws what is missing, and no more."""
    folder = Folder(tmp_path)
    with stub_server() as stub:
        assert folder.run(stub.url) == 0
        old = folder.rows()
        folder.configure(filters=[{"type": "finish"}])
        assert folder.run(stub.url) == 2
        assert "python -m sglang_optimal.distill filter" in capsys.readouterr().err
        flags = ["--config", str(folder.root / "run.yaml"), "--out", str(tmp_path / "again"), "--no-report"]
        assert main(["filter", str(folder.out), *flags]) == 0
        folder.out = tmp_path / "again"
        assert folder.run(stub.url, more=("--n", "4")) == 0
        assert set(stub.seen.values()) == {1}
        rows = folder.check_complete(n=4)
    assert len(rows) == len(old) * 4 // 3
    assert accepted(rows) == {name for name, row in rows.items() if row["finish_reason"] == "stop"}
    assert main(["filter", str(folder.out), "--best", "1", "--out", str(tmp_path / "best"), "--no-report"]) == 0
    folder.out = tmp_path / "best"
    assert folder.run("http://127.0.0.1:9", more=("--n", "5")) == 2
    assert "holds what `distill filter` selected" in capsys.readouterr().err


def test_report_export_and_filter_of_it(tmp_path, again):
    run = make_run(tmp_path / "run", four())
    assert main(["filter", str(run), "--best", "1", "--out", str(tmp_path / "best")]) == 0
    assert "not among the best 1" in (tmp_path / "best" / "report.html").read_text()
    out = tmp_path / "text.jsonl"
    assert main(["export", str(tmp_path / "best"), "--output", str(out), "--format", "records"]) == 0
    assert {json.loads(line)["id"] for line in out.read_text().splitlines()} == {"p/a/0", "q/a/0"}
    # What was not selected is no worse an answer: not for preferences.
    pairs = tmp_path / "pairs.jsonl"
    flags = ["--output", str(pairs), "--format", "trl-dpo", "--no-check"]
    assert main(["export", str(tmp_path / "best"), *flags]) == 0
    (pair,) = [json.loads(line) for line in pairs.read_text().splitlines()]
    assert (pair["chosen"][0]["content"], pair["rejected"][0]["content"]) == ("p 0: 1", "p 3: 1")
    status, rows = again(tmp_path / "best", {"filters": []}, out="all")
    assert status == 0 and len(accepted(rows)) == 5 and manifest_of(tmp_path / "all")["config"]["select"] is None
