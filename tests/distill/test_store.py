"""Records on disk: nothing is lost or doubled, whenever the process ends."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from pathlib import Path

import datasets
import pytest

from sglang_optimal.distill.records import COLUMNS, Record, schema
from sglang_optimal.distill.store import (
    EMPTY_SHARD,
    RecordStore,
    find_shards,
    optional_columns,
    read_rows,
    write_empty_shard,
)
from sglang_optimal.names import SERIES


def record(i: int, *, accepted: bool = True, text: str | None = None, **values) -> Record:
    series = {name: [0.25, 0.5] for name in SERIES}
    made = Record(
        id=f"p{i}/default/0", problem_id=f"p{i}", strategy="default", sample_index=0,
        fields={"problem": f"{i}?", "answer": i, "more": [1, {"a": None}]},
        teacher_context=[{"role": "user", "content": "t"}], student_context="s",
        text=f"sample {i}" if text is None else text, token_ids=[1, 2], finish_reason="stop", **{**series, **values},
    )  # fmt: skip
    if not accepted:
        made.accepted, made.rejected_by, made.reject_reason = False, "length", "too short"
    return made


def stored(folder, kind="accepted") -> dict[str, dict]:
    (folder / "run.json").touch()
    rows = list(read_rows(find_shards(folder, kind)))
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: row for row in rows}


def snapshot(store: RecordStore, target):
    """The folder as a kill leaves it now, or after what goes on in the background; test_run.py kills at any moment."""
    for future in store._sealing:
        future.result()
    shutil.copytree(store.folder, target)
    return target


@pytest.mark.parametrize("format", ["parquet", "jsonl"])
def test_round_trip(tmp_path, format):
    text = 'line\nbreak \u2028 "quotes" \\ emoji 🙂 </script> \x00'
    store = RecordStore(tmp_path, format=format, shard_records=3)
    for i in range(8):
        store.append(record(i, accepted=i % 4 > 0, text=text))
    store.finalize()
    store.close()
    assert not (tmp_path / "journal").exists()
    assert len(list((tmp_path / "data").glob(f"*.{format}"))) == 2
    accepted, rejected = stored(tmp_path), stored(tmp_path, "rejected")
    assert set(accepted) | set(rejected) == {f"p{i}/default/0" for i in range(8)}
    assert set(rejected) == {"p0/default/0", "p4/default/0"}
    row = accepted["p1/default/0"]
    assert list(row) == list(COLUMNS) == schema().names
    assert row["text"] == text and row["alpha"] == [0.25, 0.5] and row["mean_alpha"] == 0.375
    assert json.loads(row["fields"]) == {"problem": "1?", "answer": 1, "more": [1, {"a": None}]}
    assert row["answer"] == "1" and row["student_text"] == "s" and row["student_messages"] is None
    assert row["teacher_messages"] == [{"role": "user", "content": "t"}]
    assert rejected["p0/default/0"]["reject_reason"] == "too short"


def test_without_series(tmp_path):
    store = RecordStore(tmp_path, series=False)
    store.append(record(0))
    store.finalize()
    store.close()
    (row,) = stored(tmp_path).values()
    assert row["alpha"] == [0.25, 0.5] and row["student_logprob"] == [] and row["mean_student_logprob"] == 0.375


def test_not_finite(tmp_path):
    store = RecordStore(tmp_path)
    store.append(record(0, student_logprob=[float("-inf"), -1.0], ess_ratio=[float("nan"), float("inf")]))
    store.append(record(1, **dict.fromkeys(SERIES, [])))
    store.finalize()
    store.close()
    rows = stored(tmp_path)
    assert rows["p0/default/0"]["student_logprob"] == [None, -1.0]
    assert rows["p0/default/0"]["mean_student_logprob"] is None
    assert rows["p1/default/0"]["mean_alpha"] is None and rows["p1/default/0"]["alpha"] == []


@pytest.mark.parametrize("format", ["parquet", "jsonl"])
def test_killed_between_any_two_records(tmp_path, format):
    store = RecordStore(tmp_path / "run", format=format, shard_records=4)
    for i in range(10):
        store.append(record(i, accepted=i % 3 > 0))
        copy = snapshot(store, tmp_path / f"killed-{i}")
        again = RecordStore(copy, format=format, shard_records=4)
        assert again.done == {f"p{k}/default/0" for k in range(i + 1)}
        assert again.tally.total == i + 1 and again.tally.accepted == sum(k % 3 > 0 for k in range(i + 1))
        for k in range(i + 1, 10):
            again.append(record(k, accepted=k % 3 > 0))
        again.finalize()
        again.close()
        assert set(stored(copy)) == {f"p{k}/default/0" for k in range(10) if k % 3}
        assert set(stored(copy, "rejected")) == {f"p{k}/default/0" for k in range(10) if k % 3 == 0}
        assert not (copy / "journal").exists() and not list(copy.rglob("*.part"))
    store.close()


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_line_cut_short(tmp_path, cut):
    store = RecordStore(tmp_path)
    for i in range(3):
        store.append(record(i))
    store.close()
    journal = tmp_path / "journal" / "accepted-00000.jsonl"
    data = journal.read_bytes()
    journal.write_bytes(data[:-cut])
    store = RecordStore(tmp_path)
    assert store.done == {"p0/default/0", "p1/default/0"}
    store.append(record(2))
    store.close()
    assert journal.read_bytes() == data


def test_lines_lost_to_a_power_cut(tmp_path):
    store = RecordStore(tmp_path)
    for i in range(4):
        store.append(record(i))
    store.close()
    journal = tmp_path / "journal" / "accepted-00000.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(lines[0] + b"\0" * 300 + b"\n" + lines[2] + b'{"id": "half')
    store = RecordStore(tmp_path)
    assert store.done == {"p0/default/0", "p2/default/0"}
    store.close()
    assert set(stored(tmp_path)) == store.done


def test_killed_after_the_shard_before_its_journal_was_dropped(tmp_path):
    store = RecordStore(tmp_path, shard_records=2)
    store.append(record(0))
    journal = tmp_path / "journal" / "accepted-00000.jsonl"
    kept = journal.read_bytes()
    store.append(record(1))
    store.finalize()
    store.close()
    journal.parent.mkdir()
    journal.write_bytes(kept)
    (tmp_path / "data" / "accepted-00001.part").write_bytes(b"half a shard")
    store = RecordStore(tmp_path, shard_records=2)
    assert store.tally.total == 2 and not journal.exists()
    store.append(record(2))
    store.append(record(3))
    store.finalize()
    store.close()
    assert len(stored(tmp_path)) == 4


def test_disk_full(tmp_path, monkeypatch):
    store = RecordStore(tmp_path)
    store.append(record(0))
    write = os.write

    def half_then_full(descriptor, data):
        if len(data) < 40:
            return write(descriptor, data)
        write(descriptor, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", half_then_full)
    with pytest.raises(OSError, match="No space left"):
        store.append(record(1))
    monkeypatch.undo()
    assert store.done == {"p0/default/0"} and store.tally.total == 1
    store.append(record(2))
    store.finalize()
    store.close()
    assert set(stored(tmp_path)) == {"p0/default/0", "p2/default/0"}


def test_a_lone_surrogate(tmp_path):
    store = RecordStore(tmp_path)
    store.append(record(0, text="half \ud800 a pair"))
    store.finalize()
    store.close()
    assert stored(tmp_path)["p0/default/0"]["text"] == "half ? a pair"


def test_read_while_it_is_written(tmp_path):
    store = RecordStore(tmp_path)
    for i in range(2):
        store.append(record(i))
    journal = tmp_path / "journal" / "accepted-00000.jsonl"
    journal.write_bytes(journal.read_bytes()[:-5])
    assert set(stored(tmp_path)) == {"p0/default/0"}
    store.close()


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_read_while_a_shard_is_finished(tmp_path, format):
    """Between finding the files and reading them."""
    write_empty_shard(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    with contextlib.closing(RecordStore(tmp_path, format=format, shard_records=100)) as store:
        for i in range(5):
            store.append(record(i))
        paths = find_shards(tmp_path, "accepted")
        assert [path.parent.name for path in paths] == ["data", "journal"]
        store.finalize()
        (tmp_path / "data" / EMPTY_SHARD).unlink()
    assert {row["id"] for row in read_rows(paths)} == {record(i).id for i in range(5)}
    assert optional_columns(paths) == []
    shutil.rmtree(tmp_path / "data")
    with pytest.raises(FileNotFoundError, match="is gone"):
        list(read_rows(paths))


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_a_shard_that_is_finished_while_files_are_looked_for(tmp_path, format, monkeypatch):
    (tmp_path / "run.json").write_text("{}")
    with contextlib.closing(RecordStore(tmp_path, format=format, shard_records=100)) as store:
        store.append(record(0))
        really, done = Path.glob, []

        def glob(self, pattern):
            found = list(really(self, pattern))
            if not done:
                done.append(store.finalize())
            return found

        monkeypatch.setattr(Path, "glob", glob)
        paths = find_shards(tmp_path, "accepted")
    assert [row["id"] for row in read_rows(paths)] == [record(0).id]


def test_one_process_at_a_time(tmp_path):
    store = RecordStore(tmp_path)
    with pytest.raises(ValueError, match="another run is writing here"):
        RecordStore(tmp_path)
    other = RecordStore(tmp_path, (1, 2))  # another machine's shard
    other.close()
    store.close()
    RecordStore(tmp_path).close()


def test_shards_of_many_machines_in_one_folder(tmp_path):
    stores = [RecordStore(tmp_path, (i, 3), shard_records=2) for i in range(3)]
    for k in range(12):
        stores[k % 3].append(record(k, accepted=k % 4 > 0))
    for i, store in enumerate(stores):
        assert store.done == {f"p{k}/default/0" for k in range(i, 12, 3)}
        store.finalize()
        store.close()
    assert len(stored(tmp_path)) == 9 and len(stored(tmp_path, "rejected")) == 3
    again = RecordStore(tmp_path, (1, 3), shard_records=2)
    assert again.done == {f"p{k}/default/0" for k in range(1, 12, 3)}
    again.close()


def test_a_damaged_shard_is_named(tmp_path):
    store = RecordStore(tmp_path)
    store.append(record(0))
    store.finalize()
    store.close()
    (shard,) = (tmp_path / "data").iterdir()
    shard.write_bytes(b"not parquet")
    with pytest.raises(ValueError, match="accepted-00000.parquet: is damaged"):
        RecordStore(tmp_path)


def test_read_by_datasets(tmp_path):
    store = RecordStore(tmp_path, shard_records=3)
    for i in range(5):
        store.append(record(i, accepted=i < 4))
    store.finalize()
    store.close()
    dataset = datasets.load_dataset("parquet", data_dir=str(tmp_path / "data"), split="train")
    assert len(dataset) == 4 and dataset.column_names == list(COLUMNS)
    assert dataset.features["alpha"].feature.dtype == "float32"
