"""The records of several runs in one."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sglang_optimal.distill.card import write_card
from sglang_optimal.distill.made import Sources, write_manifest
from sglang_optimal.distill.records import SURPRISE_COLUMNS
from sglang_optimal.distill.store import KINDS, Tally, find_shards, optional_columns
from sglang_optimal.distill.stored import ShardWriter, all_rows, held, new_folder

NOT_CONTENT = ("latency", *SURPRISE_COLUMNS)
"""Columns in which one sample may differ from itself: older versions had fewer, and a tokenizer is not everywhere."""


@dataclasses.dataclass(frozen=True)
class Merged:
    """tally: over all records. doubled: records that were in several runs, and are there once."""

    tally: Tally
    doubled: int


def merge_runs(folders: Sequence[Path], out: Path) -> Merged:
    """Write a run with the records of several. All columns are kept, those of models among them.

    Where all runs have the same settings, as the shards of one, the new run has them too and can be gone on with; where
    they differ, run.json has those that all have in common, and those of each under ``sources``.

    Args:
        folders: of at least two runs; they are read, and nothing is written there.
        out: folder of the new run; not there yet, or empty.

    Raises:
        ValueError: no run, or one that is written to now; one id with two contents, or one problem's id with other
            fields; ``out`` is in a run or not empty. There is no ``out`` then.
    """
    folders, out = [Path(folder) for folder in folders], Path(out)
    if len({folder.resolve() for folder in folders}) < max(len(folders), 2):
        raise ValueError("merge: give two or more runs, each once.")
    with held(folders), new_folder(out, folders) as target:
        sources = Sources(folders)
        config = sources.common() if sources.one is None else sources.one.model_dump(mode="json")
        output = config.get("output") or {}
        if "dir" in output:
            output["dir"] = None
        paths = [path for folder in folders for kind in KINDS for path in find_shards(folder, kind)]
        writer = ShardWriter(
            target, output.get("format", "parquet"), output.get("shard_records", 1000), optional_columns(paths)
        )
        missing, tally, seen = 0, Tally(), _Seen()
        for folder in folders:
            before = tally.total + seen.doubled
            for row in all_rows(folder):
                if seen.is_new(folder, row):
                    writer.write(row)
                    tally.add(row)
            planned = sum(m.get("planned") or 0 for m in Sources([folder]).manifests)
            missing += max(0, planned - (tally.total + seen.doubled - before))
        writer.close()
        write_manifest(target, sources.manifest(config, tally, tally.total + missing))
        write_card(target)
    return Merged(tally, seen.doubled)


class _Seen:
    """What has come: digests, so that it takes little memory.

    Attributes:
        doubled: records that came again.
    """

    def __init__(self) -> None:
        self.doubled = 0
        self._records: dict[str, tuple[bytes, Path]] = {}
        self._problems: dict[str, tuple[bytes, Path]] = {}

    def is_new(self, folder: Path, row: dict[str, Any]) -> bool:
        """Raises ValueError: it is another record, or of another problem, than one of the same id."""
        fields = hashlib.blake2b(row["fields"].encode(errors="replace"), digest_size=16).digest()
        known, where = self._problems.setdefault(row["problem_id"], (fields, folder))
        if known != fields:
            raise ValueError(
                f"problem {row['problem_id']!r} of {folder} has other fields than in {where}; give problems of "
                "different data different ids."
            )
        digest = content(row)
        if row["id"] not in self._records:
            self._records[row["id"]] = (digest, folder)
            return True
        known, where = self._records[row["id"]]
        if known != digest:
            names = ", ".join(_differing(where, row)[:4])
            raise ValueError(
                f"record {row['id']!r} of {folder} is another than in {where} ({names}); an id is of one record. Give "
                "strategies other names, or problems other ids."
            )
        self.doubled += 1
        return False


def content(row: dict[str, Any]) -> bytes:
    """A digest of what a record is, the same for both formats of shards."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(row):
        value = _comparable(row, name)
        if value is not None:
            digest.update(f"{name}\0{value}\0".encode(errors="replace"))
    return digest.digest()


def _comparable(row: dict[str, Any], name: str) -> str | None:
    """A column as text; numbers in lists as the float32 that Parquet has. None for what is not there."""
    value = row.get(name)
    if name in NOT_CONTENT or value is None or value == []:
        return None
    if isinstance(value, list) and not isinstance(value[0], dict | str):
        return repr(_rounded(value))
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(inner) for inner in value]
    return value if value is None or isinstance(value, int) else float(np.float32(value))


def _differing(folder: Path, row: dict[str, Any]) -> list[str]:
    """The columns in which the record of this id there is another."""
    other = next(other for other in all_rows(folder) if other["id"] == row["id"])
    names = list(dict.fromkeys((*row, *other)))
    return [name for name in names if _comparable(row, name) != _comparable(other, name)]
