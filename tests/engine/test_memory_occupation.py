"""Sleep and wake: both models' memory is given back and taken again, on an imitated memory saver (gpu_like)."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import pytest
from gpu_like.engines import start_gpu_like
from harness import check_greedy, check_pools
from oracle import MixedOracle
from sglang.srt.constants import GPU_MEMORY_ALL_TYPES
from sglang.srt.managers.io_struct import (
    CheckWeightsReqInput,
    ContinueGenerationReqInput,
    GenerateReqInput,
    GetWeightsByNameReqInput,
    PauseGenerationReqInput,
    ReleaseMemoryOccupationReqInput,
    ResumeMemoryOccupationReqInput,
)
from test_weight_updates import cases, check, checksums, tensors
from tiny_models import build_tiny_tokenizer_model

from bench.gpu import check_sleep
from sglang_optimal.runtime.managers.tokenizer_control_mixin import RouteRefused

LOST = "released, and nothing kept them"


@pytest.fixture(scope="module")
def pair(tiny_pair, tmp_path_factory):
    """A student with buffers of its own: its heads are narrower, and SGLang keeps one table of rotations a width."""
    return tiny_pair[0], _student(tmp_path_factory.mktemp("student"), 2)


@pytest.fixture(scope="module")
def oracle(pair):
    return MixedOracle(*pair)


@pytest.fixture(scope="module")
def new_student(tmp_path_factory):
    return _student(tmp_path_factory.mktemp("new-student"), 3)


def _student(folder: Path, seed: int) -> Path:
    return build_tiny_tokenizer_model(
        folder / "student", seed=seed, hidden_size=32, num_layers=1, vocab_size=80, family="qwen2"
    )


@pytest.fixture(scope="module")
def start():
    def start(pair, **arguments):
        return start_gpu_like(pair, enable_memory_saver=True, **arguments)

    return start


@pytest.fixture(scope="module")
def sampler(start, pair):
    """The policy is the student, and nothing keeps its weights while they are released."""
    with start(pair) as engine:
        yield engine
        check_pools(engine)


def check_three(sampler, oracle) -> None:
    """At once, in graphs for four: the fourth row is what memory holds."""
    three = [cases(seed)[0] for seed in (1, 2, 3)]
    prompts, params = [case.teacher for case in three], [case.params() for case in three]
    outputs = sampler.engine.generate(input_ids=prompts, sampling_params=params)
    for case, output in zip(three, outputs, strict=True):
        assert check_greedy(oracle, case, output) == 12


def sleep(sampler, *tags: str) -> None:
    sampler.engine.release_memory_occupation(list(tags) or None)


def wake(sampler, *tags: str) -> None:
    sampler.engine.resume_memory_occupation(list(tags) or None)


def call(sampler, coroutine):
    return sampler.engine.loop.run_until_complete(coroutine)


def refused(sampler, message: str) -> None:
    """A request is refused; ``message`` says why."""
    case = cases(1)[0]
    with pytest.raises(ValueError, match=message):
        sampler.engine.generate(input_ids=case.teacher, sampling_params=case.params())


def test_the_policy_s_weights_are_sent_again(sampler, pair, oracle, new_student):
    """As a trainer does: all is released, the weights are taken and sent, and then the rest is taken."""
    check(sampler, oracle)
    before = checksums(sampler)
    for folder, expected in ((new_student, MixedOracle(pair[0], new_student)), (pair[1], oracle)):
        sleep(sampler)
        wake(sampler, "weights")
        refused(sampler, "kv_cache, cuda_graph released")
        sampler.update_student_weights(dict(tensors(folder)))
        wake(sampler, "kv_cache", "cuda_graph")
        check(sampler, expected)
    assert checksums(sampler) == before


def test_weights_that_nobody_sends(sampler, pair, oracle):
    """No request is answered from garbage, and a failed update leaves nothing else."""
    sleep(sampler)
    wake(sampler)
    refused(sampler, LOST)
    named = dict(tensors(pair[1]))
    name = next(iter(named))
    with pytest.raises(ValueError, match=LOST):
        sampler.update_student_weights({**named, name: named[name].fill_(float("nan"))})
    refused(sampler, LOST)
    sampler.update_student_weights(pair[1])
    check(sampler, oracle)


def test_what_is_refused_meanwhile(sampler, pair, oracle):
    manager = sampler.engine.tokenizer_manager
    sleep(sampler, "weights")
    refused(sampler, "the models sleep: weights released; call resume_memory_occupation")
    for coroutine in (
        manager.check_weights(CheckWeightsReqInput()),
        manager.get_weights_by_name(GetWeightsByNameReqInput(name="lm_head.weight")),
        manager.continue_generation(ContinueGenerationReqInput()),
    ):
        with pytest.raises(RouteRefused, match="weights released"):
            call(sampler, coroutine)
    for update in (pair[1], dict(tensors(pair[1]))):
        with pytest.raises(ValueError, match="the weights are released; call resume"):
            sampler.update_student_weights(update)
    with pytest.raises(RouteRefused, match="tags: 'weight' is none of kv_cache, weights, cuda_graph"):
        sleep(sampler, "weight")
    wake(sampler)
    sampler.update_student_weights(pair[1])
    check(sampler, oracle)


def test_again(sampler, pair, oracle):
    """What is released already, or is there already, stays so; SGLang would end its process."""
    wake(sampler)
    sleep(sampler, "kv_cache")
    sleep(sampler, "kv_cache")
    sleep(sampler)
    wake(sampler, "cuda_graph")
    wake(sampler)
    wake(sampler)
    sampler.update_student_weights(pair[1])
    check_three(sampler, oracle)


def test_it_is_healthy_while_it_sleeps(sampler, oracle):
    """Without a token, for which there is no memory; the scheduler answers."""
    manager = sampler.engine.tokenizer_manager
    sleep(sampler, "kv_cache")
    heard = manager.last_receive_tstamp
    request = GenerateReqInput(rid="HEALTH_CHECK_1", input_ids=[0], sampling_params={"max_new_tokens": 1})

    async def ask():
        async with contextlib.aclosing(manager.generate_request(request, None)) as outputs:
            async for _ in outputs:
                return

    call(sampler, ask())
    assert manager.last_receive_tstamp > heard
    wake(sampler)
    check(sampler, oracle)


def test_a_session_of_updates_is_open(sampler, pair, oracle):
    assert sampler.engine.begin_weight_update()[0]
    with pytest.raises(RouteRefused, match="a session of weight updates is open"):
        sleep(sampler)
    assert sampler.engine.end_weight_update()[0]
    check(sampler, oracle)


def running(sampler, n: int = 40):
    case = cases(1)[0]
    return sampler.engine.async_generate(input_ids=case.teacher, sampling_params={**case.params(), "max_new_tokens": n})


def test_running_requests_end_first(sampler, oracle):
    manager = sampler.engine.tokenizer_manager

    async def both():
        answer = asyncio.ensure_future(running(sampler))
        await asyncio.sleep(0.3)
        await manager.release_memory_occupation(ReleaseMemoryOccupationReqInput(tags=["kv_cache"]))
        return await answer

    answer = call(sampler, both())
    case = cases(1)[0]
    assert answer["output_ids"] == oracle.generate_greedy(case.teacher, case.student, 40).token_ids
    wake(sampler)
    check(sampler, oracle)


@pytest.mark.parametrize("mode", ["in_place", "retract"])
def test_a_paused_engine(sampler, oracle, mode):
    """Requests that hold KV are in the way, where SGLang ends its process; retracted ones go on after it."""
    manager = sampler.engine.tokenizer_manager
    release = ReleaseMemoryOccupationReqInput(tags=["kv_cache"])

    async def pause_and_release():
        answer = asyncio.ensure_future(running(sampler, 200))
        await asyncio.sleep(0.3)
        await manager.pause_generation(PauseGenerationReqInput(mode=mode))
        if mode == "in_place":
            with pytest.raises(RouteRefused, match="running requests hold it"):
                await manager.release_memory_occupation(release)
        else:
            await manager.release_memory_occupation(release)
            with pytest.raises(RouteRefused, match="kv_cache released"):
                await manager.continue_generation(ContinueGenerationReqInput())
            await manager.resume_memory_occupation(ResumeMemoryOccupationReqInput(tags=["kv_cache"]))
        await manager.continue_generation(ContinueGenerationReqInput())
        return await answer

    answer = call(sampler, pause_and_release())
    case = cases(1)[0]
    assert answer["output_ids"] == oracle.generate_greedy(case.teacher, case.student, 200).token_ids


def test_with_a_backup(start, pair, oracle):
    """One kind of memory after the other, and nobody sends weights."""
    with start(pair, enable_weights_cpu_backup=True) as sampler:
        before = checksums(sampler)
        for tag in GPU_MEMORY_ALL_TYPES:
            sleep(sampler, tag)
        for tag in reversed(GPU_MEMORY_ALL_TYPES):
            wake(sampler, tag)
        check(sampler, oracle)
        assert checksums(sampler) == before
        found = check_sleep.measure(sampler, free=iter(range(0, 80, 10)).__next__)  # what a GPU's check does
        assert found.keys() == {*GPU_MEMORY_ALL_TYPES, "all"}
        assert all(one["released"] == 10 and one["same_text"] for one in found.values())
        assert check_sleep.passes(found, 14) and not check_sleep.passes(found, 15)
        found["weights"]["same_text"] = False
        assert not check_sleep.passes(found, 14)
        check_pools(sampler)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["teacher", "both"])
def test_another_policy(start, pair, oracle, policy):
    """The weights that are no trainer's are kept, whichever model has them."""
    with start(pair, policy=policy) as sampler:
        before = checksums(sampler)
        sleep(sampler)
        wake(sampler)
        refused(sampler, LOST)
        if policy == "teacher":
            call(sampler, _send(sampler, pair[0]))
            check(sampler, oracle)
            assert checksums(sampler) == before


async def _send(sampler, folder) -> None:
    await sampler.engine.tokenizer_manager.update_student_weights_in_memory(dict(tensors(folder)), None)


@pytest.mark.parametrize("adapter", [False, True], ids=["one model", "adapter"])
def test_shared_weights(start, tiny_pair, self_oracle, lora_adapter, adapter):
    """One model in both places is the policy; beneath a policy that is an adapter, it is kept."""
    more = {"student_lora_path": str(lora_adapter[0])} if adapter else {}
    oracle = lora_adapter[1] if adapter else self_oracle
    with start((tiny_pair[0], tiny_pair[0]), **more) as sampler:
        check(sampler, oracle)
        sleep(sampler)
        wake(sampler)
        if not adapter:
            refused(sampler, LOST)
            call(sampler, _send(sampler, tiny_pair[0]))
        check(sampler, oracle)
        check_pools(sampler)
