"""The policy gradient's expectation over q*, enumerated over a small vocabulary, is the reverse KL's gradient."""

from __future__ import annotations

import math

import divergence_reference as reference
import pytest
import torch

from sglang_optimal.mixing import AlphaParams, mix
from sglang_optimal.train import policy_gradient_loss, reverse_kl, sampled_logprobs

V = 7


def three(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits [V] float64 of a student, its teacher, and the student as it was when tokens were drawn."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher, noise = 2 * torch.randn(3, V, generator=generator, dtype=torch.float64)
    return student, teacher, student + 0.3 * noise


def of_every_token(student: torch.Tensor, teacher: torch.Tensor, behaviour: torch.Tensor, **more) -> torch.Tensor:
    """[V] losses, of one sequence of one token for each token of the vocabulary."""
    token_ids = torch.arange(V).unsqueeze(-1)
    logprobs = sampled_logprobs(student.expand(V, 1, V), token_ids)
    return policy_gradient_loss(
        logprobs, teacher.log_softmax(-1).unsqueeze(-1), behaviour.unsqueeze(-1), reduction="none", **more
    ).squeeze(-1)


@pytest.mark.parametrize("seed", range(5))
def test_expectation_over_the_mixture(seed):
    """Drawn from q* of an older student; value and gradient."""
    student, teacher, older = three(seed)
    one = torch.ones(1)
    mixture = mix(teacher.float()[None], older.float()[None], one, AlphaParams.uniform(1, "kl_symmetry"))
    behaviour = mixture.logits[0].double().log_softmax(-1)
    leaf = student.clone().requires_grad_()
    expected = reverse_kl(leaf[None], teacher[None])
    (gradient,) = torch.autograd.grad(expected, leaf)
    value = (behaviour.exp() * of_every_token(leaf, teacher, behaviour)).sum()
    (found,) = torch.autograd.grad(value, leaf)
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found, gradient, rtol=1e-9, atol=1e-12)
    assert value.item() == pytest.approx(float(reference.kl(reference.softmax(student), reference.softmax(teacher))))
    # Without the ratio it would be another gradient: what the ratio is for.
    plain = (behaviour.exp() * of_every_token(leaf, teacher, leaf.detach().log_softmax(-1))).sum()
    (biased,) = torch.autograd.grad(plain, leaf)
    assert (biased - gradient).abs().max() > 1e-3


def test_on_policy():
    """b is the student itself: every ratio is 1."""
    student, teacher, _ = three(9)
    leaf = student.clone().requires_grad_()
    own = student.log_softmax(-1)
    values = of_every_token(leaf, teacher, own)
    torch.testing.assert_close(values.detach(), own - teacher.log_softmax(-1))
    (found,) = torch.autograd.grad((own.exp() * values).sum(), leaf)
    (expected,) = torch.autograd.grad(reverse_kl(leaf[None], teacher[None]), leaf)
    torch.testing.assert_close(found, expected)


def test_truncated_ratios():
    student = torch.tensor([[-0.1, -1.0]], requires_grad=True)
    teacher, behaviour = torch.tensor([[-2.0, -0.5]]), torch.tensor([[-3.0, -1.0]])
    values = policy_gradient_loss(student, teacher, behaviour, max_ratio=2.0, reduction="none")
    values.sum().backward()
    expected = [2.0 * (-0.1 + 2.0), 1.0 * (-1.0 + 0.5)]
    assert values.tolist()[0] == pytest.approx(expected)
    assert student.grad.tolist()[0] == pytest.approx(expected)  # ∂ log p_s = 1
    free = policy_gradient_loss(student, teacher, behaviour, reduction="none")
    assert free.tolist()[0] == pytest.approx([math.exp(2.9) * 1.9, -0.5], rel=1e-5)


def test_teacher_and_behaviour_get_no_gradient():
    student, teacher, behaviour = (torch.full((1, 2), -x, requires_grad=True) for x in (1.0, 2.0, 1.5))
    policy_gradient_loss(student, teacher, behaviour).backward()
    assert student.grad is not None and teacher.grad is None and behaviour.grad is None


def test_what_is_masked_may_be_anything():
    student = torch.tensor([[-1.0, -math.inf]], requires_grad=True)
    other = torch.tensor([[-1.5, math.nan]])
    loss = policy_gradient_loss(student, other, other, torch.tensor([[1, 0]]))
    loss.backward()
    assert loss.item() == pytest.approx(math.exp(0.5) * 0.5) and student.grad[0, 1] == 0


P = -torch.ones(2, 3)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: policy_gradient_loss(P, P[:1], P), "^teacher_logprobs: must have the shape"),
        (lambda: policy_gradient_loss(P, P, P[:1]), "^behaviour_logprobs: must have the shape"),
        (lambda: policy_gradient_loss(P, P, P, P[:1]), "^mask: must have the shape"),
        (lambda: policy_gradient_loss(P, P, P, max_ratio=0), "^max_ratio: must be positive"),
        (lambda: policy_gradient_loss(P, P - math.inf, P), "^teacher_logprobs: 6 values are −inf or NaN"),
        (lambda: policy_gradient_loss(P, P, P * math.nan), "^behaviour_logprobs: 6 values are −inf or NaN"),
    ],
)
def test_errors(call, said):
    with pytest.raises(ValueError, match=said):
        call()
