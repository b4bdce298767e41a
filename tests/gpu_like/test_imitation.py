"""The engine on imitated GPU mechanisms: right as it is, and seen to be wrong with each fault that reading found."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys

import fastapi
import pytest
from harness import SMALL, Case, check_all, check_greedy, check_pools, random_cases, random_ids, run
from oracle import MixedOracle
from serving import as_argv
from tiny_models import build_tiny_tokenizer_model

from gpu_like import faults
from gpu_like.engines import gpu_state, self_check, start_gpu_like
from sglang_optimal.runtime.launch import SelfCheckFailed


@pytest.fixture(scope="module")
def wide_pair(tmp_path_factory):
    """A teacher with a wider vocabulary than the student's embedding."""
    root = tmp_path_factory.mktemp("wide")
    teacher = build_tiny_tokenizer_model(root / "teacher", seed=4, vocab_size=96)
    student = build_tiny_tokenizer_model(root / "student", seed=2, hidden_size=32, num_layers=1)
    return teacher, student


# name: (pair of models, arguments, oracle)
ENGINES = {
    "drafts": ("same_vocabulary_pair", {"mixing_mode": "speculative", "draft_tokens": 2}),
    "wide": ("wide_pair", {"disable_overlap_schedule": True, "mixing_mode": "auto", "draft_tokens": 2}),
    "shared": ("one_model", {}),
    "triton-shared": ("one_model", {"triton": True}),
    "triton": ("same_vocabulary_pair", {"triton": True}),
    "triton-drafts": ("same_vocabulary_pair", {"triton": True, "mixing_mode": "auto", "draft_tokens": 2}),
    "triton-lora": ("one_model", {"triton": True, "lora": True}),
}
SLOW = ("wide", "triton", "triton-shared", "triton-drafts", "triton-lora")


@pytest.fixture(scope="module")
def one_model(tiny_pair):
    return tiny_pair[0], tiny_pair[0]


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in ENGINES]
)
def engine(request):
    name, arguments = ENGINES[request.param]
    pair, arguments = request.getfixturevalue(name), dict(arguments)
    oracle = None
    if arguments.pop("lora", False):
        adapter, oracle = request.getfixturevalue("lora_adapter")
        arguments["student_lora_path"] = str(adapter)
    with start_gpu_like(pair, **arguments) as sampler:
        sampler.name, sampler.oracle = request.param, oracle or MixedOracle(*pair)
        yield sampler


@pytest.fixture(autouse=True)
def nothing_is_left(request):
    yield
    if "engine" in request.fixturenames:
        sampler = request.getfixturevalue("engine")
        check_pools(sampler)


def few_cases(engine, seed: int) -> list[Case]:
    """As many as Triton's interpreter can do in a moment."""
    size = (3, 1) if "triton" in engine.name else (8, 3)
    return random_cases(seed, *size, longest=24, tokens=(4, 8))


def only(engine, *names: str) -> None:
    if engine.name not in names:
        pytest.skip(f"needs one of the engines {', '.join(names)}")


def test_right_and_without_host_waits(engine):
    cases = few_cases(engine, 71)
    check_all(engine.oracle, cases, run(engine, cases))
    alone = random_cases(70, 1, 0, longest=8, tokens=(3, 3))  # a batch of a captured size
    check_all(engine.oracle, alone, run(engine, alone))
    sampled = {"temperature": 0.9, "top_k": 8, "top_p": 0.9, "frequency_penalty": 0.3}
    more = [sampled if i % 2 else {} for i in range(len(cases))]
    engine.engine.generate(
        input_ids=[case.teacher for case in cases],
        sampling_params=[case.params(**extra) for case, extra in zip(cases, more, strict=True)],
    )
    state = gpu_state(engine)
    assert state["host_waits"] == {}
    assert state["decode_steps"] > 5 and state["replays"] > 0
    assert 0 < state["padded_replays"] < state["replays"]
    if "triton" in engine.name:
        assert state["flashinfer_plans"]["wrong"] == 0 < state["flashinfer_plans"]["right"]


def test_the_self_check_finds_nothing(engine):
    assert self_check(engine) == ""


def test_a_context_that_both_sides_begin_with(engine):
    """The teacher's forward computes it for the student, whose own prefill follows."""
    only(engine, "shared", "triton-lora")
    common = random_ids(random.Random(72), 40)
    cases = [Case(common + [20, 21], common + [30], 4), Case([9, 8, 7], None, 4)]
    check_all(engine.oracle, cases, run(engine, cases))
    if engine.name == "triton-lora":  # its student computes all of its own context
        return
    with faults.put_back("teacher-view"):
        assert "the teacher's logits are" in self_check(engine)  # wrong, or not finite
        common = random_ids(random.Random(73), 40)
        cases = [Case(common + [20, 21], common + [30], 4), Case([9, 8, 6], None, 4)]
        assert noticed(engine, cases)


def test_ids_that_another_model_left_in_padded_rows_are_noticed(engine):
    only(engine, "wide")
    with faults.put_back("old-ids"):
        assert noticed(engine, random_cases(79, 5, 2))  # five rows in a graph of eight
        assert "index out of range" in self_check(engine)
    assert self_check(engine) == ""


def noticed(engine, cases: list[Case]) -> bool:
    """Whether the answers are wrong, or end in an error."""
    try:
        outputs = run(engine, cases)
        for case, output in zip(cases, outputs, strict=True):
            check_greedy(engine.oracle, case, output)
    except AssertionError:
        return True
    except Exception as error:  # fastapi's, for a request that ended with the status 500
        assert "not finite" in error.detail or "forward failed" in error.detail
        return True
    return False


def test_a_view_that_was_kept_is_noticed(engine):
    only(engine, "drafts", "triton")
    cases = few_cases(engine, 74)
    with faults.put_back("student-view"):
        assert noticed(engine, cases)
    assert engine.engine.flush_cache().success
    check_all(engine.oracle, cases, run(engine, cases))


def test_the_self_check_notices_a_view(engine):
    only(engine, "drafts")
    for fault in faults.WRONG_LOGITS:
        with faults.put_back(fault):
            assert "logits are wrong" in self_check(engine), fault
        assert self_check(engine) == ""


def test_a_host_wait_is_noticed(engine):
    only(engine, "drafts")
    cases = few_cases(engine, 75)
    for fault in faults.HOST_WAITS:
        before = gpu_state(engine)["host_waits"]
        with faults.put_back(fault):
            engine.engine.generate(
                input_ids=[case.teacher for case in cases],
                sampling_params=[case.params(frequency_penalty=0.1 * (i % 2)) for i, case in enumerate(cases)],
            )
        assert set(gpu_state(engine)["host_waits"]) - set(before), f"{fault}: nothing waited"


def test_beam_search_beside_mixed_requests(engine):
    """Rows are not requests there. (SGLang has none with speculative decoding.)"""
    only(engine, "shared", "triton", "triton-lora")
    rng = random.Random(76)
    mixed = [Case(random_ids(rng, 12), random_ids(rng, 15), 10), Case(random_ids(rng, 9), None, 8)]
    beam = {"beam_width": 3, "n": 2, "max_new_tokens": 6, "temperature": 0.0, "ignore_eos": True}

    async def everything(*requests):
        return await asyncio.gather(
            *[engine.engine.async_generate(input_ids=ids, sampling_params=params) for ids, params in requests]
        )

    ask = engine.engine.loop.run_until_complete
    beam_request = (mixed[0].teacher, beam)
    if engine.name == "triton-lora":
        with pytest.raises(ValueError, match="beam_width: beam search is not supported beside --student-lora-path"):
            ask(everything(beam_request))
        return
    (alone,) = ask(everything(beam_request))
    *outputs, beside = ask(everything(*[(case.teacher, case.params()) for case in mixed], beam_request))
    check_all(engine.oracle, mixed, outputs)
    sequences = [[found["output_ids"] for found in entry["meta_info"]["beam_results"]] for entry in (beside, alone)]
    assert sequences[0] == sequences[1] and len(sequences[0]) == 2
    if engine.name == "shared":
        with faults.put_back("requests-for-rows"), pytest.raises(fastapi.HTTPException):
            ask(everything(*[(case.teacher, case.params()) for case in mixed], beam_request))


def test_a_forward_of_both_sides_that_raises(engine):
    """Mixed requests end, and the scheduled rows are forwarded alone."""
    only(engine, "shared")
    cases = few_cases(engine, 77)

    async def everything():
        requests = [
            engine.engine.async_generate(input_ids=case.teacher, sampling_params=case.params()) for case in cases
        ]
        return await asyncio.gather(*requests, return_exceptions=True)

    with faults.put_back("student-raises"):
        outputs = engine.engine.loop.run_until_complete(everything())
    for case, output in zip(cases, outputs, strict=True):
        if case.student is None:
            check_greedy(engine.oracle, case, output)
        else:
            assert output.status_code == 500 and "injected: out of luck" in output.detail
    assert engine.engine.flush_cache().success
    check_all(engine.oracle, cases, run(engine, cases))


def test_a_step_that_does_not_fit_the_memory_goes_on_in_lockstep(engine):
    """The last test of its engine, which does not draft again for batches as large."""
    only(engine, "drafts")
    cases = few_cases(engine, 78)
    with faults.put_back("no-memory"):
        outputs = run(engine, cases)
    check_all(engine.oracle, cases, outputs)
    drafted = [case.student is not None and case.n > 1 for case in cases]
    steps = [output["meta_info"].get("spec_verify_ct", 0) for output in outputs]
    assert [n for n, mixed in zip(steps, drafted, strict=True) if mixed] == [
        case.n - 1 for case in cases if case.student
    ]
    check_all(engine.oracle, cases, run(engine, cases))


@pytest.mark.slow  # Triton's interpreter
def test_a_stale_table_does_not_start(one_model):
    """Shared weights with SGLang's triton attention, which reads the table through its translator of KV indices."""
    from harness import start

    from gpu_like.engines import GRAPHS, TRITON, gpu_like

    arguments = {"mixing_self_check": "on", **GRAPHS, **TRITON}
    with gpu_like(faults.STALE_TABLE, triton=True), pytest.raises(SelfCheckFailed):
        start(one_model, **arguments)


@pytest.mark.slow
def test_a_server_that_finds_a_fault_leaves_with_status_2(same_vocabulary_pair, tmp_path):
    (tmp_path / "fault").write_text("student-view")
    teacher, student = map(str, same_vocabulary_pair)
    argv = ["--model-path", teacher, "--student-model-path", student, *as_argv({**SMALL, "mixing_self_check": "on"})]
    command = [sys.executable, "-m", "gpu_like.serve", *argv]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), faults.FILE: str(tmp_path / "fault")}
    process = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert process.returncode == 2, process.stderr[-2000:]
    assert "self-check: the student's logits are wrong after a prefill step" in process.stderr
    assert "--attention-backend" in process.stderr and "--mixing-self-check off" in process.stderr
