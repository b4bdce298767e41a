"""How large an experiment is. One declaration for each size of machine."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Scale:
    """name. problems: to sample on, of one task and seed; held_out: to solve. steps, batch: of every training, whatever
    the amount of data, so that arms differ in their data alone. rounds, round_problems, round_steps: with live updates.
    teacher_problems, teacher_steps: of the skilled teacher. concurrency: requests in flight. pool: KV slots of the
    server. generate: held-out problems at once. device: of training and evaluation."""

    name: str
    problems: int
    held_out: int
    seeds: tuple[int, ...]
    steps: int
    batch: int
    rounds: int
    round_problems: int
    round_steps: int
    teacher_problems: int
    teacher_steps: int
    concurrency: int
    pool: int
    generate: int
    device: str = "cpu"
    temperature: float = 0.4
    learning_rate: float = 5e-4

    @property
    def settings(self) -> str:
        """A short hash: lines of other settings are not counted together."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()[:12]


SCALES: Mapping[str, Scale] = {
    scale.name: scale
    for scale in (
        Scale("cpu", 64, 100, (0, 1, 2), 10, 8, 3, 24, 5, 160, 20, 48, 16384, 50),
        Scale("gpu", 400, 400, (0, 1, 2), 24, 32, 3, 128, 12, 400, 40, 256, 200_000, 400, device="cuda"),
        Scale("smoke", 4, 4, (0,), 1, 2, 1, 4, 1, 4, 1, 8, 4096, 4),
    )
}
