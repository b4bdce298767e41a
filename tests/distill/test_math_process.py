"""math-verify in a process of its own: verdicts, samples that it never ends with, and its death."""

from __future__ import annotations

import concurrent.futures
import os
import signal
import time

import pytest

from sglang_optimal.distill.filters.answer import Answer
from sglang_optimal.distill.filters.math_process import MathProcess, shared
from sglang_optimal.distill.records import Record

ENDLESS = "$9^{9^{9^{9}}}$"
"""Python multiplies for hours, where no signal is heard."""


@pytest.fixture(scope="module")
def judge():
    return MathProcess(limit=30)


def record(text: str, answer: str) -> Record:
    return Record("p/s/0", "p", "s", 0, {"answer": answer}, "", "", text, [1], "stop")


@pytest.mark.parametrize(
    ("said", "expected", "equal"),
    [
        ("\\boxed{2/4}", "0.5", True), ("$\\frac{1}{3}$", "0.33", False), ("3\\sqrt{13}", "3\\sqrt{13}", True),
        ("no number", "1", False), ("\\boxed{\\{1, 2\\}}", "\\{2, 1\\}", True), ("é ∞ 𝟛\n", "4", False),
    ],
)  # fmt: skip
def test_verdicts(judge, said, expected, equal):
    assert judge.equal(said, expected) is equal


def test_questions_of_many_threads_get_their_own_answers(judge):
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(judge.equal, [f"\\boxed{{{i % 3}}}" for i in range(24)], ["1"] * 24))
    assert answers == [i % 3 == 1 for i in range(24)]


def test_one_that_never_ends_costs_its_limit_alone():
    judge = MathProcess(limit=3)
    assert judge.equal("\\boxed{2/4}", "0.5")  # imports are over
    start = time.monotonic()
    with pytest.raises(ValueError, match="no verdict within 3 s|OverflowError|MemoryError"):
        judge.equal(ENDLESS, "2")
    assert time.monotonic() - start < 15
    assert judge.equal("\\boxed{2/4}", "0.5")


def test_a_process_that_is_killed_is_one_verdict_less(judge):
    judge.equal("1", "1")
    os.kill(judge._process.pid, signal.SIGKILL)
    with pytest.raises(ValueError, match="ended with status -9"):
        judge.equal("1", "1")
    assert judge.equal("1", "1")


def test_the_filter_names_what_could_not_be_judged(monkeypatch):
    check = Answer(type="answer", match="math").ready()
    assert check(record("so \\boxed{0.5}", "1/2")) is None
    assert check(record("so \\boxed{0.6}", "1/2")) == "wrong answer"
    monkeypatch.setattr(shared(), "equal", _no_verdict)
    assert check(record("so \\boxed{0.5}", "1/2")) == "math-verify: no verdict within 20 s"


def _no_verdict(said: str, expected: str) -> bool:
    raise ValueError("no verdict within 20 s")
