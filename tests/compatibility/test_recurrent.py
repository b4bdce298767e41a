"""Models with recurrent layers: greedy output is the oracle's, whatever the scheduler does with their states."""

from __future__ import annotations

import asyncio
import random

import pytest
from gpu_like.engines import gpu_state, start_gpu_like
from harness import Case, check_all, check_greedy, check_pools, mixing_state, random_cases, random_ids, run, start
from oracle import MixedOracle
from recurrent_models import ENVIRONMENT, build_tiny_recurrent_model
from tiny_models import build_tiny_tokenizer_model

SMALL = {
    "chunked_prefill_size": 64,
    "max_total_tokens": 400,
    "schedule_conservativeness": 0.05,
    "max_running_requests": 8,
    "mixing_self_check": "on",
}
NO_BUFFER = {"mamba_radix_cache_strategy": "no_buffer", "disable_overlap_schedule": True, "chunked_prefill_size": 16}
ENGINES = {
    "qwen3.5 qwen3.5": {},
    "qwen3.5 qwen3.5, no buffer": NO_BUFFER,
    "qwen3.5 qwen3.5, no cache": {"disable_radix_cache": True},
    "qwen3.5 qwen3.5, pages": {"page_size": 64, "max_total_tokens": 640},
    "qwen3.5 llama": {},
    "llama qwen3.5": {"chunked_prefill_size": 16},
    "lfm2 lfm2": {"chunked_prefill_size": 16},
    "lfm2 qwen3.5": {},
    # One model for both sides: rows of one forward, and states of one pool.
    "qwen3.5": {"max_total_tokens": 720},
    "qwen3.5, no buffer": {**NO_BUFFER, "max_mamba_cache_size": 16},
    "qwen3.5, no cache": {"disable_radix_cache": True},
    "qwen3.5, few states": {"max_mamba_cache_size": 12},
    "qwen3.5, pages": {"page_size": 64, "max_total_tokens": 960},
    "lfm2": {"chunked_prefill_size": 16},
    "qwen3.5-moe qwen3.5": {},
    "qwen3.5-moe": {"max_total_tokens": 720},
    "lfm2-moe lfm2-moe": {},
    "lfm2-moe": {"max_total_tokens": 720},
}
FAST = ("qwen3.5 qwen3.5", "qwen3.5")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recurrent")

    def build(family: str, role: str):
        path = folder / f"{family}-{role}"
        if path.exists():
            return path
        size = {"seed": 81, "num_layers": 4} if role == "teacher" else {"seed": 82, "num_layers": 2, "hidden_size": 32}
        builder = build_tiny_tokenizer_model if family == "llama" else build_tiny_recurrent_model
        return builder(path, family=family, **size)

    return build


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in ENGINES]
)
def sampler(request, models):
    names = request.param.partition(",")[0].split()
    pair = [models(family, role) for family, role in zip(names, ("teacher", "student"), strict=False)]
    pair = pair * 2 if len(pair) == 1 else pair
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        with start(pair, **{**SMALL, **ENGINES[request.param]}) as engine:
            engine.oracle = MixedOracle(*pair)
            yield engine


@pytest.fixture(autouse=True)
def pools_are_full_again(request):
    yield
    if "sampler" in request.fixturenames:
        check_pools(request.getfixturevalue("sampler"))


def test_batches(sampler):
    """Twice, the second time over what the host's radix cache has."""
    for seed in (51, 52):
        cases = random_cases(seed, 6, 2)
        check_all(sampler.oracle, cases, run(sampler, cases))
        check_all(sampler.oracle, cases, run(sampler, cases))
    assert mixing_state(sampler)["self_check"]


def test_long_prompts(sampler):
    """Many chunks on one side or on both, and longer than the 64 tokens after which a state is kept."""
    rng = random.Random(4)
    lengths = ((150, 170), (120, 3), (2, 140), (66, 64))
    cases = [Case(random_ids(rng, t), random_ids(rng, s), 8) for t, s in lengths]
    for _ in range(2):
        check_all(sampler.oracle, cases, run(sampler, cases))


def test_what_was_generated_is_a_prefix(sampler):
    rng = random.Random(5)
    first = Case(random_ids(rng, 70), random_ids(rng, 30), 70, bias={2: -100.0})
    output = run(sampler, [first])[0]
    check_greedy(sampler.oracle, first, output)
    more = [
        Case(first.teacher + output["output_ids"][:n], first.student + output["output_ids"][:n], 6) for n in (30, 66)
    ]
    check_all(sampler.oracle, more, run(sampler, more))


def test_scores(sampler):
    """Of completions, whose hidden states no cached prefix has; the second time over cached prompts."""
    rng = random.Random(9)
    for n in (3, 70, 70):
        teacher, student, completion = random_ids(rng, 70), random_ids(rng, 33), random_ids(rng, n)
        custom = {"student_input_ids": student, "completion_input_ids": completion, "return_mixing_info": True}
        for _ in range(2):
            params = {"temperature": 1.0, "max_new_tokens": 0, "custom_params": custom}
            meta = sampler.engine.generate(input_ids=teacher, sampling_params=params)["meta_info"]
            for i, token in enumerate(completion):
                logits = sampler.oracle.next_logits(teacher, student, completion[:i])
                expected = [float(one.log_softmax(-1)[token]) for one in logits]
                assert [meta["teacher_logprob"][i], meta["student_logprob"][i]] == pytest.approx(expected, abs=1e-3)


def test_retraction(sampler):
    cases = random_cases(6, 7, 2, longest=25, tokens=(90, 110))
    for case in cases:
        case.bias = {2: -100.0}
    outputs = run(sampler, cases, ignore_eos=False)
    check_all(sampler.oracle, cases, outputs)
    assert sum(o["meta_info"]["num_retractions"] for o in outputs) > 0


def test_more_requests_than_states(sampler):
    """As many states as requests may run at once: others wait, and none is lost."""
    cases = random_cases(7, 20, 4, longest=12, tokens=(3, 9))
    check_all(sampler.oracle, cases, run(sampler, cases))


def test_aborts(sampler):
    rng = random.Random(8)
    cases = [Case(random_ids(rng, 20), random_ids(rng, 24), 60) for _ in range(8)]

    async def everything():
        engine = sampler.engine
        tasks = [
            asyncio.ensure_future(
                engine.async_generate(input_ids=case.teacher, sampling_params=case.params(), rid=f"r{i}")
            )
            for i, case in enumerate(cases)
        ]
        await asyncio.sleep(0.4)
        for i in (1, 4, 6):
            engine.tokenizer_manager.abort_request(rid=f"r{i}")
        return await asyncio.gather(*tasks, return_exceptions=True)

    outputs = sampler.engine.loop.run_until_complete(everything())
    left = [i for i in range(len(cases)) if i not in (1, 4, 6)]
    check_all(sampler.oracle, [cases[i] for i in left], [outputs[i] for i in left])


@pytest.mark.slow
@pytest.mark.parametrize("roles", [("teacher", "student"), ("teacher", "teacher")], ids=["separate", "shared"])
def test_imitated_graphs(models, monkeypatch, roles):
    """With static buffers that both models share, and tensors that are overwritten after a forward."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    pair = [models("qwen3.5", role) for role in roles]
    oracle = MixedOracle(*pair)
    with start_gpu_like(pair, **{**SMALL, "mixing_self_check": "off"}) as sampler:
        for seed in (51, 52):
            cases = random_cases(seed, 6, 2)
            check_all(oracle, cases, run(sampler, cases))
            check_all(oracle, cases, run(sampler, cases))
        check_pools(sampler)
        assert gpu_state(sampler)["replays"] > 0
