"""A run's records in the forms that trainers read."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sglang_optimal.config import check_known
from sglang_optimal.distill.records import COLUMNS
from sglang_optimal.distill.store import find_shards, read_rows

IGNORED = -100
"""Label of a token that no loss is taken of, as PyTorch's cross entropy has it."""

FORMATS = {
    "sft": "chat: {messages: what the student read, and the sample as the assistant's answer}",
    "trl-sft": "TRL's prompt-completion: {prompt, completion}; messages for chats, text for plain contexts",
    "trl-tokens": "{input_ids, labels}: the very tokens that were read and sampled; labels of the sample alone",
    "trl-gkd": "TRL's GKD: {messages} as in sft; its teacher reads what the student reads, and no more",
    "text": "{text}: prompt and sample as one text, for language modelling; chats need --tokenizer",
    "records": "every column",
}
"""Name: what it holds."""


def export(
    folder: Path,
    output: Path,
    format: str,
    *,
    columns: list[str] | None = None,
    rejected: bool = False,
    tokenizer: str | None = None,
) -> int:
    """Write the accepted records of a run to one file.

    Args:
        folder: of the run.
        output: ``.jsonl`` or ``.parquet``; replaced when it is there.
        format: one of `FORMATS`.
        columns: stored columns to keep beside the format's own, such as ``log_weight_student``.
        rejected: the rejected records in place of the accepted ones.
        tokenizer: folder or id, whose chat template ``text`` uses.

    Returns:
        How many records were written.

    Raises:
        ValueError: names the argument: an unknown format or column, no records, contexts that do not fit the format.
    """
    check_known([format], FORMATS, "--format")
    extra = list(columns or ())
    check_known(extra, COLUMNS, "--columns")
    if output.suffix not in (".jsonl", ".parquet"):
        raise ValueError(f"--output: {output} must end in .jsonl or .parquet.")
    shape = _shape(format, tokenizer)
    rows = read_rows(find_shards(folder, "rejected" if rejected else "accepted"))
    shaped = ({**shape(row), **{name: row[name] for name in extra}} for row in rows)
    output.parent.mkdir(parents=True, exist_ok=True)
    part = output.with_name(output.name + ".part")
    try:
        if output.suffix == ".jsonl":
            count = _write_jsonl(part, shaped)
        else:
            count = _write_parquet(part, shaped, records=format == "records")
        if count == 0:
            raise ValueError(f"{folder}: has no {'rejected' if rejected else 'accepted'} records.")
        os.replace(part, output)
    finally:
        part.unlink(missing_ok=True)
    return count


def _shape(format: str, tokenizer: str | None) -> Callable[[dict[str, Any]], dict[str, Any]]:
    if format == "text" and tokenizer is not None:
        from transformers import AutoTokenizer

        try:
            template = AutoTokenizer.from_pretrained(tokenizer)
        except (OSError, ValueError) as error:
            raise ValueError(f"--tokenizer: cannot load {tokenizer}: {error}") from None
        return lambda row: {"text": _rendered(row, template)}
    shapes = {"sft": _sft, "trl-sft": trl_sft, "trl-tokens": _tokens, "trl-gkd": _sft, "text": _text, "records": dict}
    return shapes[format]


def _sft(row: dict[str, Any]) -> dict[str, Any]:
    return {"messages": _conversation(row), **_template_variables(row)}


def trl_sft(row: dict[str, Any]) -> dict[str, Any]:
    """TRL's prompt and completion of a stored row. A prefix of the assistant's belongs to the completion: TRL would
    render it as a turn of its own."""
    if row["student_messages"] is None:
        return {"prompt": row["student_text"], "completion": row["text"]}
    *prompt, answer = _conversation(row)
    return {"prompt": prompt, "completion": [answer], **_template_variables(row)}


def _tokens(row: dict[str, Any]) -> dict[str, Any]:
    prompt, sample = row.get("student_prompt_ids"), row["token_ids"]
    if not prompt:
        raise ValueError(
            "--format: trl-tokens needs the records' student_prompt_ids, which those of older versions have not got."
        )
    return {"input_ids": [*prompt, *sample], "labels": [*[IGNORED] * len(prompt), *sample]}


def _template_variables(row: dict[str, Any]) -> dict[str, Any]:
    """What the student's chat template was given beside the messages, in the column that TRL reads."""
    variables = json.loads(row["sampling"] or "{}").get("student_chat_template_kwargs")
    return {"chat_template_kwargs": variables} if variables else {}


def _text(row: dict[str, Any]) -> dict[str, Any]:
    if row["student_text"] is None:
        raise ValueError("--tokenizer: is needed to write chats as text.")
    return {"text": row["student_text"] + row["text"]}


def _rendered(row: dict[str, Any], tokenizer: Any) -> str:
    if row["student_text"] is not None:
        return row["student_text"] + row["text"]
    variables = _template_variables(row).get("chat_template_kwargs", {})
    return tokenizer.apply_chat_template(_conversation(row), tokenize=False, **variables)


def _conversation(row: dict[str, Any]) -> list[dict[str, str]]:
    """What the student read, answered by the sample; an assistant's prefix is a part of the answer."""
    messages = row["student_messages"]
    if messages is None:
        raise ValueError("--format: the run has plain-text contexts; use trl-sft or text.")
    prefix = ""
    if messages[-1]["role"] == "assistant":
        *messages, last = messages
        prefix = last["content"]
    return [*messages, {"role": "assistant", "content": prefix + row["text"]}]


def _write_jsonl(path: Path, rows: Iterator[dict[str, Any]]) -> int:
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


def _write_parquet(path: Path, rows: Iterator[dict[str, Any]], *, records: bool) -> int:
    import pyarrow
    import pyarrow.parquet as parquet

    from sglang_optimal.distill.records import schema

    names = schema()
    writer, count, batch = None, 0, []

    def flush() -> None:
        nonlocal writer, count
        table = pyarrow.Table.from_pylist(batch)
        if records:
            table = pyarrow.Table.from_pylist(batch, names)
        else:  # columns of a run keep their types, where the first rows may have none but nulls
            typed = [names.field(f.name) if f.name in COLUMNS else f for f in table.schema]
            table = pyarrow.Table.from_pylist(batch, pyarrow.schema(typed))
        if writer is None:
            writer = parquet.ParquetWriter(path, table.schema, compression="zstd")
        writer.write_table(table)
        count += len(batch)
        batch.clear()

    for row in rows:
        batch.append(row)
        if len(batch) == 256:
            flush()
    if batch:
        flush()
    if writer is not None:
        writer.close()
    return count
