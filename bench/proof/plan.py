"""The matrix in order of worth: what is run first, what a smaller budget leaves out, and what each part should take."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.proof.lines import Line, Results
from bench.proof.policies import MEASURE, POLICIES
from bench.proof.scales import Scale
from bench.proof.sources import SOURCES, VARIANTS, is_whole
from bench.proof.tasks import TASKS

NOTHING, REFERENCE = "nothing", "reference"


@dataclasses.dataclass(frozen=True)
class Cell:
    """One result line to be: see `bench.proof.lines.KEY`."""

    kind: str
    task: str
    arm: str
    level: str = "all"
    seed: int = 0
    round: int = 0

    @property
    def key(self) -> tuple:
        return dataclasses.astuple(self)

    def __str__(self) -> str:
        level = "" if self.level == "all" else f" at equal {self.level}"
        round = f", round {self.round}" if self.round else ""
        return f"{self.kind} {self.task} {self.arm}{level}, seed {self.seed}{round}"


@dataclasses.dataclass(frozen=True)
class Part:
    """arms: (arm, level), trained over all seeds. why: what it decides."""

    task: str
    arms: tuple[tuple[str, str], ...]
    why: str


def _at(level: str, *arms: str) -> tuple[tuple[str, str], ...]:
    return tuple((arm, level) for arm in arms)


PARTS: tuple[Part, ...] = (
    Part("one-step", _at("passes", "mix", "rs", REFERENCE), "H1, H2, H7"),
    Part("two-step", _at("passes", "star", "mix"), "H3"),
    Part("skilled", _at("rounds", "mix-kl", "own-kl"), "H8, H9"),
    Part("one-step", _at("tokens", "mix", "mix-sound"), "H5"),
    Part("one-step", _at("passes", "shuffled"), "H6"),
    Part("one-step", _at("passes", "escalation"), "H4"),
    Part("rule", _at("tokens", "mix", "teacher"), "H11, H12"),
    Part("skilled", _at("rounds", "mix-sft"), "H10"),
    Part("one-step", _at("passes", "star"), "rationalisation where the student is not hopeless"),
    Part("two-step", _at("passes", "escalation", REFERENCE), "escalation where the student is hopeless"),
    Part("one-step", _at("passes", "budget-0.5", "budget-0.1", "teacher"), "KL budgets; the teacher alone"),
    Part("one-step", _at("tokens", "rs", "star", "escalation", "shuffled", REFERENCE), "equal tokens"),
    Part(
        "one-step", _at("passes", "rs-sound", "star-sound", "mix-sound", "escalation-sound", "rs-nospike",
                        "star-nospike", "mix-nospike", "escalation-nospike"), "leap filters at equal passes",
    ),
    Part("two-step", _at("passes", "rs", "star-sound", "mix-sound", "escalation-sound"), "leap filters, two steps"),
    Part("skilled", _at("rounds", "teacher-kl"), "the teacher's own prefixes"),
)  # fmt: skip
TOKENS_OF = ("rs", "mix", "mix-sound", "star", "teacher")
"""Of these arms the one with the fewest accepted tokens says how many there are at equal tokens."""


def split(arm: str) -> tuple[str, str]:
    """(policy, variant) of an arm's name, such as ``mix-sound``."""
    policy, dash, variant = arm.rpartition("-")
    return (policy, variant) if dash and variant in VARIANTS else (arm, "plain")


def data_arms(task: str) -> list[str]:
    """Arms that a task's pools can make, with each filter; what each holds costs no model."""
    has = set(TASKS[task].sources)
    policies = [name for name in POLICIES if sources_of(name) <= has]
    variants = VARIANTS if TASKS[task].verified else ("plain",)
    return [policy if variant == "plain" else f"{policy}-{variant}" for policy in policies for variant in variants]


def tokens_of(task: str) -> list[str]:
    """`TOKENS_OF`, as far as the task has them."""
    return [arm for arm in data_arms(task) if arm in TOKENS_OF]


def sources_of(arm: str) -> set[str]:
    """The pools that an arm draws from."""
    return {stage.source for stage in POLICIES[split(arm)[0]]}


def needs(cell: Cell) -> Iterator[Cell]:
    """What has to be there before a cell."""
    if cell.kind in ("train", "data"):
        arms = [] if cell.arm == REFERENCE else [cell.arm, MEASURE]
        arms += tokens_of(cell.task) if cell.level == "tokens" else []
        wanted = set().union(*map(sources_of, arms))
        for source in TASKS[cell.task].sources:
            if source in wanted:
                yield Cell("sample", cell.task, source, seed=cell.seed)
    if cell.kind in ("train", "rounds"):
        yield Cell("untrained", cell.task, NOTHING)
    if cell.kind == "rounds":
        yield Cell("teacher", cell.task, "teacher")
        for round in range(1, cell.round):
            yield dataclasses.replace(cell, round=round)


def cells(scale: Scale, parts: Sequence[Part] = PARTS) -> list[Cell]:
    """All of the matrix, each cell once, after what it needs. Behind the samples come the data of every arm that they
    are enough for."""
    ordered: dict[Cell, None] = {}

    def add(cell: Cell) -> None:
        for needed in needs(cell):
            add(needed)
        ordered.setdefault(cell)

    for part in parts:
        for seed in scale.seeds:
            for arm, level in part.arms:
                if level == "rounds":
                    for round in range(1, scale.rounds + 1):
                        add(Cell("rounds", part.task, arm, seed=seed, round=round))
                    continue
                train = Cell("train", part.task, arm, level, seed)
                for needed in needs(train):
                    add(needed)
                for data in data_arms(part.task):
                    cell = Cell("data", part.task, data, "passes", seed)
                    if all(needed in ordered for needed in needs(cell)):
                        add(cell)
                add(train)
    return list(ordered)


def to_run(ordered: Sequence[Cell], results: Results, out: Path) -> list[Cell]:
    """Of these cells the ones that have no line, and samples that those need and `out` does not hold, because they were
    drawn on another machine."""
    lacking = {cell for cell in ordered if not results.has(cell.key)}
    needed = {need for cell in lacking for need in needs(cell) if need.kind == "sample"}
    gone = {cell for cell in needed if not is_whole(TASKS[cell.task], cell.seed, cell.arm, out)}
    return [cell for cell in ordered if cell in lacking | gone]


PASSES = {"shared": 276.0, "alone": 240.0, "lockstep": 250.0}
"""Forward passes a second at batch 32 on two cores: 138 mixed tokens with shared weights, 240 of plain requests, 125
mixed ones in lockstep; docs/benchmarks.md."""
TOKENS = {"one-step": 45, "two-step": 60, "rule": 45, "skilled": 45}
"""Of a sample; measured before, but for the last two."""
TRAIN, WRITE, LOAD, START = 0.6, 0.004, 4.0, 40.0
"""Seconds: for one sample in a step; a token of an evaluation; a model and its compilation; a server."""


def estimate(cell: Cell, scale: Scale, lines: Sequence[Line] = ()) -> float:
    """Seconds that a cell should take: the mean of those like it that were run, or of rates measured before on two
    cores (a GPU's are not known: the same, so that a first budget leaves out too much rather than too little)."""
    like = [line["seconds"] for line in lines if (line["kind"], line["task"]) == (cell.kind, cell.task)]
    same = [line["seconds"] for line in lines if cell.kind == "sample" and line["arm"] == cell.arm
            and (line["kind"], line["task"]) == (cell.kind, cell.task)]  # fmt: skip
    if same or like:
        return statistics.mean(same or like)
    tokens = TOKENS[cell.task]
    writing = LOAD + scale.held_out * tokens * WRITE
    if cell.kind == "data":
        return 0.5
    if cell.kind == "untrained":
        return writing
    if cell.kind == "sample":
        source = SOURCES[cell.arm]
        rate = PASSES["alone" if cell.arm == "student" else "shared"]
        return scale.problems * source.n * tokens * (1 if cell.arm == "student" else 2) / rate
    if cell.kind == "train":
        return writing + scale.steps * scale.batch * TRAIN
    if cell.kind == "teacher":
        return writing + scale.teacher_steps * scale.batch * TRAIN + START
    sampling = scale.round_problems * 2 * tokens * 2 / PASSES["lockstep"]
    return writing + sampling + scale.round_steps * scale.batch * TRAIN
