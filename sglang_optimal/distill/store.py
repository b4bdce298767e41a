"""Records on disk, so that nothing is lost or doubled when the process dies at any moment.

A record is appended to a journal as one line of JSON; a full journal becomes a finished shard by writing a new file and
renaming it. Opening the folder again finds what is there and drops a line that was cut short.

    data/accepted-00000.parquet        finished shards of accepted records
    rejected/rejected-00000.parquet    and of those that a filter refused, with the reason
    journal/accepted-00001.jsonl       being written
    run.json                           what the run was asked for, and how far it is

With ``--shard i/n`` every name carries ``i-of-n``, so that all machines may write to one folder.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import itertools
import json
import os
import threading
import uuid
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from sglang_optimal.distill.manifests import lock_name, manifest_name
from sglang_optimal.distill.passes import passes
from sglang_optimal.distill.records import OPTIONAL_COLUMNS, SURPRISE_COLUMNS, Record, has_top_k, schema, unpacked

if TYPE_CHECKING:
    import pyarrow

KINDS = {"accepted": "data", "rejected": "rejected"}
"""Kind of record: folder of its finished shards."""

SUFFIXES = (".parquet", ".jsonl")


class RecordStore:
    """The records of one run (or of one machine's shard of it).

    Args:
        folder: of the run; made when missing.
        shard: (i, n).
        format: ``parquet`` or ``jsonl``, of finished shards.
        shard_records: records in a finished shard.
        series: keep the per-token series beside alpha. What was asked for by name is kept always.

    Attributes:
        done: ids of all records.
        tally: counts and sums over them, for progress and the report; see `Tally`.
        sealed: number of shards that this process finished.

    Raises:
        ValueError: another process writes here.
        OSError: the folder cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        shard: tuple[int, int] = (0, 1),
        *,
        format: str = "parquet",
        shard_records: int = 1000,
        series: bool = True,
    ):
        self.folder = folder
        self.done: set[str] = set()
        self.tally = Tally()
        self.sealed = 0
        self._format, self._limit, self._series = format, shard_records, series
        self._tag = "" if shard[1] == 1 else f"{shard[0]}-of-{shard[1]}-"
        self._journal = folder / "journal"
        self._journal.mkdir(parents=True, exist_ok=True)
        self._lock = self._locked()
        self._sealer = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="seal")
        self._sealing: list[concurrent.futures.Future] = []
        self._written = threading.Lock()
        self._open: dict[str, _Journal] = {}
        for kind in KINDS:
            self._open[kind] = self._recovered(kind)

    @property
    def manifest_path(self) -> Path:
        return self.folder / manifest_name(self._tag)

    # -- writing ---------------------------------------------------------------------------------------------------

    def append(self, record: Record) -> None:
        """Keep a record; when this returns it survives the death of this process, and after `sync` the machine's.

        Raises:
            OSError: it could not be written, such as on a full disk; it is not kept then.
        """
        kind = "accepted" if record.accepted else "rejected"
        # A finished shard in JSON is a journal that was renamed.
        row = record.row(series=self._series, packed=self._format != "jsonl")
        with self._written:
            journal = self._open[kind]
            journal.append(json.dumps(row, ensure_ascii=False, allow_nan=False))
            self.done.add(record.id)
            self.tally.add(row)
            if journal.records >= self._limit:
                self._open[kind] = _Journal(self._journal_path(kind, journal.number + 1), journal.number + 1)
                self._sealing.append(self._sealer.submit(self._seal, kind, journal))

    def sync(self) -> None:
        """Wait until the disk has every record."""
        with self._written:
            journals = list(self._open.values())
        for journal in journals:
            journal.sync()
        for future in [f for f in self._sealing if f.done()]:
            self._sealing.remove(future)
            future.result()  # raises what went wrong

    def finalize(self) -> None:
        """Turn what is left in the journals into shards."""
        for future in self._sealing:
            future.result()
        self._sealing.clear()
        for kind, journal in self._open.items():
            self._seal(kind, journal)
            self._open[kind] = _Journal(self._journal_path(kind, journal.number + 1), journal.number + 1)

    def close(self) -> None:
        """Let go of the folder; safe to call again."""
        self._sealer.shutdown(wait=True)
        for journal in self._open.values():
            journal.close()
        self._open.clear()
        with contextlib.suppress(OSError):
            self._journal.rmdir()  # when empty
        self._lock.close()

    def write_json(self, path: Path, content: Any) -> None:
        """Replace a JSON file in one step."""
        replace_file(path, json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n")

    # -- reading ---------------------------------------------------------------------------------------------------

    def accepted_texts(self) -> Iterator[tuple[str, str]]:
        """(problem id, text) of every accepted record, for filters with a memory."""
        for row in read_rows(self._files("accepted"), ["problem_id", "text"]):
            yield row["problem_id"], row["text"]

    def sampled_fields(self) -> Iterator[tuple[str, str]]:
        """(problem id, its fields as JSON) of every record."""
        for kind in KINDS:
            for row in read_rows(self._files(kind), ["problem_id", "fields"]):
                yield row["problem_id"], row["fields"]

    def _files(self, kind: str) -> list[Path]:
        """Finished shards, then journals, each in the order of their numbers."""
        pattern = f"{kind}-{self._tag}[0-9]*"
        paths = [*sorted((self.folder / KINDS[kind]).glob(pattern)), *sorted(self._journal.glob(pattern))]
        return [p for p in paths if p.suffix in SUFFIXES and _number(p, kind, self._tag) is not None]

    # -- journals and shards ---------------------------------------------------------------------------------------

    def _locked(self):
        lock = (self.folder / lock_name(self._tag)).open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            raise ValueError(
                f"{self.folder}: another run is writing here; wait for it, or give another --out."
            ) from None
        return lock

    def _journal_path(self, kind: str, number: int) -> Path:
        return self._journal / f"{kind}-{self._tag}{number:05d}.jsonl"

    def _shard_path(self, kind: str, number: int) -> Path:
        return self.folder / KINDS[kind] / f"{kind}-{self._tag}{number:05d}.{self._format}"

    def _number(self, path: Path, kind: str) -> int:
        number = _number(path, kind, self._tag)
        assert number is not None, f"{path} is none of `_files`"
        return number

    def _recovered(self, kind: str) -> _Journal:
        """Count what is there, finish what was under way, and open the journal that comes next."""
        following = 0
        for folder in (self.folder / KINDS[kind], self._journal):
            for part in folder.glob(f"{kind}-{self._tag}[0-9]*.part"):
                if _number(part, kind, self._tag) is not None:
                    part.unlink()
        for path in self._files(kind):
            number = self._number(path, kind)
            following = max(following, number + 1)
            if path.parent == self._journal:
                if self._shard_path(kind, number).exists():
                    path.unlink()  # the shard was finished, and the process died before it could say so
                    continue
                _mend(path)
            for row in read_rows([path], list(TALLIED)):
                self.done.add(row["id"])
                self.tally.add(row)
        journals = [p for p in self._files(kind) if p.parent == self._journal]
        for path in journals[:-1]:
            self._seal(kind, _Journal(path, self._number(path, kind)))
        if journals:
            following = self._number(journals[-1], kind)
        return _Journal(self._journal_path(kind, following), following)

    def _seal(self, kind: str, journal: _Journal) -> None:
        journal.sync()
        journal.close()
        if journal.records == 0:
            journal.path.unlink(missing_ok=True)
            return
        target = self._shard_path(kind, journal.number)
        target.parent.mkdir(parents=True, exist_ok=True)
        if self._format == "jsonl":
            os.replace(journal.path, target)
        else:
            _write_parquet(journal.path, target)
            journal.path.unlink()
        sync_folder(target.parent)
        sync_folder(self._journal)
        self.sealed += 1


class _Journal:
    """A file that lines are appended to, each in one write."""

    def __init__(self, path: Path, number: int):
        self.path, self.number = path, number
        self.records = len(path.read_bytes().splitlines()) if path.exists() else 0
        self._size = path.stat().st_size if path.exists() else 0
        self._file = -1  # opened with the first record

    def append(self, line: str) -> None:
        if self._file < 0:
            self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        data = line.encode(errors="replace") + b"\n"  # a lone surrogate in someone's data is no reason to stop
        written = 0
        try:
            while written < len(data):
                written += os.write(self._file, data[written:])
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._size)  # no half line before the next one
            raise
        self._size += len(data)
        self.records += 1

    def sync(self) -> None:
        if self._file >= 0:
            os.fsync(self._file)

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


LATER_COLUMNS = ("step", "teacher_prompt_ids", "student_prompt_ids", *SURPRISE_COLUMNS, *OPTIONAL_COLUMNS)
"""Columns that the records of older versions, or of runs that did not ask for them, have not got."""

BATCH, LARGE_BATCH = 256, 8
"""Rows in memory at a time; the latter where each has k values a token."""

TALLIED = (
    "id", "problem_id", "strategy", "step", "num_tokens", "mean_alpha", "rare_tokens", "sampling", "accepted",
    "rejected_by", "reject_reason",
)  # fmt: skip
"""Columns that `Tally` reads."""


@dataclasses.dataclass
class StepTally:
    """Of one step of an escalation: problems that took it, samples, those accepted, tokens, forward passes."""

    problems: set[str] = dataclasses.field(default_factory=set)
    samples: int = 0
    accepted: int = 0
    tokens: int = 0
    passes: int = 0


class Tally:
    """Counts over records, kept up while they arrive.

    Attributes:
        accepted, rejected: records.
        tokens, accepted_tokens: generated tokens.
        alpha_sum: sum of alpha over all tokens.
        reasons: (filter, reason): records.
        strategies: strategy: [accepted, all].
        problems: problem id: [accepted, all].
        surprising, judged: accepted records with a token that surprises the student (`surprise.RARE`), of those of
            which it is known.
        steps: of an escalation, by number. first_accepted: problem id: the first step with an accepted sample.
    """

    def __init__(self) -> None:
        self.accepted = self.rejected = self.tokens = self.accepted_tokens = 0
        self.alpha_sum = 0.0
        self.reasons: Counter[tuple[str, str]] = Counter()
        self.strategies: dict[str, list[int]] = {}
        self.problems: dict[str, list[int]] = {}
        self.surprising = self.judged = 0
        self.steps: dict[int, StepTally] = {}
        self.first_accepted: dict[str, int] = {}
        self._accepted_at: Counter[tuple[str, int]] = Counter()

    def accepted_until(self, problem_id: str, step: int) -> int:
        """Accepted samples of a problem at a step and those before it."""
        return sum(self._accepted_at[problem_id, number] for number in range(1, step + 1))

    def add_step(self, row: dict[str, Any]) -> None:
        """Count a row of an escalation in its step alone."""
        number, problem = row["step"], row["problem_id"]
        at = self.steps.setdefault(number, StepTally())
        at.problems.add(problem)
        at.samples += 1
        at.tokens += row["num_tokens"]
        at.passes += passes(row)
        if row["accepted"]:
            at.accepted += 1
            self._accepted_at[problem, number] += 1
            self.first_accepted[problem] = min(number, self.first_accepted.get(problem, number))

    def add(self, row: dict[str, Any]) -> None:
        tokens = row["num_tokens"]
        strategy = self.strategies.setdefault(row["strategy"], [0, 0])
        problem = self.problems.setdefault(row["problem_id"], [0, 0])
        strategy[1] += 1
        problem[1] += 1
        if row["step"] is not None:
            self.add_step(row)
        self.tokens += tokens
        self.alpha_sum += tokens * (row["mean_alpha"] or 0.0)
        if row["accepted"]:
            self.accepted += 1
            self.accepted_tokens += tokens
            strategy[0] += 1
            problem[0] += 1
            if row["rare_tokens"] is not None:
                self.judged += 1
                self.surprising += row["rare_tokens"] > 0
        else:
            self.rejected += 1
            self.reasons[row["rejected_by"], row["reject_reason"]] += 1

    @property
    def total(self) -> int:
        return self.accepted + self.rejected

    def counts(self) -> dict[str, int]:
        """What run.json has of them."""
        return {
            "accepted": self.accepted,
            "rejected": self.rejected,
            "tokens": self.tokens,
            "problems": len(self.problems),
            "problems_covered": self.covered,
        }

    @property
    def covered(self) -> int:
        """Problems with an accepted sample, of ``len(problems)`` that have any."""
        return sum(accepted > 0 for accepted, _ in self.problems.values())

    @property
    def k_of_n(self) -> dict[int, int]:
        """Accepted samples of a problem: problems, from none on."""
        return dict(sorted(Counter(accepted for accepted, _ in self.problems.values()).items()))

    @property
    def mean_alpha(self) -> float | None:
        return self.alpha_sum / self.tokens if self.tokens else None


def read_rows(paths: list[Path], columns: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """Stored rows of shards and journals, of both formats, see `present_files`.

    Raises:
        ValueError: a file is damaged.
        FileNotFoundError: one is gone.
    """
    import pyarrow
    import pyarrow.parquet as parquet

    for path in present_files(paths):
        try:
            if path.suffix == ".parquet":
                with parquet.ParquetFile(path) as file:
                    size = batch_size(file.schema_arrow.names if columns is None else columns)
                    for batch in file.iter_batches(batch_size=size, columns=columns):
                        for row in batch.to_pylist():
                            yield row if columns is None else {name: _column(row, name) for name in columns}
            else:
                with path.open("rb") as lines:
                    for line in lines:
                        if not line.endswith(b"\n"):
                            break  # being written
                        row = json.loads(line)
                        if columns is None or has_top_k(columns):
                            row = unpacked(row)
                        yield row if columns is None else {name: _column(row, name) for name in columns}
        except (pyarrow.ArrowInvalid, json.JSONDecodeError, KeyError) as error:
            raise ValueError(f"{path}: is damaged or no shard of a run: {error}") from None


def _column(row: dict[str, Any], name: str) -> Any:
    """Raises KeyError: the row lacks a column that every version has had."""
    return row.get(name) if name in LATER_COLUMNS else row[name]


def batch_size(columns: Collection[str]) -> int:
    """How many rows of these columns to have in memory."""
    return LARGE_BATCH if has_top_k(columns) else BATCH


def stored_columns(path: Path) -> list[str]:
    """Names of the columns of a shard or journal; none of one without rows in JSON.

    Raises:
        ValueError: the file is damaged.
    """
    import pyarrow
    import pyarrow.parquet as parquet

    if path.suffix != ".parquet":
        return list(next(read_rows([path]), ()))
    try:
        return parquet.read_schema(path).names
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: is damaged or no shard of a run: {error}") from None


def optional_columns(paths: Iterable[Path]) -> list[str]:
    """Those of `OPTIONAL_COLUMNS` that any of these shards and journals has.

    Raises:
        ValueError: a file is damaged.
    """
    found = {name for path in present_files(paths) for name in stored_columns(path)}
    return [name for name in OPTIONAL_COLUMNS if name in found]


def find_shards(folder: Path, kind: str) -> list[Path]:
    """Finished shards of a run and journals of one that is under way, from all machines.

    Raises:
        ValueError: ``folder`` has no run in it.
    """
    journals = sorted((folder / "journal").glob(f"{kind}-*.jsonl"))  # first: one that is finished now is a shard then
    shards = sorted((folder / KINDS[kind]).glob(f"{kind}-*.*"))
    shards = [path for path in shards if path.suffix in SUFFIXES]
    names = {path.stem for path in shards}
    journals = [path for path in journals if path.stem not in names]
    if not any(folder.glob("run*.json")):
        raise ValueError(f"{folder}: has no run in it (no run.json).")
    return shards + journals


def present_files(paths: Iterable[Path]) -> Iterator[Path]:
    """Files of `find_shards` as they are when each is come to: of a journal that was finished meanwhile its shard.

    Raises:
        FileNotFoundError: one is gone.
    """
    for path in paths:
        if path.exists():
            yield path
        elif path.name != EMPTY_SHARD:  # which goes when there is a record
            kind = path.name.partition("-")[0]
            shards = [path.parent.parent / KINDS.get(kind, "") / f"{path.stem}{suffix}" for suffix in SUFFIXES]
            there = [shard for shard in shards if path.parent.name == "journal" and shard.exists()]
            if not there:
                raise FileNotFoundError(f"{path}: is gone.")
            yield there[0]


EMPTY_SHARD = "accepted-none.parquet"
"""A shard of no records that has every column, until there is one; its name is none that a run gives."""


def write_empty_shard(folder: Path, optional: Collection[str] = ()) -> None:
    """Write `EMPTY_SHARD`, with these of `OPTIONAL_COLUMNS`."""
    import pyarrow.parquet as parquet

    target = folder / KINDS["accepted"] / EMPTY_SHARD
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_suffix(".part")
    parquet.ParquetWriter(part, schema(optional)).close()  # no row group: `datasets` cannot read one without rows
    os.replace(part, target)


def replace_file(path: Path, text: str) -> None:
    """Write a file so that it is there whole, or as it was."""
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.part")  # another machine may write the same file
    try:
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in ``folder`` last."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _number(path: Path, kind: str, tag: str) -> int | None:
    digits = path.stem.removeprefix(f"{kind}-{tag}")
    return int(digits) if digits.isdigit() and len(digits) == 5 else None


def _mend(path: Path) -> None:
    """Drop lines that are not whole: the last one of a process that was killed, or more after a power cut."""
    data = path.read_bytes()
    lines = data.splitlines(keepends=True)
    whole = [line for line in lines if line.endswith(b"\n") and _is_record(line)]
    if len(whole) < len(lines):
        part = path.with_suffix(".part")
        with part.open("wb") as file:
            file.writelines(whole)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)


def _is_record(line: bytes) -> bool:
    try:
        return "id" in json.loads(line)
    except ValueError:
        return False


def write_rows(file: BinaryIO, rows: Iterable[dict[str, Any]], columns: pyarrow.Schema) -> None:
    """Rows as Parquet, a few in memory at a time; what they lack is null."""
    import pyarrow
    import pyarrow.parquet as parquet

    size, left = batch_size(columns.names), iter(rows)
    with parquet.ParquetWriter(file, columns, compression="zstd") as writer:
        while batch := list(itertools.islice(left, size)):
            writer.write_table(pyarrow.Table.from_pylist(batch, columns))


def _write_parquet(journal: Path, target: Path) -> None:
    part = target.with_suffix(".part")
    # What the rows have, not what this run's settings say: a run with other settings, which may find a journal here
    # before it is refused, must not drop columns.
    columns = schema(optional_columns([journal]))
    with part.open("wb") as file:
        write_rows(file, read_rows([journal]), columns)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, target)
