"""The budget in nats, of all implementations: against float64 bisection (tests/oracle.py), at its ends, beside others.

The GPU's kernel is in test_kernels.py.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from oracle import interpolate, kl_divergence, solve_alpha
from test_mixture import implementation, logit_rows, on_support  # noqa: F401 (a fixture)

from sglang_optimal.mixing import AlphaParams, mix
from sglang_optimal.mixing.alpha import KL_TOLERANCE, TOLERANCE
from sglang_optimal.mixing.pair import LogPair

METHODS = ("kl_budget", "kl_budget_teacher")
ENDS = {"kl_budget": (0.0, 1.0), "kl_budget_teacher": (1.0, 0.0)}
"""Alpha where nothing fits the budget, and where everything does."""
BUDGETS = st.one_of(st.sampled_from([1e-3, 0.01, 0.1, 1.0]), st.floats(1e-4, 20.0))


def solved(row, method, budget, temperature=1.0, **bounds):
    """The `Mixture` of one row."""
    teacher, student = row
    params = AlphaParams.uniform(1, method, kl_budget=budget, **bounds)
    return mix(teacher[None], student[None], torch.tensor([temperature]), params)


def models(row, method, temperature=1.0):
    """Float64 log-probabilities of the model whose budget it is, and of the other."""
    log_s, log_t = on_support(*row, temperature)
    return (log_s, log_t) if method == "kl_budget" else (log_t, log_s)


def noise(near, far, weight):
    """How well the KL is known where the other model has this weight: float32's terms, and the tolerance of alpha."""
    ratio = far - near
    log_q = interpolate(near, far, weight)
    mean = float((log_q.exp() * ratio).sum())
    variance = float((log_q.exp() * (ratio - mean) ** 2).sum())
    spread = max(1.0, float(ratio.abs().max()))
    return 2 * KL_TOLERANCE + 2e-6 * spread + 1.2 * TOLERANCE * weight * variance


def kl_of(row, method, alpha, temperature=1.0):
    near, far = models(row, method, temperature)
    weight = alpha if method == "kl_budget" else 1.0 - alpha
    return kl_divergence(interpolate(near, far, weight), near), noise(near, far, weight)


@settings(max_examples=300, deadline=None)
@given(row=logit_rows(), method=st.sampled_from(METHODS), budget=BUDGETS, temperature=st.sampled_from([1.0, 0.3, 2.0]))
def test_it_is_the_oracles_alpha(row, method, budget, temperature):
    """Alpha is the oracle's, or the KL is as near to the budget as float32 can tell."""
    alpha = solved(row, method, budget, temperature).alpha.item()
    assert 0.0 <= alpha <= 1.0
    log_s, log_t = on_support(*row, temperature)
    expected = solve_alpha(log_s, log_t, method, **{method: budget})
    if abs(alpha - expected) <= 2e-5:
        return
    kl, unknown = kl_of(row, method, alpha, temperature)
    most, _ = kl_of(row, method, ENDS[method][1], temperature)
    assert abs(kl - min(budget, most)) <= unknown, (alpha, expected)


@settings(max_examples=200, deadline=None)
@given(row=logit_rows(), method=st.sampled_from(METHODS), budget=BUDGETS)
def test_within_the_budget_and_used_up(row, method, budget):
    m = solved(row, method, budget)
    alpha = m.alpha.item()
    kl, unknown = kl_of(row, method, alpha)
    assert kl <= budget + unknown
    if alpha != ENDS[method][1]:
        assert kl >= budget - unknown
    reported = m.kl_to_student if method == "kl_budget" else m.kl_to_teacher
    assert reported.item() == pytest.approx(kl, abs=unknown)


@settings(max_examples=150, deadline=None)
@given(row=logit_rows(), method=st.sampled_from(METHODS))
def test_nothing_and_everything(row, method):
    """0 gives one model exactly, what the other is away gives that one; in between neither."""
    log_s, log_t = on_support(*row)
    assume(float((log_t - log_s).abs().max()) > 0.02)  # equal ones fit any budget
    nothing, everything = ENDS[method]
    m = solved(row, method, 0.0)
    assert m.alpha.item() == nothing
    assert (m.kl_to_student if method == "kl_budget" else m.kl_to_teacher).item() <= 1e-4
    near, far = models(row, method)
    most = kl_divergence(far, near)
    assert solved(row, method, 1.001 * most + noise(near, far, 1.0)).alpha.item() == everything
    assert solved(row, method, 1e30).alpha.item() == solved(row, method, 1e300).alpha.item() == everything
    if 0.01 * most > noise(near, far, 1.0):
        assert solved(row, method, 0.98 * most).alpha.item() != everything


@settings(max_examples=150, deadline=None)
@given(row=logit_rows(), method=st.sampled_from(METHODS), budgets=st.lists(BUDGETS, min_size=2, max_size=6))
def test_more_budget_goes_farther(row, method, budgets):
    nearest, farthest = 0.0, 0.0
    for budget in sorted(budgets):
        alpha = solved(row, method, budget).alpha.item()
        weight = alpha if method == "kl_budget" else 1.0 - alpha
        kl, unknown = kl_of(row, method, alpha)
        assert weight >= nearest or kl >= farthest - unknown, budget
        nearest, farthest = weight, kl


@settings(max_examples=150, deadline=None)
@given(row=logit_rows(), method=st.sampled_from(METHODS), budget=st.one_of(st.just(0.0), BUDGETS), data=st.data())
def test_bounds(row, method, budget, data):
    """Between the bounds as without; a budget that the near bound exceeds gives that bound, a large one the other."""
    low = data.draw(st.floats(0, 1, width=32))
    high = data.draw(st.floats(low, 1, width=32))
    free = solved(row, method, budget).alpha.item()
    bound = solved(row, method, budget, alpha_min=low, alpha_max=high).alpha.item()
    assert bound == pytest.approx(min(max(free, low), high), abs=1e-6)
    kl_low, unknown = kl_of(row, method, low if method == "kl_budget" else high)
    if kl_low > budget + unknown:
        assert bound == (low if method == "kl_budget" else high)
    kl_high, unknown = kl_of(row, method, high if method == "kl_budget" else low)
    if kl_high < budget - unknown:
        assert bound == (high if method == "kl_budget" else low)


@pytest.mark.parametrize("budget", [0.0, 1e-6, 0.1])
@pytest.mark.parametrize("method,alpha", [("kl_budget", 0.6), ("kl_budget_teacher", 0.2)])
def test_equal_models_fit_any_budget(method, alpha, budget):
    teacher = 4.0 * torch.randn(3, 5000, generator=torch.Generator().manual_seed(5))
    student = teacher + torch.tensor([[0.0], [3.0], [-17.0]])  # a shift does not change a distribution
    params = AlphaParams.uniform(3, method, alpha_min=0.2, alpha_max=0.6, kl_budget=budget)
    m = mix(teacher, student, torch.ones(3), params)
    assert m.alpha.tolist() == pytest.approx([alpha] * 3)


@pytest.mark.parametrize("method", METHODS)
def test_nearly_equal_models(method):
    """KLs of 1e-7 are beyond float32: alpha means little there, but the budget holds."""
    generator = torch.Generator().manual_seed(6)
    teacher = 2.0 * torch.randn(1, 3000, generator=generator)
    student = teacher + 5e-4 * torch.randn(1, 3000, generator=generator)
    row = teacher[0], student[0]
    for budget in (1e-9, 1e-8, 1e-7, 1e-6):
        alpha = solved(row, method, budget).alpha.item()
        assert 0.0 <= alpha <= 1.0
        assert kl_of(row, method, alpha)[0] <= budget + KL_TOLERANCE
    assert solved(row, method, 0.0).alpha.item() == ENDS[method][0]
    assert solved(row, method, 1e-5).alpha.item() == ENDS[method][1]


@pytest.mark.parametrize("method", METHODS)
def test_certain_of_different_tokens(method):
    """The KL rises from 0 to hundreds of nats within a thousandth of alpha: a step, which Newton alone would miss."""
    teacher, student = torch.zeros(1000), torch.zeros(1000)
    teacher[1], student[2] = 500.0, 500.0
    for budget in (0.01, 1.0, 100.0, 400.0):
        alpha = solved((teacher, student), method, budget).alpha.item()
        kl, unknown = kl_of((teacher, student), method, alpha)
        assert kl == pytest.approx(budget, abs=unknown)


@pytest.mark.parametrize("method", METHODS)
def test_no_budget_where_float32_sees_no_kl(method):
    """Both are certain of one token, and the other's odds differ: not equal, but a KL that float32 rounds to 0."""
    row = torch.tensor([14.6044, -6.2096]), torch.tensor([12.3748, -7.8031])
    assert solved(row, method, 0.0).alpha.item() == ENDS[method][0]
    assert solved(row, method, 1e-5).alpha.item() == ENDS[method][1]


@pytest.mark.parametrize("method", METHODS)
def test_one_common_token(method):
    """Both models are certain of it once the others are masked: equal, so any budget fits."""
    teacher = torch.tensor([1.0, 2.0, -torch.inf, 0.5])
    student = torch.tensor([-torch.inf, 1.0, 3.0, -torch.inf])
    m = solved((teacher, student), method, 0.1)
    assert m.alpha.item() == ENDS[method][1]
    assert m.logits[0].isneginf().tolist() == [True, False, True, True]
    assert m.kl_to_student.item() == m.kl_to_teacher.item() == 0.0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("budget", [0.0, 0.1, 1e30])
def test_nan_stays(method, budget):
    teacher = torch.randn(3, 100, generator=torch.Generator().manual_seed(7))
    student = 2.0 * torch.randn(3, 100, generator=torch.Generator().manual_seed(8))
    clean = mix(teacher, student, torch.ones(3), AlphaParams.uniform(3, method, kl_budget=budget))
    teacher[0, 3], student[2] = torch.nan, torch.nan
    m = mix(teacher, student, torch.ones(3), AlphaParams.uniform(3, method, kl_budget=budget))
    assert m.alpha.isnan().tolist() == [True, False, True]
    assert m.alpha[1] == clean.alpha[1] and m.kl_to_student[[0, 2]].isnan().all()


def test_each_row_has_its_own():
    """Many budgets of either kind in one call, beside other methods."""
    generator = torch.Generator().manual_seed(9)
    teacher = 3.0 * torch.randn(40, 400, generator=generator)
    student = 2.0 * torch.randn(40, 400, generator=generator)
    methods = [("kl_budget", "fixed", "kl_budget_teacher", "kl_symmetry")[i % 4] for i in range(40)]
    budgets = [0.05 * i for i in range(40)]
    params = AlphaParams.from_lists(methods, [0.0] * 40, [1.0] * 40, [-0.5] * 40, kl_budget=budgets)
    for p, t, s, times in (
        (params, teacher, student, 1),
        (params.repeat(2), teacher.tile(2, 1), student.tile(2, 1), 2),
    ):
        m = mix(t, s, torch.ones(40 * times), p)
        kls = {"kl_budget": m.kl_to_student, "kl_budget_teacher": m.kl_to_teacher}
        used = 0
        for i, (method, budget) in enumerate(zip(methods * times, budgets * times, strict=True)):
            if method == "fixed":
                assert m.alpha[i] == -0.5
            elif method == "kl_symmetry":
                assert m.kl_to_student[i].item() == pytest.approx(m.kl_to_teacher[i].item(), abs=1e-4)
            else:
                assert kls[method][i].item() == pytest.approx(budget, abs=1e-5) or m.alpha[i] == ENDS[method][1]
                used += 0.0 < m.alpha[i] < 1.0
        assert used >= 15 * times


def test_settings():
    uniform = AlphaParams.uniform(4, "kl_budget", kl_budget=0.25)
    assert uniform.kl_budget.tolist() == [0.25] * 4 and uniform.kl_budget.dtype == torch.float32
    lists = AlphaParams.from_lists(["kl_budget"] * 3, [0.0] * 3, [1.0] * 3, [0.5] * 3, kl_budget=[0.0, 1.0, 2.0])
    assert lists.rows(slice(1, 3)).kl_budget.tolist() == [1.0, 2.0]
    assert lists.repeat(2).kl_budget.tolist() == [0.0, 1.0, 2.0] * 2
    assert AlphaParams.uniform(2).kl_budget.shape == (2,)
    with pytest.raises(ValueError, match="kl_budget: required"):
        AlphaParams.uniform(2, "kl_budget_teacher")
    with pytest.raises(ValueError, match="kl_budget: must have the same length"):
        AlphaParams.from_lists(["kl_budget"], [0.0], [1.0], [0.5], kl_budget=[0.1, 0.2])


def test_few_steps(monkeypatch):
    """√(2·KL) is nearly linear: plain PyTorch looks at a row about four times between the ends."""
    generator = torch.Generator().manual_seed(10)
    common, own = torch.randn(2, 30, 5000, generator=generator)
    teacher, student = 3.0 * common, 2.0 * common + 1.5 * own
    count = 0
    original = LogPair.derivatives

    def counting(pair, alpha, order=2):
        nonlocal count
        count += 1
        return original(pair, alpha, order)

    monkeypatch.setattr(LogPair, "derivatives", counting)
    for budget in (1e-3, 0.05, 0.5):
        for t, s in zip(teacher, student, strict=True):
            params = AlphaParams.uniform(1, "kl_budget", kl_budget=budget)
            mix(t[None], s[None], torch.ones(1), params, implementation="torch")
    steps = count / 90 - 3  # the test for equal models, the end, and what is reported of alpha
    assert math.isfinite(steps) and 1.0 < steps <= 5.0
