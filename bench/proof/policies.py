"""Arms: which samples each takes from the pools, at equal forward passes or at equal tokens. Pure functions."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence

from bench.proof.sources import Drawn

Pools = Mapping[str, Mapping[str, Sequence[Drawn]]]
"""Source: problem: its samples in their order."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """rounds: samples of each problem; None: as many as there are. unsolved: only of problems that have no accepted
    sample yet."""

    source: str
    rounds: int | None = None
    unsolved: bool = False


POLICIES: Mapping[str, tuple[Stage, ...]] = {
    "rs": (Stage("student"),),
    "star": (Stage("student", 2), Stage("teacher", None, unsolved=True)),
    "mix": (Stage("mixture"),),
    "budget-0.1": (Stage("budget-0.1"),),
    "budget-0.5": (Stage("budget-0.5"),),
    "escalation": (
        Stage("student", 1), Stage("student", 1, unsolved=True), Stage("budget-0.1", 1, unsolved=True),
        Stage("budget-0.5", 1, unsolved=True), Stage("mixture", 1, unsolved=True),
        Stage("teacher", None, unsolved=True),
    ),
    "shuffled": (Stage("shuffled"),),
    "teacher": (Stage("teacher"),),
}  # fmt: skip
"""``rs``: rejection sampling. ``star``: rationalisation, the student first, the teacher with the answer for the rest.
``mix``: kl_symmetry. ``escalation``: more and more of the teacher for what is not solved yet."""
MEASURE = "mix"
"""The policy whose passes the others may spend."""


@dataclasses.dataclass(frozen=True)
class Taken:
    """samples: all that were drawn, in their order. variant: the filter that judged."""

    samples: tuple[Drawn, ...]
    variant: str

    @property
    def accepted(self) -> list[Drawn]:
        return [sample for sample in self.samples if sample.accepted[self.variant]]

    @property
    def passes(self) -> int:
        return sum(sample.passes(self.variant) for sample in self.samples)

    @property
    def tokens(self) -> int:
        return sum(sample.tokens for sample in self.samples)

    @property
    def accepted_tokens(self) -> int:
        return sum(sample.tokens for sample in self.accepted)

    def covered(self, problems: Sequence[str]) -> str:
        """``1`` for each problem with an accepted sample."""
        has = {sample.problem for sample in self.accepted}
        return "".join("01"[problem in has] for problem in problems)


def take(
    stages: Sequence[Stage], pools: Pools, problems: Sequence[str], variant: str, budget: int | None = None
) -> Taken:
    """What a policy draws.

    In rounds: in each stage every problem's next sample of that source, then every one's next again. It ends before the
    first sample that would go beyond the budget.

    Args:
        pools: of every source that the stages name.
        variant: the filter; a problem is solved when a sample of it passes.
        budget: forward passes; None: no end.
    """
    drawn: list[Drawn] = []
    used: dict[tuple[str, str], int] = {}
    solved: set[str] = set()
    spent = 0
    for stage in stages:
        pool = pools[stage.source]
        rounds = max((len(samples) for samples in pool.values()), default=0) if stage.rounds is None else stage.rounds
        for _ in range(rounds):
            # Decided as a whole round: its requests are in flight together.
            asked = [problem for problem in problems if not (stage.unsolved and problem in solved)]
            for problem in asked:
                place = used.get((stage.source, problem), 0)
                samples = pool.get(problem, ())
                if place >= len(samples):
                    continue
                sample = samples[place]
                spent += sample.passes(variant)
                if budget is not None and spent > budget:
                    return Taken(tuple(drawn), variant)
                used[stage.source, problem] = place + 1
                drawn.append(sample)
                if sample.accepted[variant]:
                    solved.add(problem)
    return Taken(tuple(drawn), variant)


def cut(samples: Sequence[Drawn], tokens: int, seed: int) -> list[Drawn]:
    """Of the samples, in an order that the seed draws, those that fit into so many tokens."""
    order = sorted(samples, key=lambda sample: (sample.problem, sample.source, sample.index))
    random.Random(seed).shuffle(order)
    kept, used = [], 0
    for sample in order:
        if used + sample.tokens <= tokens:
            kept.append(sample)
            used += sample.tokens
    return kept
