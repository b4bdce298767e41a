"""The problems of a run, read with the ``datasets`` library."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_optimal.config import check_known
from sglang_optimal.distill.records import sha256

if TYPE_CHECKING:
    from sglang_optimal.distill.config import Data

_LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


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
    dataset = _open(data)
    columns = dict(data.fields)
    for name, column in columns.items():
        try:
            check_known([column], dataset.column_names, f"data.fields.{name}: {data.path}")
        except ValueError as error:
            raise ValueError(str(error).replace("unknown key", "no column")) from None
    taken = set(columns.values())
    columns |= {name: name for name in dataset.column_names if name not in taken and name not in columns}
    if data.limit is not None:
        dataset = dataset.select(range(min(data.limit, len(dataset))))
    if len(dataset) == 0:
        raise ValueError(f"data.path: {data.path} has no problems.")
    return list(_numbered(dataset, columns, own_ids="id" in data.fields))


def _numbered(dataset: Any, columns: dict[str, str], *, own_ids: bool) -> Iterator[Problem]:
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

    if data.path is None:
        raise ValueError("data.path: is required (or give --data).")
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


def _arguments(data: Data) -> dict[str, Any]:
    path = Path(data.path)
    if path.is_file():
        suffixes = [s for s in path.suffixes if s in _LOADERS]
        if not suffixes:
            raise ValueError(f"data.path: {path} is none of {', '.join(_LOADERS)}.")
        return {"path": _LOADERS[suffixes[-1]], "data_files": {"train": str(path)}}
    looks_like_a_file = path.suffix in _LOADERS or path.is_absolute() or str(data.path).startswith(".")
    if not path.exists() and looks_like_a_file:
        raise ValueError(f"data.path: no such file: {data.path}")
    return {"path": str(data.path), "name": data.name, "revision": data.revision}


def _first_line(error: Exception) -> str:
    # datasets says what went wrong with a file in the cause, and only that it went wrong in the error itself.
    cause = error.__cause__ or error.__context__ or error
    lines = str(cause).strip().splitlines() or str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
