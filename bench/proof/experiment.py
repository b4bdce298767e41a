"""Runs the matrix cell by cell, and writes each one's line."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from bench.proof import rounds
from bench.proof.lines import Results
from bench.proof.plan import REFERENCE, Cell, estimate, sources_of, split, to_run, tokens_of
from bench.proof.policies import MEASURE, POLICIES, Pools, Taken, cut, take
from bench.proof.sources import Drawn, pool, sample
from bench.proof.tasks import TASKS, Task, followed, judged
from bench.proof.training import answers, load, save, solution_rows, trained
from sglang_optimal.demo.loop.evaluate import update_student


class Servers(Protocol):
    """What `bench.proof.engines.Engines` is here."""

    def url(self, kind: str) -> str: ...


class Experiment:
    """Args: results: where lines go. out: samples and checkpoints, kept so that a killed run goes on. model: folder."""

    def __init__(self, results: Results, out: Path, model: str, engines: Servers, console: Console):
        self.results, self.scale, self.out, self.model = results, results.scale, out, model
        self.engines, self.console = engines, console
        self._pools: dict[str, dict[str, list[Drawn]]] = {}
        self._pools_are: tuple[str, int] | None = None

    def run(self, cells: Sequence[Cell], budget: float | None = None) -> list[Cell]:
        """Run what has no line yet, in order; what was sampled on another machine is sampled again where it is needed.

        Args:
            budget: seconds; ends before the first cell that should go beyond it.

        Returns:
            Cells that were not run.
        """
        began = time.monotonic()
        missing = to_run(cells, self.results, self.out)
        for i, cell in enumerate(missing):
            spent = time.monotonic() - began
            if budget is not None and spent + estimate(cell, self.scale, self.results.lines) > budget:
                return missing[i:]
            self.console.print(f"{spent / 60:5.1f} min  {i + 1} of {len(missing)}: {cell}")
            start = time.monotonic()
            line = _KINDS[cell.kind](self, cell)
            if self.results.has(cell.key):  # drawn again
                continue
            self.results.append(
                {
                    **dict(zip(("kind", "task", "arm", "level", "seed", "round"), cell.key, strict=True)), **line,
                    "seconds": round(time.monotonic() - start, 2),
                }
            )  # fmt: skip
            if cell.round > 1:  # the line is safe, and the checkpoint before is not needed any more
                rounds.forget(self._student(cell, cell.round - 1))
        return []

    # One method for each kind of cell; each returns what its line says.

    def _untrained(self, cell: Cell) -> dict[str, Any]:
        model, tokenizer = load(self.model, self.scale)
        return self._evaluated(model, tokenizer, TASKS[cell.task])

    def _sample(self, cell: Cell) -> dict[str, Any]:
        task = TASKS[cell.task]
        sample(task, self.scale, cell.seed, cell.arm, self.out, self.engines.url("shared"), self.console)
        problems = self._problems(task)
        samples = pool(task, cell.seed, cell.arm, self.out)
        drawn = tuple(each for problem in problems for each in samples.get(problem, ()))
        return self._counted(Taken(drawn, "plain"), task)

    def _data(self, cell: Cell) -> dict[str, Any]:
        return self._counted(self._taken(cell), TASKS[cell.task])

    def _train(self, cell: Cell) -> dict[str, Any]:
        task = TASKS[cell.task]
        model, tokenizer = load(self.model, self.scale)
        if cell.arm == REFERENCE:
            rows = solution_rows(tokenizer, task.training(self.scale.problems, cell.seed))
            line: dict[str, Any] = {"problems": len(rows), "passes": 0}
            if cell.level == "tokens":
                rows = _fitting(rows, self._equal_tokens(cell))
        else:
            taken = self._taken(cell)
            line = self._counted(taken, task)
            samples: Sequence[Drawn] = taken.accepted
            if cell.level == "tokens":
                samples = cut(samples, self._equal_tokens(cell), cell.seed)
            rows = [each.row() for each in samples]
        line |= {"trained_samples": len(rows), "trained_tokens": sum(len(row["completion_ids"]) for row in rows)}
        if not rows:  # the student stays what it was
            before = self.results.find(kind="untrained", task=cell.task)
            assert before is not None
            names = ("solved_problems", "followed_problems")
            return line | {"steps": 0} | {name: before[name] for name in names}
        folder = self.out / "trainer"
        model, figures = trained(model, rows, self.scale, folder, steps=self.scale.steps, seed=cell.seed)
        return line | figures | self._evaluated(model, tokenizer, task)

    def _teacher(self, cell: Cell) -> dict[str, Any]:
        task = TASKS[cell.task]
        model, tokenizer = load(self.model, self.scale)
        rows = solution_rows(tokenizer, rounds.teacher_problems(task, self.scale))
        model, figures = trained(model, rows, self.scale, self.out / "trainer", steps=self.scale.teacher_steps, seed=0)
        line = self._evaluated(model, tokenizer, task)
        _save_whole(model, tokenizer, self.out / "teacher")
        tokens = sum(len(row["completion_ids"]) for row in rows)
        return {"trained_samples": len(rows), "trained_tokens": tokens, **figures, **line}

    def _rounds(self, cell: Cell) -> dict[str, Any]:
        task, arm = TASKS[cell.task], rounds.ROUND_ARMS[cell.arm]
        before = self._student(cell, cell.round - 1)
        if not (before / "config.json").exists():
            raise ValueError(
                f"--out: {before} is not there, the student after round {cell.round - 1}; give the folder of the runs "
                "that the results are of, or another --results."
            )
        url = self.engines.url("skilled")
        update_student(url, str(before.resolve()), f"seed-{cell.seed}-{cell.arm}-{cell.round - 1}")
        mixing = arm.of(cell.round)
        name, value = next(iter(mixing.items()))
        # In the first round all students are one, and the same samples serve each arm that asks for them.
        parent = self._folder(cell) if cell.round > 1 else self.out / cell.task / f"seed-{cell.seed}" / "first-round"
        folder = parent / f"round-{cell.round}-{name}-{value}"
        records = rounds.sample_round(task, self.scale, cell.seed, cell.round, mixing, folder, url, self.console)
        line = rounds.figures_of(records, self.scale.round_problems)
        rows = rounds.training_rows(records, arm.loss)
        model, tokenizer = load(before, self.scale)
        line |= {"loss": arm.loss, "trained_samples": len(rows)}
        line["trained_tokens"] = sum(len(row["token_ids"]) for row in rows)
        if rows:
            steps = self.scale.round_steps
            model, figures = trained(
                model, rows, self.scale, self.out / "trainer", steps=steps, seed=cell.seed, loss=arm.loss
            )
            line |= figures
        line |= self._evaluated(model, tokenizer, task)
        _save_whole(model, tokenizer, self._student(cell, cell.round))
        return line

    def _folder(self, cell: Cell) -> Path:
        return self.out / cell.task / f"seed-{cell.seed}" / cell.arm

    def _student(self, cell: Cell, round: int) -> Path:
        """The checkpoint after a round; before the first the model itself."""
        return self._folder(cell) / f"student-{round}" if round else Path(self.model)

    def _evaluated(self, model: Any, tokenizer: Any, task: Task) -> dict[str, Any]:
        problems = task.held_out(self.scale.held_out)
        texts = answers(model, tokenizer, problems, self.scale, task.max_new_tokens)
        return {"solved_problems": judged(texts, problems), "followed_problems": followed(texts)}

    def _problems(self, task: Task) -> list[str]:
        """Their ids."""
        return [f"{i:04d}" for i in range(self.scale.problems)]

    def _pools_of(self, task: Task, seed: int, sources: set[str]) -> Pools:
        """Read once, as long as no other task or seed is asked for."""
        if self._pools_are != (task.name, seed):
            self._pools_are = (task.name, seed)
            self._pools = {}
        for name in sources - set(self._pools):
            self._pools[name] = pool(task, seed, name, self.out)
        return self._pools

    def _taken(self, cell: Cell) -> Taken:
        task = TASKS[cell.task]
        policy, variant = split(cell.arm)
        pools = self._pools_of(task, cell.seed, sources_of(policy) | sources_of(MEASURE))
        problems = self._problems(task)
        most = take(POLICIES[MEASURE], pools, problems, "plain").passes
        return take(POLICIES[policy], pools, problems, variant, most)

    def _equal_tokens(self, cell: Cell) -> int:
        """The accepted tokens of the arm of `tokens_of` that has the fewest, but none."""
        arms = [Cell("data", cell.task, arm, "passes", cell.seed) for arm in tokens_of(cell.task)]
        counts = [self._taken(arm).accepted_tokens for arm in arms]
        return min(count for count in counts if count) if any(counts) else 0

    def _counted(self, taken: Taken, task: Task) -> dict[str, Any]:
        accepted = taken.accepted
        covered = taken.covered(self._problems(task))
        known = [each.surprising for each in accepted if each.surprising is not None]
        return {
            "problems": len(covered), "samples": len(taken.samples), "passes": taken.passes, "tokens": taken.tokens,
            "covered": covered.count("1"), "covered_problems": covered, "accepted": len(accepted),
            "accepted_tokens": taken.accepted_tokens,
            "sound": sum(each.accepted["sound"] for each in accepted) if task.verified else None,
            "surprises": sum(known), "surprises_of": len(known),
        }  # fmt: skip


_KINDS: dict[str, Callable[[Experiment, Cell], dict[str, Any]]] = {
    "untrained": Experiment._untrained, "sample": Experiment._sample, "data": Experiment._data,
    "train": Experiment._train, "teacher": Experiment._teacher, "rounds": Experiment._rounds,
}  # fmt: skip


def _fitting(rows: list[dict[str, Any]], tokens: int) -> list[dict[str, Any]]:
    """The first rows that fit."""
    kept, used = [], 0
    for row in rows:
        if used + len(row["completion_ids"]) <= tokens:
            kept.append(row)
            used += len(row["completion_ids"])
    return kept


def _save_whole(model: Any, tokenizer: Any, folder: Path) -> None:
    """All of a checkpoint or none of it."""
    part = folder.with_name(f".{folder.name}")
    shutil.rmtree(part, ignore_errors=True)
    save(model, tokenizer, part)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)
