"""The oracle must be right before anything is compared with it."""

from __future__ import annotations

import json
import math
from importlib import resources
from pathlib import Path

import pytest
import torch
from oracle import MixedOracle, condition, entropy, filter_probs, kl_divergence, mix, solve_alpha
from tiny_models import build_tiny_tokenizer_model
from transformers import AutoTokenizer

SOLVED_METHODS = ("kl_symmetry", "ess_balance", "reverse_kl_symmetry")
TEACHER_IDS = [1, 5, 27, 30, 22, 12, 8, 41, 6]
STUDENT_IDS = [1, 5, 33, 9, 6]


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> MixedOracle:
    """Two unrelated 64-token models; the student is flatter, so that alphas are not all near 1/2."""
    folder = tmp_path_factory.mktemp("models")
    return MixedOracle(
        build_tiny_tokenizer_model(folder / "teacher", seed=1),
        build_tiny_tokenizer_model(folder / "student", seed=2, logit_std=0.8),
    )


def random_pair(seed: int, size: int = 500) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [size] of a peaked teacher and a flatter student."""
    generator = torch.Generator().manual_seed(seed)
    return 4.0 * torch.randn(size, generator=generator), 1.5 * torch.randn(size, generator=generator)


@pytest.mark.parametrize("method", SOLVED_METHODS)
@pytest.mark.parametrize("seed", range(4))
def test_alpha_meets_its_condition(method: str, seed: int) -> None:
    step = mix(*random_pair(seed), alpha_method=method)
    assert 0.0 < step.alpha < 1.0
    p_s, p_t, q = step.student.exp(), step.teacher.exp(), step.mixture.exp()
    if method == "kl_symmetry":
        sides = kl_divergence(step.mixture, step.student), kl_divergence(step.mixture, step.teacher)
    elif method == "reverse_kl_symmetry":
        sides = kl_divergence(step.student, step.mixture), kl_divergence(step.teacher, step.mixture)
    else:
        sides = float((p_s**2 / q).sum()), float((p_t**2 / q).sum())
    assert sides[0] == pytest.approx(sides[1], rel=1e-8)


def test_alpha_agrees_with_other_derivations() -> None:
    """Facts that the bisection does not use: the Chernoff point is a minimum, the reverse one has a closed form."""
    step = mix(*random_pair(5))

    def cumulant(a: float) -> float:
        return float(torch.logsumexp((1 - a) * step.student + a * step.teacher, dim=-1))

    assert all(cumulant(step.alpha) < cumulant(step.alpha + delta) for delta in (-1e-3, 1e-3))
    assert -cumulant(step.alpha) == pytest.approx(kl_divergence(step.mixture, step.teacher), rel=1e-9)

    forward, backward = kl_divergence(step.teacher, step.student), kl_divergence(step.student, step.teacher)
    reverse = solve_alpha(step.student, step.teacher, "reverse_kl_symmetry")
    assert reverse == pytest.approx(forward / (forward + backward), abs=1e-12)

    balance = solve_alpha(step.student, step.teacher, "ess_balance")
    assert cumulant(-balance) == pytest.approx(cumulant(2 - balance), rel=1e-9)

    h_s, h_t = entropy(step.student), entropy(step.teacher)
    assert solve_alpha(step.student, step.teacher, "entropy") == pytest.approx(h_s / (h_s + h_t))


@pytest.mark.parametrize("method", SOLVED_METHODS)
def test_condition_changes_sign_once(method: str) -> None:
    step = mix(*random_pair(6))
    values = [condition(method, step.student, step.teacher, a / 20) for a in range(21)]
    assert values[0] < 0 < values[-1]
    assert values == sorted(values)


@pytest.mark.parametrize("method", [*SOLVED_METHODS, "entropy"])
def test_swapping_the_models_mirrors_alpha(method: str) -> None:
    teacher, student = random_pair(7)
    assert mix(teacher, student, alpha_method=method).alpha == pytest.approx(
        1.0 - mix(student, teacher, alpha_method=method).alpha, abs=1e-9
    )


@pytest.mark.parametrize("budget", [1e-4, 0.1, 1.0])
def test_a_budget_is_used_up(budget: float) -> None:
    teacher, student = random_pair(9)
    step = mix(teacher, student, alpha_method="kl_budget", kl_budget=budget)
    assert 0.0 < step.alpha < 1.0
    assert kl_divergence(step.mixture, step.student) == pytest.approx(budget, rel=1e-9)
    step = mix(teacher, student, alpha_method="kl_budget_teacher", kl_budget_teacher=budget)
    assert 0.0 < step.alpha < 1.0
    assert kl_divergence(step.mixture, step.teacher) == pytest.approx(budget, rel=1e-9)


def test_a_budget_at_its_ends() -> None:
    """Nothing, everything, a bound that already exceeds it, and equal models, which any budget allows."""
    teacher, student = random_pair(9)
    step = mix(teacher, student)
    most = {
        "kl_budget": kl_divergence(step.teacher, step.student),
        "kl_budget_teacher": kl_divergence(step.student, step.teacher),
    }
    for name, near, far in (("kl_budget", 0.0, 1.0), ("kl_budget_teacher", 1.0, 0.0)):

        def alpha(budget: float, student=student, name=name, **bounds: float) -> float:
            return mix(teacher, student, alpha_method=name, **{name: budget}, **bounds).alpha

        bounds = {"alpha_min": 0.3, "alpha_max": 0.6}
        assert alpha(0.0) == near
        assert alpha(1.001 * most[name]) == far != alpha(0.999 * most[name])
        assert alpha(0.0, **bounds) == (0.3 if near == 0.0 else 0.6)
        assert alpha(99.0, **bounds) == alpha(0.0, student=teacher + 3.0, **bounds) == (0.6 if near == 0.0 else 0.3)


def test_bounds_equal_distributions_and_masks() -> None:
    teacher, student = random_pair(8)
    free = mix(teacher, student).alpha
    assert mix(teacher, student, alpha_max=free - 0.1).alpha == free - 0.1
    assert mix(teacher, student, alpha_min=free + 0.1).alpha == free + 0.1
    assert mix(teacher, teacher + 3.0, alpha_min=0.2, alpha_max=0.4).alpha == pytest.approx(0.3)

    # One side masks tokens, the other has a larger (padded) vocabulary: as if both had only the common tokens.
    masked = teacher.clone()
    masked[:100] = -torch.inf
    step = mix(masked, torch.cat([student, torch.full((12,), 50.0)]))
    alone = mix(teacher[100:], student[100:])
    assert step.alpha == pytest.approx(alone.alpha, abs=1e-12)
    assert step.mixture.shape == teacher.shape
    assert torch.all(step.mixture[:100] == -torch.inf)
    torch.testing.assert_close(step.mixture[100:], alone.mixture)


def test_fixed_alpha_ends_are_the_models_alone(oracle: MixedOracle) -> None:
    for alpha, ids, model in ((1.0, TEACHER_IDS, "teacher"), (0.0, STUDENT_IDS, "student")):
        mixed = oracle.generate_greedy(TEACHER_IDS, STUDENT_IDS, 16, alpha_method="fixed", fixed_alpha=alpha)
        assert mixed.token_ids == oracle.plain_greedy(ids, 16, model)
        assert mixed.alphas == [alpha] * 16
        own = mixed.teacher_logprobs if model == "teacher" else mixed.student_logprobs
        assert mixed.mixture_logprobs == pytest.approx(own, abs=1e-9)
    outside = oracle.generate_greedy(TEACHER_IDS, STUDENT_IDS, 4, alpha_method="fixed", fixed_alpha=1.5)
    assert outside.alphas == [1.5] * 4


def test_greedy_result_is_consistent(oracle: MixedOracle) -> None:
    result = oracle.generate_greedy(TEACHER_IDS, STUDENT_IDS, 16)
    assert len(set(result.token_ids)) > 5
    assert max(result.alphas) - min(result.alphas) > 0.02
    for i, token in enumerate(result.token_ids):
        done = result.token_ids[:i]
        step = mix(*oracle.next_logits(TEACHER_IDS + done, STUDENT_IDS + done))
        others = torch.cat([step.mixture[:token], step.mixture[token + 1 :]])
        assert result.margins[i] == pytest.approx(float(step.mixture[token] - others.max()), abs=1e-9)
        assert result.margins[i] >= 0.0
        assert result.alphas[i] == pytest.approx(step.alpha, abs=1e-9)

    stopped = oracle.generate_greedy(TEACHER_IDS, STUDENT_IDS, 16, eos_ids={result.token_ids[3]})
    end = result.token_ids.index(result.token_ids[3]) + 1
    assert stopped.token_ids == result.token_ids[:end]
    assert len(stopped.alphas) == len(stopped.margins) == end


def test_logit_bias_counts_once(oracle: MixedOracle) -> None:
    plain = mix(*oracle.next_logits(TEACHER_IDS, STUDENT_IDS), alpha_method="fixed", fixed_alpha=0.3).mixture
    biased = mix(
        *oracle.next_logits(TEACHER_IDS, STUDENT_IDS, logit_bias={9: 2.0}), alpha_method="fixed", fixed_alpha=0.3
    ).mixture
    change = (biased - biased[10]) - (plain - plain[10])
    expected = torch.zeros_like(change)
    expected[9] = 2.0
    torch.testing.assert_close(change, expected, atol=1e-5, rtol=0)

    chosen = oracle.generate_greedy(TEACHER_IDS, STUDENT_IDS, 3, logit_bias={9: 100.0})
    assert chosen.token_ids == [9, 9, 9]


def test_next_token_distribution(oracle: MixedOracle) -> None:
    logits = oracle.next_logits(TEACHER_IDS, STUDENT_IDS)
    for temperature in (0.7, 1.0):
        probs = oracle.next_token_distribution(TEACHER_IDS, STUDENT_IDS, temperature)
        torch.testing.assert_close(probs, mix(*logits, temperature=temperature).mixture.exp())
        assert float(probs.sum()) == pytest.approx(1.0, abs=1e-12)

    top = oracle.next_token_distribution(TEACHER_IDS, STUDENT_IDS, 0.7, top_k=10, top_p=0.6, min_p=0.05)
    full = oracle.next_token_distribution(TEACHER_IDS, STUDENT_IDS, 0.7)
    kept = top > 0
    assert 1 < int(kept.sum()) <= 10
    torch.testing.assert_close(top[kept] / top.max(), full[kept] / full.max())
    assert float(full[kept].min()) >= float(full[~kept].max())


def test_filters_by_hand() -> None:
    probs = torch.tensor([0.1, 0.4, 0.2, 0.3], dtype=torch.float64)

    def kept(**filters: float | bool) -> list[float]:
        return [round(p, 4) for p in filter_probs(probs, **filters).tolist()]

    assert kept() == [0.1, 0.4, 0.2, 0.3]
    assert kept(top_k=2) == [0.0, 0.5714, 0.0, 0.4286]
    # A token stays while the mass before it is at most top_p.
    assert kept(top_p=0.65) == [0.0, 0.5714, 0.0, 0.4286]
    assert kept(top_p=0.75) == [0.0, 0.4444, 0.2222, 0.3333]
    assert kept(min_p=0.6) == [0.0, 0.5714, 0.0, 0.4286]
    # 0.4 / 0.7 > 0.5: after top-k the first token alone is enough.
    assert kept(top_k=2, top_p=0.5) == [0.0, 0.5714, 0.0, 0.4286]
    assert kept(top_k=2, top_p=0.5, renormalize_after_top_k=True) == [0.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_tiny_models_are_not_degenerate(tmp_path: Path, family: str) -> None:
    pair = MixedOracle(
        build_tiny_tokenizer_model(tmp_path / "a", seed=1, family=family),
        build_tiny_tokenizer_model(tmp_path / "b", seed=2, family=family, vocab_size=80),
    )
    for n in range(4):
        step = mix(*pair.next_logits(TEACHER_IDS[n:], STUDENT_IDS[n:]))
        assert 2.0 < entropy(step.teacher) < math.log(64) - 0.3
        assert kl_divergence(step.teacher, step.student) > 0.5
    assert len(set(pair.plain_greedy(TEACHER_IDS, 24))) > 5
    assert pair.plain_greedy(TEACHER_IDS, 8) != pair.plain_greedy(TEACHER_IDS, 8, "student")


def test_small_tokenizer_round_trip(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(build_tiny_tokenizer_model(tmp_path / "m", seed=3))
    assert len(tokenizer) == 64
    text = "what is 12 + 3?\n15"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, tokenize=False
    )
    assert prompt == "<bos><usr>hi<ast>"
    assert tokenizer(prompt).input_ids == [1, 5, 26, 27, 6]


def test_demo_problems_are_well_formed() -> None:
    lines = resources.files("sglang_optimal.demo").joinpath("problems.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 12
    for record in map(json.loads, lines):
        assert set(record) == {"problem", "answer"}
        assert record["problem"].endswith("?")
        assert record["answer"].rsplit(" ", 1)[0].endswith("The answer is")
