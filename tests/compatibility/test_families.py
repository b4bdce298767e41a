"""Model families: greedy output is the oracle's, in both roles. Rows of docs/compatibility.md."""

from __future__ import annotations

import pytest
from harness import check_all, check_pools, mixing_state, random_cases, run, start
from oracle import MixedOracle
from tiny_models import FAMILIES, build_tiny_tokenizer_model
from transformers.activations import ACT2FN

SMALL = {"chunked_prefill_size": 16, "max_total_tokens": 400, "schedule_conservativeness": 0.05}
PAIRS = {family: family for family in FAMILIES if family != "llama"} | {"qwen3-moe": "qwen3", "llama": "mistral"}
"""{teacher: student}; the last two are of different families."""


def oracle_of(teacher, student) -> MixedOracle:
    """The oracle, with what SGLang computes otherwise than transformers."""
    oracle = MixedOracle(teacher, student)
    for model in (oracle.teacher, oracle.student):
        if model.config.model_type == "gemma":
            # The exact GELU, where transformers has the approximation with tanh that the checkpoints ask for.
            for layer in model.model.layers:
                layer.mlp.act_fn = ACT2FN["gelu"]
    return oracle


def check_everything(sampler, oracle) -> None:
    """Mixed and plain rows, chunked prompts, prefixes from the radix caches, retraction."""
    for seed in (51, 52):
        cases = random_cases(seed, 6, 2)
        check_all(oracle, cases, run(sampler, cases))
        outputs = run(sampler, cases)
        check_all(oracle, cases, outputs)
        assert any(output["meta_info"]["cached_tokens"] for output in outputs)
    long = random_cases(6, 7, 2, longest=25, tokens=(90, 110))
    for case in long:
        case.bias = {2: -100.0}
    outputs = run(sampler, long, ignore_eos=False)
    check_all(oracle, long, outputs)
    assert sum(output["meta_info"]["num_retractions"] for output in outputs)
    check_pools(sampler)


@pytest.mark.slow  # an engine for each family
@pytest.mark.parametrize("teacher,student", PAIRS.items())
def test_two_models(tmp_path, teacher, student):
    pair = (
        build_tiny_tokenizer_model(tmp_path / "teacher", seed=41, family=teacher),
        build_tiny_tokenizer_model(tmp_path / "student", seed=42, family=student, hidden_size=32, num_layers=1),
    )
    with start(pair, **SMALL) as sampler:
        check_everything(sampler, oracle_of(*pair))


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "llama"])
def test_shared_weights(tmp_path, family):
    model = build_tiny_tokenizer_model(tmp_path / "model", seed=43, family=family)
    with start((model, model), **{**SMALL, "max_total_tokens": 720}) as sampler:  # for both contexts
        assert mixing_state(sampler)["shared_weights"]
        check_everything(sampler, oracle_of(model, model))
