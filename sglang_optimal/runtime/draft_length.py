"""How many tokens the student drafts in the next step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

RUN = 6
"""Steps between two decisions, on every rank alike. A run of equal steps is also what makes a step's time measurable
under overlap, where the scheduler is told of a step one or two launches later."""
_SETTLED = 3  # launches of one kind after which the time between two is the time of one such step
_NEW = 0.5  # weight of the newest run's median time in a running mean
_MEMORY = 0.97  # of the acceptance, from step to step
_MARGIN = 1.02  # another length must promise this much more
_FIRST_PROBE, _LAST_PROBE = 128, 4096  # steps without a look at another length


def expected_tokens(acceptance: float, length: int) -> float:
    """1 + a + … + a^k: what a step with k drafts gives a row where each is accepted with chance a."""
    return sum(acceptance**i for i in range(length + 1))


class FixedLength:
    """Always the same length."""

    def __init__(self, length: int):
        self.length = length

    def choose(self, rows: int) -> int:
        """Draft tokens for a decode step that is launched now, with ``rows`` requests to draft for."""
        return self.length

    def interrupt(self) -> None:
        """Told of a step of another kind (a prefill)."""

    def observe(self, length: int, accepted: Sequence[int]) -> None:
        """Told how many of ``length`` drafts each row of a finished step had accepted."""


class BestLength(FixedLength):
    """The length that gives most tokens a second, by what has been measured.

    A step with k drafts gives 1 + a + … + a^k tokens a row, where a is the chance that a draft is accepted, and costs
    c(k) seconds, measured where it was run and on the line through the nearest measured ones elsewhere. Costs are kept
    for each size of batch, to the next power of two: a small batch is verified almost for free, because the weights are
    read once whatever it holds, and a large one is not. Another length is tried from time to time, ever more seldom
    while that changes nothing.

    Args:
        longest: the most drafts in a step.
        agree: gets this rank's choice and returns the one of all; every rank calls it at the same steps.
        clock: seconds.
    """

    def __init__(
        self,
        longest: int,
        agree: Callable[[int], int] = lambda choice: choice,
        clock: Callable[[], float] = time.perf_counter,
    ):
        super().__init__(0)
        self.longest = longest
        self._agree, self._clock = agree, clock
        self._sizes: dict[int, _Costs] = {}
        self._size: int | None = None
        self._left = 0  # steps until the next decision
        self._settled, self._launched = 0, 0.0
        self._times: list[float] = []  # of the steps of this run
        self._kept, self._tried = 1.5, 2.0  # a guess that the first steps outweigh

    @property
    def acceptance(self) -> float:
        """The chance that a draft is accepted."""
        return min(self._kept / self._tried, 0.999)

    def choose(self, rows: int) -> int:
        size, now = rows.bit_length(), self._clock()
        costs = self._sizes.setdefault(size, _Costs(self.longest))
        if size != self._size:
            self._size, self._settled, self._left = size, 0, 0
            self._times.clear()
        elif self._settled >= _SETTLED:
            self._times.append(now - self._launched)
        if self._left == 0:
            costs.add(self.length, self._times)
            self._times.clear()
            length = self._agree(costs.decide(self.acceptance))
            self._settled = 0 if length != self.length else self._settled
            self.length, self._left = length, RUN
        self._left -= 1
        self._settled += 1
        self._launched = now
        return self.length

    def interrupt(self) -> None:
        self._settled = 0

    def observe(self, length: int, accepted: Sequence[int]) -> None:
        # A row is tried until its first refusal.
        self._kept = self._kept * _MEMORY + sum(accepted)
        self._tried = self._tried * _MEMORY + sum(min(count + 1, length) for count in accepted)


class _Costs:
    """Seconds of a step by its length, for batches of one size."""

    def __init__(self, longest: int):
        self.longest = longest
        self.seconds: dict[int, float] = {}
        self._best: int | None = None
        self._since_probe, self._patience = 0, _FIRST_PROBE

    def add(self, length: int, times: list[float]) -> None:
        """Take note of the times of one run; a median, because a machine has other things to do as well."""
        if times:
            new = statistics.median(times)
            old = self.seconds.get(length, new)
            self.seconds[length] = old + _NEW * (new - old)

    def decide(self, acceptance: float) -> int:
        """The length of the next run."""
        for length in (0, min(2, self.longest)):  # two points make a line
            if length not in self.seconds:
                return length
        rates = [self._rate(length, acceptance) for length in range(self.longest + 1)]
        best = max(range(len(rates)), key=rates.__getitem__)
        if self._best is not None and rates[best] < _MARGIN * rates[self._best]:
            best = self._best
        self._since_probe += RUN
        if best != self._best:
            self._best, self._since_probe, self._patience = best, 0, _FIRST_PROBE
        elif self._since_probe >= self._patience:
            self._since_probe, self._patience = 0, min(2 * self._patience, _LAST_PROBE)
            return max((k for k in (best - 1, best + 1) if 0 <= k <= self.longest), key=rates.__getitem__)
        return best

    def _rate(self, length: int, acceptance: float) -> float:
        """Tokens a second and row."""
        return expected_tokens(acceptance, length) / self._cost(length)

    def _cost(self, length: int) -> float:
        if length in self.seconds:
            return self.seconds[length]
        known = sorted(self.seconds)
        # The two nearest with the length between them, or the two at the end that it lies beyond.
        upper = next((i for i, k in enumerate(known) if k > length), len(known) - 1)
        low, high = known[max(upper - 1, 0)], known[max(upper, 1)]
        slope = (self.seconds[high] - self.seconds[low]) / (high - low)
        return max(self.seconds[low] + slope * (length - low), 0.5 * min(self.seconds.values()))
