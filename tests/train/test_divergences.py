"""Values and gradients of the divergences against float64 sums over the whole vocabulary, and against TRL's."""

from __future__ import annotations

import math
import subprocess
import sys

import divergence_reference as reference
import numpy as np
import pytest
import torch
from torch import Tensor

from sglang_optimal.mixing import AlphaParams, mix
from sglang_optimal.train import (
    TAIL_RESOLUTION,
    TopK,
    forward_kl,
    generalised_jsd,
    mixture_kl,
    mixture_logits,
    reverse_kl,
    sampled_logprobs,
)
from sglang_optimal.train.reduction import reduce

B, L, V = 2, 3, 11
NAMES = ["forward_kl", "reverse_kl", "jsd-0", "jsd-0.1", "jsd-0.5", "jsd-1"]
every_divergence = pytest.mark.parametrize("name", NAMES)


def loss_of(name: str, student: Tensor, target, **more) -> Tensor:
    if name.startswith("jsd"):
        return generalised_jsd(student, target, beta=float(name[4:]), **more)
    return {"forward_kl": forward_kl, "reverse_kl": reverse_kl}[name](student, target, **more)


def expected_of(name: str, p: np.ndarray, s: np.ndarray) -> np.ndarray:
    return reference.divergence(name.partition("-")[0], p, s, float(name[4:] or 0) if "jsd" in name else 0.5)


def logits_of(seed: int, *shape: int, spread: float = 2.0, dtype=torch.float64) -> Tensor:
    return spread * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def pair_of_logits(dtype=torch.float64, **more) -> tuple[Tensor, Tensor]:
    return logits_of(0, B, L, V, dtype=dtype, **more), logits_of(1, B, L, V, dtype=dtype, **more)


@every_divergence
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_whole_vocabulary(name, temperature):
    student, teacher = pair_of_logits()
    expected = expected_of(name, reference.softmax(teacher / temperature), reference.softmax(student / temperature))
    found = loss_of(name, student, teacher, temperature=temperature, reduction="none")
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    single = loss_of(name, student.float(), teacher.float(), temperature=temperature, reduction="none")
    assert single.dtype == torch.float32
    np.testing.assert_allclose(single, expected, rtol=2e-5, atol=1e-6)


@every_divergence
def test_bfloat16_is_computed_in_float32(name):
    student, teacher = pair_of_logits(torch.float32)
    student, teacher = student.bfloat16(), teacher.bfloat16()
    expected = expected_of(name, reference.softmax(teacher.double()), reference.softmax(student.double()))
    for target in (teacher, TopK.from_logits(teacher, V)):
        found = loss_of(name, student, target, reduction="none")
        assert found.dtype == torch.float32
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-6)


@every_divergence
@pytest.mark.parametrize("k", [1, 4, V - 1])
def test_top_k_is_the_divergence_of_the_partition(name, k):
    student, teacher = pair_of_logits()
    target = TopK.from_logits(teacher, k, temperature=0.8)
    p, s = reference.softmax(teacher / 0.8), reference.softmax(student / 0.8)
    ids = target.ids.numpy()
    expected = expected_of(name, reference.lump(p, ids), reference.lump(s, ids))
    found = loss_of(name, student, target, temperature=0.8, reduction="none")
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


@every_divergence
@pytest.mark.parametrize("whole", [V, V + 5])
def test_all_ids_are_the_whole_vocabulary(name, whole):
    """Values and gradients; the ids in the target's order, and a tail that is rounding."""
    student, teacher = pair_of_logits()
    gradients = []
    target = TopK.from_logits(teacher, whole)
    for of in (teacher, target, TopK(target.ids, target.logprobs, torch.full((B, L), 3e-8))):
        leaf = student.clone().requires_grad_()
        value = loss_of(name, leaf, of)
        value.backward()
        gradients.append((value.detach(), leaf.grad))
    for value, gradient in gradients[1:]:
        torch.testing.assert_close(value, gradients[0][0], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(gradient, gradients[0][1], rtol=1e-9, atol=1e-12)


@every_divergence
def test_gradients(name):
    student, teacher = pair_of_logits()
    leaf = student.requires_grad_()
    for target in (teacher, TopK.from_logits(teacher, 3), TopK.from_logits(teacher, ids=student.topk(3).indices)):
        assert torch.autograd.gradcheck(lambda x, target=target: loss_of(name, x, target, reduction="none"), leaf)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    for reduction in ("token", "sequence", "sum"):
        assert torch.autograd.gradcheck(
            lambda x, how=reduction: loss_of(name, x, teacher, mask=mask, reduction=how, temperature=0.7), leaf
        )


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_as_trl_has_it(beta):
    from trl.experimental.gkd import GKDTrainer

    student, teacher = pair_of_logits(torch.float32)
    labels = torch.tensor([[-100, 4, 5], [-100, -100, 6]])
    expected = GKDTrainer.generalized_jsd_loss(student, teacher, labels=labels, beta=beta, temperature=0.9)
    found = generalised_jsd(student, teacher, beta=beta, temperature=0.9, mask=labels != -100, reduction="token")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_forward_and_reverse_are_what_they_are_called():
    """KL(teacher‖student) is infinite for a student without the teacher's token, and the reverse is not."""
    teacher, student = torch.tensor([[[0.0, 0.0]]]), torch.tensor([[[0.0, -60.0]]])
    assert forward_kl(student, teacher) == pytest.approx(30 - math.log(2), rel=1e-5)
    assert reverse_kl(student, teacher) == pytest.approx(math.log(2), rel=1e-5)


# -- tails, masked tokens, masked positions ----------------------------------------------------------------------------


@every_divergence
@pytest.mark.parametrize("gap", [5.0, 20.0, 60.0, 200.0])
def test_a_vanishing_tail(name, gap):
    """Of student, of target, of both: finite values that are right, finite gradients, in float32."""
    flat = torch.zeros(1, 1, 6)
    steep = flat.clone()
    steep[..., :2] = gap
    ids = torch.tensor([[[0, 1]]])
    for student, teacher in ((flat, steep), (steep, flat), (steep, steep + 0.1)):
        leaf = student.clone().requires_grad_()
        target = TopK.from_logits(teacher, ids=ids)
        value = loss_of(name, leaf, target)
        value.backward()
        assert value.isfinite() and leaf.grad.isfinite().all()
        p, s = (reference.lump(reference.softmax(x.double()), ids.numpy()) for x in (teacher, student))
        if name in ("reverse_kl", "jsd-1"):  # where float32 cannot tell the tail from none
            p[..., -1] = p[..., -1].clip(min=TAIL_RESOLUTION)
        assert value.item() == pytest.approx(expected_of(name, p, s).item(), rel=1e-4, abs=2e-6)


def test_the_gradient_of_a_tail_that_is_lost_in_one_minus_the_sum():
    """The student's tail is 4e-18; 1 − Σ is 0 in float32, and in float64 too. The target's is a half."""
    student = torch.tensor([[[0.0, -40.0]]], requires_grad=True)
    target = TopK(torch.tensor([[[0]]]), torch.tensor([[[0.5]]]).log(), torch.tensor([[0.5]]))
    value = forward_kl(student, target)
    value.backward()
    assert value.item() == pytest.approx(0.5 * math.log(0.5) * 2 + 0.5 * 40, rel=1e-6)
    np.testing.assert_allclose(student.grad[0, 0], [0.5, -0.5], rtol=1e-6)  # p_s − p


def test_reverse_kl_reads_a_tail_of_zero_as_what_float32_resolves():
    student = torch.zeros(1, 1, 4, requires_grad=True)
    target = TopK(torch.tensor([[[0, 1]]]), torch.tensor([[[0.5, 0.5]]]).log(), torch.zeros(1, 1))
    value = reverse_kl(student, target)
    value.backward()
    assert value.item() == pytest.approx(0.5 * math.log(0.5) + 0.5 * math.log(0.5 / TAIL_RESOLUTION), rel=1e-5)
    assert student.grad.isfinite().all()
    tiny = TopK(target.ids, target.logprobs, torch.full((1, 1), -1e-9))
    assert reverse_kl(student, tiny) == value


@every_divergence
def test_a_token_that_either_side_masks_is_left_out_of_both(name):
    student, teacher = pair_of_logits()
    student[0, 0, 3] = -math.inf
    teacher[0, :, 5] = -math.inf
    teacher[1, 2, 5] = student[1, 2, 5] = -math.inf
    dead = np.isneginf(student) | np.isneginf(teacher)
    s, p = (reference.softmax(np.where(dead, -np.inf, x)) for x in (student, teacher))
    leaf = student.requires_grad_()
    value = loss_of(name, leaf, teacher, reduction="none")
    np.testing.assert_allclose(value.detach(), expected_of(name, p, s), rtol=1e-10)
    value.sum().backward()
    assert leaf.grad.isfinite().all() and (leaf.grad[torch.tensor(dead)] == 0).all()


@every_divergence
def test_ids_outside_the_common_support(name):
    """k is larger than the support: the arrays have −inf there, and the student's logits know nothing of it."""
    student, teacher = logits_of(0, 1, 1, 6), logits_of(1, 1, 1, 6)
    teacher[..., [2, 4]] = -math.inf
    target = TopK.from_logits(teacher, 6)
    assert target.logprobs.isneginf().sum() == 2
    leaf = student.requires_grad_()
    value = loss_of(name, leaf, target)
    torch.testing.assert_close(value, loss_of(name, student, teacher))
    value.backward()
    assert leaf.grad.isfinite().all()


@every_divergence
def test_a_student_that_masks_the_whole_tail(name):
    """Its tail has no tokens, so that the target's is rounding."""
    student = torch.tensor([[[0.0, 1.0, -math.inf, -math.inf]]], requires_grad=True)
    teacher = torch.tensor([[[1.0, -1.0]]])
    target = TopK(torch.tensor([[[0, 1]]]), teacher.log_softmax(-1), torch.full((1, 1), 3e-8))
    value = loss_of(name, student, target)
    value.backward()
    p, s = (reference.softmax(x.detach().double()) for x in (teacher, student[..., :2]))
    assert value.item() == pytest.approx(expected_of(name, p, s).item(), rel=1e-5)
    assert student.grad.isfinite().all() and (student.grad[..., 2:] == 0).all()


def test_a_position_without_a_common_token():
    student = torch.tensor([[[0.0, -math.inf], [0.0, 1.0]]], requires_grad=True)
    teacher = torch.tensor([[[-math.inf, 0.0], [1.0, 0.0]]])
    for name in NAMES:
        value = loss_of(name, student, teacher, reduction="none")
        assert value[0, 0] == math.inf and value[0, 1].isfinite()
    for name in NAMES:
        student.grad = None
        loss_of(name, student, teacher, mask=torch.tensor([[False, True]])).backward()
        assert student.grad.isfinite().all() and (student.grad[0, 0] == 0).all()


@every_divergence
def test_what_is_masked_may_be_anything(name):
    student, teacher = pair_of_logits()
    mask = torch.tensor([[True, False, True], [False, False, True]])
    for form in (teacher, TopK.from_logits(teacher, 4)):
        clean = student.clone().requires_grad_()
        expected = loss_of(name, clean, form, mask=mask)
        expected.backward()
        spoilt = torch.where(mask.unsqueeze(-1), student, math.nan).requires_grad_()
        found = loss_of(name, spoilt, form, mask=mask)
        found.backward()
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        torch.testing.assert_close(spoilt.grad, clean.grad, rtol=0, atol=0)
        assert (spoilt.grad[~mask] == 0).all()


def test_reductions():
    values = torch.tensor([[1.0, 2.0, 99.0], [6.0, 99.0, 99.0], [99.0, 99.0, 99.0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]])
    assert reduce(values, mask, "token") == 3
    assert reduce(values, mask, "sequence") == (1.5 + 6) / 2
    assert reduce(values, mask, "sum") == 9
    assert reduce(values, mask, "none").tolist() == [[1, 2, 0], [6, 0, 0], [0, 0, 0]]
    assert reduce(values, torch.zeros_like(mask), "token") == 0
    assert reduce(values[:1, :2], None, "token") == 1.5


def test_a_temperature_for_each_sequence_or_position():
    student, teacher = pair_of_logits()
    by_row = torch.tensor([0.5, 2.0])
    by_position = by_row[:, None].expand(B, L).clone()
    mask = torch.tensor([[1, 1, 0], [1, 0, 1]])
    expected = torch.stack([
        forward_kl(student[i], teacher[i], temperature=by_row[i].item(), reduction="none") for i in range(B)
    ])  # fmt: skip
    for temperature in (by_row, by_row[:, None], by_position):
        torch.testing.assert_close(forward_kl(student, teacher, temperature=temperature, reduction="none"), expected)
        found = forward_kl(student, teacher, temperature=temperature, mask=mask, reduction="none")
        torch.testing.assert_close(found, expected * mask)


# -- the mixture -------------------------------------------------------------------------------------------------------


def test_mixture_kl_is_the_series_kl_to_student():
    student, teacher = pair_of_logits(torch.float32)
    temperature = torch.full((B * L,), 0.7)
    made = mix(teacher.reshape(-1, V), student.reshape(-1, V), temperature, AlphaParams.uniform(B * L, "kl_symmetry"))
    found = mixture_kl(
        student, mixture_logits(student, teacher, made.alpha.reshape(B, L)), temperature=0.7, reduction="none"
    )
    torch.testing.assert_close(found.reshape(-1), made.kl_to_student, rtol=1e-4, atol=1e-5)
    assert (found > 0.01).all()


def test_the_mixture_is_a_fixed_target():
    """The gradient in the student's logits is p_s − q*."""
    student, teacher = pair_of_logits()
    leaf = student.requires_grad_()
    mixture = mixture_logits(leaf, teacher, 0.4)
    assert not mixture.requires_grad
    mixture_kl(leaf, mixture, reduction="sum").backward()
    q = reference.softmax(0.6 * student.detach() + 0.4 * teacher)
    np.testing.assert_allclose(leaf.grad, reference.softmax(student.detach()) - q, rtol=1e-9, atol=1e-12)


def test_mixture_logits_keep_what_is_masked_masked():
    student, teacher = torch.tensor([[-math.inf, 0.0, 1.0]]), torch.tensor([[0.0, -math.inf, 1.0]])
    assert mixture_logits(student, teacher, 1.5).tolist() == [[-math.inf, -math.inf, 1.0]]
    assert mixture_logits(student, teacher, torch.tensor([0.0])).tolist() == [[-math.inf, -math.inf, 1.0]]


def test_sampled_logprobs():
    student = logits_of(0, B, L, V)
    ids = torch.randint(V, (B, L), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    expected = np.log(np.take_along_axis(reference.softmax(student / 0.8), ids.long().numpy()[..., None], -1))[..., 0]
    np.testing.assert_allclose(sampled_logprobs(student, ids, 0.8), expected, rtol=1e-12)
    assert torch.autograd.gradcheck(lambda x: sampled_logprobs(x, ids, 0.8), student.requires_grad_())


# -- errors ------------------------------------------------------------------------------------------------------------

STUDENT = torch.zeros(B, L, V)
GOOD = TopK.from_logits(STUDENT, 3)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: forward_kl(STUDENT, torch.zeros(B, L, V + 1)), r"^target: .*cut both to the common ids"),
        (lambda: forward_kl(STUDENT[:1], GOOD), r"^target: top-k arrays for the positions \[2, 3\]"),
        (lambda: forward_kl(STUDENT[:1], GOOD, mask=torch.ones(1, L)), r"^target: top-k arrays for the positions"),
        (lambda: forward_kl(STUDENT[..., :2], GOOD), r"^target: 3 ids a position, but student_logits have 2"),
        (lambda: reverse_kl(STUDENT, STUDENT, temperature=0.0), r"^temperature: must be positive, got 0.0"),
        (lambda: reverse_kl(STUDENT, STUDENT, temperature=math.nan), r"^temperature: must be positive"),
        (lambda: reverse_kl(STUDENT, STUDENT, temperature=torch.tensor([1.0, 0.0])), r"^temperature: must be positive"),
        (lambda: reverse_kl(STUDENT, STUDENT, temperature=torch.ones(5)), r"^temperature: of shape \[5, 1\]"),
        (lambda: forward_kl(STUDENT, STUDENT, mask=torch.ones(B, L + 1)), r"^mask: must have the shape of"),
        (lambda: forward_kl(STUDENT, STUDENT, reduction="mean"), r"^reduction: must be one of token, sequence"),
        (lambda: forward_kl(STUDENT[0], STUDENT[0], reduction="sequence"), r"^reduction: sequence needs values of"),
        (lambda: generalised_jsd(STUDENT, STUDENT, beta=1.5), r"^beta: must be in \[0, 1\], got 1.5"),
        (lambda: generalised_jsd(STUDENT, STUDENT, beta=math.nan), r"^beta: must be in"),
        (lambda: TopK(GOOD.ids, GOOD.logprobs[..., :2], GOOD.tail), r"^logprobs: must be one for each of ids"),
        (lambda: TopK(GOOD.ids, GOOD.logprobs, GOOD.tail[0]), r"^tail: must be one for each position"),
        (lambda: TopK(GOOD.ids.float(), GOOD.logprobs, GOOD.tail), r"^ids: must be integers"),
        (lambda: TopK.from_logits(STUDENT), r"^k: give either"),
        (lambda: TopK.from_logits(STUDENT, 0), r"^k: must be at least 1"),
        (lambda: TopK.from_logits(STUDENT, 1, temperature=-1.0), r"^temperature: must be positive"),
        (lambda: mixture_logits(STUDENT, STUDENT[0], 0.5), r"^teacher_logits: must have the shape"),
        (lambda: mixture_logits(STUDENT, STUDENT, torch.ones(3)), r"^alpha: must be a number or one for each"),
        (lambda: sampled_logprobs(STUDENT, torch.zeros(B, L + 1)), r"^token_ids: must be one for each position"),
    ],
)
def test_errors(call, said):
    with pytest.raises(ValueError, match=said):
        call()


def test_sglang_and_transformers_are_not_imported():
    code = "import sys, sglang_optimal.train; assert not {'sglang', 'transformers', 'trl'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_trainers_do_not_import_sglang():
    code = (
        "import sys, sglang_optimal.train as t; t.RecordTrainer, t.RolloutTrainer, t.TrainConfig; "
        "assert 'sglang' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
