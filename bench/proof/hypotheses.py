"""What is expected, written down before any run, and the comparison that decides each."""

from __future__ import annotations

import dataclasses

WRITTEN = "2026-11-30"
"""Before the first run."""
MARGIN = 0.05
"""``no less`` is within so much of the other's share."""
LEAST_SEEDS = 3


@dataclasses.dataclass(frozen=True)
class Arm:
    """Which lines: those of `bench.proof.lines.KEY` but the seed."""

    task: str
    arm: str
    level: str = "passes"
    kind: str = "train"
    round: int = 0

    def __str__(self) -> str:
        level = {"passes": "", "tokens": ", equal tokens", "all": ""}[self.level]
        return f"{self.arm}{level}{f', round {self.round}' if self.round else ''}"


@dataclasses.dataclass(frozen=True)
class Hypothesis:
    """says: in words. metric: ``solved`` and ``followed`` of the held-out problems, ``retained`` of those that the
    untrained student solves, ``covered`` of those sampled on. a, b: the arms; wanted: a ``more`` than b, or ``no
    less``. why: where it comes from."""

    name: str
    says: str
    metric: str
    a: Arm
    b: Arm
    wanted: str
    why: str


def _one(arm: str, level: str = "passes") -> Arm:
    return Arm("one-step", arm, level)


def _data(arm: str) -> Arm:
    return Arm("one-step", arm, kind="data")


def _two(arm: str) -> Arm:
    return Arm("two-step", arm)


def _round(arm: str, round: int) -> Arm:
    return Arm("skilled", arm, "all", "rounds", round)


HYPOTHESES: tuple[Hypothesis, ...] = (
    Hypothesis(
        "H1", "At equal forward passes the mixture finds a right sample of more problems than rejection sampling.",
        "covered", _data("mix"), _data("rs"), "more", "57 of 110 against 49 in one earlier draw",
    ),
    Hypothesis(
        "H2", "At equal forward passes the student that learns from the mixture solves more than with rejection "
        "sampling.", "solved", _one("mix"), _one("rs"), "more", "90 and 83 against 78 of 150 in one earlier draw",
    ),
    Hypothesis(
        "H3", "Where the student is hopeless (two steps), rationalisation teaches more than the mixture.",
        "solved", _two("star"), _two("mix"), "more", "a mixture has no plan of its own; STaR (2203.14465)",
    ),
    Hypothesis(
        "H4", "Escalation finds a right sample of more problems than the mixture, at equal passes.",
        "covered", _data("escalation"), _data("mix"), "more", "it spends the teacher where the student fails alone",
    ),
    Hypothesis(
        "H5", "At equal training tokens, mixture samples without leaps (all equations true) teach more than all "
        "accepted ones.", "solved", _one("mix-sound", "tokens"), _one("mix", "tokens"), "more",
        "an earlier draw did not show it (14 : 14, 15 : 6 against it); 2606.00628 and others expect it",
    ),
    Hypothesis(
        "H6", "The right hint is what helps: the mixture teaches more than the same with another problem's solution.",
        "solved", _one("mix"), _one("shuffled"), "more", "elsewhere wrong hints were found to do as well",
    ),
    Hypothesis(
        "H7", "Where worked solutions exist, plain SFT on them is no worse than the mixture.",
        "solved", _one("reference"), _one("mix"), "no less", "91 against 90 and 83 of 150 in one earlier draw",
    ),
    Hypothesis(
        "H8", "With a skilled teacher without privilege, prefixes from the mixture at a falling KL budget and a "
        "per-token loss beat the student's own after the first round.", "solved", _round("mix-kl", 1),
        _round("own-kl", 1), "more", "TRB (2605.31159), SKD (2410.11325)",
    ),
    Hypothesis(
        "H9", "And they are no worse after the last.", "solved", _round("mix-kl", 3), _round("own-kl", 3), "no less",
        "TRB (2605.31159): the budget goes to nothing",
    ),
    Hypothesis(
        "H10", "On the mixture's samples the per-token loss teaches more than SFT on the accepted ones.",
        "solved", _round("mix-kl", 3), _round("mix-sft", 3), "more", "all of the cited works use a per-token loss",
    ),
    Hypothesis(
        "H11", "Of a shared rule without a verifier, the mixture's samples teach no less than the teacher's, at equal "
        "tokens.", "followed", Arm("rule", "mix", "tokens"), Arm("rule", "teacher", "tokens"), "no less",
        "2605.11182: privileged distillation works for shared rules",
    ),
    Hypothesis(
        "H12", "And the student forgets less of what it could do.", "retained", Arm("rule", "mix", "tokens"),
        Arm("rule", "teacher", "tokens"), "more", "the mixture's texts are nearer to the student",
    ),
)  # fmt: skip
