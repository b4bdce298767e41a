"""How many tokens the student drafts in the next step."""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence

# Weight of the newest step in the running means.
_NEW = 0.1
# Steps at one choice before the costs are looked at again, at first; doubles while nothing changes, up to the last.
_PATIENCE = 16
_LONGEST_PATIENCE = 1024
# A measurement older than this many decisions is tried again.
_MARGIN = 0.02


class FixedLength:
    """Always the same."""

    def __init__(self, length: int):
        self.longest = length

    def choose(self, rows: int) -> int:
        """Draft tokens for a step in which ``rows`` requests can be drafted for."""
        return self.longest

    def observe(self, rows: int, length: int, accepted: Sequence[int], seconds: float) -> None:
        """Told of a finished step: its rows, drafts, how many were accepted in each row, and how long it took."""


class BestLength:
    """The length that gives most tokens a second, by what was measured so far.

    A step with k drafts costs ``base + k · slope`` seconds and gives 1 + a + … + a^k tokens a row, where a is the
    chance that a draft is accepted. Base, slope and a are running means for each size of batch (to the next power of
    two), because weights are read once for a small batch whatever it verifies, and not for a large one. Every so often
    a step is run at another length to keep them fresh; the longer the choice stays the same, the less often.

    Args:
        longest: the most drafts in a step.
        agree: makes every rank choose alike; gets this rank's choice, returns the one of all.
    """

    def __init__(self, longest: int, agree: Callable[[int], int] = lambda choice: choice):
        self.longest = longest
        self._agree = agree
        self._sizes: dict[int, _Size] = collections.defaultdict(lambda: _Size(longest))

    def choose(self, rows: int) -> int:
        return self._agree(self._sizes[rows.bit_length()].choose())

    def observe(self, rows: int, length: int, accepted: Sequence[int], seconds: float) -> None:
        self._sizes[rows.bit_length()].observe(length, accepted, seconds)


class _Size:
    """What is known about batches of one size."""

    def __init__(self, longest: int):
        self.longest = longest
        self.seconds: dict[int, float] = {}
        self.kept, self.tried = 0.0, 0.0
        self._best = longest
        self._left = 0  # steps until the next look
        self._patience = _PATIENCE
        self._probe: list[int] = [0, longest, max(1, longest // 2)]  # first of all, learn the costs

    def choose(self) -> int:
        if self._probe:
            return self._probe[0]
        return self._best

    def observe(self, length: int, accepted: Sequence[int], seconds: float) -> None:
        old = self.seconds.get(length)
        self.seconds[length] = seconds if old is None else min(seconds, 4 * old) * _NEW + old * (1 - _NEW)
        for count in accepted:
            # Each row was tried until its first refusal.
            self.kept = self.kept * (1 - _NEW / 10) + count
            self.tried = self.tried * (1 - _NEW / 10) + min(count + 1, length)
        if self._probe and self._probe[0] == length:
            self._probe.pop(0)
        elif self._left > 0:
            self._left -= 1
            return
        if not self._probe:
            self._look()

    def _look(self) -> None:
        best = max(range(self.longest + 1), key=self.rate)
        if best != self._best and self.rate(best) < self.rate(self._best) * (1 + _MARGIN):
            best = self._best
        self._patience = _PATIENCE if best != self._best else min(2 * self._patience, _LONGEST_PATIENCE)
        self._best, self._left = best, self._patience
        # The next look is preceded by a step one longer or shorter, whichever was seen less.
        self._probe = []

    def acceptance(self) -> float:
        """The chance that a draft is accepted."""
        return (self.kept + 0.8) / (self.tried + 1.0)

    def cost(self, length: int) -> float:
        """Seconds of a step, from the line through the measured ones."""
        points = sorted(self.seconds.items())
        if length in self.seconds or len(points) == 1:
            return self.seconds.get(length, points[0][1])
        (x0, y0), (x1, y1) = points[0], points[-1]
        return max(y0 + (y1 - y0) * (length - x0) / (x1 - x0), 1e-9)

    def rate(self, length: int) -> float:
        """Tokens a second and row."""
        a = min(self.acceptance(), 0.999)
        return (1 - a ** (length + 1)) / (1 - a) / self.cost(length)
