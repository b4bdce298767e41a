"""Alpha: the teacher's weight, solved anew for every token.

With r = log p_t − log p_s and A(α) = log Σ p_s^(1−α) p_t^α (convex, A(0) = A(1) = 0), the mixture is q ∝ p_s e^(αr),
A' = E_q[r] and A'' = Var_q[r]. A' = KL(q‖p_s) − KL(q‖p_t), so its root is the minimum of A: the Chernoff point.
KL(q‖p_s) = αA' − A increases with α (its slope is αA''), and KL(q‖p_t) = −(1−α)A' − A decreases, so either can be a
budget.

Sources: Chernoff 1952, "A Measure of Asymptotic Efficiency for Tests of a Hypothesis Based on the sum of Observations";
"Trust-Region Behavior Blending", arXiv 2605.31159 (the budget).
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sglang_optimal.mixing.pair import LogPair

TOLERANCE = 1e-6
"""Iteration stops at |f| ≤ TOLERANCE or |Δα| ≤ TOLERANCE."""
KL_TOLERANCE = 3e-7
"""Of max(1, |αA'|), in nats. A budget counts as met so near to it: αA' − A is a difference, which float32 knows no
better."""
# Newton with bisection as the safeguard. On a GPU the count is fixed, because asking whether it has converged would
# stall the overlap loop; a converged row stays where it is. 12 leaves room for a few bisections of the bracket.
MAX_STEPS = 40
_STEPS_DEVICE = 12
# Squared: below this root-mean-square of r under the middle mixture (float32 noise of the logits) alpha has no meaning.
EQUAL = 1e-10
# … unless some token's |r| is beyond float32 noise: two models certain of one token may still differ in the tail, on
# which the effective sample sizes depend.
EQUAL_TAIL = 1e-2


class AlphaMethod(enum.IntEnum):
    """The condition that alpha solves. The numbers are the entries of ``AlphaParams.method``."""

    KL_SYMMETRY = 0
    """KL(q‖p_s) = KL(q‖p_t), the Chernoff point: A'(α) = 0 (Chernoff 1952)."""
    ESS_BALANCE = 1
    """Σ p_s²/q = Σ p_t²/q, equal effective sample sizes: A(2−α) = A(−α)."""
    REVERSE_KL_SYMMETRY = 2
    """KL(p_s‖q) = KL(p_t‖q); α = KL(p_t‖p_s) / (KL(p_s‖p_t) + KL(p_t‖p_s))."""
    ENTROPY = 3
    """α = H(p_s) / (H(p_s) + H(p_t)): the more certain model weighs more."""
    FIXED = 4
    """α is given and may lie outside [0, 1]."""
    KL_BUDGET = 5
    """The largest α with KL(q‖p_s) ≤ a budget: nearest to the teacher in a trust region around the student (arXiv
    2605.31159)."""
    KL_BUDGET_TEACHER = 6
    """The smallest α with KL(q‖p_t) ≤ a budget, the mirror image."""


ALPHA_METHODS: tuple[str, ...] = tuple(method.name.lower() for method in AlphaMethod)
_BUDGETS = (AlphaMethod.KL_BUDGET, AlphaMethod.KL_BUDGET_TEACHER)


@dataclasses.dataclass
class AlphaParams:
    """Alpha settings of one batch, an entry for each of B rows. All tensors are on one device (cpu or cuda).

    Make them with `from_lists` or `uniform`, which check and move them.

    Attributes:
        method: [B] int64, an `AlphaMethod` each.
        alpha_min, alpha_max: [B] float32, bounds on solved alphas; FIXED ignores them.
        fixed_alpha: [B] float32, read where the method is FIXED.
        kl_budget: [B] float32, nats, read where the method is KL_BUDGET or KL_BUDGET_TEACHER.
        methods_present: the methods that occur, known on the host so that only these are solved.

    Example:
        >>> from sglang_optimal.mixing import AlphaParams
        >>> params = AlphaParams.from_lists(
        ...     ["kl_symmetry", "fixed"], alpha_min=[0.0, 0.0], alpha_max=[0.7, 1.0], fixed_alpha=[0.5, 1.5]
        ... )
        >>> params.method.tolist(), params.fixed_alpha.tolist()
        ([0, 4], [0.5, 1.5])
        >>> AlphaParams.uniform(3, "entropy").method.tolist()
        [3, 3, 3]
        >>> AlphaParams.uniform(2, "kl_budget", kl_budget=0.5).kl_budget.tolist()
        [0.5, 0.5]
    """

    method: Tensor
    alpha_min: Tensor
    alpha_max: Tensor
    fixed_alpha: Tensor
    kl_budget: Tensor
    methods_present: frozenset[AlphaMethod]

    @classmethod
    def from_lists(
        cls,
        methods: Sequence[str | AlphaMethod],
        alpha_min: Sequence[float],
        alpha_max: Sequence[float],
        fixed_alpha: Sequence[float],
        device: torch.device | str = "cpu",
        *,
        kl_budget: Sequence[float] | None = None,
    ) -> AlphaParams:
        """Make the settings of B rows from lists of B entries.

        Args:
            methods: names in `ALPHA_METHODS`, or `AlphaMethod` values.
            alpha_min, alpha_max: bounds on solved alphas.
            fixed_alpha: alphas of the rows with FIXED; the others ignore theirs.
            device: of the tensors, cpu or cuda. A copy to cuda is asynchronous, from pinned memory.
            kl_budget: nats, 0 or more, of the rows with KL_BUDGET or KL_BUDGET_TEACHER; the others ignore theirs. None:
                no row has such a method.

        Raises:
            ValueError: lists of different lengths, an unknown method, or a method that needs a budget without any.
        """
        if not len(methods) == len(alpha_min) == len(alpha_max) == len(fixed_alpha):
            raise ValueError("methods, alpha_min, alpha_max, fixed_alpha: must have the same length.")
        if kl_budget is not None and len(kl_budget) != len(methods):
            raise ValueError("kl_budget: must have the same length as methods.")
        values = [_method(m) for m in methods]
        present = frozenset(values)
        if kl_budget is None and not present.isdisjoint(_BUDGETS):
            raise ValueError("kl_budget: required where a method is kl_budget or kl_budget_teacher.")

        # Pinned, because a copy from other memory may wait until a GPU has caught up.
        pin = torch.device(device).type == "cuda"

        def floats(entries: Sequence[float]) -> Tensor:
            return torch.tensor(entries, dtype=torch.float32, pin_memory=pin).to(device, non_blocking=True)

        method = torch.tensor([int(v) for v in values], dtype=torch.int64, pin_memory=pin)
        fixed = floats(fixed_alpha)
        return cls(
            method=method.to(device, non_blocking=True),
            alpha_min=floats(alpha_min),
            alpha_max=floats(alpha_max),
            fixed_alpha=fixed,
            # Where nothing reads it, any tensor of this shape will do: no copy for batches without a budget.
            kl_budget=fixed if kl_budget is None else floats(kl_budget),
            methods_present=present,
        )

    @classmethod
    def uniform(
        cls,
        batch_size: int,
        method: str | AlphaMethod = AlphaMethod.KL_SYMMETRY,
        *,
        alpha_min: float = 0.0,
        alpha_max: float = 1.0,
        fixed_alpha: float = 0.5,
        kl_budget: float | None = None,
        device: torch.device | str = "cpu",
    ) -> AlphaParams:
        """Make the same settings for each of ``batch_size`` rows; the arguments are those of `from_lists`.

        Raises:
            ValueError: an unknown method, or one that needs a budget without any.
        """
        n = batch_size
        budgets = None if kl_budget is None else [kl_budget] * n
        lists = [method] * n, [alpha_min] * n, [alpha_max] * n, [fixed_alpha] * n
        return cls.from_lists(*lists, device, kl_budget=budgets)

    def repeat(self, times: int) -> AlphaParams:
        """Return the settings of [times · B] rows: all rows once, then all rows again."""
        return AlphaParams(
            self.method.repeat(times),
            self.alpha_min.repeat(times),
            self.alpha_max.repeat(times),
            self.fixed_alpha.repeat(times),
            self.kl_budget.repeat(times),
            self.methods_present,
        )

    def rows(self, rows: slice) -> AlphaParams:
        """Return the settings of a range of rows, as views."""
        return AlphaParams(
            self.method[rows],
            self.alpha_min[rows],
            self.alpha_max[rows],
            self.fixed_alpha[rows],
            self.kl_budget[rows],
            self.methods_present,
        )


def _method(value: str | AlphaMethod) -> AlphaMethod:
    if isinstance(value, AlphaMethod):
        return value
    try:
        return AlphaMethod[value.upper()]
    except KeyError:
        raise ValueError(f"alpha_method: {value!r} is not one of {', '.join(ALPHA_METHODS)}.") from None


def solve_alpha(pair: LogPair, params: AlphaParams) -> Tensor:
    """Solve alpha for every row, in plain PyTorch.

    Args:
        pair: the distributions of B rows. params: their settings, on the same device (cpu or cuda).

    Returns:
        [B] float32, within the bounds of each row (FIXED: as given). Equal distributions give the middle of the bounds
        (KL_BUDGET: alpha_max, KL_BUDGET_TEACHER: alpha_min), an empty common support gives 1, and NaN in a row stays
        NaN.
    """
    alpha = torch.zeros_like(params.fixed_alpha)
    for method in sorted(params.methods_present):
        if method is AlphaMethod.FIXED:
            solved = params.fixed_alpha
        elif method in _BUDGETS:
            free = kl_budget(pair, params.kl_budget, of_teacher=method is AlphaMethod.KL_BUDGET_TEACHER)
            solved = free.clamp(params.alpha_min, params.alpha_max)
        else:
            solved, equal = _SOLVERS[method](pair)
            middle = (params.alpha_min + params.alpha_max) / 2
            solved = torch.where(equal, middle, solved.clamp(params.alpha_min, params.alpha_max))
        if len(params.methods_present) == 1:
            alpha = solved.clone()
        else:
            alpha = torch.where(params.method == int(method), solved, alpha)
    if pair.empty is not None:
        alpha = alpha.masked_fill(pair.empty, 1.0)
    return alpha


def kl_symmetry(pair: LogPair) -> tuple[Tensor, Tensor]:
    """Find the root of A' in [0, 1], the Chernoff point (Chernoff 1952).

    A' increases from −KL(p_s‖p_t) at 0 to KL(p_t‖p_s) at 1.

    Returns:
        (alpha [B] float32, equal [B] bool: whether the distributions are equal to float32 precision).
    """

    def f(p: LogPair, alpha: Tensor, _: Tensor | None) -> tuple[Tensor, Tensor]:
        _, first, second = p.derivatives(alpha)
        return first, second

    equal = _is_equal(pair)
    return _newton(pair, f, equal), equal


def ess_balance(pair: LogPair) -> tuple[Tensor, Tensor]:
    """Find the root of A(−α) − A(2−α) in [0, 1], where Σ p_s²/q = Σ p_t²/q.

    These are the reciprocals of the effective sample sizes, per sample, of importance sampling from q for p_s and p_t.

    Returns:
        (alpha [B] float32, equal [B] bool), as `kl_symmetry`.
    """

    def f(p: LogPair, alpha: Tensor, _: Tensor | None) -> tuple[Tensor, Tensor]:
        low, low_slope = p.derivatives(-alpha, order=1)
        high, high_slope = p.derivatives(2.0 - alpha, order=1)
        return low - high, high_slope - low_slope

    equal = _is_equal(pair)
    return _newton(pair, f, equal), equal


def reverse_kl_symmetry(pair: LogPair) -> tuple[Tensor, Tensor]:
    """Return α = A'(1) / (A'(1) − A'(0)), where KL(p_s‖q) = KL(p_t‖q): a closed form.

    Returns:
        (alpha [B] float32, equal [B] bool), as `kl_symmetry`.
    """
    zero = torch.zeros_like(pair.student_log_z)
    _, minus_kl_st = pair.derivatives(zero, order=1)
    _, kl_ts = pair.derivatives(zero + 1.0, order=1)
    total = kl_ts - minus_kl_st
    return (kl_ts / total).clamp(0.0, 1.0), _is_equal(pair)


def entropy(pair: LogPair) -> tuple[Tensor, Tensor]:
    """Return α = H(p_s) / (H(p_s) + H(p_t)), a heuristic; 1/2 where both are certain.

    Returns:
        (alpha [B] float32, equal [B] bool), as `kl_symmetry`.
    """
    student, teacher = entropies(pair)
    total = student + teacher
    alpha = torch.where(total > 0, student / total, torch.where(total.isnan(), total, 0.5))
    return alpha, _is_equal(pair)


def kl_budget(pair: LogPair, budget: Tensor, of_teacher: bool = False) -> Tensor:
    """Find the largest α in [0, 1] with KL(q‖p_s) ≤ ``budget`` (Trust-Region Behavior Blending, arXiv 2605.31159).

    Solves √(2·KL) = √(2·budget), which is nearly linear in α and has no zero slope at 0.

    Args:
        budget: [B] float32, nats. 0 gives the student, KL(p_t‖p_s) or more the teacher; so do equal distributions.
        of_teacher: the mirror image, the smallest α with KL(q‖p_t) ≤ ``budget``.

    Returns:
        [B] float32.
    """

    def alpha_at(x: Tensor) -> Tensor:  # x: how far from the model whose budget it is
        return 1.0 - x if of_teacher else x

    def kl(p: LogPair, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of KL(q‖its model): the value, the slope, and how well the value is known."""
        a, first, second = p.derivatives(alpha_at(x))
        first.mul_(-x if of_teacher else x)
        return (first - a).clamp_(min=0.0), x * second, first.abs().clamp_(min=1.0).mul_(KL_TOLERANCE)

    def f(p: LogPair, x: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        wanted = budget if rows is None else budget[rows]
        value, slope, known = kl(p, x)
        root = (2.0 * value).sqrt_()
        missing = root - (2.0 * wanted).sqrt_()
        missing.masked_fill_((value - wanted).abs() <= known, 0.0)
        # The slope of a KL that is noise says nothing; 0 bisects.
        return missing, torch.where(value <= known, 0.0, slope / root)

    # The ends are decided first, because between them only the region near the root is looked at.
    most, _, _ = kl(pair, torch.ones_like(pair.student_log_z))
    # Nothing fits a budget of 0, even where float32 gives 0 for a KL of models that differ.
    none_fits = (budget <= 0.0) & ~most.isnan()
    all_fits = _is_equal(pair) | ((most <= budget) & ~none_fits)
    x = _newton(pair, f, all_fits | none_fits)
    return alpha_at(torch.where(all_fits, 1.0, torch.where(none_fits, 0.0, x)))


def entropies(pair: LogPair) -> tuple[Tensor, Tensor]:
    """Return the entropies H(p_s) and H(p_t) in nats, each [B] float32."""
    result = []
    for alpha in (0.0, 1.0):
        w, _ = pair.weights(torch.full_like(pair.student_log_z, alpha))
        total = w.sum(-1)
        log_p = pair.student if alpha == 0.0 else pair.student + pair.delta
        result.append((w.mul_(log_p).sum(-1) / total).neg_().clamp_(min=0.0))
    return result[0], result[1]


def _is_equal(pair: LogPair) -> Tensor:
    _, mean, variance = pair.derivatives(torch.full_like(pair.student_log_z, 0.5))
    equal = variance + mean * mean <= EQUAL
    if not equal.is_cuda and not equal.any():
        return equal
    return equal & (pair.delta.abs().amax(-1) <= EQUAL_TAIL)


def _newton(
    pair: LogPair, f: Callable[[LogPair, Tensor, Tensor | None], tuple[Tensor, Tensor]], done: Tensor
) -> Tensor:
    """Root in [0, 1] of an increasing f with f(0) ≤ 0 ≤ f(1).

    A Newton step that leaves the bracket, or that would not halve the last step, becomes a bisection.

    Args:
        f: of a pair of n rows, alpha [n], and which rows of ``pair`` they are ([n] int64; None: all); returns (value,
            slope), each [n].
        done: [B] bool, rows that are not to be solved.

    Returns:
        [B] float32.
    """
    on_device = pair.student.is_cuda
    done = done.clone()
    alpha = torch.full_like(pair.student_log_z, 0.5)
    low, high = torch.zeros_like(alpha), torch.ones_like(alpha)
    step = torch.ones_like(alpha)
    part, rows = pair, None  # the rows that still iterate; None: all
    for _ in range(_STEPS_DEVICE if on_device else MAX_STEPS):
        a = alpha if rows is None else alpha[rows]
        lo, hi = (low, high) if rows is None else (low[rows], high[rows])
        last = step if rows is None else step[rows]
        value, slope = f(part, a, rows)
        below = value < 0
        lo, hi = torch.where(below, a, lo), torch.where(below, hi, a)
        newton = a - value / slope
        take = (newton > lo) & (newton < hi) & ((newton - a).abs() <= last / 2)
        target = torch.where(take, newton, (lo + hi) / 2)
        small = value.abs() <= TOLERANCE
        target = torch.where(small, a, target)
        target = torch.where(value.isnan(), value, target)
        change = (target - a).abs()
        finished = small | ~(change > TOLERANCE)  # NaN is finished too
        if rows is None:
            keep = done
            alpha = torch.where(keep, alpha, target)
            low, high, step = lo, hi, change
            done = done | finished
        else:
            alpha[rows], low[rows], high[rows], step[rows] = target, lo, hi, change
            done[rows] = finished
        if on_device:
            continue
        left = (~done).nonzero().squeeze(-1)
        if left.numel() == 0:
            break
        # Rows are independent: go on with the open ones alone once that is clearly less work.
        current = alpha.numel() if rows is None else rows.numel()
        if left.numel() <= current // 2:
            rows = left
            part = pair.select(rows)
    return alpha


_SOLVERS = {
    AlphaMethod.KL_SYMMETRY: kl_symmetry,
    AlphaMethod.ESS_BALANCE: ess_balance,
    AlphaMethod.REVERSE_KL_SYMMETRY: reverse_kl_symmetry,
    AlphaMethod.ENTROPY: entropy,
}
