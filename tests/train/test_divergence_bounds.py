"""The divergence of the whole vocabulary lies between the bounds, and reaches them where the page says so."""

from __future__ import annotations

import math

import divergence_reference as reference
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_optimal.train import (
    DIVERGENCES,
    TAIL_RESOLUTION,
    TopK,
    divergence_bounds,
    forward_kl,
    generalised_jsd,
    reverse_kl,
)

LOGIT = st.floats(-12, 12)
CLOSE = 1e-9


@st.composite
def situations(draw):
    size = draw(st.integers(2, 9))
    teacher = torch.tensor(draw(st.lists(LOGIT, min_size=size, max_size=size)), dtype=torch.float64)
    student = torch.tensor(draw(st.lists(LOGIT, min_size=size, max_size=size)), dtype=torch.float64)
    masked = draw(st.sets(st.integers(0, size - 1), max_size=size - 1))
    teacher[list(masked)] = student[list(masked)] = -math.inf
    k = draw(st.integers(1, size))
    temperature = draw(st.sampled_from([1.0, 0.5, 2.0]))
    if draw(st.booleans()):
        target = TopK.from_logits(teacher, k, temperature=temperature)
    else:  # other ids than its own
        ids = torch.tensor(draw(st.permutations(range(size)))[:k])
        target = TopK.from_logits(teacher, ids=ids, temperature=temperature)
    return teacher, student, target, temperature


@settings(max_examples=300, deadline=None)
@given(situations(), st.sampled_from(DIVERGENCES), st.floats(0.01, 0.99), st.booleans())
def test_the_truth_is_between_them(situation, divergence, beta, with_floor):
    teacher, student, target, temperature = situation
    p, s = reference.softmax(teacher / temperature), reference.softmax(student / temperature)
    truth = float(reference.divergence(divergence, p, s, beta))
    floor = float(np.log(p[p > 0]).min()) if with_floor else None
    bounds = divergence_bounds(
        divergence, student, target, beta=beta, temperature=temperature, target_floor=floor
    )  # fmt: skip
    assert bounds.lower.item() <= truth + CLOSE
    assert bounds.upper.item() >= truth - CLOSE
    assert bounds.lower.item() >= -CLOSE - (TAIL_RESOLUTION if divergence == "reverse_kl" else 0)
    if target.ids.shape[-1] == len(p):
        assert bounds.upper.item() == bounds.lower.item() == pytest.approx(truth, abs=CLOSE)
    elif divergence != "reverse_kl" or with_floor:
        assert bounds.upper.isfinite()


@settings(max_examples=60, deadline=None)
@given(situations(), st.sampled_from(DIVERGENCES))
def test_the_lower_bound_is_the_loss(situation, divergence):
    _, student, target, temperature = situation
    loss = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "jsd": generalised_jsd}[divergence]
    expected = loss(
        student[None], TopK(target.ids[None], target.logprobs[None], target.tail[None]), temperature=temperature
    )
    found = divergence_bounds(divergence, student, target, temperature=temperature)
    assert found.lower.item() == pytest.approx(expected.item(), abs=1e-12)


def with_tail(shares) -> tuple[torch.Tensor, TopK]:
    """A target with two known tokens and a tail of 0.3, whose shares are given; and what its arrays say."""
    p = torch.tensor([0.5, 0.2, *(0.3 * np.asarray(shares))], dtype=torch.float64)
    ids = torch.tensor([0, 1])
    return p, TopK(ids, p[:2].log(), torch.tensor(0.3, dtype=torch.float64))


STUDENT = torch.tensor([1.0, 0.0, 2.0, -1.0, 0.5], dtype=torch.float64)
S = reference.softmax(STUDENT)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_lower_bound_is_reached_by_a_tail_of_the_student_s_shape(divergence):
    p, target = with_tail(S[2:] / S[2:].sum())
    bounds = divergence_bounds(divergence, STUDENT, target)
    assert bounds.lower.item() == pytest.approx(float(reference.divergence(divergence, p.numpy(), S)), rel=1e-9)


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_the_upper_bound_is_reached_by_a_tail_on_the_student_s_least_likely_token(divergence):
    p, target = with_tail([0, 1, 0])
    bounds = divergence_bounds(divergence, STUDENT, target)
    assert bounds.upper.item() == pytest.approx(float(reference.divergence(divergence, p.numpy(), S)), rel=1e-9)
    assert bounds.upper > bounds.lower + 0.1


def test_nothing_bounds_the_reverse_kl_from_above():
    _, target = with_tail([1, 0, 0])
    assert divergence_bounds("reverse_kl", STUDENT, target).upper == math.inf
    large = [float(reference.kl(S, with_tail([1 - 2 * e, e, e])[0].numpy())) for e in (1e-3, 1e-30, 1e-300)]
    assert large[0] < large[1] < large[2] and large[2] > 100
    floor = math.log(0.3 * 1e-3)
    bounds = divergence_bounds("reverse_kl", STUDENT, target, target_floor=floor)
    assert large[0] <= bounds.upper.item() < large[1]


def test_ids_of_its_own_make_the_upper_bound_smaller():
    p = torch.tensor([0.3, 0.2, 0.2, 0.2, 0.1], dtype=torch.float64)
    own = TopK.from_logits(p.log(), 2)
    assert own.own
    other = TopK(own.ids, own.logprobs, own.tail)
    narrow, wide = (divergence_bounds("forward_kl", STUDENT, target) for target in (own, other))
    assert narrow.lower == wide.lower
    assert float(reference.kl(p.numpy(), S)) <= narrow.upper < wide.upper


@pytest.mark.parametrize(("beta", "same"), [(0.0, "forward_kl"), (1.0, "reverse_kl")])
def test_the_ends_of_beta(beta, same):
    _, target = with_tail([0.2, 0.3, 0.5])
    ends, kl = divergence_bounds("jsd", STUDENT, target, beta=beta), divergence_bounds(same, STUDENT, target)
    assert ends.lower == kl.lower and ends.upper == kl.upper


def test_errors():
    _, target = with_tail([1, 0, 0])
    with pytest.raises(ValueError, match="^divergence: must be one of forward_kl, reverse_kl, jsd, got 'kl'"):
        divergence_bounds("kl", STUDENT, target)
    with pytest.raises(ValueError, match="^beta: must be in"):
        divergence_bounds("jsd", STUDENT, target, beta=-0.1)
    with pytest.raises(ValueError, match="^target: top-k arrays"):
        divergence_bounds("jsd", STUDENT[None], target)
