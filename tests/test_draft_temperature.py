"""Drafts are drawn as sharply as agrees best with the mixture."""

from __future__ import annotations

import pytest
import torch

from sglang_optimal.mixing.filters import SamplingFilters
from sglang_optimal.runtime.speculative.draft_temperature import EVERY, DraftTemperature


def settings(rows: int, top_k: int = 1 << 30) -> SamplingFilters:
    ones = torch.ones(rows)
    return SamplingFilters(ones * 0.8, torch.full((rows,), top_k), ones, ones * 0, needed=top_k < 1 << 30, greedy=False)


def factor(temperature: DraftTemperature) -> float:
    return float(temperature.sharpened(settings(1)).temperature) / 0.8


def test_as_it_is_until_something_is_known():
    assert factor(DraftTemperature("cpu")) == pytest.approx(1.0)


@pytest.mark.parametrize("top_k", [5, 1 << 30])
@pytest.mark.parametrize("sharper", [0.5, 0.7, 1.0, 1.3])
def test_finds_the_sharpness(sharper, top_k):
    """The mixture is the student at another temperature; then comes one at yet another."""
    torch.manual_seed(0)
    temperature = DraftTemperature("cpu")
    for wanted in (sharper, 1.0):
        for _ in range(12 * EVERY):
            logits = torch.randn(4, 200) * 2
            truncation = settings(4, top_k)
            temperature.observe(logits, truncation.scaled(torch.tensor(wanted)).probs(logits), truncation)
        assert factor(temperature) == pytest.approx(wanted)


def test_not_a_number_changes_nothing():
    temperature = DraftTemperature("cpu")
    for _ in range(3 * EVERY):
        temperature.observe(torch.full((2, 10), torch.nan), torch.full((2, 10), 0.1), settings(2))
    assert factor(temperature) == pytest.approx(1.0)
