"""The mixing library against float64 bisection (tests/oracle.py), on random and extreme distributions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import condition, entropy, interpolate, kl_divergence
from oracle import mix as oracle_mix

from sglang_optimal.config import NUMBERLESS_METHODS
from sglang_optimal.mixing import ALPHA_METHODS, AlphaMethod, AlphaParams, mix, token_logprobs
from sglang_optimal.mixing import mixture as mixture_module

SOLVED = list(NUMBERLESS_METHODS)  # the budgets: test_budget.py
BY_CONDITION = ["kl_symmetry", "ess_balance", "reverse_kl_symmetry"]


@pytest.fixture(autouse=True, scope="module", params=["numba", "torch"])
def implementation(request):
    """Every test of this file runs on the CPU's fused implementation and on plain PyTorch."""
    choose = mixture_module._fused
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixture_module, "_fused", lambda name, device: choose(name or request.param, device))
        yield request.param


@st.composite
def logit_rows(draw, min_size=2, max_size=300):
    """One row of (teacher, student) logits: flat to peaked, related or not, masked or not."""
    size = draw(st.integers(min_size, max_size))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale_t, scale_s = draw(st.sampled_from([0.01, 1.0, 4.0, 15.0])), draw(st.sampled_from([0.01, 1.0, 4.0, 15.0]))
    common = torch.randn(size, generator=generator)
    shared = draw(st.sampled_from([0.0, 0.5, 0.95]))

    def one(scale):
        return scale * (shared * common + (1 - shared) * torch.randn(size, generator=generator))

    teacher, student = one(scale_t), one(scale_s) + draw(st.sampled_from([0.0, -40.0, 25.0]))
    if size > 4 and draw(st.booleans()):
        teacher[torch.rand(size, generator=generator) < 0.3] = -torch.inf
        student[torch.rand(size, generator=generator) < 0.3] = -torch.inf
        teacher[0], student[0] = 1.0, 0.5  # at least one common token
    return teacher, student


def on_support(teacher, student, temperature=1.0):
    support = torch.isfinite(teacher) & torch.isfinite(student)
    log_t = torch.log_softmax(teacher[support].double() / temperature, -1)
    log_s = torch.log_softmax(student[support].double() / temperature, -1)
    return log_s, log_t


def assert_alpha_is_right(alpha, method, teacher, student, temperature=1.0):
    """Either alpha agrees with the oracle's, or the float64 condition is met as well as float32 can tell."""
    expected = oracle_mix(teacher, student, temperature=temperature, alpha_method=method).alpha
    if abs(alpha - expected) <= 2e-5:
        return
    log_s, log_t = on_support(teacher, student, temperature)
    spread = float((log_t - log_s).abs().max())
    if method == "entropy":
        # float32 knows a probability near 1, and so a nearly certain model's entropy, to about 1.2e-7.
        resolution = 2.4e-7 / float(entropy(log_s) + entropy(log_t))
        assert abs(alpha - expected) <= max(1e-3, resolution) or spread < 1e-4, (alpha, expected)
        return
    # float32 resolves log-probability ratios of this size to about this much.
    noise = 4e-6 * max(1.0, spread)
    assert abs(condition(method, log_s, log_t, alpha)) <= noise, (alpha, expected)


@settings(max_examples=300, deadline=None)
@given(row=logit_rows(), method=st.sampled_from(SOLVED), temperature=st.sampled_from([1.0, 0.3, 2.0]))
def test_alpha_meets_its_condition(row, method, temperature):
    teacher, student = row
    m = mix(teacher[None], student[None], torch.tensor([temperature]), AlphaParams.uniform(1, method))
    alpha = m.alpha.item()
    assert 0.0 <= alpha <= 1.0
    assert_alpha_is_right(alpha, method, teacher, student, temperature)


@settings(max_examples=200, deadline=None)
@given(
    row=logit_rows(),
    alpha=st.floats(-2.0, 3.0, width=32),
    temperature=st.sampled_from([1.0, 0.3, 2.0]),
)
def test_mixture_at_a_given_alpha(row, alpha, temperature):
    """With alpha given, also outside [0, 1], everything else is a smooth function that must agree closely."""
    teacher, student = row
    t = torch.tensor([temperature])
    m = mix(teacher[None], student[None], t, AlphaParams.uniform(1, "fixed", fixed_alpha=alpha), ess_ratio=True)
    assert m.alpha.item() == alpha
    log_s, log_t = on_support(teacher, student, temperature)
    log_q = interpolate(log_s, log_t, alpha)
    support = torch.isfinite(teacher) & torch.isfinite(student)
    assert torch.all(m.logits[0, ~support] == -torch.inf)
    got = torch.log_softmax(m.logits[0, support].double() / temperature, -1)
    scale = max(1.0, float(teacher[support].abs().max()), float(student[support].abs().max())) * (1 + abs(alpha))
    torch.testing.assert_close(got, log_q, atol=1e-5 * scale / temperature, rtol=0)
    tolerance = 2e-5 * scale / temperature
    assert m.kl_to_student.item() == pytest.approx(kl_divergence(log_q, log_s), abs=tolerance, rel=1e-4)
    assert m.kl_to_teacher.item() == pytest.approx(kl_divergence(log_q, log_t), abs=tolerance, rel=1e-4)
    log_ratio = torch.logsumexp(2 * log_t - log_q, -1) - torch.logsumexp(2 * log_s - log_q, -1)
    if abs(log_ratio) < 60:
        assert math.log(m.ess_ratio.item()) == pytest.approx(float(log_ratio), abs=4 * tolerance, rel=1e-4)
    token = int(support.nonzero()[-1])
    at = int(support[:token].sum())
    logprobs = token_logprobs(m, teacher[None], student[None], t, torch.tensor([token]))
    for value, reference in zip(logprobs, (log_t, log_s, log_q), strict=True):
        assert value.item() == pytest.approx(float(reference[at]), abs=2 * tolerance, rel=1e-5)


@settings(max_examples=100, deadline=None)
@given(row=logit_rows(), data=st.data())
def test_bounds_clamp_the_solved_alpha(row, data):
    teacher, student = row
    low = data.draw(st.floats(0, 1, width=32))
    high = data.draw(st.floats(low, 1, width=32))
    method = data.draw(st.sampled_from(SOLVED))
    one = torch.ones(1)
    free = mix(teacher[None], student[None], one, AlphaParams.uniform(1, method)).alpha.item()
    bound = mix(teacher[None], student[None], one, AlphaParams.uniform(1, method, alpha_min=low, alpha_max=high))
    assert bound.alpha.item() == pytest.approx(min(max(free, low), high), abs=1e-6)


@pytest.mark.parametrize("size", [2, 3, 1000, 49152, 151_936])
@pytest.mark.parametrize("method", SOLVED)
def test_vocabulary_sizes(size, method):
    generator = torch.Generator().manual_seed(size)
    teacher = 3.0 * torch.randn(2, size, generator=generator)
    student = 0.6 * teacher + 1.5 * torch.randn(2, size, generator=generator)
    m = mix(teacher, student, torch.tensor([1.0, 0.7]), AlphaParams.uniform(2, method))
    for row, temperature in enumerate((1.0, 0.7)):
        assert_alpha_is_right(m.alpha[row].item(), method, teacher[row], student[row], temperature)


@pytest.mark.parametrize("method", SOLVED)
@pytest.mark.parametrize("gap", [5.0, 60.0, 500.0])
def test_peaked_on_different_tokens(method, gap):
    """Nearly disjoint: each model is certain of a token the other finds impossible."""
    teacher = torch.zeros(1, 1000)
    student = torch.zeros(1, 1000)
    teacher[0, 1], student[0, 2] = gap, gap
    m = mix(teacher, student, torch.ones(1), AlphaParams.uniform(1, method), ess_ratio=True)
    assert m.alpha.item() == pytest.approx(0.5, abs=1e-5)  # by symmetry
    assert m.logits.isfinite().all()
    if method == "kl_symmetry":
        log_s, log_t = on_support(teacher[0], student[0])
        assert m.kl_to_student.item() == pytest.approx(kl_divergence(interpolate(log_s, log_t, 0.5), log_s), rel=1e-5)


@pytest.mark.parametrize("method", ALPHA_METHODS)
def test_disjoint_support_is_the_teachers_row(method):
    teacher = torch.tensor([[1.0, 2.0, -torch.inf, -torch.inf], [0.0, 1.0, 2.0, 3.0]])
    student = torch.tensor([[-torch.inf, -torch.inf, 1.0, 2.0], [3.0, 1.0, 2.0, 0.0]])
    middle = mix(teacher, student, torch.ones(2), AlphaParams.uniform(2, "fixed", fixed_alpha=0.5))
    params = AlphaParams.uniform(2, method, fixed_alpha=0.4, kl_budget=middle.kl_to_student[1].item())
    m = mix(teacher, student, torch.ones(2), params, ess_ratio=True)
    assert m.alpha[0] == 1.0
    assert torch.equal(m.logits[0], teacher[0])
    assert m.kl_to_student[0] == m.kl_to_teacher[0] == torch.inf
    assert m.alpha[1].item() == pytest.approx(0.4 if method == "fixed" else 0.5, abs=1e-5)
    assert m.kl_to_student[1].isfinite()


@pytest.mark.parametrize("method", SOLVED)
def test_equal_distributions_give_the_middle_of_the_bounds(method):
    generator = torch.Generator().manual_seed(5)
    teacher = 4.0 * torch.randn(3, 5000, generator=generator)
    student = teacher + torch.tensor([[0.0], [3.0], [-17.0]])  # a shift does not change a distribution
    params = AlphaParams.uniform(3, method, alpha_min=0.2, alpha_max=0.6)
    m = mix(teacher, student, torch.ones(3), params, ess_ratio=True)
    assert m.alpha.tolist() == pytest.approx([0.4] * 3)
    assert m.kl_to_student.max() < 1e-5 and m.kl_to_teacher.max() < 1e-5
    assert m.ess_ratio.tolist() == pytest.approx([1.0] * 3, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_computed_in_float32(dtype):
    generator = torch.Generator().manual_seed(6)
    teacher = (3.0 * torch.randn(4, 2000, generator=generator)).to(dtype)
    student = (2.0 * torch.randn(4, 2000, generator=generator)).to(dtype)
    params = AlphaParams.uniform(4)
    got = mix(teacher, student, torch.ones(4), params)
    expected = mix(teacher.float(), student.float(), torch.ones(4), params)
    assert got.logits.dtype == torch.float32
    torch.testing.assert_close(got.alpha, expected.alpha)
    torch.testing.assert_close(got.logits, expected.logits)


def mixed_batch():
    """Logits, temperatures and the lists of `AlphaParams.from_lists` of 40 rows; the last is their budgets."""
    generator = torch.Generator().manual_seed(7)
    teacher = 3.0 * torch.randn(40, 500, generator=generator)
    student = 2.0 * torch.randn(40, 500, generator=generator)
    student[3, :400] = -torch.inf
    student[11] = teacher[11]
    methods = [ALPHA_METHODS[i % len(ALPHA_METHODS)] for i in range(40)]
    lows = [0.1 * (i % 4) for i in range(40)]
    highs = [min(1.0, low + 0.1 * (i % 7)) for i, low in enumerate(lows)]
    fixed = [-1.0 + 0.1 * i for i in range(40)]
    temperatures = torch.tensor([0.5 + 0.05 * i for i in range(40)])
    budgets = [0.02 * i for i in range(40)]
    return teacher, student, temperatures, methods, lows, highs, fixed, budgets


def params_of(methods, lows, highs, fixed, budgets):
    return AlphaParams.from_lists(methods, lows, highs, fixed, kl_budget=budgets)


def test_rows_of_a_batch_are_independent():
    """A row's result does not depend on its neighbours, whatever their methods, bounds, temperatures and masks."""
    teacher, student, temperatures, methods, lows, highs, fixed, budgets = mixed_batch()
    whole = mix(teacher, student, temperatures, params_of(methods, lows, highs, fixed, budgets), ess_ratio=True)
    for i in range(40):
        params = params_of([methods[i]], [lows[i]], [highs[i]], [fixed[i]], [budgets[i]])
        alone = mix(teacher[i : i + 1], student[i : i + 1], temperatures[i : i + 1], params, ess_ratio=True)
        for name in ("alpha", "kl_to_student", "kl_to_teacher", "mixture_log_z", "ess_ratio"):
            assert getattr(whole, name)[i].item() == pytest.approx(
                getattr(alone, name)[0].item(), abs=2e-5, rel=1e-4
            ), (i, name)
        if methods[i] == "fixed":
            assert whole.alpha[i].item() == pytest.approx(fixed[i])
        else:
            assert lows[i] - 1e-6 <= whole.alpha[i].item() <= highs[i] + 1e-6


def test_blocks_do_not_change_the_result(monkeypatch):
    teacher, student, temperatures, *settings_ = mixed_batch()
    params = params_of(*settings_)
    whole = mix(teacher, student, temperatures, params, ess_ratio=True)
    monkeypatch.setattr(mixture_module, "_BLOCK_ELEMENTS", 7 * 500)
    blocks = mix(teacher, student, temperatures, params, ess_ratio=True)
    torch.testing.assert_close(blocks.alpha, whole.alpha, atol=1e-5, rtol=0)
    torch.testing.assert_close(blocks.logits, whole.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(blocks.ess_ratio, whole.ess_ratio, atol=1e-4, rtol=1e-3)


def test_nan_stays_in_its_row():
    teacher, student, temperatures, *settings_ = mixed_batch()
    params = params_of(*settings_)
    clean = mix(teacher, student, temperatures, params)
    student[6, 100] = torch.nan
    m = mix(teacher, student, temperatures, params)
    assert m.logits[6].isnan().any() and m.kl_to_student[6].isnan()
    others = [i for i in range(40) if i != 6]
    torch.testing.assert_close(m.alpha[others], clean.alpha[others], atol=1e-5, rtol=0)
    assert not m.kl_to_student[others].isnan().any()


def test_linear_bias_comes_out_once():
    generator = torch.Generator().manual_seed(8)
    teacher, student = torch.randn(2, 1, 50, generator=generator).unbind(0)
    bias = torch.randn(50, generator=generator)
    params = AlphaParams.uniform(1, "fixed", fixed_alpha=0.3)
    plain = mix(teacher, student, torch.ones(1), params).logits
    biased = mix(teacher + bias, student + bias, torch.ones(1), params).logits
    torch.testing.assert_close(biased, plain + bias)


def test_arguments_are_left_alone_and_out_is_used():
    teacher, student, temperatures, *settings_ = mixed_batch()
    copies = teacher.clone(), student.clone(), temperatures.clone()
    params = params_of(*settings_)
    expected = mix(teacher, student, temperatures, params)
    out = torch.empty_like(teacher)
    got = mix(teacher, student, temperatures, params, out=out)
    assert got.logits.data_ptr() == out.data_ptr()
    torch.testing.assert_close(got.logits, expected.logits)
    for now, before in zip((teacher, student, temperatures), copies, strict=True):
        assert torch.equal(now, before)


def test_wrong_arguments():
    good = torch.zeros(2, 8)
    with pytest.raises(ValueError, match="teacher_logits, student_logits"):
        mix(good, torch.zeros(2, 9), torch.ones(2), AlphaParams.uniform(2))
    with pytest.raises(ValueError, match="temperature, params"):
        mix(good, good, torch.ones(3), AlphaParams.uniform(2))
    with pytest.raises(ValueError, match="out"):
        mix(good, good, torch.ones(2), AlphaParams.uniform(2), out=torch.zeros(2, 9))
    with pytest.raises(ValueError, match="implementation: 'quick' cannot run on cpu"):
        mix(good, good, torch.ones(2), AlphaParams.uniform(2), implementation="quick")
    with pytest.raises(ValueError, match="alpha_method: 'best'"):
        AlphaParams.uniform(2, "best")
    with pytest.raises(ValueError, match="same length"):
        AlphaParams.from_lists(["fixed"], [0.0], [1.0, 1.0], [0.5])


def test_method_names_are_the_configurations():
    from sglang_optimal.config import ALPHA_METHODS as names

    assert names == ALPHA_METHODS
    assert [AlphaMethod[n.upper()] for n in names] == list(AlphaMethod)


@pytest.mark.parametrize("method", SOLVED)
def test_certain_of_the_same_token_with_other_tails(method):
    """Not equal distributions: their tails differ, and the effective sample sizes depend on them."""
    teacher, student = torch.tensor([[30.0, 14.0, 2.0]]), torch.tensor([[118.0, 0.0, 30.0]])
    alpha = mix(teacher, student, torch.ones(1), AlphaParams.uniform(1, method)).alpha.item()
    assert_alpha_is_right(alpha, method, teacher[0], student[0])
