"""Runs made by hand: records whose every number a test knows."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sglang_optimal.distill.config import DistillConfig, parse_config
from sglang_optimal.distill.records import Record
from sglang_optimal.distill.settings import fingerprint
from sglang_optimal.distill.store import RecordStore, find_shards, read_rows

SETTINGS: dict[str, Any] = {
    "contexts": {"student": "{problem}", "strategies": [{"name": "a", "teacher": "{problem} {answer}"}]},
}


def config_of(**sections: Any) -> DistillConfig:
    return parse_config({**SETTINGS, **sections})


def record(
    problem: str = "p", index: int = 0, *, strategy: str = "a", tokens: int = 2, student: Sequence[float] | None = None,
    mixture: Sequence[float] | None = None, accepted: bool = True, text: str | None = None, **more: Any,
) -> Record:  # fmt: skip
    """A sample of a problem; student, mixture: its log-probabilities, by default −1 and −0.5 a token."""
    student = [-1.0] * tokens if student is None else student
    count = len(student)
    values: dict[str, Any] = {
        "id": f"{problem}/{strategy}/{index}",
        "problem_id": problem,
        "strategy": strategy,
        "sample_index": index,
        "fields": {"problem": f"What is {problem}?", "answer": "1"},
        "teacher_context": [{"role": "user", "content": f"What is {problem}? 1"}],
        "student_context": [{"role": "user", "content": f"What is {problem}?"}],
        "text": f"{problem} {index}: 1" if text is None else text,
        "token_ids": list(range(5, 5 + count)),
        "finish_reason": "stop",
        "alpha": [0.5] * count,
        "teacher_logprob": [-0.25] * count,
        "student_logprob": list(student),
        "mixture_logprob": [-0.5] * count if mixture is None else list(mixture),
        "kl_to_student": [0.125] * count,
        "kl_to_teacher": [0.25] * count,
        "ess_ratio": [1.0] * count,
        "accepted": accepted,
        "models": {"teacher_model": "T", "student_model": "S"},
    }
    if not accepted:
        values |= {"rejected_by": "answer", "reject_reason": "wrong answer"}
    return Record(**values | more)


def refused(problem: str = "p", index: int = 0, **more: Any) -> Record:
    """A request that a server would not take."""
    made = record(problem, index, tokens=0, accepted=False, text="", **more)
    made.finish_reason, made.rejected_by, made.reject_reason = "refused", "server", "too long"
    return made


def make_run(
    folder: Path, records: Sequence[Record], config: DistillConfig | None = None, *, shard: tuple[int, int] = (0, 1),
    finish: bool = True, **manifest: Any,
) -> Path:  # fmt: skip
    """The folder of a run with these records. finish: False leaves them in the journals, as a run that was killed."""
    config = config_of() if config is None else config
    output = config.output
    store = RecordStore(
        folder, shard, format=output.format, shard_records=output.shard_records, series=bool(output.series)
    )
    for made in records:
        store.append(made)
    if finish:
        store.finalize()
    content = {
        "run_id": folder.name, "fingerprint": fingerprint(config), "state": "complete" if finish else "stopped",
        "planned": len(records), "config": config.model_dump(mode="json"),
    }  # fmt: skip
    store.write_json(store.manifest_path, content | manifest)
    store.close()
    return folder


def rows_of(folder: Path) -> dict[str, dict[str, Any]]:
    rows = [row for kind in ("accepted", "rejected") for row in read_rows(find_shards(folder, kind))]
    assert len({row["id"] for row in rows}) == len(rows)
    for row in rows:
        where = "data" if row["accepted"] else "rejected"
        assert (row["rejected_by"] is None) == row["accepted"], where
    return {row["id"]: row for row in rows}


def manifest_of(folder: Path, name: str = "run.json") -> dict[str, Any]:
    return json.loads((folder / name).read_text())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


MINUS_INFINITY = -math.inf
