"""Alpha: the teacher's weight, solved anew for every token.

With r = log p_t − log p_s and A(α) = log Σ p_s^(1−α) p_t^α (convex, A(0) = A(1) = 0), the mixture is q ∝ p_s e^(αr),
A' = E_q[r] and A'' = Var_q[r]. A' = KL(q‖p_s) − KL(q‖p_t), so its root is the minimum of A: the Chernoff point.

Source: Chernoff 1952, "A Measure of Asymptotic Efficiency for Tests of a Hypothesis Based on the sum of Observations".
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


ALPHA_METHODS: tuple[str, ...] = tuple(method.name.lower() for method in AlphaMethod)


@dataclasses.dataclass
class AlphaParams:
    """Alpha settings of one batch, an entry for each of B rows. All tensors are on one device (cpu or cuda).

    Make them with `from_lists` or `uniform`, which check and move them.

    Attributes:
        method: [B] int64, an `AlphaMethod` each.
        alpha_min, alpha_max: [B] float32, bounds on solved alphas; FIXED ignores them.
        fixed_alpha: [B] float32, read where the method is FIXED.
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
    """

    method: Tensor
    alpha_min: Tensor
    alpha_max: Tensor
    fixed_alpha: Tensor
    methods_present: frozenset[AlphaMethod]

    @classmethod
    def from_lists(
        cls,
        methods: Sequence[str | AlphaMethod],
        alpha_min: Sequence[float],
        alpha_max: Sequence[float],
        fixed_alpha: Sequence[float],
        device: torch.device | str = "cpu",
    ) -> AlphaParams:
        """Make the settings of B rows from lists of B entries.

        Args:
            methods: names in `ALPHA_METHODS`, or `AlphaMethod` values.
            alpha_min, alpha_max: bounds on solved alphas.
            fixed_alpha: alphas of the rows with FIXED; the others ignore theirs.
            device: of the tensors, cpu or cuda. A copy to cuda is asynchronous, from pinned memory.

        Raises:
            ValueError: lists of different lengths, or an unknown method.
        """
        if not len(methods) == len(alpha_min) == len(alpha_max) == len(fixed_alpha):
            raise ValueError("methods, alpha_min, alpha_max, fixed_alpha: must have the same length.")
        values = [_method(m) for m in methods]

        # Pinned, because a copy from other memory may wait until a GPU has caught up.
        pin = torch.device(device).type == "cuda"

        def floats(entries: Sequence[float]) -> Tensor:
            return torch.tensor(entries, dtype=torch.float32, pin_memory=pin).to(device, non_blocking=True)

        method = torch.tensor([int(v) for v in values], dtype=torch.int64, pin_memory=pin)
        return cls(
            method=method.to(device, non_blocking=True),
            alpha_min=floats(alpha_min),
            alpha_max=floats(alpha_max),
            fixed_alpha=floats(fixed_alpha),
            methods_present=frozenset(values),
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
        device: torch.device | str = "cpu",
    ) -> AlphaParams:
        """Make the same settings for each of ``batch_size`` rows; the arguments are those of `from_lists`.

        Raises:
            ValueError: an unknown method.
        """
        n = batch_size
        return cls.from_lists([method] * n, [alpha_min] * n, [alpha_max] * n, [fixed_alpha] * n, device)

    def repeat(self, times: int) -> AlphaParams:
        """Return the settings of [times · B] rows: all rows once, then all rows again."""
        return AlphaParams(
            self.method.repeat(times),
            self.alpha_min.repeat(times),
            self.alpha_max.repeat(times),
            self.fixed_alpha.repeat(times),
            self.methods_present,
        )

    def rows(self, rows: slice) -> AlphaParams:
        """Return the settings of a range of rows, as views."""
        return AlphaParams(
            self.method[rows], self.alpha_min[rows], self.alpha_max[rows], self.fixed_alpha[rows], self.methods_present
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
        [B] float32, within the bounds of each row (FIXED: as given). Equal distributions give the middle of the bounds,
        an empty common support gives 1, and NaN in a row stays NaN.
    """
    alpha = torch.zeros_like(params.fixed_alpha)
    for method in sorted(params.methods_present):
        if method is AlphaMethod.FIXED:
            solved = params.fixed_alpha
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

    def f(p: LogPair, alpha: Tensor) -> tuple[Tensor, Tensor]:
        _, first, second = p.derivatives(alpha)
        return first, second

    return _newton(pair, f)


def ess_balance(pair: LogPair) -> tuple[Tensor, Tensor]:
    """Find the root of A(−α) − A(2−α) in [0, 1], where Σ p_s²/q = Σ p_t²/q.

    These are the reciprocals of the effective sample sizes, per sample, of importance sampling from q for p_s and p_t.

    Returns:
        (alpha [B] float32, equal [B] bool), as `kl_symmetry`.
    """

    def f(p: LogPair, alpha: Tensor) -> tuple[Tensor, Tensor]:
        low, low_slope = p.derivatives(-alpha, order=1)
        high, high_slope = p.derivatives(2.0 - alpha, order=1)
        return low - high, high_slope - low_slope

    return _newton(pair, f)


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


def _newton(pair: LogPair, f: Callable[[LogPair, Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Root in [0, 1] of an increasing f with f(0) ≤ 0 ≤ f(1); f returns (value, slope), each [B].

    A Newton step that leaves the bracket, or that would not halve the last step, becomes a bisection.

    Returns:
        (alpha [B] float32, equal [B] bool: whether the distributions are equal to float32 precision).
    """
    on_device = pair.student.is_cuda
    equal = _is_equal(pair)
    alpha = torch.full_like(pair.student_log_z, 0.5)
    low, high = torch.zeros_like(alpha), torch.ones_like(alpha)
    step = torch.ones_like(alpha)
    done = equal.clone()
    part, rows = pair, None  # the rows that still iterate; None: all
    for _ in range(_STEPS_DEVICE if on_device else MAX_STEPS):
        a = alpha if rows is None else alpha[rows]
        lo, hi = (low, high) if rows is None else (low[rows], high[rows])
        last = step if rows is None else step[rows]
        value, slope = f(part, a)
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
    return alpha, equal


_SOLVERS = {
    AlphaMethod.KL_SYMMETRY: kl_symmetry,
    AlphaMethod.ESS_BALANCE: ess_balance,
    AlphaMethod.REVERSE_KL_SYMMETRY: reverse_kl_symmetry,
    AlphaMethod.ENTROPY: entropy,
}
