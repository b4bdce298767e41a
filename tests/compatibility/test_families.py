"""Model families: greedy output over two models of each is the oracle's. Rows of docs/compatibility.md."""

from __future__ import annotations

import pytest
from harness import check_all, check_pools, mixing_state, random_cases, run, start
from oracle import MixedOracle
from tiny_models import build_tiny_tokenizer_model

PAIRS = {
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "mistral": "mistral",
    "phi3": "phi3",
    "gemma3": "gemma3",
    "mixtral": "mixtral",
    "qwen3-moe": "qwen3",  # the student of another family
    "llama": "mistral",
}


@pytest.mark.slow  # an engine for each family
@pytest.mark.parametrize("teacher,student", PAIRS.items())
def test_two_models(tmp_path, teacher, student):
    pair = (
        build_tiny_tokenizer_model(tmp_path / "teacher", seed=41, family=teacher),
        build_tiny_tokenizer_model(tmp_path / "student", seed=42, family=student, hidden_size=32, num_layers=1),
    )
    oracle = MixedOracle(*pair)
    small = {"chunked_prefill_size": 16, "max_total_tokens": 400, "schedule_conservativeness": 0.05}
    with start(pair, **small) as sampler:
        for seed in (51, 52):
            cases = random_cases(seed, 6, 2)
            check_all(oracle, cases, run(sampler, cases))
            check_all(oracle, cases, run(sampler, cases))  # from the radix caches
            check_pools(sampler)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3", "qwen3-moe"])
def test_shared_weights(tmp_path, family):
    model = build_tiny_tokenizer_model(tmp_path / "model", seed=43, family=family)
    oracle = MixedOracle(model, model)
    with start((model, model)) as sampler:
        assert mixing_state(sampler)["shared_weights"]
        cases = random_cases(53, 6, 2)
        check_all(oracle, cases, run(sampler, cases))
        check_pools(sampler)
