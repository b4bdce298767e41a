"""Tensor and data parallel, with SGLang's own ranks (gloo on a CPU): the same tokens as one rank gives."""

from __future__ import annotations

import json

import pytest
from harness import check_all, check_pools, mixing_state, random_cases, run, start
from oracle import MixedOracle
from rank_trace import TRACE, traced_scheduler_process
from tiny_models import build_tiny_tokenizer_model

from sglang_optimal.runtime.entrypoints.engine import MixedEngine

SMALL = {"chunked_prefill_size": 16, "max_total_tokens": 400, "schedule_conservativeness": 0.05}


@pytest.fixture
def traced(monkeypatch, tmp_path):
    """Engines write what each rank samples; gives a function that reads it."""
    monkeypatch.setattr(MixedEngine, "scheduler_process", staticmethod(traced_scheduler_process))
    monkeypatch.setenv(TRACE, str(tmp_path))

    def read() -> list[list]:
        return [[json.loads(line) for line in (tmp_path / f"{rank}.jsonl").open()] for rank in (0, 1)]

    return read


def traffic(sampler, oracle) -> None:
    """Greedy against the oracle, with prefix hits and retractions; then sampled."""
    for seed in (71, 72):
        cases = random_cases(seed, 6, 2)
        check_all(oracle, cases, run(sampler, cases))
    long = random_cases(73, 8, 2, longest=25, tokens=(50, 60))
    for case in long:
        case.bias = {2: -100.0}
    outputs = run(sampler, long, ignore_eos=False)
    check_all(oracle, long, outputs)
    assert sum(output["meta_info"]["num_retractions"] for output in outputs) > 0
    run(sampler, random_cases(74, 12, 4, tokens=(20, 30)), temperature=1.0, top_p=0.9, ignore_eos=False)
    check_pools(sampler)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["two-models", "shared", "drafts", "auto"])
def test_tensor_parallel(tiny_pair, tiny_oracle, self_oracle, traced, mode):
    shared = mode == "shared"
    pair = (tiny_pair[0], tiny_pair[0]) if shared else tiny_pair
    more: dict = {"max_total_tokens": 520, "max_running_requests": 6} if shared else {}
    if mode in ("drafts", "auto"):
        more = {"mixing_mode": "speculative" if mode == "drafts" else "auto", "draft_tokens": 3}
    with start(pair, tp_size=2, **{**SMALL, **more}) as sampler:
        assert mixing_state(sampler)["shared_weights"] is shared
        traffic(sampler, self_oracle if shared else tiny_oracle)
    first, second = traced()
    assert first == second, "ranks sampled different tokens"
    assert sum(len(tokens) for tokens, rows in first if rows) > 500


@pytest.mark.slow
def test_new_weights_on_every_rank_or_on_none(tiny_pair, tiny_oracle, tmp_path):
    """A checkpoint that is good for one rank and bad for the other changes neither."""
    from safetensors.torch import load_file

    shape = {"hidden_size": 32, "num_layers": 1, "vocab_size": 80}
    other = build_tiny_tokenizer_model(tmp_path / "other", seed=9, **shape)
    tensors = load_file(other / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    spoiled = {**tensors, name: tensors[name].clone()}
    spoiled[name][-1, 0] = float("nan")  # rows are split over the ranks: the second alone has this one
    cases = random_cases(75, 4, 1)
    with start(tiny_pair, tp_size=2) as sampler:
        with pytest.raises(ValueError, match="old weights are in place"):
            sampler.update_student_weights(spoiled)
        check_all(tiny_oracle, cases, run(sampler, cases))
        sampler.update_student_weights(other)
        check_all(MixedOracle(tiny_pair[0], other), cases, run(sampler, cases))
        check_pools(sampler)


@pytest.mark.slow
def test_data_parallel(tiny_pair, tiny_oracle):
    with start(tiny_pair, dp_size=2) as sampler:
        for seed in (76, 77):
            cases = random_cases(seed, 12, 4)
            check_all(tiny_oracle, cases, run(sampler, cases))
        states = sampler.engine.get_server_info()["internal_states"]
        assert len(states) == 2
        for state in states:
            mixing = state["mixing"]
            assert mixing["student_pool"]["prompt_tokens_total"] > 0, "a replica had nothing to do"
            for pool in (mixing["teacher_pool"], mixing["student_pool"]):
                assert pool["free"] + pool["evictable"] == pool["size"]
        check_pools(sampler)
