"""Times of steps."""

from __future__ import annotations

import time

import pytest

from sglang_optimal.runtime.speculative.step_timer import StepTimer


def test_steps_come_back_once_and_in_order():
    timer = StepTimer("cpu")
    for name, seconds in (("short", 0.01), ("long", 0.05)):
        with timer.step(name):
            time.sleep(seconds)
        time.sleep(0.02)  # between steps: not theirs
    (first, short), (second, long) = timer.finished()
    assert (first, second) == ("short", "long")
    assert 0.01 <= short < 0.05 <= long < 0.5
    assert list(timer.finished()) == []


def test_a_step_that_raises_has_no_time():
    timer = StepTimer("cpu")
    with pytest.raises(RuntimeError), timer.step("broken"):
        raise RuntimeError
    assert list(timer.finished()) == []


def test_what_the_device_has_not_finished_is_waited_for():
    timer, done = StepTimer("cpu"), []

    class Event:
        def record(self):
            pass

        def query(self):
            return bool(done)

        def elapsed_time(self, end):
            return 7.0  # ms

    timer._event = Event
    with timer.step("first"):
        pass
    assert list(timer.finished()) == []
    done.append(True)
    assert list(timer.finished()) == [("first", 0.007)]
