"""What engine tests share: random requests, their oracle answers, and the pool invariant."""

from __future__ import annotations

import dataclasses
import random
import time
from typing import Any

import pytest

from sglang_optimal import OptimalSampler
from sglang_optimal.config import override

# Where the oracle's best two tokens are closer than this (nats), float32 may order them either way.
TIE = 2e-4
FIRST_TEXT_ID, VOCAB = 7, 64

# SGLang's server arguments for the tiny pair: float32, small pools.
SMALL: dict[str, Any] = {
    "dtype": "float32",
    "max_total_tokens": 6000,
    "context_length": 1024,
    "max_running_requests": 64,
    "random_seed": 11,
    "mem_fraction_static": 0.3,
    "sleep_on_idle": True,
}


def start(pair, **server_args) -> OptimalSampler:
    """An engine over the tiny pair; ``server_args`` over SMALL."""
    return OptimalSampler(str(pair[0]), str(pair[1]), **{**SMALL, **server_args})


@dataclasses.dataclass
class Case:
    """One request: teacher ids, student ids (None: plain), length, alpha settings and logit bias."""

    teacher: list[int]
    student: list[int] | None
    n: int
    alpha: dict[str, Any] = dataclasses.field(default_factory=dict)
    bias: dict[int, float] = dataclasses.field(default_factory=dict)

    def params(self, **more: Any) -> dict[str, Any]:
        params = {"temperature": 0.0, "max_new_tokens": self.n, "ignore_eos": True, **more}
        if self.bias:
            params["logit_bias"] = {str(token): value for token, value in self.bias.items()}
        if self.student is not None:
            params["custom_params"] = {"student_input_ids": self.student, "return_mixing_info": True, **self.alpha}
        return params


def random_ids(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(FIRST_TEXT_ID, VOCAB) for _ in range(length)]


ALPHAS = (
    {},
    {"alpha_method": "ess_balance"},
    {"alpha_method": "reverse_kl_symmetry"},
    {"alpha_method": "entropy"},
    {"fixed_alpha": 1.4},
    {"fixed_alpha": -0.3},
    {"alpha_min": 0.55, "alpha_max": 0.7},
    {"alpha_max": 0.3},
    {"kl_budget": 0.15},
    {"kl_budget_teacher": 0.15, "alpha_min": 0.2},
)


def oracle_settings(alpha: dict[str, Any]) -> dict[str, Any]:
    """A request's alpha fields as the oracle takes them: with the method that a number implies."""
    return {name: value for name, value in override({}, alpha).items() if value is not None}


def random_cases(seed: int, mixed: int, plain: int, *, longest: int = 60, tokens: tuple[int, int] = (6, 20)):
    """Requests of different |T| and |S| (either may be the longer), plain ones among them, in random order."""
    rng = random.Random(seed)
    cases = [
        Case(
            random_ids(rng, rng.randint(1, longest)),
            random_ids(rng, rng.randint(1, longest)),
            rng.randint(*tokens),
            ALPHAS[i % len(ALPHAS)],
        )
        for i in range(mixed)
    ]
    cases += [Case(random_ids(rng, rng.randint(1, longest)), None, rng.randint(*tokens)) for _ in range(plain)]
    rng.shuffle(cases)
    return cases


def run(sampler: OptimalSampler, cases: list[Case], **more: Any) -> list[dict]:
    """All cases in one call, through SGLang's own engine API."""
    return sampler.engine.generate(
        input_ids=[case.teacher for case in cases], sampling_params=[case.params(**more) for case in cases]
    )


_answers: dict[tuple, Any] = {}


def answer(oracle, case: Case):
    """The oracle's answer, computed once however many engines are asked."""
    key = (oracle, repr(case))  # the oracle itself: a later one may get the number of one that has gone
    if key not in _answers:
        bias = case.bias or None
        if case.student is None:
            _answers[key] = oracle.plain_greedy(case.teacher, case.n, logit_bias=bias)
        else:
            settings = oracle_settings(case.alpha)
            _answers[key] = oracle.generate_greedy(case.teacher, case.student, case.n, logit_bias=bias, **settings)
    return _answers[key]


def check_greedy(oracle, case: Case, output: dict) -> int:
    """Compare one greedy output with the oracle. Returns how many tokens were compared (a tie ends it early)."""
    ids = output["output_ids"]
    meta = output["meta_info"]
    if case.student is None:
        assert "alpha" not in meta
        assert ids == answer(oracle, case)
        return len(ids)
    expected = answer(oracle, case)
    assert len(ids) == case.n
    for name in ("alpha", "teacher_logprob", "student_logprob", "mixture_logprob", "kl_to_student", "ess_ratio"):
        assert len(meta[name]) == len(ids), name
    for i, token in enumerate(expected.token_ids):
        if ids[i] != token:
            assert expected.margins[i] < TIE, (i, ids, expected.token_ids)
            return i
        # Alpha is where both KLs are equal: float32's error of them, over what they are. It matters as little.
        apart = meta["kl_to_student"][i] + meta["kl_to_teacher"][i]
        assert meta["alpha"][i] == pytest.approx(expected.alphas[i], abs=min(max(1e-4, 5e-7 / max(apart, 1e-9)), 0.05))
        assert meta["teacher_logprob"][i] == pytest.approx(expected.teacher_logprobs[i], abs=1e-3)
        assert meta["student_logprob"][i] == pytest.approx(expected.student_logprobs[i], abs=1e-3)
        assert meta["mixture_logprob"][i] == pytest.approx(expected.mixture_logprobs[i], abs=1e-3)
    return case.n


def check_all(oracle, cases: list[Case], outputs: list[dict]) -> None:
    compared = sum(check_greedy(oracle, case, output) for case, output in zip(cases, outputs, strict=True))
    # Ties must stay the exception, or the comparison means nothing.
    assert compared >= 0.9 * sum(case.n for case in cases)


def mixing_state(sampler: OptimalSampler) -> dict:
    return sampler.engine.get_server_info()["internal_states"][0]["mixing"]


def check_pools(sampler: OptimalSampler) -> dict:
    """When idle, every slot of both pools is free or in a radix cache, and after a flush every slot is free."""
    deadline = time.monotonic() + 10
    while True:
        state = mixing_state(sampler)
        pools = (state["teacher_pool"], state["student_pool"])
        settled = all(p["free"] + p["evictable"] == p["size"] and p["protected"] == 0 for p in pools)
        if settled and state["student_pool"]["requests"] == 0:
            break
        assert time.monotonic() < deadline, f"slots are missing: {state}"
        time.sleep(0.1)  # the overlap loop releases a step later
    assert sampler.engine.flush_cache().success
    flushed = mixing_state(sampler)
    for name in ("teacher_pool", "student_pool"):
        assert flushed[name]["free"] == flushed[name]["size"], flushed
    return state
