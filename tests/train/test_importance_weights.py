"""Importance weights: expectations enumerated over a small vocabulary, clipping, normalising, sample sizes."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from sglang_optimal.train import importance_weights, sampled_logprobs, weighted_nll

V = 5


def distributions(count: int, seed: int = 0) -> torch.Tensor:
    """[count, V] float64 log-probabilities."""
    generator = torch.Generator().manual_seed(seed)
    return (1.5 * torch.randn(count, V, generator=generator, dtype=torch.float64)).log_softmax(-1)


def every_token(log_p: torch.Tensor) -> torch.Tensor:
    """One sequence of one token for each token of the vocabulary: [V, 1]."""
    return log_p.unsqueeze(-1)


def test_expectations_per_token():
    """Σ_y q(y)·w(y)·f(y) = Σ_y p(y)·f(y), f = 1 and another."""
    q, p = distributions(2)
    w = importance_weights(every_token(p), every_token(q), normalise=False).weights.double().squeeze(-1)
    f = torch.arange(V, dtype=torch.float64) ** 2
    assert (q.exp() * w).sum().item() == pytest.approx(1, rel=1e-6)
    assert (q.exp() * w * f).sum().item() == pytest.approx((p.exp() * f).sum().item(), rel=1e-6)


def test_expectations_per_sequence():
    """Over all texts of three tokens, each token's distribution depending on the one before."""
    q, p = distributions(V, 1), distributions(V, 2)
    texts = torch.tensor(list(itertools.product(range(V), repeat=3)))
    before = torch.cat([torch.zeros(len(texts), 1, dtype=torch.long), texts[:, :-1]], -1)
    log_q, log_p = q[before, texts], p[before, texts]
    f = (texts.double() ** 2).sum(-1) + texts[:, 0] * texts[:, 2]
    weights = importance_weights(log_p, log_q, level="sequence", normalise=False).weights
    assert weights.shape == texts.shape and (weights == weights[:, :1]).all()
    drawn = log_q.sum(-1).exp()
    assert (drawn * weights[:, 0]).sum().item() == pytest.approx(1, rel=1e-5)
    assert (drawn * weights[:, 0] * f).sum().item() == pytest.approx((log_p.sum(-1).exp() * f).sum().item(), rel=1e-5)
    # Token weights are another thing: prefixes stay as q drew them.
    tokens = importance_weights(log_p, log_q, normalise=False).weights
    torch.testing.assert_close(tokens.prod(-1), weights[:, 0], rtol=1e-4, atol=1e-6)
    assert (drawn * tokens[:, 2] * f).sum().item() != pytest.approx((log_p.sum(-1).exp() * f).sum().item(), rel=1e-2)


def test_the_gradient_of_weighted_nll_is_that_of_the_forward_kl():
    """In expectation over a token of q."""
    q, t = distributions(2, 3)
    student = distributions(1, 4).clone().requires_grad_()
    logprobs = sampled_logprobs(student.expand(V, V).unsqueeze(1), torch.arange(V).unsqueeze(-1))
    weights = importance_weights(every_token(t), every_token(q), normalise=False).weights
    (q.exp() * weighted_nll(logprobs, weights, reduction="none").squeeze(-1)).sum().backward()
    np.testing.assert_allclose(student.grad[0], student.detach()[0].exp() - t.exp(), atol=1e-7)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_normalised_weights_have_mean_one(level):
    q, p = (-torch.rand(2, 4, 6, generator=torch.Generator().manual_seed(0)) * 3).unbind()
    mask = torch.arange(6) < torch.tensor([[6], [3], [1], [0]])
    found = importance_weights(p, q, mask, level=level)
    raw = importance_weights(p, q, mask, level=level, normalise=False)
    assert (found.weights[~mask] == 0).all()
    if level == "token":
        assert found.weights[mask].mean().item() == pytest.approx(1, rel=1e-6)
        w = raw.weights[mask]
    else:
        assert found.weights[:3, 0].mean().item() == pytest.approx(1, rel=1e-6)
        w = raw.weights[:3, 0]
        assert w.tolist() == pytest.approx([(p - q)[i][mask[i]].sum().exp().item() for i in range(3)], rel=1e-5)
    torch.testing.assert_close(found.weights / found.weights.sum(), raw.weights / raw.weights.sum())
    assert found.ess.item() == pytest.approx((w.sum() ** 2 / (w**2).sum()).item(), rel=1e-5)
    assert found.ess_ratio.item() == pytest.approx(found.ess.item() / len(w), rel=1e-6)
    assert raw.ess == found.ess


def test_equal_distributions_have_the_full_sample_size():
    q = torch.full((2, 3), -1.0)
    found = importance_weights(q, q)
    assert found.weights.tolist() == [[1.0] * 3] * 2 and found.ess == 6 and found.ess_ratio == 1


def test_one_weight_that_is_all():
    q = torch.zeros(1, 4)
    p = torch.tensor([[0.0, -math.inf, -math.inf, -math.inf]])
    found = importance_weights(p, q)
    assert found.weights.tolist() == [[4, 0, 0, 0]] and found.ess == 1 and found.ess_ratio == 0.25


def test_clipping_comes_before_normalising():
    q, p = torch.zeros(1, 3), torch.tensor([[math.log(8.0), 0.0, 0.0]])
    found = importance_weights(p, q, max_weight=2.0, normalise=False)
    assert found.weights.tolist() == [[2, 1, 1]] and found.clipped.item() == pytest.approx(1 / 3)
    assert importance_weights(p, q, max_weight=2.0).weights.tolist() == [pytest.approx([1.5, 0.75, 0.75])]
    assert found.ess.item() == pytest.approx(16 / 6)


def test_weights_that_float32_has_no_room_for():
    """A sequence's log weight of 200."""
    q, p = torch.full((2, 50), -5.0), torch.full((2, 50), -1.0)
    p[1] -= 0.1
    found = importance_weights(p, q, level="sequence")
    assert found.weights.isfinite().all()
    assert (found.weights[0, 0] / found.weights[1, 0]).item() == pytest.approx(math.exp(5), rel=1e-4)


def test_nothing_to_weigh():
    q = torch.zeros(2, 3)
    found = importance_weights(q, q, torch.zeros(2, 3))
    assert (found.weights == 0).all() and found.ess == 0
    none = importance_weights(torch.full((2, 3), -math.inf), q)
    assert (none.weights == 0).all() and none.ess == 0


def test_what_is_masked_may_be_anything():
    q, p = torch.tensor([[-1.0, math.nan]]), torch.tensor([[-1.0, -math.inf]])
    mask = torch.tensor([[True, False]])
    assert importance_weights(p, q, mask).weights.tolist() == [[1, 0]]
    student = torch.tensor([[-1.0, -math.inf]], requires_grad=True)
    weighted_nll(student, torch.tensor([[1.0, math.nan]]).nan_to_num(), mask).backward()
    assert student.grad.tolist() == [[-1, 0]]


Q = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: importance_weights(Q, Q[:1]), "^behaviour_logprobs: must have the shape of target_logprobs"),
        (lambda: importance_weights(Q[0], Q[0]), r"^target_logprobs: must be \[B, L\]"),
        (lambda: importance_weights(Q, Q, torch.ones(2)), "^mask: must have the shape"),
        (lambda: importance_weights(Q, Q, level="text"), "^level: must be one of token, sequence"),
        (lambda: importance_weights(Q, Q, max_weight=0.0), "^max_weight: must be positive"),
        (lambda: importance_weights(Q, Q - math.inf), "^behaviour_logprobs: 6 values are −inf or NaN"),
        (lambda: weighted_nll(Q, Q[:1]), "^weights: must have the shape"),
        (lambda: weighted_nll(Q, Q, Q[:1]), "^mask: must have the shape"),
    ],
)
def test_errors(call, said):
    with pytest.raises(ValueError, match=said):
        call()
