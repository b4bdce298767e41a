"""Where samples come from: runs of `sglang_optimal.distill`, one for each way to sample, judged by each filter.

Every arm draws from these pools, so nothing is sampled twice: a sample of a way at a problem is the same draw whichever
policy asks for it.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from bench.proof.scales import Scale
from bench.proof.tasks import Task, rows_of
from sglang_optimal.distill.config import parse_config
from sglang_optimal.distill.manifests import read_manifests
from sglang_optimal.distill.pipeline import run
from sglang_optimal.distill.refilter import filter_run
from sglang_optimal.distill.store import KINDS, find_shards, read_rows
from sglang_optimal.distill.surprise import tokens_below


@dataclasses.dataclass(frozen=True)
class Source:
    """mixing: the run's section. n: samples a problem. models: that are needed for a token (another may run along, for
    its log-probabilities). shuffled: the teacher reads another problem's solution."""

    mixing: dict[str, Any]
    n: int
    models: int = 2
    shuffled: bool = False


SOURCES: Mapping[str, Source] = {
    # At one pass a token against two, and with a sample to spare where its texts are the shorter ones.
    "student": Source({"fixed_alpha": 0.0}, 5, models=1),
    "mixture": Source({"alpha_method": "kl_symmetry"}, 2),
    "budget-0.1": Source({"kl_budget": 0.1}, 2),
    "budget-0.5": Source({"kl_budget": 0.5}, 2),
    "teacher": Source({"fixed_alpha": 1.0}, 2, models=1),
    "shuffled": Source({"alpha_method": "kl_symmetry"}, 2, shuffled=True),
}
VARIANTS: Mapping[str, dict[str, Any] | None] = {
    "plain": None,
    "sound": {"type": "equations"},
    "nospike": {"type": "surprise", "max_tokens_below_floor": 0},
}
"""Filters on top of the task's own. ``nospike``: no token with a student probability below 0.001."""


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A sample. accepted: by variant. surprising: None where the student's log-probabilities are not known."""

    source: str
    problem: str
    index: int
    tokens: int
    accepted: Mapping[str, bool]
    surprising: bool | None
    prompt_ids: tuple[int, ...] = ()
    token_ids: tuple[int, ...] = ()

    def passes(self, variant: str) -> int:
        """Forward passes of its tokens that a run with this filter needs: the teacher's text alone takes the student's
        log-probabilities where surprises are judged. Prompts are not counted."""
        models = SOURCES[self.source].models
        return self.tokens * (2 if self.source == "teacher" and variant == "nospike" else models)

    def row(self) -> dict[str, list[int]]:
        """For a trainer."""
        return {"prompt_ids": list(self.prompt_ids), "completion_ids": list(self.token_ids)}


def folder_of(out: Path, task: Task, seed: int, source: str) -> Path:
    return out / task.name / f"seed-{seed}" / source


def settings_of(task: Task, scale: Scale, seed: int, name: str, data: Path, folder: Path, url: str) -> dict[str, Any]:
    """The file of a source's run."""
    source = SOURCES[name]
    return {
        "data": {"path": str(data), "fields": {"id": "id"}, "privileged": ["answer", "solution", "wrong_solution"]},
        "contexts": task.contexts(shuffled=source.shuffled),
        "sampling": {
            "n": source.n, "max_new_tokens": task.max_new_tokens, "temperature": scale.temperature, "seed": seed,
        },
        "filters": task.filters(),
        "output": {"dir": str(folder), "format": "jsonl"},
        "client": {"endpoints": [url], "concurrency": scale.concurrency},
        "mixing": source.mixing,
    }  # fmt: skip


def judged_by(task: Task) -> dict[str, dict[str, Any]]:
    """The variants that samples of a task are judged by, in folders of their own."""
    return {variant: more for variant, more in VARIANTS.items() if more is not None and task.verified}


def sample(task: Task, scale: Scale, seed: int, name: str, out: Path, url: str, console: Console) -> None:
    """Sample what is missing of a source, and judge all of it by every variant.

    Raises:
        RuntimeError: samples failed; the same command tries them again.
    """
    folder = folder_of(out, task, seed, name)
    data = folder.parent / "problems.jsonl"
    data.parent.mkdir(parents=True, exist_ok=True)
    rows = rows_of(task.training(scale.problems, seed))
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run(parse_config(settings_of(task, scale, seed, name, data, folder, url), name), console=console)
    if not done.complete:
        raise RuntimeError(f"{folder}: {done.failed} samples failed; the same command tries them again")
    for variant, more in judged_by(task).items():
        target = folder.with_name(f"{name}-{variant}")
        shutil.rmtree(target, ignore_errors=True)  # half of one, of a killed run
        config = folder.with_name(f"{name}-{variant}.yaml")
        filters = task.filters()
        config.write_text(yaml.safe_dump({"filters": [*filters[:-1], more, filters[-1]]}))
        filter_run(folder, target, config)


def is_whole(task: Task, seed: int, name: str, out: Path) -> bool:
    """Whether a source was sampled and judged to its end on this machine."""
    folder = folder_of(out, task, seed, name)
    folders = [folder, *(folder.with_name(f"{name}-{variant}") for variant in judged_by(task))]
    return all([manifest.get("state") for manifest in read_manifests(each)] == ["complete"] for each in folders)


def pool(task: Task, seed: int, name: str, out: Path) -> dict[str, list[Drawn]]:
    """The samples of a source, by problem, each one's in their order."""
    folder = folder_of(out, task, seed, name)
    accepted = {"plain": _accepted(folder)}
    for variant in VARIANTS:
        judged = folder.with_name(f"{name}-{variant}")
        accepted.setdefault(variant, _accepted(judged) if judged.exists() else accepted["plain"])
    found: dict[str, list[Drawn]] = {}
    for kind in KINDS:
        for row in read_rows(find_shards(folder, kind)):
            logprobs = row["student_logprob"] or []
            drawn = Drawn(
                name, row["problem_id"], row["sample_index"], row["num_tokens"],
                {variant: row["id"] in ids for variant, ids in accepted.items()},
                tokens_below(logprobs) > 0 if len(logprobs) == row["num_tokens"] else None,
                tuple(row["student_prompt_ids"] or ()), tuple(row["token_ids"]),
            )  # fmt: skip
            found.setdefault(drawn.problem, []).append(drawn)
    for samples in found.values():
        samples.sort(key=lambda each: each.index)
    return found


def _accepted(folder: Path) -> set[str]:
    return {row["id"] for row in read_rows(find_shards(folder, "accepted"), ["id"])}
