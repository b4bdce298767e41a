"""The choice of the number of drafts, on a simulated machine whose steps have known costs."""

from __future__ import annotations

import random

import pytest

from sglang_optimal.runtime.speculative.adaptive_draft_length import AdaptiveDraftLength, FixedDraftLength
from sglang_optimal.runtime.speculative.step_timer import StepTimer


class Timer(StepTimer):
    """Times by the machine's clock; a step's time is known ``late`` steps after it."""

    def __init__(self, machine: Machine, late: int):
        super().__init__("cpu")
        self.machine, self.late = machine, late

    def _event(self):
        return Event(self)


class Event:
    def __init__(self, timer: Timer):
        self.timer = timer

    def record(self) -> None:
        self.now, self.step = self.timer.machine.now, self.timer.machine.steps

    def query(self) -> bool:
        return self.timer.machine.steps >= self.step + self.timer.late

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end.now - self.now)


class Machine:
    """Steps that cost ``base + slope · k`` seconds (by the rows), with noise, and drafts accepted with chance ``a``."""

    def __init__(self, longest: int, acceptance: float, base: float, slope: float, noise: float = 0.05, late: int = 0):
        self.now, self.tokens, self.steps = 0.0, 0, 0
        self.acceptance, self.base, self.slope, self.noise = acceptance, base, slope, noise
        self.rng = random.Random(1)
        self.lengths = AdaptiveDraftLength(longest, Timer(self, late))
        self.chosen: list[int] = []

    def run(self, steps: int, rows: int = 1) -> float:
        """Tokens a second and row over ``steps`` steps."""
        start, tokens = self.now, self.tokens
        for _ in range(steps):
            with self.lengths.step(rows) as k:
                self.chosen.append(k)
                self.now += self.cost(k) * self.rng.uniform(1 - self.noise, 1 + self.noise)
                if self.noise and self.rng.random() < 0.005:
                    self.now += 5 * self.base  # something else ran on the machine
            self.steps += 1
            accepted = []
            for _ in range(rows):
                count = 0
                while count < k and self.rng.random() < self.chance():
                    count += 1
                accepted.append(count)
                self.tokens += 1 + count
            if k:
                self.lengths.observe(k, accepted)
        return (self.tokens - tokens) / (self.now - start) / rows

    def cost(self, k: int) -> float:
        return self.base + self.slope * k

    def chance(self) -> float:
        """That the next draft is accepted."""
        return self.acceptance

    def rate(self, k: int) -> float:
        """What length k gives, without disturbances."""
        return sum(self.acceptance**i for i in range(k + 1)) / (self.base + self.slope * k)


@pytest.mark.parametrize("acceptance", [0.1, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("slope", [0.05, 0.2, 0.5, 1.5])
@pytest.mark.parametrize("rows", [1, 8])
def test_close_to_the_best_length(acceptance, slope, rows):
    machine = Machine(8, acceptance, base=1.0, slope=slope)
    machine.run(200, rows)
    reached = machine.run(2000, rows)
    best = max(machine.rate(k) for k in range(9))
    assert reached > 0.92 * best  # of which 2.5 % are the disturbances


@pytest.mark.parametrize("acceptance", [0.2, 0.7])
def test_where_drafting_loses_lockstep_is_kept(acceptance):
    """From the first step on, and within three parts in a hundred of never drafting."""
    machine = Machine(8, acceptance, base=1.0, slope=1.2, noise=0.0)
    reached, chosen = machine.run(1500), machine.chosen
    assert sum(k > 0 for k in chosen) < 60
    machine.now = machine.tokens = 0
    lockstep = Machine(0, acceptance, base=1.0, slope=1.2, noise=0.0)
    lockstep.lengths = FixedDraftLength(0)
    assert reached > 0.97 * lockstep.run(1500)


class Crooked(Machine):
    """One draft costs less than the line from none to two says, as where lockstep samples in a slower way."""

    costs = (0.9, 1.06, 1.47, 1.79, 2.1, 2.4, 2.7, 3.0, 3.3)

    def cost(self, k: int) -> float:
        return self.costs[k]


def test_what_a_guess_hides_is_found():
    machine = Crooked(8, 0.75, base=1.0, slope=0.0, noise=0.02)
    machine.run(150, rows=16)
    assert machine.run(500, rows=16) > 0.95 * 1.75 / 1.06
    assert machine.chosen.count(1) > 400


def test_follows_a_change():
    """Another kind of text: the drafts are refused, and later accepted again."""
    machine = Machine(8, 0.9, base=1.0, slope=0.25)
    machine.run(300)
    assert machine.chosen[-1] >= 4
    machine.acceptance = 0.05
    machine.run(300)
    assert machine.chosen[-1] <= 1
    machine.acceptance = 0.9
    machine.run(1000)
    assert machine.chosen[-1] >= 3


def test_each_size_of_batch_has_its_own():
    machine = Machine(8, 0.8, base=1.0, slope=0.1)
    machine.run(300, 1)
    small = machine.chosen[-1]
    machine.slope = 1.5
    machine.run(300, 16)
    large = machine.chosen[-1]
    machine.slope = 0.1
    machine.run(20, 1)
    assert small >= 3 and large == 0 and machine.chosen[-1] >= 3


class Stretches(Machine):
    """Text with easy and hard stretches, of which the rows take their drafts in turn."""

    easy = True

    def chance(self) -> float:
        self.easy ^= self.rng.random() < 0.08
        return 0.97 if self.easy else 0.3


def test_easy_stretches_are_used():
    """A run of accepted drafts is a sign of more: the mean acceptance alone would make the drafts too short."""

    def rate(lengths=None) -> float:
        machine = Stretches(8, 0.0, base=1.0, slope=0.15, noise=0.0)
        machine.lengths = lengths or machine.lengths
        machine.run(1000)
        return machine.run(4000)

    assert rate() > 0.93 * max(rate(FixedDraftLength(k)) for k in range(9))


def test_requests_that_come_and_go():
    """The batch has another size at every few steps, with a prefill between, and times are known late."""
    machine = Machine(8, 0.8, base=1.0, slope=0.1, late=2)
    for _ in range(300):
        machine.run(2, machine.rng.randint(3, 16))
        machine.now += 30.0
    assert all(k >= 3 for k in machine.chosen[-50:])
    for costs in machine.lengths._sizes.values():
        assert all(seconds < 2.5 for seconds in costs.seconds.values())


def test_ranks_agree():
    """Each decision is put to the other ranks, whatever this one has measured."""
    lengths = AdaptiveDraftLength(8, StepTimer("cpu"), broadcast=lambda choice: 3)
    assert {lengths.choose(1) for _ in range(50)} == {3}
