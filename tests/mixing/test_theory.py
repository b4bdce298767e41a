"""Every numbered statement of docs/theory.md, numerically.

The library solves alpha and mixes (float32, plain PyTorch). What it is compared with is summed in float64, or found by
an optimiser that knows nothing of the path. `EXACT` is for what both sides compute in float64.
"""

from __future__ import annotations

import itertools
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax, logsumexp, softmax

from sglang_optimal.mixing import AlphaParams, SamplingFilters, Sides, mix, more_series
from sglang_optimal.train import generalised_jsd

PAGE = (Path(__file__).parents[2] / "docs" / "theory.md").read_text(encoding="utf-8")
EXACT = 1e-11
SOLVED = 2e-5
"""Of what follows from a float32 alpha, where the distributions are as mild as `pairs` makes them."""
WEIGHTS = st.floats(0.0, 1.0)
some = settings(max_examples=40, deadline=None)
few = settings(max_examples=15, deadline=None)
"""Where an optimiser runs for each example."""


@st.composite
def pairs(draw, low=2, high=6):
    """Log-probabilities of the student and the teacher, float64 [V]."""
    size, seed = draw(st.integers(low, high)), draw(st.integers(0, 2**31))
    random = np.random.default_rng(seed)
    scale = draw(st.sampled_from([0.5, 1.0, 2.0]))
    log_s, log_t = log_softmax(scale * random.normal(size=(2, size)), axis=-1)
    assume(kl(log_t, log_s) > 1e-3 and kl(log_s, log_t) > 1e-3)
    return log_s, log_t


@st.composite
def with_others(draw):
    """A pair, and 200 distributions [200, V]: anywhere on the simplex, and near the path."""
    log_s, log_t = draw(pairs())
    random = np.random.default_rng(draw(st.integers(0, 2**31)))
    anywhere = log_softmax(random.normal(size=(100, len(log_s))) * random.choice([0.3, 1, 4], size=(100, 1)), axis=-1)
    on_path = np.stack([path(log_s, log_t, a) for a in random.uniform(-0.5, 1.5, size=100)])
    near = log_softmax(on_path + random.normal(size=on_path.shape) * random.choice([1e-3, 0.1], size=(100, 1)), axis=-1)
    return log_s, log_t, np.concatenate([anywhere, near])


def kl(log_p, log_q):
    """KL(p‖q), nats, over the last dimension; 0·log 0 is 0."""
    with np.errstate(invalid="ignore"):
        return np.where(np.isneginf(log_p), 0.0, np.exp(log_p) * (log_p - log_q)).sum(-1)


def path(log_s, log_t, alpha):
    return log_softmax((1 - alpha) * log_s + alpha * log_t, axis=-1)


def log_z(log_s, log_t, alpha):
    """A(α)."""
    return float(logsumexp((1 - alpha) * log_s + alpha * log_t))


def mean_and_variance(log_q, values):
    mean = float((np.exp(log_q) * values).sum())
    return mean, float((np.exp(log_q) * (values - mean) ** 2).sum())


def mixed(log_s, log_t, method="kl_symmetry", temperature=1.0, **settings_of_alpha):
    """The library's `Mixture` of one row."""
    teacher, student = (torch.tensor(row, dtype=torch.float32)[None] for row in (log_t, log_s))
    params = AlphaParams.uniform(1, method, **settings_of_alpha)
    return mix(teacher, student, torch.tensor([temperature]), params, ess_ratio=True, implementation="torch")


def alpha_of(log_s, log_t, method="kl_symmetry", **settings_of_alpha):
    return float(mixed(log_s, log_t, method, **settings_of_alpha).alpha)


def q_of(mixture, temperature=1.0):
    """Its log-probabilities, float64 [V]."""
    return log_softmax(mixture.logits[0].double().numpy() / temperature, axis=-1)


def best(objective, size, bound=None):
    """The least value of a function of a distribution, by SLSQP over its logits, from three starts.

    ``bound``: a function that must not be positive.
    """
    constraints = [] if bound is None else [{"type": "ineq", "fun": lambda z: -bound(log_softmax(z))}]
    found = []
    for seed in range(3):
        start = np.random.default_rng(seed).normal(size=size) * 0.3
        done = scipy.optimize.minimize(
            lambda z: objective(log_softmax(z)), start, method="SLSQP", constraints=constraints,
            options={"maxiter": 500, "ftol": 1e-12},
        )  # fmt: skip
        if bound is None or bound(log_softmax(done.x)) <= 1e-6:
            found.append(done.fun)
    return min(found)


def least_maximum(first, second, size):
    """The least, over distributions, of the larger of two functions: t with both at most t."""
    found = []
    for seed in range(3):
        z = np.random.default_rng(seed).normal(size=size) * 0.3
        start = np.append(z, max(first(log_softmax(z)), second(log_softmax(z))))
        bounds = [
            {"type": "ineq", "fun": lambda x, f=function: x[-1] - f(log_softmax(x[:-1]))}
            for function in (first, second)
        ]
        done = scipy.optimize.minimize(
            lambda x: x[-1], start, method="SLSQP", constraints=bounds, options={"maxiter": 500, "ftol": 1e-12}
        )
        found.append(max(first(log_softmax(done.x[:-1])), second(log_softmax(done.x[:-1]))))
    return min(found)


# -- one token -------------------------------------------------------------------------------------------------------


@some
@given(with_others(), st.floats(-3.0, 4.0))
def test_statement_1_the_weighted_sum(models, alpha):
    log_s, log_t, others = models
    mixture = mixed(log_s, log_t, "fixed", fixed_alpha=alpha)
    q, a = path(log_s, log_t, alpha), log_z(log_s, log_t, alpha)
    assert np.abs(q_of(mixture) - q).max() < 1e-4
    sums = (1 - alpha) * kl(others, log_s) + alpha * kl(others, log_t)
    np.testing.assert_allclose(sums, kl(others, q) - a, atol=EXACT)
    assert (sums >= -a - EXACT).all()
    np.testing.assert_allclose((1 - alpha) * kl(q, log_s) + alpha * kl(q, log_t), -a, atol=EXACT)


@some
@given(pairs(), st.floats(0.01, 0.99))
def test_statement_2_both_distances(models, alpha):
    log_s, log_t = models
    q, r, a = path(log_s, log_t, alpha), log_t - log_s, log_z(log_s, log_t, alpha)
    slope, variance = mean_and_variance(q, r)
    step = 1e-5
    numeric = (log_z(log_s, log_t, alpha + step) - log_z(log_s, log_t, alpha - step)) / (2 * step)
    assert numeric == pytest.approx(slope, abs=1e-7)
    assert kl(q, log_s) == pytest.approx(alpha * slope - a, abs=EXACT)
    assert kl(q, log_t) == pytest.approx((alpha - 1) * slope - a, abs=EXACT)
    rise = [kl(path(log_s, log_t, alpha + d), log_s) for d in (-step, step)]
    assert (rise[1] - rise[0]) / (2 * step) == pytest.approx(alpha * variance, rel=1e-4, abs=1e-6)
    along = [path(log_s, log_t, x) for x in np.linspace(0, 1, 21)]
    assert (np.diff([kl(p, log_s) for p in along]) > 0).all() and (np.diff([kl(p, log_t) for p in along]) < 0).all()
    assert kl(along[-1], log_s) == pytest.approx(kl(log_t, log_s)) and kl(along[0], log_s) == pytest.approx(
        0, abs=EXACT
    )
    mixture = mixed(log_s, log_t, "fixed", fixed_alpha=alpha)
    assert float(mixture.kl_to_student) == pytest.approx(alpha * slope - a, abs=SOLVED)
    assert float(mixture.kl_to_teacher) == pytest.approx((alpha - 1) * slope - a, abs=SOLVED)


@some
@given(with_others(), WEIGHTS)
def test_statement_3_no_distribution_is_nearer_to_both(models, alpha):
    log_s, log_t, others = models
    q = path(log_s, log_t, alpha)
    nearer = (kl(others, log_s) <= kl(q, log_s)) & (kl(others, log_t) <= kl(q, log_t))
    assert (kl(others[nearer], q) < EXACT).all()
    # By how much one of the distances has to be larger: the identity of 1.
    worse = np.maximum(kl(others, log_s) - kl(q, log_s), kl(others, log_t) - kl(q, log_t))
    assert (worse >= kl(others, q) - EXACT).all()


@some
@given(pairs(), WEIGHTS)
def test_statement_4_no_token_falls_below_both(models, alpha):
    log_s, log_t = models
    assert (path(log_s, log_t, alpha) >= np.minimum(log_s, log_t) - EXACT).all()
    assert log_z(log_s, log_t, alpha) <= EXACT
    agree = mixed(np.log([0.4, 0.5, 0.1]), np.log([0.4, 0.1, 0.5]))
    assert np.exp(q_of(agree))[0] > 0.45


# -- the point that each method takes --------------------------------------------------------------------------------


@few
@given(with_others())
def test_statement_5_kl_symmetry(models):
    log_s, log_t, others = models
    mixture = mixed(log_s, log_t)
    alpha, q = float(mixture.alpha), q_of(mixture)
    chernoff = -log_z(log_s, log_t, alpha)
    lowest = scipy.optimize.minimize_scalar(lambda x: log_z(log_s, log_t, x), bounds=(0, 1), method="bounded")
    assert chernoff == pytest.approx(-lowest.fun, abs=SOLVED)
    assert kl(q, log_s) == pytest.approx(chernoff, abs=SOLVED) and kl(q, log_t) == pytest.approx(chernoff, abs=SOLVED)
    assert (np.maximum(kl(others, log_s), kl(others, log_t)) >= chernoff - SOLVED).all()
    least = least_maximum(lambda p: kl(p, log_s), lambda p: kl(p, log_t), len(q))
    assert max(kl(q, log_s), kl(q, log_t)) == pytest.approx(least, abs=1e-4)


@some
@given(st.integers(2, 8), st.integers(0, 2**31))
def test_statement_6_kl_symmetry_is_near_one_half_where_models_agree(size, seed):
    random = np.random.default_rng(seed)
    log_s = log_softmax(random.normal(size=size))
    direction = random.normal(size=size)
    direction -= mean_and_variance(log_s, direction)[0]
    direction /= np.abs(direction).max()

    def root(scale):
        log_t = log_softmax(log_s + scale * direction)
        return scipy.optimize.brentq(
            lambda a: mean_and_variance(path(log_s, log_t, a), log_t - log_s)[0], 0, 1, xtol=1e-14
        )

    away = [abs(root(scale) - 0.5) for scale in (0.2, 0.1, 0.05)]
    assert away[0] < 0.1 and away[1] < 0.6 * away[0] + 1e-3 and away[2] < 0.6 * away[1] + 1e-3
    assert abs(alpha_of(log_s, log_softmax(log_s + 0.1 * direction)) - root(0.1)) < 1e-3


BUDGETS = st.floats(0.05, 0.95)


@few
@given(with_others(), BUDGETS)
def test_statement_7_kl_budget(models, share):
    log_s, log_t, others = models
    budget = share * kl(log_t, log_s)
    q = q_of(mixed(log_s, log_t, "kl_budget", kl_budget=budget))
    assert kl(q, log_s) == pytest.approx(budget, abs=SOLVED)
    allowed = others[kl(others, log_s) <= budget]
    assert (kl(allowed, log_t) >= kl(q, log_t) - 1e-4).all()
    least = best(lambda p: kl(p, log_t), len(q), lambda p: kl(p, log_s) - budget)
    assert kl(q, log_t) == pytest.approx(least, abs=1e-4)
    assert alpha_of(log_s, log_t, "kl_budget", kl_budget=1.01 * kl(log_t, log_s)) == 1.0
    assert alpha_of(log_s, log_t, "kl_budget", kl_budget=0.0) == 0.0


@few
@given(with_others(), BUDGETS)
def test_statement_8_kl_budget_teacher(models, share):
    log_s, log_t, others = models
    budget = share * kl(log_s, log_t)
    q = q_of(mixed(log_s, log_t, "kl_budget_teacher", kl_budget=budget))
    assert kl(q, log_t) == pytest.approx(budget, abs=SOLVED)
    allowed = others[kl(others, log_t) <= budget]
    assert (kl(allowed, log_s) >= kl(q, log_s) - 1e-4).all()
    least = best(lambda p: kl(p, log_s), len(q), lambda p: kl(p, log_t) - budget)
    assert kl(q, log_s) == pytest.approx(least, abs=1e-4)


def second_moment(log_p, log_q):
    """log Σ p²/q."""
    return logsumexp(2 * log_p - log_q, axis=-1)


@few
@given(pairs(low=3))
def test_statement_9_ess_balance(models):
    log_s, log_t = models
    mixture = mixed(log_s, log_t, "ess_balance")
    q, alpha = q_of(mixture), float(mixture.alpha)
    assert second_moment(log_s, q) == pytest.approx(second_moment(log_t, q), abs=1e-4)
    assert float(mixture.ess_ratio) == pytest.approx(1.0, abs=1e-4)
    along = np.stack([path(log_s, log_t, x) for x in np.linspace(0, 1, 41)])
    to_s, to_t = second_moment(log_s, along), second_moment(log_t, along)
    assert (np.diff(to_s) > 0).all() and (np.diff(to_t) < 0).all() and 0 <= alpha <= 1
    assert (np.maximum(to_s, to_t) >= second_moment(log_s, q) - 1e-4).all()

    weights = np.linspace(0.001, 0.999, 999)[:, None]
    elsewhere = log_softmax(0.5 * np.logaddexp(2 * log_s + np.log(weights), 2 * log_t + np.log1p(-weights)), axis=-1)
    least = np.maximum(second_moment(log_s, elsewhere), second_moment(log_t, elsewhere)).min()
    searched = least_maximum(lambda p: second_moment(log_s, p), lambda p: second_moment(log_t, p), len(q))
    assert least == pytest.approx(searched, abs=5e-3)
    assert searched <= second_moment(log_s, q) + 1e-4


def test_statement_9_has_something_to_lose():
    log_s, log_t = np.log([0.9, 0.09, 0.01]), np.log([0.01, 0.09, 0.9])
    q = q_of(mixed(log_s, log_t, "ess_balance"))
    better = log_softmax(0.5 * np.logaddexp(2 * log_s, 2 * log_t))
    assert max(second_moment(log_s, better), second_moment(log_t, better)) < second_moment(log_s, q) - 0.1


@few
@given(pairs(low=3))
def test_statement_10_reverse_kl_symmetry(models):
    log_s, log_t = models
    forward, backward = kl(log_t, log_s), kl(log_s, log_t)
    alpha = alpha_of(log_s, log_t, "reverse_kl_symmetry")
    assert alpha == pytest.approx(forward / (forward + backward), abs=SOLVED)
    for x in (0.2, 0.7, alpha):
        q, a = path(log_s, log_t, x), log_z(log_s, log_t, x)
        assert kl(log_s, q) == pytest.approx(a + x * backward, abs=EXACT)
        assert kl(log_t, q) == pytest.approx(a + (1 - x) * forward, abs=EXACT)
    along = [path(log_s, log_t, x) for x in np.linspace(0, 1, 41)]
    to_s, to_t = np.array([kl(log_s, p) for p in along]), np.array([kl(log_t, p) for p in along])
    assert (np.diff(to_s) > 0).all() and (np.diff(to_t) < 0).all()
    q = path(log_s, log_t, alpha)
    here = max(kl(log_s, q), kl(log_t, q))
    assert (np.maximum(to_s, to_t) >= here - SOLVED).all()

    def gap(x):
        m = np.log((1 - x) * np.exp(log_s) + x * np.exp(log_t))
        return kl(log_s, m) - kl(log_t, m)

    x = scipy.optimize.brentq(gap, 0, 1)
    arithmetic = kl(log_s, np.log((1 - x) * np.exp(log_s) + x * np.exp(log_t)))
    assert arithmetic < here + 1e-9
    searched = least_maximum(lambda p: kl(log_s, p), lambda p: kl(log_t, p), len(q))
    assert arithmetic == pytest.approx(searched, abs=1e-4)


@some
@given(pairs(low=3), st.randoms(use_true_random=False))
def test_statement_11_entropy_does_not_look_at_the_disagreement(models, random):
    log_s, log_t = models
    order = list(range(len(log_t)))
    random.shuffle(order)
    assume(not np.allclose(log_s, log_t[order]))
    before = alpha_of(log_s, log_t, "entropy")
    assert alpha_of(log_s, log_t[order], "entropy") == pytest.approx(before, abs=SOLVED)
    h_s, h_t = (-(np.exp(p) * p).sum() for p in (log_s, log_t))
    assert before == pytest.approx(h_s / (h_s + h_t), abs=SOLVED)


def test_statement_11_the_others_do():
    log_s, log_t, order = np.log([0.7, 0.2, 0.1]), np.log([0.5, 0.4, 0.1]), [2, 0, 1]
    for method in ("kl_symmetry", "ess_balance", "reverse_kl_symmetry"):
        assert abs(alpha_of(log_s, log_t, method) - alpha_of(log_s, log_t[order], method)) > 1e-3, method


@some
@given(pairs(), st.sampled_from(["kl_symmetry", "ess_balance", "reverse_kl_symmetry", "entropy"]), BUDGETS)
def test_statement_12_the_roles_may_change(models, method, share):
    log_s, log_t = models
    tolerance = 1e-3  # Newton stops at |f| ≤ 1e-6, and f may be flat
    assert alpha_of(log_s, log_t, method) == pytest.approx(1 - alpha_of(log_t, log_s, method), abs=tolerance)
    budget = share * kl(log_t, log_s)
    mirrored = alpha_of(log_t, log_s, "kl_budget_teacher", kl_budget=budget)
    assert alpha_of(log_s, log_t, "kl_budget", kl_budget=budget) == pytest.approx(1 - mirrored, abs=tolerance)


@some
@given(pairs(), st.tuples(WEIGHTS, WEIGHTS).map(sorted))
def test_statement_13_bounds(models, bounds):
    log_s, log_t = models
    low, high = bounds
    cut = alpha_of(log_s, log_t, alpha_min=low, alpha_max=high)
    assert cut == pytest.approx(min(max(alpha_of(log_s, log_t), low), high), abs=1e-6)

    def larger(x):
        return max(kl(path(log_s, log_t, x), log_s), kl(path(log_s, log_t, x), log_t))

    assert all(larger(x) >= larger(cut) - SOLVED for x in np.linspace(low, high, 31))
    mixture = mixed(log_s, log_t, "kl_budget", kl_budget=1e-6, alpha_min=0.9)
    assert float(mixture.alpha) == pytest.approx(0.9) and float(mixture.kl_to_student) > 1e-6


# -- outside 0 and 1 -------------------------------------------------------------------------------------------------


@some
@given(with_others(), st.floats(1.1, 4.0))
def test_statement_14_guidance(models, alpha):
    log_s, log_t, others = models
    z_s, z_t = log_s + 3.0, log_t - 1.0  # logits: any constant may be added
    mixture = mixed(z_s, z_t, "fixed", fixed_alpha=alpha)
    guided = log_softmax(z_s + alpha * (z_t - z_s))
    assert np.abs(q_of(mixture) - guided).max() < 1e-4

    def score(log_q):
        return alpha * kl(log_q, log_t) - (alpha - 1) * kl(log_q, log_s)

    assert (score(others) >= score(guided) - EXACT).all()
    beyond = [path(log_s, log_t, x) for x in np.linspace(1, alpha, 11)]
    assert (np.diff([kl(p, log_s) for p in beyond]) > 0).all() and (np.diff([kl(p, log_t) for p in beyond]) > 0).all()
    below = [path(log_s, log_t, 1 - x) for x in np.linspace(1, alpha, 11)]
    assert (np.diff([kl(p, log_t) for p in below]) > 0).all() and (np.diff([kl(p, log_s) for p in below]) > 0).all()


@some
@given(pairs())
def test_statement_15_contrastive_decoding(models):
    log_s, log_t = models
    ratio = np.sort(log_t - log_s)
    assume(ratio[-1] - ratio[-2] > 0.01)
    mixture = mixed(log_s, log_t, "fixed", fixed_alpha=1e5)
    assert int(mixture.logits.argmax()) == int((log_t - log_s).argmax())


def test_statement_15_a_token_that_both_find_impossible():
    log_s, log_t = np.log([0.5, 0.5 - 1e-9, 1e-9]), np.log([0.6, 0.4 - 1e-7, 1e-7])
    q = np.exp(q_of(mixed(log_s, log_t, "fixed", fixed_alpha=10.0)))
    assert q[2] > 0.999
    filters = SamplingFilters(
        temperature=torch.ones(1), top_k=torch.tensor([3]), top_p=torch.tensor([0.9]), min_p=torch.tensor([0.1]),
        needed=True, greedy=False,
    )  # fmt: skip
    logits = mixed(log_s, log_t, "fixed", fixed_alpha=10.0).logits
    assert int(filters.probs(logits).argmax()) == 2


# -- the arithmetic mixture ------------------------------------------------------------------------------------------


@few
@given(with_others(), st.floats(0.05, 0.95))
def test_statement_16_the_arithmetic_mixture(models, alpha):
    log_s, log_t, others = models
    m = np.log((1 - alpha) * np.exp(log_s) + alpha * np.exp(log_t))

    def score(log_q):
        return (1 - alpha) * kl(log_s, log_q) + alpha * kl(log_t, log_q)

    assert (score(others) >= score(m) - EXACT).all()
    assert score(m) == pytest.approx(best(score, len(m)), abs=1e-6)
    entropy = [-(np.exp(p) * p).sum() for p in (m, log_s, log_t)]
    jensen_shannon = entropy[0] - (1 - alpha) * entropy[1] - alpha * entropy[2]
    assert score(m) == pytest.approx(jensen_shannon, abs=EXACT)
    rows = [torch.tensor(p)[None, None] for p in (log_s, log_t)]
    assert float(generalised_jsd(*rows, beta=alpha)) == pytest.approx(jensen_shannon, abs=1e-9)


def test_statement_17_or_and_and():
    with np.errstate(divide="ignore"):
        log_s, log_t = np.log([0.5, 0.5, 0.0]), np.log([0.0, 0.5, 0.5])
    m = 0.5 * np.exp(log_s) + 0.5 * np.exp(log_t)
    assert m.tolist() == [0.25, 0.5, 0.25]
    assert np.exp(q_of(mixed(log_s, log_t, "fixed", fixed_alpha=0.5))).tolist() == [0.0, 1.0, 0.0]


# -- temperature, cuts, masks ----------------------------------------------------------------------------------------


@some
@given(pairs(low=3), WEIGHTS, st.sampled_from([0.3, 0.7, 1.5]))
def test_statement_18_temperature(models, alpha, temperature):
    z_s, z_t = models
    log_s, log_t = log_softmax(z_s / temperature), log_softmax(z_t / temperature)
    mixture = mixed(z_s, z_t, "fixed", temperature, fixed_alpha=alpha)
    assert np.abs(q_of(mixture, temperature) - path(log_s, log_t, alpha)).max() < 1e-4
    solved = mixed(z_s, z_t, temperature=temperature)
    q = q_of(solved, temperature)
    assert kl(q, log_s) == pytest.approx(kl(q, log_t), abs=SOLVED)
    assert float(solved.kl_to_student) == pytest.approx(kl(q, log_s), abs=SOLVED)
    assert float(solved.alpha) == pytest.approx(alpha_of(log_s, log_t), abs=1e-3)


def test_statement_18_the_alpha_of_another_temperature():
    log_s, log_t = np.log([0.7, 0.2, 0.1]), np.log([0.1, 0.5, 0.4])
    assert abs(float(mixed(log_s, log_t, temperature=0.3).alpha) - alpha_of(log_s, log_t)) > 0.01


@some
@given(with_others(), WEIGHTS, st.integers(1, 3))
def test_statement_19_cuts(models, alpha, k):
    log_s, log_t, others = models
    assume(k < len(log_s))
    mixture = mixed(log_s, log_t, "fixed", fixed_alpha=alpha)
    filters = SamplingFilters(
        temperature=torch.ones(1), top_k=torch.tensor([k]), top_p=torch.ones(1), min_p=torch.zeros(1),
        needed=True, greedy=False,
    )  # fmt: skip
    left = filters.probs(mixture.logits)[0].double().numpy()
    kept = left > 0
    assert kept.sum() == k

    def score(log_q):
        return (1 - alpha) * kl(log_q, log_s[kept]) + alpha * kl(log_q, log_t[kept])

    cut = path(log_s, log_t, alpha)[kept]
    cut = cut - logsumexp(cut)
    np.testing.assert_allclose(left[kept], np.exp(cut), atol=1e-5)
    others = others[:, kept] - logsumexp(others[:, kept], axis=-1, keepdims=True)
    assert (score(others) >= score(cut) - EXACT).all()


def test_statement_19_a_cut_is_outside_the_budget():
    log_s, log_t = np.log([0.4, 0.35, 0.25]), np.log([0.2, 0.4, 0.4])
    mixture = mixed(log_s, log_t, "kl_budget", kl_budget=0.02)
    token = int(mixture.logits.argmax())
    assert float(mixture.kl_to_student) == pytest.approx(0.02, abs=SOLVED)
    assert -log_s[token] > 0.9  # KL of that token alone


@some
@given(pairs(low=4), st.integers(0, 2**31))
def test_statement_20_biases_and_masks(models, seed):
    log_s, log_t = models
    bias = np.random.default_rng(seed).normal(size=len(log_s))
    once = q_of(mixed(log_s + bias, log_t + bias, "fixed", fixed_alpha=0.3))
    assert np.abs(once - log_softmax(path(log_s, log_t, 0.3) + bias)).max() < 1e-4
    masked = log_t.copy()
    masked[0] = -np.inf
    mixture = mixed(log_s, masked)
    q = q_of(mixture)
    assert np.isneginf(q[0])
    rest = np.log1p(-np.exp(log_s[0]))
    assert kl(q, log_s) == pytest.approx(float(mixture.kl_to_student) - rest, abs=SOLVED)


# -- importance weights ----------------------------------------------------------------------------------------------


@some
@given(pairs(), WEIGHTS, st.integers(2, 4))
def test_statement_21_importance_weights(models, alpha, length):
    log_s, log_t = models
    q, a, r = path(log_s, log_t, alpha), log_z(log_s, log_t, alpha), log_t - log_s
    np.testing.assert_allclose(log_s - q, a - alpha * r, atol=EXACT)
    np.testing.assert_allclose(log_t - q, a + (1 - alpha) * r, atol=EXACT)
    mixture = mixed(log_s, log_t, "fixed", fixed_alpha=alpha)
    rows = [torch.tensor(p, dtype=torch.float32)[None] for p in (log_t, log_s)]
    ess = more_series(["ess_student", "ess_teacher"], Sides(mixture, *rows, torch.ones(1)), torch.tensor([0]))[0]
    for log_p, reported in ((log_s, ess[0]), (log_t, ess[1])):
        weight = np.exp(log_p - q)
        assert (np.exp(q) * weight).sum() == pytest.approx(1.0)
        moment = (np.exp(q) * weight**2).sum()
        assert 1 / float(reported) == pytest.approx(moment, rel=1e-3)
        # Independent positions: every text of this length.
        texts = list(itertools.product(range(len(q)), repeat=length))
        chances = np.array([np.exp(q[list(text)].sum()) for text in texts])
        weights = np.array([np.exp((log_p - q)[list(text)].sum()) for text in texts])
        assert (chances * weights).sum() == pytest.approx(1.0)
        assert (chances * weights**2).sum() == pytest.approx(moment**length)


@some
@given(pairs(low=3), WEIGHTS)
def test_statement_22_weights_after_a_cut(models, alpha):
    log_s, log_t = models
    q = path(log_s, log_t, alpha)
    kept = q > q.min()
    cut = q[kept] - logsumexp(q[kept])
    for log_p in (log_s, log_t):
        mean = (np.exp(cut) * np.exp(log_p[kept] - cut)).sum()
        assert mean == pytest.approx(np.exp(log_p[kept]).sum()) and mean < 1


# -- whole texts -----------------------------------------------------------------------------------------------------


class Tree:
    """All texts of ``length`` tokens, of two models whose next token depends on the whole text so far.

    ``models``: the text so far to the student's and the teacher's log-probabilities [size] of its next token.
    """

    def __init__(self, models, size: int, length: int):
        self.texts = list(itertools.product(range(size), repeat=length))
        self.models, self.length = models, length

    def logs(self, of) -> np.ndarray:
        """Of each text, the sum of ``of(prefix)[token]``."""
        return np.array([sum(of(text[:i])[text[i]] for i in range(self.length)) for text in self.texts])

    def student(self):
        return self.logs(lambda prefix: self.models(prefix)[0])

    def teacher(self):
        return self.logs(lambda prefix: self.models(prefix)[1])

    def token_by_token(self, alpha=0.5, **method):
        """Log-probabilities of the texts where each token is drawn from the library's mixture."""
        method = method or {"method": "fixed", "fixed_alpha": alpha}
        return self.logs(lambda prefix: q_of(mixed(*self.models(prefix), **method)))

    def sums(self, alpha):
        """Σ A_i of each text."""
        return np.array([sum(log_z(*self.models(text[:i]), alpha) for i in range(self.length)) for text in self.texts])


def random_tree(seed: int, size=3, length=3) -> Tree:
    prefixes = [p for i in range(length) for p in itertools.product(range(size), repeat=i)]
    random = np.random.default_rng(seed)
    table = {prefix: log_softmax(1.5 * random.normal(size=(2, size)), axis=-1) for prefix in prefixes}
    return Tree(lambda prefix: (table[prefix][0], table[prefix][1]), size, length)


trees = pytest.mark.parametrize("seed", range(6))
weights = pytest.mark.parametrize("alpha", [0.25, 0.5, 0.8])


@trees
@weights
def test_statement_23_token_by_token_is_not_the_mixture_of_texts(seed, alpha):
    tree = random_tree(seed)
    p_s, p_t, q, sums = tree.student(), tree.teacher(), tree.token_by_token(alpha), tree.sums(alpha)
    assert logsumexp(q) == pytest.approx(0, abs=1e-5)
    np.testing.assert_allclose(q, (1 - alpha) * p_s + alpha * p_t - sums, atol=1e-4)
    whole = path(p_s, p_t, alpha)
    np.testing.assert_allclose(whole, (1 - alpha) * p_s + alpha * p_t - log_z(p_s, p_t, alpha), atol=EXACT)
    assert np.ptp(sums) > 0.1 and kl(q, whole) > 1e-3


@weights
def test_statement_23_but_for_equal_quarrels(alpha):
    """After every text so far the models are the same but for the tokens' names: Σ A_i is one number."""
    log_s, log_t = np.log([0.7, 0.2, 0.1]), np.log([0.1, 0.3, 0.6])
    tree = Tree(lambda prefix: (np.roll(log_s, sum(prefix)), np.roll(log_t, sum(prefix))), 3, 3)
    np.testing.assert_allclose(tree.token_by_token(alpha), path(tree.student(), tree.teacher(), alpha), atol=1e-4)


@trees
@weights
def test_statement_24_the_mixture_of_texts_is_nearer(seed, alpha):
    tree = random_tree(seed)
    p_s, p_t, q, sums = tree.student(), tree.teacher(), tree.token_by_token(alpha), tree.sums(alpha)
    whole = path(p_s, p_t, alpha)

    def score(log_q):
        return (1 - alpha) * kl(log_q, p_s) + alpha * kl(log_q, p_t)

    assert score(whole) == pytest.approx(-log_z(p_s, p_t, alpha), abs=EXACT)
    assert score(q) == pytest.approx(score(whole) + kl(q, whole), abs=1e-4)
    assert score(q) == pytest.approx(-(np.exp(q) * sums).sum(), abs=1e-4)
    random = np.random.default_rng(seed)
    others = log_softmax(whole + random.normal(size=(50, len(whole))) * 0.2, axis=-1)
    assert (score(others) >= score(whole) - EXACT).all()


def test_statement_25_no_plan():
    after = {
        (): (np.log([0.5, 0.5]), np.log([0.5, 0.5])),
        (0,): (np.log([0.5, 0.5]), np.log([0.5, 0.5])),
        (1,): (np.log([0.99, 0.01]), np.log([0.01, 0.99])),
    }
    tree = Tree(lambda prefix: after[prefix], 2, 2)
    q, whole = tree.token_by_token(0.5), path(tree.student(), tree.teacher(), 0.5)
    begins_with_a = [text[0] == 0 for text in tree.texts]
    shares = [float(np.exp(p)[begins_with_a].sum()) for p in (whole, q)]
    distances = [0.5 * kl(p, tree.student()) + 0.5 * kl(p, tree.teacher()) for p in (whole, q)]
    assert [round(share, 3) for share in shares] == [0.834, 0.5]
    assert [round(float(distance), 3) for distance in distances] == [0.512, 0.807]
    (paragraph,) = re.findall(r"^\*\*25\.\*\*.*?\n\n", PAGE, re.MULTILINE | re.DOTALL)
    assert all(figure in paragraph for figure in ("0.834", "0.5:", "0.807", "0.512"))


@trees
def test_statement_26_a_budget_a_token(seed):
    tree, budget = random_tree(seed), 0.1
    p_s, p_t = tree.student(), tree.teacher()
    method = {"method": "kl_budget", "kl_budget": budget}
    q = tree.token_by_token(**method)
    per_token = {}
    for i in range(tree.length):
        for prefix in itertools.product(range(3), repeat=i):
            per_token[prefix] = float(mixed(*tree.models(prefix), **method).kl_to_student)
    added = np.array([sum(per_token[text[:i]] for i in range(tree.length)) for text in tree.texts])
    assert kl(q, p_s) == pytest.approx(float((np.exp(q) * added).sum()), abs=1e-4)
    assert kl(q, p_s) <= budget * tree.length + 1e-4
    x = scipy.optimize.brentq(lambda x: kl(path(p_s, p_t, x), p_s) - kl(q, p_s), 0, 1)
    assert kl(path(p_s, p_t, x), p_t) < kl(q, p_t) - 1e-3


# -- what it knows nothing of, and what a student learns -------------------------------------------------------------


def test_statement_27_correctness():
    log_s, log_t = np.log([0.5, 1e-4, 0.4999]), np.log([1e-4, 0.5, 0.4999])
    q = np.exp(q_of(mixed(log_s, log_t, "fixed", fixed_alpha=0.5)))
    assert round(100 * float(q[:2].sum()), 1) == 2.8 and "2.8 %" in PAGE
    assert float(mixed(log_s, log_t).alpha) == pytest.approx(0.5, abs=1e-4)  # and kl_symmetry takes it
    right = np.exp(q_of(mixed(np.log([0.4, 0.59, 0.01]), np.log([0.4, 0.01, 0.59]))))
    assert right[0] > 0.6


@some
@given(pairs(), st.sampled_from([0.3, 0.5, 0.8]))
def test_statement_28_rounds_of_fine_tuning(models, alpha):
    log_s, log_t = models
    q = np.exp(path(log_s, log_t, alpha))
    student = torch.zeros(len(q), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([student], max_iter=200, tolerance_change=0, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = -(torch.tensor(q) * student.log_softmax(-1)).sum()
        value.backward()
        return value

    optimizer.step(loss)
    assert np.abs(softmax(student.detach().numpy()) - q).max() < 1e-6
    now, contrast = log_s, log_t - log_s
    for n in range(1, 4):
        now = q_of(mixed(now, log_t, "fixed", fixed_alpha=alpha))
        left = (log_t - now) - (log_t - now)[0]
        np.testing.assert_allclose(left, (1 - alpha) ** n * (contrast - contrast[0]), atol=1e-4)


@few
@given(st.integers(3, 6), st.integers(2, 4), st.integers(0, 2**31))
def test_statement_29_privileged_contexts_are_averaged(size, hints, seed):
    random = np.random.default_rng(seed)
    log_s = log_softmax(random.normal(size=size))
    told = np.stack([q_of(mixed(log_s, log_softmax(2 * random.normal(size=size)))) for _ in range(hints)])
    chances = random.dirichlet(np.ones(hints))
    average = np.log((chances[:, None] * np.exp(told)).sum(0))

    def score(log_p):
        return float((chances * kl(told, log_p)).sum())

    assert score(average) == pytest.approx(best(score, size), abs=1e-6)
    assert score(average) > 0
    # A rule that is the same for all problems: nothing is left.
    assert float((chances * kl(np.repeat(told[:1], hints, 0), told[0])).sum()) == pytest.approx(0, abs=EXACT)


# -- the page --------------------------------------------------------------------------------------------------------


def test_every_statement_has_its_test_and_every_test_its_statement():
    statements = re.findall(r"^\*\*(\d+)\.\*\*(.*?)(?=^\*\*\d+\.\*\*|^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    named = {}
    for number, text in statements:
        tests = re.findall(r"`(test_statement_\w+)`", text)
        assert len(tests) == 1 and tests[0].startswith(f"test_statement_{number}_"), number
        named[tests[0]] = int(number)
    assert list(named.values()) == list(range(1, len(statements) + 1)) and len(statements) >= 20
    ours = {name for name in vars(sys.modules[__name__]) if name.startswith("test_statement_")}
    assert set(named) <= ours
    # Others of a number look at one more side of the same statement.
    assert {int(name.split("_")[2]) for name in ours} == set(named.values())


def test_the_page_names_every_alpha_method():
    from sglang_optimal.mixing import ALPHA_METHODS

    assert all(f"`{method}`" in PAGE for method in ALPHA_METHODS)
    assert math.isclose(0.834, 1 / (1 + 2 * math.sqrt(0.99 * 0.01)), abs_tol=5e-4)
