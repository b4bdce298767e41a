"""Stored rows as the records that they were, and new folders made of them."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import shutil
import uuid
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from sglang_optimal.distill.manifests import lock_name
from sglang_optimal.distill.records import (
    COLUMNS,
    MODEL_COLUMNS,
    OPTIONAL_COLUMNS,
    SURPRISE_COLUMNS,
    Context,
    NotStored,
    PartialRecord,
    schema,
)
from sglang_optimal.distill.store import KINDS, batch_size, find_shards, read_rows, stored_columns, sync_folder
from sglang_optimal.distill.tables import WrittenFloat
from sglang_optimal.names import MORE_SERIES, SERIES, SIDES
from sglang_optimal.top_k import ARRAYS, decode_top_k, top_k_column


class _Kept(dict):
    """By name; a known name that was not stored raises `NotStored`."""

    def __init__(self, values: dict[str, Any], known: Collection[str], prefix: str = ""):
        super().__init__(values)
        self._known, self._prefix = known, prefix

    def __missing__(self, name: str) -> Any:
        raise NotStored(f"{self._prefix}{name}") if name in self._known else KeyError(name)

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self or name in self._known else default


_NULL = {
    **dict.fromkeys((*SERIES, *MORE_SERIES), math.nan),
    **dict.fromkeys((name for name in (*SERIES, *MORE_SERIES) if name.endswith("logprob")), -math.inf),
    **dict.fromkeys((name for name in (*SERIES, *MORE_SERIES) if name.startswith("kl_")), math.inf),
}
"""What a null of a series was: JSON has no infinities."""


def record_of(row: dict[str, Any]) -> PartialRecord:
    """The record whose row it is, as filters see it. Log-probabilities that are null are −inf again.

    Args:
        row: with all its columns, see `read_rows`.
    """
    tokens = list(row["token_ids"] or ())
    series: dict[str, Any] = {name: _values(row, name) for name in SERIES}
    more = {name: _values(row, name) for name in MORE_SERIES if row.get(name) is not None}
    record = PartialRecord(
        id=row["id"],
        problem_id=row["problem_id"],
        strategy=row["strategy"],
        sample_index=row["sample_index"],
        fields=json.loads(row["fields"], parse_float=WrittenFloat),
        teacher_context=_context(row, "teacher"),
        student_context=_context(row, "student"),
        text=row["text"],
        token_ids=tokens,
        finish_reason=row["finish_reason"],
        **series,
        more_series=_Kept(more, MORE_SERIES),
        top_k=_Kept(_top_k(row), SIDES, "top_k of the "),
        sampling=json.loads(row["sampling"]),
        seed=row["seed"],
        teacher_prompt_tokens=row["teacher_prompt_tokens"],
        teacher_prompt_ids=list(row.get("teacher_prompt_ids") or ()),
        student_prompt_ids=list(row.get("student_prompt_ids") or ()),
        latency=row["latency"],
        answer_probability=row.get("answer_probability"),
        step=row.get("step"),
        models={name: row[name] for name in MODEL_COLUMNS},
        accepted=row["accepted"],
        rejected_by=row["rejected_by"],
        reject_reason=row["reject_reason"],
    )
    record.missing = tuple(name for name in SERIES if tokens and len(series[name]) != len(tokens))
    return record


def _values(row: dict[str, Any], name: str) -> list[float]:
    return [_NULL[name] if value is None else value for value in row[name] or ()]


def _context(row: dict[str, Any], side: str) -> Context:
    messages = row[f"{side}_messages"]
    return row[f"{side}_text"] if messages is None else messages


def _top_k(row: dict[str, Any]) -> dict[str, dict[str, np.ndarray]]:
    """As `sglang_optimal.decode_top_k` gives it: where fewer ids are possible, −1 with −inf."""
    sides: dict[str, dict[str, list]] = {}
    for side in SIDES:
        columns = {name: row.get(top_k_column(side, name)) for name in ARRAYS}
        if all(values is not None for values in columns.values()):
            sides[side] = {name: _finite(name, values) for name, values in columns.items() if values is not None}
    return decode_top_k(sides)


def _finite(name: str, values: list) -> list:
    if name.endswith("_tail"):
        return values
    return [[-math.inf if value is None else value for value in inner] for inner in values]


def all_rows(folder: Path) -> Iterator[dict[str, Any]]:
    """Every row of a run with all its columns: the accepted ones in their order, then the rejected ones.

    Raises:
        ValueError: no run, a damaged file, or a column that this version does not know.
    """
    for kind in KINDS:
        paths = find_shards(folder, kind)
        for path in paths:
            for name in stored_columns(path):
                if name not in COLUMNS and name not in OPTIONAL_COLUMNS and name != "top_k":
                    raise ValueError(f"{path}: has the column {name!r}, which this version does not know.")
        for row in read_rows(paths):
            yield dict.fromkeys((*SURPRISE_COLUMNS, "step")) | row  # which older versions had not got


@contextlib.contextmanager
def held(folders: Sequence[Path]) -> Iterator[None]:
    """Within, no run writes to these folders. Nothing is written there.

    Raises:
        ValueError: one has no run in it, or a run is writing to it.
    """
    with contextlib.ExitStack() as stack:
        for folder in folders:
            find_shards(folder, "accepted")
            for manifest in sorted(folder.glob("run*.json")):
                tag = manifest.stem.removeprefix("run").removeprefix("-")
                with contextlib.suppress(FileNotFoundError):
                    lock: TextIO = stack.enter_context((folder / lock_name(f"{tag}-" if tag else "")).open())
                    try:
                        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                    except OSError:
                        raise ValueError(f"{folder}: a run is writing here; wait for it, or stop it.") from None
        yield


@contextlib.contextmanager
def new_folder(out: Path, sources: Sequence[Path]) -> Iterator[Path]:
    """A folder to write to, which becomes ``out`` when the block ends well, and is gone when it does not.

    Raises:
        ValueError: ``out`` is, or is within, one of ``sources``, or has something in it.
    """
    out = out.resolve()
    for source in sources:
        if out == source.resolve() or source.resolve() in out.parents:
            raise ValueError(f"--out: {out} is in the run {source}, which stays as it is; give another folder.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out: {out} is not empty; give another folder.")
    # Of its later name: what is written there says how the folder is called.
    room = out.parent / f".{out.name}-{uuid.uuid4().hex[:12]}"
    target = room / out.name
    target.mkdir(parents=True)
    try:
        yield target
        sync_folder(target)
        os.replace(target, out)
        sync_folder(out.parent)
    finally:
        shutil.rmtree(room, ignore_errors=True)


class ShardWriter:
    """Finished shards of rows that are there already.

    Args:
        folder: of the new run.
        format: ``parquet`` or ``jsonl``.
        shard_records: records in a shard.
        optional: those of `OPTIONAL_COLUMNS` that rows may have.
    """

    def __init__(self, folder: Path, format: str, shard_records: int, optional: Collection[str]):
        self._folder, self._format, self._limit = folder, format, shard_records
        self._schema = schema(optional)
        self._kinds = {kind: _Shards(self, kind) for kind in KINDS}

    def write(self, row: dict[str, Any]) -> None:
        self._kinds["accepted" if row["accepted"] else "rejected"].write(row)

    def close(self) -> None:
        for shards in self._kinds.values():
            shards.close()


class _Shards:
    def __init__(self, writer: ShardWriter, kind: str):
        self._all, self._kind = writer, kind
        self._number = self._in_shard = 0
        self._rows: list[dict[str, Any]] = []
        self._file: Any = None
        self._parquet: Any = None

    def write(self, row: dict[str, Any]) -> None:
        if self._file is None:
            self._open()
        self._rows.append(row)
        self._in_shard += 1
        if len(self._rows) == batch_size(self._all._schema.names):
            self._flush()
        if self._in_shard == self._all._limit:
            self.close()

    def _open(self) -> None:
        import pyarrow.parquet as parquet

        folder = self._all._folder / KINDS[self._kind]
        folder.mkdir(exist_ok=True)
        path = folder / f"{self._kind}-{self._number:05d}.{self._all._format}"
        self._file = path.open("wb")
        if self._all._format == "parquet":
            self._parquet = parquet.ParquetWriter(self._file, self._all._schema, compression="zstd")

    def _flush(self) -> None:
        import pyarrow

        if self._parquet is None:
            for row in self._rows:
                line = json.dumps(row, ensure_ascii=False, allow_nan=False)
                self._file.write(line.encode(errors="replace") + b"\n")
        elif self._rows:
            self._parquet.write_table(pyarrow.Table.from_pylist(self._rows, self._all._schema))
        self._rows = []

    def close(self) -> None:
        if self._file is None:
            return
        self._flush()
        if self._parquet is not None:
            self._parquet.close()
            self._parquet = None
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        self._number, self._in_shard = self._number + 1, 0
