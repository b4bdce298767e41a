"""The problems of a run: local files value by value as they are, everything else with the ``datasets`` library."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_optimal.config import check_known
from sglang_optimal.distill.records import sha256
from sglang_optimal.distill.tables import Row, kind_of, read_table

if TYPE_CHECKING:
    from sglang_optimal.distill.config import Data

_SPLITS = ("test", "valid", "dev", "eval")
ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


@dataclasses.dataclass(frozen=True)
class Problem:
    """id: stable while the data stays the same. fields: what templates and filters know it by."""

    id: str
    fields: dict[str, Any]


def load_problems(data: Data) -> list[Problem]:
    """Read every problem.

    Args:
        data: the section ``data`` of the run's file.

    Raises:
        ValueError: no data, a missing file, split or column, an id that occurs twice.
    """
    if data.path is None:
        raise ValueError("data.path: is required (or give --data).")
    names, rows = _rows(data)
    columns = dict(data.fields)
    for name, column in columns.items():
        try:
            check_known([column], names, f"data.fields.{name}: {data.path}")
        except ValueError as error:
            raise ValueError(str(error).replace("unknown key", "no column")) from None
    taken = set(columns.values())
    columns |= {name: name for name in names if name not in taken and name not in columns}
    problems = list(_numbered(rows, columns, own_ids="id" in data.fields))
    if not problems:
        raise ValueError(f"data.path: {data.path} has no problems.")
    return problems


def _rows(data: Data) -> tuple[list[str], Any]:
    """(columns, rows)"""
    path = Path(_path(data))
    if path.is_file() and kind_of(path) is not None:
        rows = read_table(path, data.encoding)
        names = list(rows[0]) if rows else []
        return names, rows[_part(data, len(rows))][: data.limit]
    if files := _text_files(path, _split_of(data)):
        tables = [read_table(file, data.encoding) for file in files]
        names = list(dict.fromkeys(name for table in tables for row in table[:1] for name in row))
        rows = [{name: row.get(name) for name in names} for table in tables for row in table]
        return names, rows[_part(data, len(rows), _split_of(data))][: data.limit]
    dataset = _open(data)
    if data.limit is not None:
        dataset = dataset.select(range(min(data.limit, len(dataset))))
    return dataset.column_names, dataset


def _text_files(folder: Path, split: str) -> list[Path]:
    """The folder's files of ``split`` that `read_table` reads; none where it has others, which ``datasets`` reads."""
    if not folder.is_dir() or any(folder.rglob("*.parquet")):
        return []
    files = sorted(file for file in folder.rglob("*") if file.is_file() and kind_of(file) is not None)
    named = {word: [file for file in files if word in file.stem.lower()] for word in (split, *_SPLITS)}
    if named[split]:
        return named[split]
    other = next((found[0].name for found in named.values() if found), None)
    if other is not None and len(files) > 1:
        raise ValueError(f"data.path: {folder} has files of other splits ({other}); name the one file.")
    return files


def _split_of(data: Data) -> str:
    """Without a slice."""
    return data.split.partition("[")[0]


def _part(data: Data, length: int, split: str = "train") -> slice:
    """The rows that ``data.split`` means, in the words of ``datasets``; a file is one split, ``split``."""
    import datasets

    try:
        (part,) = datasets.ReadInstruction.from_spec(data.split).to_absolute({split: length})
    except (ValueError, AssertionError, KeyError) as error:
        raise ValueError(f"data.path: cannot read {data.path}: data.split {data.split!r}: {error}") from None
    return slice(part.from_, part.to)


def _numbered(dataset: Iterable[Row], columns: dict[str, str], *, own_ids: bool) -> Iterator[Problem]:
    seen: Counter[str] = Counter()
    for row in dataset:
        fields = {name: row[column] for name, column in columns.items()}
        if own_ids:
            name = str(fields["id"])
            if not name or fields["id"] is None:
                raise ValueError("data.fields.id: a problem has an empty id.")
        else:
            name = sha256(json.dumps(fields, sort_keys=True, default=str))[:12]
        seen[name] += 1
        if seen[name] > 1:
            if own_ids:
                raise ValueError(f"data.fields.id: the id {name!r} occurs twice; leave `id` out to have ids made.")
            name = f"{name}-{seen[name]}"  # the same problem again is another problem
        yield Problem(name, fields)


def _open(data: Data):
    import datasets

    arguments = _arguments(data)
    quiet = datasets.utils.logging.get_verbosity()
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(**arguments, split=data.split)
    except Exception as error:  # datasets raises many kinds, its own and others'
        raise ValueError(f"data.path: cannot read {data.path}: {_first_line(error)}") from error
    finally:
        datasets.utils.logging.set_verbosity(quiet)


def _path(data: Data) -> str:
    if data.path is None:
        raise ValueError("data.path: is required.")
    return data.path


def _arguments(data: Data) -> dict[str, Any]:
    path = Path(_path(data))
    if path.is_file():
        if path.suffix.lower() != ".parquet":
            raise ValueError(f"data.path: {path} is none of {', '.join(ENDINGS)}.")
        return {"path": "parquet", "data_files": {"train": str(path)}}
    looks_like_a_file = path.suffix.lower() in ENDINGS or path.is_absolute() or str(data.path).startswith(".")
    if not path.exists() and looks_like_a_file:
        raise ValueError(f"data.path: no such file: {data.path}")
    return {"path": str(data.path), "name": data.name, "revision": data.revision}


def _first_line(error: Exception) -> str:
    # datasets says what went wrong with a file in the cause, and only that it went wrong in the error itself.
    cause = error.__cause__ or error.__context__ or error
    lines = str(cause).strip().splitlines() or str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
