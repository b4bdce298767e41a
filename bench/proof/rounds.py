"""A skilled teacher without privilege: rounds of sampling, training and updating the student in the running server."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.proof.scales import Scale
from bench.proof.tasks import QUESTION, Task, rows_of
from sglang_optimal.demo.loop.problems import WordProblem
from sglang_optimal.distill.config import parse_config
from sglang_optimal.distill.passes import passes
from sglang_optimal.distill.pipeline import run
from sglang_optimal.distill.store import KINDS, find_shards, read_rows
from sglang_optimal.train import Objective

BUDGETS = (0.5, 0.2, 0.05)
"""Nats a token, by round: more of the student as it learns (TRB, arXiv 2605.31159, anneals to 0)."""
TOP_K = 32
SAMPLES = 2
TEACHER_SEED = 2_000_003


@dataclasses.dataclass(frozen=True)
class RoundArm:
    """mixing: of each round. loss: of `sglang_optimal.train.LOSSES`; ``sft`` is on accepted samples, a divergence on
    all, since it needs no verifier."""

    mixing: tuple[Mapping[str, float], ...]
    loss: str

    def of(self, round: int) -> dict[str, float]:
        """The section ``mixing`` of a round, from 1 on; the last one's goes on."""
        return dict(self.mixing[min(round, len(self.mixing)) - 1])


_FALLING = tuple({"kl_budget": budget} for budget in BUDGETS)
ROUND_ARMS: Mapping[str, RoundArm] = {
    "mix-kl": RoundArm(_FALLING, "reverse_kl"),
    "own-kl": RoundArm(({"fixed_alpha": 0.0},), "reverse_kl"),
    "mix-sft": RoundArm(_FALLING, "sft"),
    "teacher-kl": RoundArm(({"fixed_alpha": 1.0},), "reverse_kl"),
}


def problems_of(task: Task, scale: Scale, seed: int, round: int) -> list[WordProblem]:
    """New ones in each round."""
    count = scale.round_problems
    return task.training(count * scale.rounds, seed)[count * (round - 1) : count * round]


def teacher_problems(task: Task, scale: Scale) -> list[WordProblem]:
    """Problems whose solutions the teacher learns: none that a student samples on or is judged by."""
    taken = {p.problem for seed in scale.seeds for p in task.training(scale.round_problems * scale.rounds, seed)}
    made = task.training(scale.teacher_problems + len(taken), TEACHER_SEED)
    return [problem for problem in made if problem.problem not in taken][: scale.teacher_problems]


def sample_round(
    task: Task, scale: Scale, seed: int, round: int, mixing: dict[str, float], folder: Path, url: str, console: Console
) -> list[dict[str, Any]]:
    """The records of a round, accepted and rejected; what is there is not sampled again."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    data = folder.with_name(f"{folder.name}.jsonl")
    rows = [{**row, "id": f"{round}-{row['id']}"} for row in rows_of(problems_of(task, scale, seed, round))]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "data": {"path": str(data), "fields": {"id": "id"}, "privileged": ["answer", "solution", "wrong_solution"]},
        "contexts": {"format": "chat", "student": QUESTION, "strategies": [{"name": "proof", "teacher": task.teacher}]},
        "sampling": {
            "n": SAMPLES, "max_new_tokens": task.max_new_tokens, "temperature": scale.temperature, "seed": seed,
        },
        "filters": task.filters(),
        "output": {"dir": str(folder), "format": "jsonl", "return_top_k": TOP_K, "top_k_of": ["student"]},
        "client": {"endpoints": [url], "concurrency": scale.concurrency},
        "mixing": mixing,
    }  # fmt: skip
    done = run(parse_config(settings, folder.name), console=console)
    if not done.complete:
        raise RuntimeError(f"{folder}: {done.failed} samples failed; the same command tries them again")
    return [row for kind in KINDS for row in read_rows(find_shards(folder, kind)) if row["num_tokens"]]


def training_rows(records: Sequence[Mapping[str, Any]], loss: str) -> list[dict[str, Any]]:
    """What the loss is taken of."""
    columns = ["student_prompt_ids", "token_ids", "sampling", *(Objective(loss).top_k or ())]
    kept = [record for record in records if loss != "sft" or record["accepted"]]
    return [{name: record[name] for name in columns} for record in kept]


def figures_of(records: Sequence[Mapping[str, Any]], problems: int) -> dict[str, Any]:
    """Of a round's records, for its line."""
    accepted = [record for record in records if record["accepted"]]
    return {
        "problems": problems,
        "samples": len(records),
        "passes": sum(passes(dict(record)) for record in records),
        "tokens": sum(record["num_tokens"] for record in records),
        "covered": len({record["problem_id"] for record in accepted}),
        "accepted": len(accepted),
        "accepted_tokens": sum(record["num_tokens"] for record in accepted),
    }


def forget(folder: Path) -> None:
    """A checkpoint that is not needed any more."""
    shutil.rmtree(folder, ignore_errors=True)
