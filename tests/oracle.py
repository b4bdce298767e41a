"""What mixed decoding should give, computed as plainly as possible.

Both full sequences go through plain transformers float32 models again at every step, without a KV cache, and alpha is
found in float64 by bisection on the condition that defines it. Nothing here is shared with `sglang_optimal.mixing`, so
that an error there cannot hide.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

AlphaMethod = Literal[
    "kl_symmetry", "ess_balance", "reverse_kl_symmetry", "entropy", "fixed", "kl_budget", "kl_budget_teacher"
]

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))

_BISECTIONS = 60  # an interval of 2^-60: nothing is left to gain in float64
_EQUAL = 1e-5  # log-probabilities this close everywhere (float32 noise) have no well-defined alpha


@dataclass
class OracleResult:
    """A greedy mixed continuation of n tokens; all lists have length n and are aligned with ``token_ids``.

    ``*_logprobs`` are the chosen token's, at temperature 1. ``margins`` is the gap between the best and the second
    mixture log-probability: where it is within float error, another choice is no error (and later tokens may differ).
    """

    token_ids: list[int] = field(default_factory=list)
    alphas: list[float] = field(default_factory=list)
    teacher_logprobs: list[float] = field(default_factory=list)
    student_logprobs: list[float] = field(default_factory=list)
    mixture_logprobs: list[float] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)


@dataclass
class Mixture:
    """One position. Each tensor is float64 [V]; a token that either side excludes has log-probability -inf."""

    alpha: float
    teacher: Tensor
    student: Tensor
    mixture: Tensor


# --- alpha -----------------------------------------------------------------------------------------------------------


def interpolate(log_s: Tensor, log_t: Tensor, alpha: float) -> Tensor:
    """log q for q ∝ p_s^(1-alpha) p_t^alpha; all [V] with finite entries."""
    return torch.log_softmax((1.0 - alpha) * log_s + alpha * log_t, dim=-1)


def kl_divergence(log_p: Tensor, log_q: Tensor) -> float:
    """KL(p‖q) in nats; both [V] with finite entries."""
    return float((log_p.exp() * (log_p - log_q)).sum())


def entropy(log_p: Tensor) -> float:
    """H(p) in nats; [V] with finite entries."""
    return float(-(log_p.exp() * log_p).sum())


def condition(method: AlphaMethod, log_s: Tensor, log_t: Tensor, alpha: float) -> float:
    """The left side minus the right side of the condition that ``method`` puts on alpha; increasing in alpha.

    ``ess_balance`` compares the logarithms of its two sums, which can be very large.
    """
    log_q = interpolate(log_s, log_t, alpha)
    if method == "kl_symmetry":
        return kl_divergence(log_q, log_s) - kl_divergence(log_q, log_t)
    if method == "reverse_kl_symmetry":
        return kl_divergence(log_s, log_q) - kl_divergence(log_t, log_q)
    if method == "ess_balance":
        return float(torch.logsumexp(2 * log_s - log_q, dim=-1) - torch.logsumexp(2 * log_t - log_q, dim=-1))
    raise ValueError(f"{method!r} is not defined by a condition")


def bisect(function: Callable[[float], float]) -> float:
    """The root in [0, 1] of an increasing function."""
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if function(middle) < 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def farthest(near: Tensor, far: Tensor, budget: float) -> float:
    """The weight of ``far``: the largest x in [0, 1] with KL(q‖near) ≤ budget, for q ∝ near^(1-x) far^x."""
    if budget <= 0.0:
        return 0.0

    def excess(x: float) -> float:
        return kl_divergence(interpolate(near, far, x), near) - budget

    return 1.0 if excess(1.0) <= 0 else bisect(excess)


def solve_alpha(
    log_s: Tensor,
    log_t: Tensor,
    method: AlphaMethod = "kl_symmetry",
    alpha_min: float = 0.0,
    alpha_max: float = 1.0,
    fixed_alpha: float | None = None,
    kl_budget: float | None = None,
    kl_budget_teacher: float | None = None,
) -> float:
    """Alpha for two normalized log-distributions, float64 [V] with finite entries."""
    if method == "fixed":
        if fixed_alpha is None:
            raise ValueError("alpha_method 'fixed' needs fixed_alpha")
        return fixed_alpha  # the bounds are for solved alphas: guidance asks for a value outside [0, 1]
    equal = float((log_t - log_s).abs().max()) <= _EQUAL
    if method == "kl_budget":
        if kl_budget is None:
            raise ValueError("alpha_method 'kl_budget' needs kl_budget")
        alpha = 1.0 if equal else farthest(log_s, log_t, kl_budget)
    elif method == "kl_budget_teacher":
        if kl_budget_teacher is None:
            raise ValueError("alpha_method 'kl_budget_teacher' needs kl_budget_teacher")
        alpha = 0.0 if equal else 1.0 - farthest(log_t, log_s, kl_budget_teacher)
    elif equal:
        return (alpha_min + alpha_max) / 2
    elif method == "entropy":
        h_s, h_t = entropy(log_s), entropy(log_t)
        alpha = h_s / (h_s + h_t)
    else:
        alpha = bisect(lambda a: condition(method, log_s, log_t, a))
    return min(max(alpha, alpha_min), alpha_max)


def mix(
    teacher_logits: Tensor,
    student_logits: Tensor,
    *,
    temperature: float = 1.0,
    alpha_method: AlphaMethod = "kl_symmetry",
    alpha_min: float = 0.0,
    alpha_max: float = 1.0,
    fixed_alpha: float | None = None,
    kl_budget: float | None = None,
    kl_budget_teacher: float | None = None,
) -> Mixture:
    """Mix two rows of logits, [V_t] and [V_s], over their first min(V_t, V_s) ids.

    -inf masks a token; what either side masks is outside the support of both before anything is solved.
    """
    size = min(teacher_logits.shape[-1], student_logits.shape[-1])
    z_t = teacher_logits[:size].double() / temperature
    z_s = student_logits[:size].double() / temperature
    support = torch.isfinite(z_t) & torch.isfinite(z_s)
    log_t = torch.log_softmax(z_t[support], dim=-1)
    log_s = torch.log_softmax(z_s[support], dim=-1)
    bounds = alpha_min, alpha_max
    alpha = solve_alpha(log_s, log_t, alpha_method, *bounds, fixed_alpha, kl_budget, kl_budget_teacher)

    def spread(values: Tensor) -> Tensor:
        full = torch.full((size,), -torch.inf, dtype=torch.float64)
        full[support] = values
        return full

    return Mixture(alpha, spread(log_t), spread(log_s), spread(interpolate(log_s, log_t, alpha)))


def filter_probs(
    probs: Tensor,
    *,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    renormalize_after_top_k: bool = False,
) -> Tensor:
    """top-k, then top-p, then min-p, as SGLang 0.5.23 applies them; float64 [V] to float64 [V], sum 1.

    Its PyTorch sampler (and flashinfer without min-p) measures top-p on the distribution from before top-k; flashinfer
    with min-p measures it on what top-k left: ``renormalize_after_top_k``. The two agree when only one of top-k and
    top-p is set.
    """
    sorted_probs, order = probs.sort(descending=True, stable=True)
    kept = sorted_probs.clone()
    if top_k is not None and top_k > 0:
        kept[top_k:] = 0.0
    if top_p is not None:
        basis = kept / kept.sum() if renormalize_after_top_k else sorted_probs
        kept[(basis.cumsum(0) - basis) > top_p] = 0.0
    if min_p is not None:
        kept[kept < min_p * kept[0]] = 0.0
    return torch.zeros_like(probs).scatter(0, order, kept / kept.sum())


# --- decoding --------------------------------------------------------------------------------------------------------


class MixedOracle:
    """Mixed decoding of two Hugging Face folders (the same one twice for self-distillation).

    ``of_one``: ids that one tokenizer alone has, which are not in the mixture's support.
    """

    def __init__(
        self,
        teacher_path: str | os.PathLike[str],
        student_path: str | os.PathLike[str],
        of_one: Collection[int] = (),
    ) -> None:
        self.of_one = list(of_one)
        self.teacher = _load(teacher_path)
        same = Path(teacher_path).resolve() == Path(student_path).resolve()
        self.student = self.teacher if same else _load(student_path)

    def generate_greedy(
        self,
        teacher_ids: Sequence[int],
        student_ids: Sequence[int],
        max_new_tokens: int,
        alpha_method: AlphaMethod = "kl_symmetry",
        alpha_min: float = 0.0,
        alpha_max: float = 1.0,
        fixed_alpha: float | None = None,
        kl_budget: float | None = None,
        kl_budget_teacher: float | None = None,
        eos_ids: Collection[int] = (),
        logit_bias: Mapping[int, float] | None = None,
    ) -> OracleResult:
        """Alpha at temperature 1, then the argmax of the mixture, appended to both contexts.

        Stops after ``max_new_tokens``, or after a token of ``eos_ids``, which is kept.
        """
        result = OracleResult()
        while len(result.token_ids) < max_new_tokens:
            step = mix(
                *self.next_logits(teacher_ids, student_ids, result.token_ids, logit_bias),
                alpha_method=alpha_method,
                alpha_min=alpha_min,
                alpha_max=alpha_max,
                fixed_alpha=fixed_alpha,
                kl_budget=kl_budget,
                kl_budget_teacher=kl_budget_teacher,
            )
            best = step.mixture.topk(2)
            token = int(best.indices[0])
            result.token_ids.append(token)
            result.alphas.append(step.alpha)
            result.teacher_logprobs.append(float(step.teacher[token]))
            result.student_logprobs.append(float(step.student[token]))
            result.mixture_logprobs.append(float(step.mixture[token]))
            result.margins.append(float(best.values[0] - best.values[1]))
            if token in eos_ids:
                break
        return result

    def next_token_distribution(
        self,
        teacher_ids: Sequence[int],
        student_ids: Sequence[int],
        temperature: float = 1.0,
        alpha_method: AlphaMethod = "kl_symmetry",
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        *,
        alpha_min: float = 0.0,
        alpha_max: float = 1.0,
        fixed_alpha: float | None = None,
        kl_budget: float | None = None,
        kl_budget_teacher: float | None = None,
        logit_bias: Mapping[int, float] | None = None,
        renormalize_after_top_k: bool = False,
    ) -> Tensor:
        """Probabilities of the next token, float64 [V]: alpha is solved on the tempered distributions.

        See `filter_probs` for the filters.
        """
        step = mix(
            *self.next_logits(teacher_ids, student_ids, (), logit_bias),
            temperature=temperature,
            alpha_method=alpha_method,
            alpha_min=alpha_min,
            alpha_max=alpha_max,
            fixed_alpha=fixed_alpha,
            kl_budget=kl_budget,
            kl_budget_teacher=kl_budget_teacher,
        )
        return filter_probs(
            step.mixture.exp(),
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            renormalize_after_top_k=renormalize_after_top_k,
        )

    def plain_greedy(
        self,
        ids: Sequence[int],
        n: int,
        model: Literal["teacher", "student"] = "teacher",
        eos_ids: Collection[int] = (),
        logit_bias: Mapping[int, float] | None = None,
    ) -> list[int]:
        """Greedy continuation of one model alone: what a plain request gives."""
        network = self.teacher if model == "teacher" else self.student
        generated: list[int] = []
        while len(generated) < n and not (generated and generated[-1] in eos_ids):
            logits = _last_logits(network, [*ids, *generated])
            for token, bias in (logit_bias or {}).items():
                logits[token] += bias
            generated.append(int(logits.argmax()))
        return generated

    def next_logits(
        self,
        teacher_ids: Sequence[int],
        student_ids: Sequence[int],
        generated: Sequence[int] = (),
        logit_bias: Mapping[int, float] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Logits after each prompt and the common ``generated`` tokens: teacher [V_t], student [V_s], float32."""
        pair = (
            _last_logits(self.teacher, [*teacher_ids, *generated]),
            _last_logits(self.student, [*student_ids, *generated]),
        )
        for token, bias in (logit_bias or {}).items():
            for logits in pair:
                logits[token] += bias
        for logits in pair:
            logits[self.of_one] = -torch.inf
        return pair


def _load(path: str | os.PathLike[str]) -> torch.nn.Module:
    sees = getattr(AutoConfig.from_pretrained(path), "vision_config", None) is not None
    kind = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    return kind.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()


@torch.no_grad()
def _last_logits(model: torch.nn.Module, ids: Sequence[int]) -> Tensor:
    """float32 [V] at the last position of ``ids``, from scratch."""
    output = model(torch.tensor([list(ids)]), use_cache=False, logits_to_keep=1)
    return output.logits[0, -1].clone()
