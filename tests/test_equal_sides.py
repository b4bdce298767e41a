"""A server whose sides are the same although they should not be says so, once."""

from __future__ import annotations

import logging
import types
from array import array

from sglang_optimal.config import AlphaSettings
from sglang_optimal.names import SERIES
from sglang_optimal.runtime.core import MixedRequest, Side
from sglang_optimal.runtime.sampling.sampling_observer import EqualSides


def request(teacher: list[int], student: list[int]):
    sides = [Side("teacher", array("q", teacher)), Side("student", array("q", student))]
    return types.SimpleNamespace(origin_input_ids=sides[0].prompt_ids, mixing=MixedRequest(sides, AlphaSettings()))


def values(kl: float) -> list[float]:
    return [kl if name.startswith("kl_") else 0.5 for name in SERIES]


def test_many_equal_tokens_are_warned_of_once(caplog):
    watch, req = EqualSides(), request([1, 2], [1, 3])
    with caplog.at_level(logging.WARNING):
        for _ in range(511):
            watch.add(req, values(0.0))
        assert not caplog.records
        for _ in range(600):
            watch.add(req, values(0.0))
    assert watch.tokens == 1111
    assert len(caplog.records) == 1 and "the mixture may be one model alone" in caplog.text


def test_equal_contexts_and_single_equal_tokens_are_nothing(caplog):
    watch = EqualSides()
    with caplog.at_level(logging.WARNING):
        for i in range(2000):
            watch.add(request([1, 2], [1, 2]), values(0.0))
            watch.add(request([1, 2], [3]), values(0.0 if i % 3 else 1e-9))
    assert not caplog.records and watch.tokens == 1333
