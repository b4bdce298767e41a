"""Rows of a local file, with every value as the file has it: nothing is guessed from how a text looks."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class WrittenFloat(float):
    """A JSON number with a point or an exponent; as text it is what the file has (``0.10``, ``1e3``)."""

    text: str

    def __new__(cls, text: str) -> WrittenFloat:
        value = super().__new__(cls, text)
        value.text = text
        return value

    def __str__(self) -> str:
        return self.text

    def __format__(self, spec: str) -> str:
        return super().__format__(spec) if spec else self.text


def written_json(value: Any, *, sort_keys: bool = False) -> str:
    """JSON with the numbers as they were written; what JSON has no form for is its text."""
    if isinstance(value, WrittenFloat):
        return value.text
    if isinstance(value, dict):
        items = sorted(value.items()) if sort_keys else value.items()
        parts = (f"{written_json(str(key))}: {written_json(inner, sort_keys=sort_keys)}" for key, inner in items)
        return "{" + ", ".join(parts) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(written_json(inner, sort_keys=sort_keys) for inner in value) + "]"
    return json.dumps(value, ensure_ascii=False, default=str)


def read_table(path: Path, encoding: str) -> list[Row]:
    """Every row, numbered from 1 in the messages. An empty cell of a CSV file, and a key that a row lacks, is None.

    Args:
        path: ``.jsonl``, ``.json``, ``.csv`` or ``.tsv`` in any case, ``.gz`` behind it or not.
        encoding: of the file; a byte order mark wins over it.

    Raises:
        ValueError: names the file and the row.
    """
    read = kind_of(path)
    assert read is not None, path
    text = _text(path, encoding)
    try:
        rows = list(read(text))
    except ValueError as error:
        raise ValueError(f"data.path: {path}: {error}") from None
    columns = dict.fromkeys(name for row in rows for name in row)
    for number, row in enumerate(rows, 1):
        for name, value in row.items():
            _check_text(value, f"data.path: {path}: row {number}: {name!r}")
    return [{name: row.get(name) for name in columns} for row in rows]


def kind_of(path: Path) -> Callable[[str], Iterator[Row]] | None:
    """How to read the file; None where its name does not say."""
    name = path.name.lower().removesuffix(".gz")
    kinds = {".jsonl": _json_lines, ".ndjson": _json_lines, ".json": _json, ".csv": _csv, ".tsv": _tsv}
    return next((read for ending, read in kinds.items() if name.endswith(ending)), None)


def _text(path: Path, encoding: str) -> str:
    content = path.read_bytes()
    if path.name.lower().endswith(".gz"):
        content = gzip.decompress(content)
    marks = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
    encoding = next((named for mark, named in marks if content.startswith(mark)), encoding)
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"data.path: {path}: line {line} is not {encoding} (byte 0x{content[error.start]:02x}); say what it is "
            "with data.encoding, such as latin-1."
        ) from None
    except LookupError:
        raise ValueError(f"data.encoding: there is no encoding {encoding!r}.") from None


def _check_text(value: Any, where: str) -> None:
    """Half a character (a lone surrogate) can be neither sent nor stored."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{where} has half a character at position {error.start}; clean the data.") from None
    elif isinstance(value, dict):
        for key, inner in value.items():
            _check_text(key, where)
            _check_text(inner, where)
    elif isinstance(value, list):
        for inner in value:
            _check_text(inner, where)


def _once(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} occurs twice.")
    return row


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number.")


def _loads(text: str) -> Any:
    try:
        return json.loads(text, parse_float=WrittenFloat, parse_constant=_no_constant, object_pairs_hook=_once)
    except RecursionError:
        raise ValueError("is nested too deeply.") from None


def _json_lines(text: str) -> Iterator[Row]:
    lines = text.split("\n")  # and at nothing else: U+2028 may stand within a text
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = _loads(line)
        except json.JSONDecodeError as error:
            if number == 1 or all(not before.strip() for before in lines[: number - 1]):
                yield from _whole(text, error)  # one value over many lines
                return
            raise ValueError(f"line {number} is no JSON: {error.msg} at column {error.colno}.") from None
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None
        if isinstance(row, list) and number == 1 and not any(rest.strip() for rest in lines[1:]):
            yield from _rows_of(row)
            return
        yield _as_row(row, f"line {number}")


def _json(text: str) -> Iterator[Row]:
    try:
        value = _loads(text)
    except json.JSONDecodeError:
        yield from _json_lines(text)
        return
    yield from _rows_of(value)


def _whole(text: str, first: json.JSONDecodeError) -> Iterator[Row]:
    try:
        value = _loads(text)
    except json.JSONDecodeError:
        raise ValueError(f"line {first.lineno} is no JSON: {first.msg} at column {first.colno}.") from None
    yield from _rows_of(value)


def _rows_of(value: Any) -> Iterator[Row]:
    if isinstance(value, dict):
        values = list(value.values())
        if values and all(isinstance(column, list) for column in values):  # columns
            if len({len(column) for column in values}) > 1:
                raise ValueError("its columns are not of one length.")
            value = [dict(zip(value, row, strict=True)) for row in zip(*values, strict=True)]
        else:
            value = [value]
    if not isinstance(value, list):
        raise ValueError(f"is no list of rows, but {type(value).__name__}.")
    for number, row in enumerate(value, 1):
        yield _as_row(row, f"row {number}")


def _as_row(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: is no mapping from columns to values, but {type(row).__name__}.")
    return row


def _csv(text: str) -> Iterator[Row]:
    return _delimited(text, ",")


def _tsv(text: str) -> Iterator[Row]:
    return _delimited(text, "\t")


def _delimited(text: str, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = next(reader, None)
        if not header:
            raise ValueError("has no header.")
        for name in header:
            if header.count(name) > 1:
                raise ValueError(f"the column {name!r} occurs twice.")
        for number, cells in enumerate(reader, 1):
            if not cells:
                continue  # a blank line
            if len(cells) != len(header):
                raise ValueError(f"row {number} has {len(cells)} cells for {len(header)} columns.")
            yield {name: cell if cell else None for name, cell in zip(header, cells, strict=True)}
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num}: {error}.") from None
