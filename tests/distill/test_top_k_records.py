"""Runs that ask for more series and for the most likely tokens: asked, checked, stored, resumed, read and exported."""

from __future__ import annotations

import hashlib
import json
import time

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from stub_server import stub_answer, stub_server
from test_export import read
from test_run import Folder
from test_store import record

from sglang_optimal import decode_top_k
from sglang_optimal.distill.cli import main
from sglang_optimal.distill.config import load_config
from sglang_optimal.distill.export import FORMATS, export
from sglang_optimal.distill.pipeline import fingerprint, seed_of
from sglang_optimal.distill.records import COLUMNS, OPTIONAL_COLUMNS, has_top_k
from sglang_optimal.distill.report import write_report
from sglang_optimal.distill.store import RecordStore, find_shards, read_rows
from sglang_optimal.names import MORE_SERIES, SERIES, SIDES
from sglang_optimal.top_k import encoded
from sglang_optimal.train import Objective, RecordCollator

K = 4
OUTPUT = {"shard_records": 16, "series": ["student_rank", "behaviour_logprob"], "return_top_k": K}
TOP_K = [name for name in OPTIONAL_COLUMNS if name.startswith(("top_k_teacher", "top_k_student"))]
ASKED = ["student_rank", "behaviour_logprob", *TOP_K]
"""The columns that runs with `OUTPUT` have beside the others."""

pytestmark = pytest.mark.usefixtures("impatient")


@pytest.fixture
def folder(tmp_path):
    made = Folder(tmp_path)
    made.configure(output=OUTPUT)
    return made


def expected(name: str) -> dict[str, list]:
    """The columns that were asked for of the record ``name``, from what the stub sends as lists."""
    fields = {"return_mixing_info": list(MORE_SERIES), "return_top_k": K, "top_k_of": list(SIDES)}
    body = {"sampling_params": {"sampling_seed": seed_of(0, name)}, "session_params": {"mixing": fields}}
    meta = stub_answer(body)["meta_info"]
    top_k = {
        f"top_k_{side}_{array}": values for side, arrays in meta["top_k"].items() for array, values in arrays.items()
    }
    return {**{name: meta[name] for name in MORE_SERIES}, **top_k}


def check(rows: dict[str, dict], asked: list[str] = ASKED) -> None:
    for name, row in rows.items():
        assert [column for column in OPTIONAL_COLUMNS if column in row] == asked
        should = expected(name)
        for column in asked:
            assert len(row[column]) == row["num_tokens"]
            assert list(map(np.shape, row[column])) == list(map(np.shape, should[column])), column
            values, others = (np.concatenate(list(map(np.atleast_1d, side[column]))) for side in (row, should))
            np.testing.assert_allclose(values, others, rtol=1e-6)


def test_the_columns_are_all_documented():
    arrays = decode_top_k(stub_answer(body_of("a/b/0"))["meta_info"]["top_k"])
    names = {f"top_k_{side}_{name}" for side, each in arrays.items() for name in each}
    assert set(OPTIONAL_COLUMNS) == {*MORE_SERIES, *names} and all(OPTIONAL_COLUMNS.values())
    assert not set(OPTIONAL_COLUMNS) & set(COLUMNS)


def body_of(name: str) -> dict:
    fields = {"return_top_k": K, "top_k_of": list(SIDES), "top_k_format": "base64"}
    return {"sampling_params": {"sampling_seed": seed_of(0, name)}, "session_params": {"mixing": fields}}


@pytest.mark.parametrize("format", ["parquet", "jsonl"])
def test_complete(folder, stub, format):
    folder.configure(output={**OUTPUT, "format": format})
    assert folder.run(stub.url) == 0
    rows = folder.check_complete()
    check(rows)
    assert {len(inner) for row in rows.values() for inner in row["top_k_teacher_ids"]} == {2, K}
    fields = stub.bodies[0]["session_params"]["mixing"]
    assert fields["return_mixing_info"] == [*SERIES, "student_rank", "behaviour_logprob"]
    assert (fields["return_top_k"], fields["top_k_format"]) == (K, "base64") and "top_k_of" not in fields
    assert "top_k" not in stub.bodies[0]["sampling_params"]
    sampling = json.loads(next(iter(rows.values()))["sampling"])
    assert sampling["return_top_k"] == K and "top_k_format" not in sampling and "top_k" not in sampling

    for name, accepted in ((None, True), ("rejected", False)):
        loaded = datasets.load_dataset(str(folder.out), name, split="train")
        check({row["id"]: row for row in loaded})
        assert set(loaded["id"]) == {row["id"] for row in rows.values() if row["accepted"] is accepted}
    card = (folder.out / "README.md").read_text()
    assert [name for name in OPTIONAL_COLUMNS if f"| `{name}` |" in card] == ASKED and "dataset_info" not in card
    assert "<svg" in write_report(folder.out).read_text()


def test_types(folder, stub):
    folder.configure(output={**OUTPUT, "series": list(MORE_SERIES), "top_k_of": ["mixture", "teacher"]})
    assert folder.run(stub.url, more=("--limit", "8")) == 0
    assert stub.bodies[0]["session_params"]["mixing"]["top_k_of"] == ["teacher", "mixture"]
    mixture = [name for name in OPTIONAL_COLUMNS if name.startswith(("top_k_teacher", "top_k_mixture"))]
    check(folder.rows(), [*MORE_SERIES, *mixture])
    shard = find_shards(folder.out, "accepted")[0]
    columns = parquet.read_schema(shard)
    assert columns.names == [*COLUMNS, *MORE_SERIES, *mixture]
    assert columns.field("teacher_rank").type == pa.list_(pa.int32())
    assert columns.field("ess_student").type == pa.list_(pa.float32())
    assert columns.field("top_k_mixture_ids").type == pa.list_(pa.list_(pa.int32()))
    assert columns.field("top_k_mixture_teacher_logprobs").type == pa.list_(pa.list_(pa.float32()))
    assert columns.field("top_k_mixture_student_tail").type == pa.list_(pa.float32())
    # Exactly what came: the journal holds the bytes, not numbers in digits.
    row = next(read_rows([shard]))
    sent = decode_top_k(stub_answer(body_of(row["id"]))["meta_info"]["top_k"])["mixture"]["teacher_logprobs"]
    stored = np.array(row["top_k_mixture_teacher_logprobs"][0], np.float32)
    assert stored.tobytes() == sent[0].tobytes()


def test_without_the_seven(folder, stub):
    """``series: false`` with most likely tokens."""
    folder.configure(output={**OUTPUT, "series": False})
    assert folder.run(stub.url, more=("--limit", "4")) == 0
    rows = folder.rows()
    check(rows, TOP_K)
    assert all(row["teacher_logprob"] == [] and row["alpha"] for row in rows.values())
    assert stub.bodies[0]["session_params"]["mixing"]["return_mixing_info"] is True


def test_resumed(folder, capsys):
    """A server that dies, then other settings, then the same command."""
    folder.configure(output=OUTPUT, client={"concurrency": 4, "max_downtime": 0.2, "retries": 3, "timeout": 20})
    with stub_server() as stub:
        stub.dies_after = 41
        assert folder.run(stub.url) == 1
    there = folder.rows()
    assert 30 < len(there) < 45
    check(there)
    assert len(datasets.load_dataset(str(folder.out), split="train")) == sum(r["accepted"] for r in there.values())
    with stub_server() as stub:
        folder.configure()
        assert folder.run(stub.url) == 2
        error = capsys.readouterr().err
        assert "other settings (output.series, output.return_top_k)" in error and not stub.seen
        folder.configure(output=OUTPUT)
        assert folder.run(stub.url) == 0
        assert sum(stub.seen.values()) == len(folder.rows()) - len(there)
    check(folder.check_complete())


def test_killed(folder, stub):
    stub.delay = 0.05
    process = folder.process(stub.url)
    while sum(stub.seen.values()) < 60 and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()
    journals = list((folder.out / "journal").glob("*.jsonl"))
    assert journals and len(folder.rows()) > 20
    check(folder.rows())
    stub.delay = 0
    assert folder.run(stub.url) == 0
    check(folder.check_complete())


def test_a_run_of_before(folder, stub, capsys):
    """What did not ask is the run that it was, by its fingerprint too, so that it can be resumed."""
    folder.configure()
    config = load_config(folder.root / "run.yaml")
    values = config.model_dump(mode="json", exclude={"client": True, "server": True})
    values["data"].pop("limit"), values["sampling"].pop("n")
    for name in ("dir", "shard_records", "return_top_k", "top_k_of"):
        values["output"].pop(name)
    for side in ("teacher", "student"):
        values["contexts"].pop(f"{side}_chat_template_kwargs"), values["mixing"].pop(f"{side}_chat_template")
    values.pop("select"), values.pop("escalate"), values["sampling"].pop("one_model")
    assert fingerprint(config) == hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
    assert folder.run(stub.url, more=("--limit", "4")) == 0
    manifest = json.loads((folder.out / "run.json").read_text())
    for name in ("return_top_k", "top_k_of"):
        del manifest["config"]["output"][name]
    for side in ("teacher", "student"):
        del manifest["config"]["contexts"][f"{side}_chat_template_kwargs"]
        del manifest["config"]["mixing"][f"{side}_chat_template"]
    (folder.out / "run.json").write_text(json.dumps(manifest))
    folder.configure(sampling={"n": 3, "max_new_tokens": 17})
    assert folder.run(stub.url) == 2
    assert "other settings (sampling.max_new_tokens);" in capsys.readouterr().err
    folder.configure()
    assert folder.run(stub.url) == 0
    assert all(list(row) == list(COLUMNS) for row in folder.check_complete().values())


def test_one_meaning_is_one_run(folder, stub):
    """The order of names, and names of the seven, say nothing."""
    assert folder.run(stub.url, more=("--limit", "2")) == 0
    folder.configure(output={**OUTPUT, "series": ["behaviour_logprob", "alpha", "student_rank", "student_rank"]})
    assert folder.run(stub.url, more=("--limit", "2")) == 0


def test_journals_are_sealed_with_the_columns_that_they_have(tmp_path, monkeypatch):
    """Whoever opens the folder: the settings of a run are compared after its journals were finished."""
    arrays = decode_top_k(stub_answer(body_of("a/b/0"))["meta_info"]["top_k"])
    store = RecordStore(tmp_path, shard_records=2)
    monkeypatch.setattr(store, "_seal", lambda kind, journal: None)
    for i in range(4):
        store.append(record(i, more_series={"teacher_rank": [1.0, 2.0]}, top_k=arrays))
    store.close()
    RecordStore(tmp_path).close()
    (tmp_path / "run.json").touch()
    paths = find_shards(tmp_path, "accepted")
    assert [path.suffix for path in paths].count(".parquet") == 1
    rows = list(read_rows(paths))
    assert len(rows) == 4 and all(row["teacher_rank"] == [1, 2] for row in rows)
    assert all(row["top_k_teacher_ids"] == rows[0]["top_k_teacher_ids"] != [] for row in rows)


def without(*path: str):
    def change(meta):
        for name in path[:-1]:
            meta = meta[name]
        del meta[path[-1]]

    return change


def put(value, *path: str):
    def change(meta):
        for name in path[:-1]:
            meta = meta[name]
        meta[path[-1]] = value

    return change


def one_token_short(meta):
    sides = decode_top_k(meta["top_k"])
    meta["top_k"] = {
        side: {name: encoded(name, array[1:]) for name, array in arrays.items()} for side, arrays in sides.items()
    }


@pytest.mark.parametrize(
    ("change", "missing"),
    [
        (one_token_short, "top_k of the teacher"),
        (without("behaviour_logprob"), "behaviour_logprob"),
        (put([-1.0], "student_rank"), "student_rank"),
        (without("top_k"), "top_k of the teacher"),
        (put({}, "top_k"), "top_k of the teacher"),
        (put([1], "top_k"), "top_k of the teacher"),
        (without("top_k", "student"), "top_k of the student"),
        (without("top_k", "student", "mixture_tail"), "top_k of the student"),
        (put([[1, 2]], "top_k", "student", "ids"), "top_k of the student"),
        (put({"dtype": "<f4", "shape": [1, 2], "base64": "AAAA"}, "top_k", "teacher", "ids"), "top_k of the teacher"),
        (put({"dtype": "<f4", "shape": [1, 2], "base64": "!"}, "top_k", "teacher", "ids"), "top_k of the teacher"),
    ],
)
def test_answers_without_what_was_asked(folder, stub, change, missing, capsys):
    def behave(body):
        answer = stub_answer(body)
        change(answer["meta_info"])
        return 200, answer

    stub.behave = behave
    assert folder.run(stub.url) == 1
    assert f"answers without {missing} for every token; is it a server that mixes, of" in capsys.readouterr().err
    assert not folder.rows()


def test_requests_that_are_refused(folder, stub):
    """Their records have the columns, without a value."""

    def behave(body):
        text = body["session_params"]["mixing"]["student_messages"][0]["content"]
        return (400, {"error": "too long"}) if text.startswith("7 ") else ...

    stub.behave = behave
    assert folder.run(stub.url) == 0
    rows = folder.rows()
    refused = {name: row for name, row in rows.items() if row["rejected_by"] == "server"}
    assert len(refused) == 3 and all(row[column] == [] for row in refused.values() for column in ASKED)
    check({name: row for name, row in rows.items() if name not in refused})
    assert len(datasets.load_dataset(str(folder.out), "rejected", split="train")) > 3


def test_filters_see_them(folder, stub, monkeypatch):
    (folder.root / "my_top_k_filter.py").write_text(
        "def keep(record):\n"
        "    ids = record.top_k['teacher']['ids']\n"
        "    return ids.shape == (len(record.token_ids), 4) and record.more_series['student_rank'][0] == 1.0\n"
    )
    folder.configure(output=OUTPUT, filters=[{"type": "function", "function": "my_top_k_filter:keep"}])
    monkeypatch.syspath_prepend(str(folder.root))
    assert folder.run(stub.url, more=("--limit", "3")) == 0
    assert all(row["accepted"] for row in folder.rows().values())


@pytest.mark.parametrize("with_them", [0, 1])
@pytest.mark.parametrize("format", ["parquet", "jsonl"])
def test_parts_with_and_without(folder, stub, with_them, format):
    """Two machines' parts of one folder; datasets would take the columns of the first for all."""
    for part in (0, 1):
        folder.configure(output={**(OUTPUT if part == with_them else {}), "shard_records": 16, "format": format})
        assert folder.run(stub.url, more=("--shard", f"{part}/2")) == 0
    rows = folder.rows()
    asked = {name: row for name, row in rows.items() if row.get("top_k_teacher_ids") is not None}
    assert 0 < len(asked) < len(rows) == 120
    check(asked)
    for name, accepted in ((None, True), ("rejected", False)):
        loaded = {row["id"]: row for row in datasets.load_dataset(str(folder.out), name, split="train")}
        assert set(loaded) == {row["id"] for row in rows.values() if row["accepted"] is accepted}
        check({i: row for i, row in loaded.items() if i in asked})
        assert all(row[column] is None for i, row in loaded.items() if i not in asked for column in ASKED)
    output = folder.root / "all.parquet"
    export(folder.out, output, "records")
    assert sum(row["top_k_teacher_ids"] is not None for row in read(output)) == sum(
        row["accepted"] for row in asked.values()
    )
    assert write_report(folder.out).exists()


def test_nothing_accepted(folder, stub):
    folder.configure(output=OUTPUT, filters=[{"type": "length", "min_tokens": 10**6}])
    assert folder.run(stub.url, more=("--limit", "4")) == 0
    (empty,) = (folder.out / "data").glob("*.parquet")
    assert parquet.read_schema(empty).names == [*COLUMNS, *ASKED]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_exported_and_read_back(folder, stub, suffix, monkeypatch):
    assert folder.run(stub.url) == 0
    accepted = {name: row for name, row in folder.rows().items() if row["accepted"]}
    output = folder.root / f"records.{suffix}"
    assert export(folder.out, output, "records").written == len(accepted)
    check({row["id"]: row for row in read(output)})
    columns = ["id", "num_tokens", *ASKED]
    export(folder.out, output, "trl-sft", columns=columns, check=False)
    check({row["id"]: row for row in read(output)})
    # The others read no more than they write.
    seen: list[str] = []
    monkeypatch.setattr(
        "sglang_optimal.distill.export.read_rows",
        lambda paths, names: seen.extend(names) or read_rows(paths, names),
    )
    export(folder.out, output, "sft", check=False)
    assert read(output).column_names == ["messages"] and seen and not has_top_k(seen)
    assert "--columns" in FORMATS["records"]


@pytest.mark.parametrize(
    ("column", "key"), [("top_k_mixture_ids", "return_top_k"), ("teacher_entropy", "series"), ("top_k_teacher", None)]
)
def test_exports_of_what_the_run_has_not(folder, stub, column, key, capsys):
    assert folder.run(stub.url, more=("--limit", "4")) == 0
    output = folder.root / "x.jsonl"
    argv = ["export", str(folder.out), "--output", str(output), "--no-check", "--columns", "id", column]
    assert main(argv) == 2
    said = f"the run has no {column}; it is stored where the run's file asks for it (output.{key})."
    known = "unknown key 'top_k_teacher'. Did you mean 'top_k_teacher_ids'?"
    assert (f"--columns: {said}" if key else f"--columns: {known}") in capsys.readouterr().err
    assert not output.exists()


def test_preview_refuses_what_no_server_would_answer(folder, capsys):
    argv = ["preview", str(folder.root / "run.yaml"), "--data", str(folder.root / "problems.jsonl")]
    assert main(argv) == 0
    folder.configure(output={"return_top_k": 1024}, sampling={"max_new_tokens": 1000})
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert "output.return_top_k: 1024 tokens of 2 sides for each of up to 1000 output tokens are 2048000" in error
    assert "lower return_top_k, top_k_of or max_new_tokens" in error
    folder.configure(output={"return_top_k": 1024, "top_k_of": "teacher"}, sampling={"max_new_tokens": 1000})
    assert main(argv) == 0


def test_a_trainer_reads_them(folder, stub):
    """Batches of a stored run: ids and log-probabilities as they came, short supports filled, the rest padding."""

    def behave(body):
        answer = stub_answer(body)
        answer["meta_info"]["student_prompt_ids"] = [5, 6, 7]
        return 200, answer

    stub.behave = behave
    assert folder.run(stub.url) == 0
    rows = list(datasets.load_dataset(str(folder.out), split="train"))[:6]
    length = max(row["num_tokens"] for row in rows)
    for loss, at in (("forward_kl", "teacher"), ("reverse_kl", "student")):
        batch = RecordCollator(Objective(loss))(rows)
        assert batch["top_k_ids"].shape == (6, length, K)
        for i, row in enumerate(rows):
            should = expected(row["id"])
            for t, ids in enumerate(should[f"top_k_{at}_ids"]):
                assert batch["top_k_ids"][i, t, : len(ids)].tolist() == ids
                logprobs = batch["top_k_logprobs"][i, t]
                np.testing.assert_allclose(logprobs[: len(ids)], should[f"top_k_{at}_teacher_logprobs"][t], rtol=1e-6)
                assert logprobs[len(ids) :].isneginf().all()
            tail = should[f"top_k_{at}_teacher_tail"]
            np.testing.assert_allclose(batch["top_k_tail"][i, : len(tail)], tail, atol=1e-7)
        logits = torch.randn(6, length, 128, generator=torch.Generator().manual_seed(0))
        losses, _ = Objective(loss)(logits, batch)
        assert losses.isfinite().all() and (losses[batch["mask"]] > 0).all() and (losses[~batch["mask"]] == 0).all()
    batch = RecordCollator(Objective("importance_sft"))(rows)
    behaviour = expected(rows[0]["id"])["behaviour_logprob"]
    np.testing.assert_allclose(batch["behaviour_logprob"][0, : len(behaviour)], behaviour, rtol=1e-6)
