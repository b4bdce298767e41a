"""Result lines made by hand."""

from __future__ import annotations

from typing import Any

from bench.proof.hypotheses import Arm


def line(arm: Arm | None = None, seed: int = 0, **more: Any) -> dict[str, Any]:
    """A line as `bench.proof.lines.Results` writes it; solved_problems and the like decide its counts."""
    arm = arm or Arm("one-step", "mix")
    values = {
        "kind": arm.kind, "task": arm.task, "arm": arm.arm, "level": arm.level, "seed": seed, "round": arm.round,
        "scale": "cpu", "settings": "s", "model": "small", "time": "2026-12-01T10:00:00", "cpu": "Some CPU", "cores": 2,
        "gpu": None, "versions": {"torch": "2.0"}, "seconds": 30.0, **more,
    }  # fmt: skip
    if "solved_problems" in values:
        solved = values["solved_problems"]
        values |= {"solved": solved.count("1"), "held_out": len(solved)}
        values.setdefault("followed_problems", "0" * len(solved))
    return values
