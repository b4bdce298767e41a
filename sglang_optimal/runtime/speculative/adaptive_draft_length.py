"""How many tokens the guest drafts in the next step."""

from __future__ import annotations

import collections
import contextlib
import math
import statistics
from collections.abc import Callable, Iterator, Sequence

from sglang_optimal.runtime.speculative.step_timer import StepTimer

RUN = 6
"""Steps between two decisions for one size of batch, on every rank alike."""
_ENOUGH, _RECENT = 3, 9  # steps of a length that make its cost known, and that are remembered
_GUESS = 0.75  # acceptance before anything is known
_MEMORY = 0.98  # of the acceptance, from step to step
_PRIOR = 4.0  # drafts at one position that weigh as much as what is known of the position before
_MARGIN = 1.02  # another length must promise this much more
_PROMISING = 0.93  # of the best rate: lengths that are expected to give this much are measured before one is settled on
_FIRST_PROBE, _LAST_PROBE = 128, 4096  # steps without a look at another length


class FixedDraftLength:
    """Always the same length."""

    def __init__(self, length: int):
        self.length = length

    @contextlib.contextmanager
    def step(self, rows: int) -> Iterator[int]:
        """The drafts of a decode step that is launched within the block, with ``rows`` requests to draft for."""
        yield self.choose(rows)

    def choose(self, rows: int) -> int:
        """What ``step`` yields."""
        return self.length

    def observe(self, length: int, accepted: Sequence[int]) -> None:
        """Take note of how many of ``length`` drafts each row of a finished step had accepted."""


class AdaptiveDraftLength(FixedDraftLength):
    """The length that gives most tokens a second, by what has been measured.

    A step with k drafts gives 1 + a₁ + a₁a₂ + … + a₁⋯a_k tokens a row, where a_i is the chance that a draft is accepted
    if those before it were (it mostly grows with i: text has easy stretches). It costs c(k) seconds, measured where it
    was run and guessed on the line through the nearest measured ones elsewhere; what looks promising by such a guess is
    measured. Costs are kept for each size of batch, in powers of two: a small batch is verified almost for free,
    because the weights are read once whatever it holds, and a large one is not. Another length is tried from time to
    time, ever more seldom while that changes nothing.

    Args:
        longest: the most drafts in a step.
        timer: of the steps.
        broadcast: gets this rank's choice and returns rank 0's; every rank calls it at the same steps.
    """

    def __init__(self, longest: int, timer: StepTimer, broadcast: Callable[[int], int] = lambda choice: choice):
        super().__init__(0)
        self.longest = longest
        self._timer, self._broadcast = timer, broadcast
        self._sizes: dict[int, _Costs] = {}
        self._size: int | None = None
        self._left = 0  # steps until the next decision
        self._acceptance = _Acceptance(longest)

    @contextlib.contextmanager
    def step(self, rows: int) -> Iterator[int]:
        for (size, length), seconds in self._timer.finished():
            self._sizes[size].add(length, seconds)
        length = self.choose(rows)
        with self._timer.step((self._size, length)):
            yield length

    def choose(self, rows: int) -> int:
        size = round(math.log2(rows))
        costs = self._sizes.setdefault(size, _Costs(self.longest))
        if size != self._size or self._left == 0:
            self.length = self._broadcast(costs.decide(self._acceptance.tokens()))
            self._size, self._left = size, RUN
        self._left -= 1
        costs.steps += 1
        return self.length

    def observe(self, length: int, accepted: Sequence[int]) -> None:
        self._acceptance.add(length, accepted)


class _Acceptance:
    """How many drafts are accepted, position by position."""

    def __init__(self, longest: int):
        self._kept, self._tried = [0.0] * longest, [0.0] * longest

    def add(self, length: int, accepted: Sequence[int]) -> None:
        for i in range(len(self._tried)):
            # A row is tried until its first refusal.
            reached = [count for count in accepted if count >= i] if i < length else []
            self._tried[i] = self._tried[i] * _MEMORY + len(reached)
            self._kept[i] = self._kept[i] * _MEMORY + sum(count > i for count in reached)

    def tokens(self) -> list[float]:
        """What a step gives a row with 0, 1, … drafts."""
        chance, reached, expected = _GUESS, 1.0, [1.0]
        for kept, tried in zip(self._kept, self._tried, strict=True):
            chance = (kept + _PRIOR * chance) / (tried + _PRIOR)
            reached *= chance
            expected.append(expected[-1] + reached)
        return expected


class _Costs:
    """Seconds of a step by its length, for batches of one size.

    Attributes:
        steps: since another length was tried.
    """

    def __init__(self, longest: int):
        self.longest = longest
        self.steps = 0
        self._times: dict[int, collections.deque[float]] = {}
        self._best: int | None = None
        self._patience = _FIRST_PROBE

    def add(self, length: int, seconds: float) -> None:
        self._times.setdefault(length, collections.deque(maxlen=_RECENT)).append(seconds)

    @property
    def seconds(self) -> dict[int, float]:
        """What is known; medians, because a machine has other things to do as well."""
        return {k: statistics.median(times) for k, times in self._times.items() if len(times) >= _ENOUGH}

    def decide(self, tokens: Sequence[float]) -> int:
        """The length of the next run; ``tokens``: what each gives."""
        seconds = self.seconds
        for length in (0, min(2, self.longest)):  # two points make a line
            if length not in seconds:
                return length
        rates = [tokens[k] / _cost(k, seconds) for k in range(self.longest + 1)]
        best = max(range(len(rates)), key=rates.__getitem__)
        promising = [k for k in range(len(rates)) if k not in seconds and rates[k] > _PROMISING * rates[best]]
        if promising:
            return max(promising, key=rates.__getitem__)
        if self._best is not None and rates[best] < _MARGIN * rates[self._best]:
            best = self._best
        if best != self._best:
            self._best, self.steps, self._patience = best, 0, _FIRST_PROBE
        elif self.steps >= self._patience:
            self.steps, self._patience = 0, min(2 * self._patience, _LAST_PROBE)
            return max((k for k in (best - 1, best + 1) if 0 <= k <= self.longest), key=rates.__getitem__)
        return best


def _cost(length: int, seconds: dict[int, float]) -> float:
    """Seconds of a step with ``length`` drafts, from two or more known ones."""
    if length in seconds:
        return seconds[length]
    known = sorted(seconds)
    # The two nearest with the length between them, or the two at the end that it lies beyond.
    upper = next((i for i, k in enumerate(known) if k > length), len(known) - 1)
    low, high = known[max(upper - 1, 0)], known[max(upper, 1)]
    slope = (seconds[high] - seconds[low]) / (high - low)
    return max(seconds[low] + slope * (length - low), 0.5 * min(seconds.values()))
