"""What was asked, what came back, and what should not have."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path


class Ledger:
    """Counts for the report; ``violations`` must stay empty."""

    def __init__(self):
        self.started = time.monotonic()
        self.requests: Counter[str] = Counter()
        self.outcomes: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()
        self.memory: list[tuple[float, float]] = []  # (seconds, MB of all the server's processes)
        self.violations: list[str] = []

    def violation(self, what: str) -> None:
        self.violations.append(f"{time.monotonic() - self.started:.1f} s: {what}")

    def seen_memory(self, megabytes: float) -> None:
        self.memory.append((round(time.monotonic() - self.started, 1), round(megabytes, 1)))

    def memory_growth(self) -> float:
        """MB between the median of the second quarter of the samples and that of the last: the first warms up."""
        values = [megabytes for _, megabytes in self.memory]
        quarter = len(values) // 4
        if quarter == 0:
            return 0.0
        early, late = sorted(values[quarter : 2 * quarter]), sorted(values[-quarter:])
        return late[len(late) // 2] - early[len(early) // 2]

    def report(self, mode: str) -> dict:
        return {
            "mode": mode,
            "seconds": round(time.monotonic() - self.started, 1),
            "requests": dict(self.requests),
            "requests_total": self.requests.total(),
            "outcomes": dict(self.outcomes),
            "faults_injected": dict(self.faults),
            **self.counts,
            "memory_mb": [self.memory[0], self.memory[-1]] if self.memory else [],
            "memory_growth_mb": round(self.memory_growth(), 1),
            "violations": self.violations,
        }

    def write(self, mode: str, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{mode}.json").write_text(json.dumps(self.report(mode), indent=1) + "\n")
