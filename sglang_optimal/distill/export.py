"""A run's records, or its problems, in the forms that trainers read."""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sglang_optimal.config import check_known
from sglang_optimal.distill.card import public_name
from sglang_optimal.distill.export_check import KINDS, OTHER_END, PROMPT, ExportCheck, load_tokenizer
from sglang_optimal.distill.export_pairs import COLUMNS as JUDGED_COLUMNS
from sglang_optimal.distill.export_pairs import JUDGED, PAIRS, PICKS, UNPAIRED_PROBLEMS, UNPAIRED_RECORDS, Judged
from sglang_optimal.distill.export_weights import WEIGHTED, TokenColumns
from sglang_optimal.distill.manifests import read_manifests
from sglang_optimal.distill.records import COLUMNS, OPTIONAL_COLUMNS, schema
from sglang_optimal.distill.store import batch_size, find_shards, optional_columns, read_rows
from sglang_optimal.distill.tables import WrittenFloat, written_json

IGNORED = -100
"""Label of a token that no loss is taken of, as PyTorch's cross entropy has it."""

FORMATS = {
    "sft": "chat: {messages: what the student read, and the sample as the assistant's answer}",
    "trl-sft": "TRL's prompt-completion: {prompt, completion}; messages for chats, text for plain contexts",
    "trl-tokens": "{input_ids, labels}: the very tokens that were read and sampled; labels of the sample alone",
    "trl-gkd": "TRL's GKD: {messages, input_ids, completion_mask}, exact as trl-tokens; its teacher reads the same",
    "trl-dpo": "TRL's DPO, a row a pair: {prompt, chosen, rejected}, an accepted and a rejected sample of a problem",
    "trl-kto": "TRL's KTO: {prompt, completion, label}, accepted and rejected records",
    "text": "{text}: prompt and sample as one text, for language modelling; chats need --tokenizer",
    "records": "every column, the series and most likely tokens among them; the others have those that --columns names",
    "verl": "verl's RLHF dataset, a row a problem: {data_source, prompt, ability, reward_model, extra_info}",
    "sdft": "TRL's SDFT and SDPO, a row a problem: {prompt, privileged_context}",
    "slime": "slime's prompt data, a row a problem: {prompt, label, metadata}",
}
"""Name: what it holds."""

ALL = "all"

ALIASES = {
    "trl-sdft": "sdft", "trl-sdpo": "sdft", "sdpo": "sdft", "gkd": "trl-gkd", "dpo": "trl-dpo", "kto": "trl-kto",
}  # fmt: skip
"""Other names of formats."""

PROBLEMS = ("verl", "sdft", "slime")
"""Formats of problems, for trainers that sample themselves: no sample is in them."""
TURN, ANSWER = "turn", "answer"
UNFIT = {
    TURN: "what the student read does not end with a user's turn, after which such a trainer opens the answer's",
    ANSWER: "there is no expected answer",
}
"""Why a problem has no row in a format of `PROBLEMS`: what it means."""

MASKED = "masked"
MASKED_RECORDS = {MASKED: "no token is left by --mask-below"}
"""Why a record is in no row of ``trl-tokens`` with a mask: what it means."""

CHECKED = ("sft", "trl-sft", "text", *JUDGED)
"""Formats that a trainer renders and tokenizes itself."""
ON_MISMATCH = ("skip", "keep", "refuse")


@dataclasses.dataclass(frozen=True)
class Exported:
    """The counts of an export.

    Attributes:
        written: number of rows in the file.
        checked: whether they were compared with the tokens that were read and sampled.
        differing: number of records that were left out (or kept) for each kind of difference in `export_check.KINDS`.
        other_ends: number of records of plain text that are in the file and end with the trainer's end token, where
            another was sampled, such as the one of a teacher that reads a chat.
        left_out: number of problems without a row for each reason in `UNFIT` or `export_pairs.UNPAIRED_PROBLEMS`, of
            records for each in `export_pairs.UNPAIRED_RECORDS` or `MASKED_RECORDS`.
        with_others: number of problems of which other records have other contexts than the row.
    """

    written: int
    checked: bool
    differing: dict[str, int]
    left_out: dict[str, int] = dataclasses.field(default_factory=dict)
    with_others: int = 0
    other_ends: int = 0


def export(
    folder: Path,
    output: Path,
    format: str,
    *,
    columns: list[str] | None = None,
    rejected: bool = False,
    tokenizer: str | None = None,
    check: bool = True,
    on_mismatch: str = "skip",
    answer_field: str | None = None,
    pairs: int | str | None = None,
    pick: str | None = None,
    rejected_by: list[str] | None = None,
    weights: str | None = None,
    max_weight: float | None = None,
    mask_below: float | None = None,
) -> Exported:
    """Write the accepted records of a run to one file, and check that a trainer would read the sampled tokens in it.

    Rows of chats and texts are rendered as TRL's trainers do, and compared with the ids that the student read and that
    were sampled (`sglang_optimal.distill.export_check`); ``trl-tokens`` and ``trl-gkd`` hold those ids, and ``records``
    the stored columns. The formats of `PROBLEMS` have one row for each problem that has a record, with the contexts of
    its first accepted sample; those of `export_pairs.JUDGED` put accepted and rejected samples side by side. The file
    appears when it is complete; an error leaves an older one as it was.

    Args:
        folder: of the run, or of one that is still going on.
        output: ``.jsonl`` or ``.parquet`` (``verl``: the latter), replaced if it exists; missing folders are made.
        format: one of `FORMATS` or `ALIASES`.
        columns: stored columns to keep beside the format's own, such as ``log_weight_student``; of pairs as
            ``chosen_log_weight_student`` and ``rejected_log_weight_student``.
        rejected: write the rejected records in place of the accepted ones; with a format of `PROBLEMS`, write the
            problems of both.
        tokenizer: folder or id of the trainer's tokenizer, whose chat template ``text`` uses as well; by default that
            of the records' student, where it is a folder here.
        check: compare. With ``rejected`` nothing is compared.
        on_mismatch: how to treat a sample whose text has other tokens than were sampled, or that was cut where the
            trainer would see an end: ``skip`` leaves it out, ``keep`` writes it, ``refuse`` writes nothing at all. A
            row with another prompt is refused, unless ``on_mismatch`` is ``keep``. Plain text that differs in its end
            token alone is refused by ``refuse``, and written otherwise.
        answer_field: the problem's field with the expected answer, for a format of `PROBLEMS`; by default ``answer``.
        pairs: most pairs of a problem, for ``trl-dpo``; by default 1. Those of samples that are in the fewest pairs so
            far come first. ``all``: every accepted sample with every rejected one of the same context.
        pick: one of `export_pairs.PICKS`, which pairs come first; by default ``order``.
        rejected_by: for a format of `export_pairs.JUDGED`, the filters whose rejected records are used; None: all.
        weights, max_weight, mask_below: columns ``weights`` and ``mask``, see `export_weights.TokenColumns`, for a
            format of `export_weights.WEIGHTED`: one value for each of ``token_ids`` (``records``) or ``input_ids``
            (``trl-tokens``: 0 for the prompt; tokens that are masked have no label).

    Returns:
        How many rows were written, and how many records or problems differed or were left out.

    Raises:
        ValueError: an unknown format or column, no records, contexts that do not fit the format, no tokenizer to
            compare with, or a row that is refused. The message names the flag of ``distill export`` or the record.
    """
    check_known([on_mismatch], ON_MISMATCH, "--on-mismatch")
    format = ALIASES.get(format, format)
    check_known([format], FORMATS, "--format")
    per_token = TokenColumns(weights, max_weight, mask_below)
    _check_flags(format, rejected, pairs, pick, rejected_by, per_token)
    extra = list(columns or ())
    check_known(extra, [*COLUMNS, *OPTIONAL_COLUMNS], "--columns")
    if output.suffix not in (".jsonl", ".parquet"):
        raise ValueError(f"--output: {output} must end in .jsonl or .parquet.")
    of_problems = format in PROBLEMS
    if format == "verl" and output.suffix != ".parquet":
        raise ValueError(f"--output: {output} must end in .parquet, which every version of verl reads.")
    if answer_field is not None and not of_problems:
        raise ValueError(f"--answer-field: is only read with --format {', '.join(PROBLEMS)}.")
    both = format in JUDGED or (rejected and of_problems)
    kinds = ["accepted", "rejected"] if both else ["rejected" if rejected else "accepted"]
    shards = [path for kind in kinds for path in find_shards(folder, kind)]
    optional = optional_columns(shards)
    if shards and (absent := [name for name in extra if name in OPTIONAL_COLUMNS and name not in optional]):
        raise ValueError(
            f"--columns: the run has no {absent[0]}; it is stored where the run's file asks for it "
            f"(output.{'return_top_k' if absent[0].startswith('top_k_') else 'series'})."
        )
    kept = optional if format == "records" else [name for name in optional if name in extra]
    comparing = ExportCheck(tokenizer) if check and format in CHECKED and not rejected else None
    differing: Counter[str] = Counter()
    left_out: Counter[str] = Counter()
    problems = _Problems(folder, answer_field or "answer") if of_problems else None
    if format in JUDGED:
        judged = Judged(
            folder,
            lambda row: _checked(row, trl_sft(row), comparing, on_mismatch, differing),
            extra=extra,
            rejected_by=rejected_by,
            pick=pick or "order",
        )
        left_out = judged.left_out
        rows = read_rows(shards, list(dict.fromkeys([*JUDGED_COLUMNS, *extra])))
        shaped = judged.shaped(rows, format, None if pairs == ALL else int(pairs or 1))
    else:
        if problems is not None:
            left_out = problems.left_out
            rows = read_rows(shards, list(dict.fromkeys([*_PROBLEM_COLUMNS, *extra])))
            made = problems.shaped(rows, format)
        else:
            shape = _shape(format, tokenizer)
            drawn = ["behaviour_logprob"] if per_token.weights and "behaviour_logprob" in optional else []
            rows = read_rows(shards, list(dict.fromkeys([*COLUMNS, *kept, *drawn])))
            made = (
                (row, _with_token_columns(row, fitting, per_token, left_out))
                for row in rows
                if (fitting := _checked(row, shape(row), comparing, on_mismatch, differing)) is not None
            )
        shaped = (
            {**fitting, **{name: row.get(name) for name in extra}} for row, fitting in made if fitting is not None
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    part = output.with_name(output.name + ".part")
    try:
        if output.suffix == ".jsonl":
            count = _write_jsonl(part, shaped)
        else:
            count = _write_parquet(part, shaped, kept, per_token.names, records=format == "records")
        if count == 0 and differing:
            raise ValueError(
                f"--on-mismatch: no record is left; {described(differing)}. Take --format trl-tokens, or keep them."
            )
        if count == 0 and problems is not None and left_out:
            raise ValueError(
                f"--format: no problem is left for {format}; {described(left_out)}. Name the field with the "
                "answer (--answer-field), or sample without the beginning of an answer in the student's context."
            )
        if count == 0 and left_out:
            raise ValueError(f"--format: nothing is left for {format}; {described(left_out)}.")
        if count == 0:
            raise ValueError(f"{folder}: has no {' or '.join(kinds)} records.")
        os.replace(part, output)
    finally:
        part.unlink(missing_ok=True)
    others = problems.with_others if problems is not None else 0
    other_ends = differing.pop(OTHER_END, 0)
    return Exported(count, comparing is not None, dict(differing), dict(left_out), others, other_ends=other_ends)


def _check_flags(
    format: str,
    rejected: bool,
    pairs: int | str | None,
    pick: str | None,
    rejected_by: list[str] | None,
    per_token: TokenColumns,
) -> None:
    """Raises ValueError: a flag that the format does not read."""
    if rejected and format in JUDGED:
        raise ValueError(f"--rejected: {format} reads accepted and rejected records as it is.")
    if format != PAIRS and (pairs is not None or pick is not None):
        flag = "--pick" if pick is not None else "--pairs"
        raise ValueError(f"{flag}: is only read with --format {PAIRS}.")
    if pairs is not None and pairs != ALL and not (isinstance(pairs, int) and pairs > 0):
        raise ValueError(f"--pairs: must be a positive number or all, got {pairs}.")
    if pick is not None:
        check_known([pick], PICKS, "--pick")
    if rejected_by is not None and format not in JUDGED:
        raise ValueError(f"--rejected-by: is only read with --format {', '.join(JUDGED)}.")
    if per_token.names and format not in WEIGHTED:
        flag = "--weights" if per_token.weights else "--mask-below"
        raise ValueError(f"{flag}: is only read with --format {', '.join(WEIGHTED)}, which have the token ids.")


def _with_token_columns(
    row: dict[str, Any], shaped: dict[str, Any], per_token: TokenColumns, left_out: Counter[str]
) -> dict[str, Any] | None:
    """The row with ``weights`` and ``mask``, or None if no token of it is left."""
    made = per_token.of(row)
    if "input_ids" not in shaped:
        return shaped | made
    before = len(shaped["input_ids"]) - len(row["token_ids"])
    made = {name: [*[0] * before, *values] for name, values in made.items()}
    if "mask" in made:
        if not any(made["mask"]):
            left_out[MASKED] += 1
            return None
        labels = zip(shaped["labels"], made["mask"], strict=True)
        shaped = shaped | {"labels": [label if kept else IGNORED for label, kept in labels]}
    return shaped | made


def _checked(
    row: dict[str, Any], shaped: dict[str, Any], check: ExportCheck | None, on_mismatch: str, differing: Counter[str]
) -> dict[str, Any] | None:
    """The row as it is written, or None if it is left out; counts it where it differs."""
    kind = check.difference(row, shaped) if check is not None else None
    if check is None or kind is None:
        return shaped
    if on_mismatch == "refuse" or (kind == PROMPT and on_mismatch == "skip"):
        raise ValueError(
            f"record {row['id']}: {KINDS[kind]}: {check.describe(row, shaped)}. Give the tokenizer and template of "
            "the server with --tokenizer, or take --format trl-tokens, which is always exact, or --on-mismatch keep."
        )
    differing[kind] += 1
    return shaped if on_mismatch == "keep" or kind == OTHER_END else None


def described(differing: Mapping[str, int]) -> str:
    """Return the counts of `Exported.differing`, or of `Exported.left_out`, as a sentence."""
    meanings = {kind: f"records: {meaning}" for kind, meaning in KINDS.items()}
    meanings |= {kind: f"records: {meaning}" for kind, meaning in (UNPAIRED_RECORDS | MASKED_RECORDS).items()}
    meanings |= {kind: f"problems: {meaning}" for kind, meaning in (UNFIT | UNPAIRED_PROBLEMS).items()}
    return "; ".join(f"{count} {meanings[kind]}" for kind, count in differing.items())


def _shape(format: str, tokenizer: str | None) -> Callable[[dict[str, Any]], dict[str, Any]]:
    if format == "text" and tokenizer is not None:
        template = load_tokenizer(tokenizer)
        return lambda row: {"text": _rendered(row, template)}
    shapes: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
        "sft": _sft,
        "trl-sft": trl_sft,
        "trl-tokens": _tokens,
        "trl-gkd": _gkd,
        "text": _text,
        "records": dict,
    }
    return shapes[format]


def _sft(row: dict[str, Any]) -> dict[str, Any]:
    return {"messages": _conversation(row), **_template_variables(row)}


def trl_sft(row: dict[str, Any]) -> dict[str, Any]:
    """Return TRL's prompt and completion of a stored row.

    A prefix of the assistant's belongs to the completion: TRL would render it as a turn of its own.

    Args:
        row: a record as it is stored, by column.

    Returns:
        ``prompt`` and ``completion``: messages for chats, with ``chat_template_kwargs`` where the template was given
        variables; text for plain contexts.
    """
    if row["student_messages"] is None:
        return {"prompt": row["student_text"], "completion": row["text"]}
    *prompt, answer = _conversation(row)
    return {"prompt": prompt, "completion": [answer], **_template_variables(row)}


def _gkd(row: dict[str, Any]) -> dict[str, Any]:
    """TRL's GKD takes ids as they are, and of messages it would render no template variables."""
    prompt, sample = _ids(row, "trl-gkd")
    plain = row["student_messages"] is None
    read = {"prompt": row["student_text"]} if plain else {"messages": _conversation(row)}
    return {
        **read,
        "input_ids": [*prompt, *sample],
        "completion_mask": [*[0] * len(prompt), *[1] * len(sample)],
    }


def _ids(row: dict[str, Any], format: str) -> tuple[list[int], list[int]]:
    prompt, sample = row.get("student_prompt_ids"), row["token_ids"]
    if not prompt:
        raise ValueError(
            f"--format: {format} needs the records' student_prompt_ids, which those of older versions have not got; "
            "take sft or trl-sft."
        )
    return prompt, sample


def _tokens(row: dict[str, Any]) -> dict[str, Any]:
    prompt, sample = _ids(row, "trl-tokens")
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


_PROBLEM_COLUMNS = (
    "problem_id", "strategy", "sample_index", "fields", "accepted", "student_messages", "student_text",
    "teacher_messages", "teacher_text", "student_context_sha256", "teacher_context_sha256",
)  # fmt: skip


class _Problems:
    """One row for each problem of a run.

    Args:
        folder: of the run.
        answer_field: the problem's field with the expected answer.

    Attributes:
        left_out, with_others: see `Exported`.
    """

    def __init__(self, folder: Path, answer_field: str):
        manifests = read_manifests(folder)
        config: dict[str, Any] = next((manifest["config"] for manifest in manifests if manifest.get("config")), {})
        data = config.get("data", {})
        self._source = public_name(data.get("path") or folder.resolve().name)
        self._split = (data.get("split") or "train").partition("[")[0]
        self._strategies = [strategy["name"] for strategy in config.get("contexts", {}).get("strategies", [])]
        self._answer_field = answer_field
        self.left_out: Counter[str] = Counter()
        self.with_others = 0

    def shaped(
        self, rows: Iterable[dict[str, Any]], format: str
    ) -> Iterator[tuple[dict[str, Any], dict[str, Any] | None]]:
        """(record, row in one of `PROBLEMS`) of each problem. The record is that of the first accepted sample, or else
        of the first rejected one; of two strategies', that of the one which the run's file names first."""
        best: dict[str, dict[str, Any]] = {}
        contexts: dict[str, set[tuple[str, str]]] = {}
        unfit: dict[str, str] = {}
        for row in rows:
            name = row["problem_id"]
            if reason := self._unfit(row):
                unfit[name] = reason
                continue
            contexts.setdefault(name, set()).add((row["student_context_sha256"], row["teacher_context_sha256"]))
            if name not in best or self._rank(row) < self._rank(best[name]):
                best[name] = row
        self.left_out.update(reason for name, reason in unfit.items() if name not in best)
        self.with_others = sum(len(read) > 1 for read in contexts.values())
        for index, row in enumerate(best.values()):
            yield row, self._shaped(row, format, index)

    def _shaped(self, row: dict[str, Any], format: str, index: int) -> dict[str, Any]:
        prompt, teacher_prompt = (
            row[f"{side}_text"] if row[f"{side}_messages"] is None else row[f"{side}_messages"]
            for side in ("student", "teacher")
        )
        answer, fields = self._answer(row), _fields(row)
        if format == "sdft":
            return {"prompt": prompt, "privileged_context": answer}
        source = _written(fields.get("data_source")) or self._source
        known = {"problem_id": row["problem_id"], "strategy": row["strategy"], "teacher_prompt": teacher_prompt}
        if format == "slime":
            return {"prompt": prompt, "label": answer, "metadata": {"source_name": source, **known}}
        if isinstance(prompt, str):
            raise ValueError("--format: the run has plain-text contexts, and verl reads chats; use slime or sdft.")
        return {
            "data_source": source,
            "prompt": prompt,
            "ability": _written(fields.get("ability")) or "general",
            "reward_model": {"style": "rule", "ground_truth": answer},
            "extra_info": {"split": self._split, "index": index, **known},
        }

    def _answer(self, row: dict[str, Any]) -> str:
        fields = _fields(row)
        if self._answer_field not in fields:
            raise ValueError(
                f"--answer-field: the run's problems have no field {self._answer_field!r}. Name the one with the "
                f"expected answer: {', '.join(sorted(fields))}."
            )
        return _written(fields[self._answer_field])

    def _unfit(self, row: dict[str, Any]) -> str | None:
        if not self._answer(row).strip():
            return ANSWER
        messages = row["student_messages"]
        return TURN if messages is not None and messages[-1]["role"] != "user" else None

    def _rank(self, row: dict[str, Any]) -> tuple[bool, int, int, str]:
        name = row["strategy"]
        place = self._strategies.index(name) if name in self._strategies else len(self._strategies)
        return not row["accepted"], row["sample_index"], place, name


def _fields(row: dict[str, Any]) -> dict[str, Any]:
    return json.loads(row["fields"], parse_float=WrittenFloat)


def _written(value: Any) -> str:
    """As text; nothing of None."""
    return "" if value is None else value if isinstance(value, str) else written_json(value, sort_keys=True)


def _write_jsonl(path: Path, rows: Iterator[dict[str, Any]]) -> int:
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


def _write_parquet(
    path: Path, rows: Iterator[dict[str, Any]], optional: list[str], per_token: list[str], *, records: bool
) -> int:
    import pyarrow
    import pyarrow.parquet as parquet

    names, size = schema(optional), batch_size(optional)
    for name in per_token:
        names = names.append(pyarrow.field(name, pyarrow.list_({"mask": pyarrow.int8()}.get(name, pyarrow.float32()))))
    batch: list[dict[str, Any]] = []
    writer, count = None, 0

    def flush() -> None:
        nonlocal writer, count
        table = pyarrow.Table.from_pylist(batch)
        if records:
            table = pyarrow.Table.from_pylist(batch, names)
        else:  # columns of a run keep their types, where the first rows may have none but nulls
            stored = {f.name: f.name.removeprefix("chosen_").removeprefix("rejected_") for f in table.schema}
            stored = {name: name if name in names.names else other for name, other in stored.items()}
            typed = [
                names.field(stored[f.name]).with_name(f.name) if stored[f.name] in names.names else f
                for f in table.schema
            ]
            table = pyarrow.Table.from_pylist(batch, pyarrow.schema(typed))
        if writer is None:
            writer = parquet.ParquetWriter(path, table.schema, compression="zstd")
        writer.write_table(table)
        count += len(batch)
        batch.clear()

    for row in rows:
        batch.append(row)
        if len(batch) == size:
            flush()
    if batch:
        flush()
    if writer is not None:
        writer.close()
    return count
