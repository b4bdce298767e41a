"""A model that goes wrong ends the requests that met it, with a message, and nobody else's."""

from __future__ import annotations

import asyncio
import random

import pytest
from faulty import faulty_scheduler_process
from harness import Case, check_all, check_greedy, check_pools, random_cases, random_ids, run, start

from sglang_optimal.runtime.entrypoints.engine import MixedEngine

DRAFTS = {"mixing_mode": "speculative", "draft_tokens": 2}


@pytest.fixture(scope="module", params=[{}, pytest.param(DRAFTS, marks=pytest.mark.slow)], ids=["", "drafts"])
def sampler(request, tiny_pair):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MixedEngine, "scheduler_process", staticmethod(faulty_scheduler_process))
        with start(tiny_pair, chunked_prefill_size=64, **request.param) as engine:
            engine.most_tokens = 1 + request.param.get("draft_tokens", 0)  # of one step
            yield engine


@pytest.fixture(autouse=True)
def pools_are_full_again(sampler, tiny_oracle):
    yield
    check_pools(sampler)
    cases = random_cases(61, 2, 1)
    check_all(tiny_oracle, cases, run(sampler, cases))


FAULTS = {
    "student-nan": "the student's logits are not finite",
    "student-inf": "the student's logits are not finite",
    "teacher-nan": "the teacher's logits are not finite",
    "teacher-inf": "the teacher's logits are not finite",
    "student-masked": "no token is left to sample",
}


def generate(sampler, case: Case, rid: str) -> dict:
    """Through SGLang's own engine, which takes request ids."""
    return sampler.engine.generate(input_ids=case.teacher, sampling_params=case.params(), rid=rid)


@pytest.mark.parametrize("after", [0, 5])
@pytest.mark.parametrize("fault,message", FAULTS.items(), ids=FAULTS)
def test_only_the_request_that_met_it_ends(sampler, tiny_oracle, fault, message, after):
    cases = random_cases(62, 5, 2, tokens=(12, 20))
    cases.insert(3, Case(random_ids(random.Random(63), 20), random_ids(random.Random(64), 30), 20))

    async def one(i: int, case: Case):
        rid = f"{fault}-{after}-x" if i == 3 else f"good-{fault}-{after}-{i}"
        return await sampler.engine.async_generate(input_ids=case.teacher, sampling_params=case.params(), rid=rid)

    async def everything():
        return await asyncio.gather(*[one(i, c) for i, c in enumerate(cases)], return_exceptions=True)

    outputs = sampler.engine.loop.run_until_complete(everything())
    error = outputs.pop(3)
    bad = cases.pop(3)
    assert getattr(error, "status_code", None) == 500 and message in error.detail, error
    check_all(tiny_oracle, cases, outputs)
    # What it left in the radix caches is sound: asked again, it is answered.
    assert check_greedy(tiny_oracle, bad, generate(sampler, bad, f"again-{fault}-{after}")) == 20


@pytest.mark.parametrize("after", [0, 5])
def test_a_forward_that_raises(sampler, tiny_oracle, after):
    """All mixed requests of that step end; plain ones do not notice."""
    rng = random.Random(65)
    mixed = [Case(random_ids(rng, 20), random_ids(rng, 30), 20) for _ in range(3)]
    plain = [Case(random_ids(rng, 20), None, 40) for _ in range(2)]

    async def one(case: Case, rid: str):
        return await sampler.engine.async_generate(input_ids=case.teacher, sampling_params=case.params(), rid=rid)

    async def everything():
        tasks = [one(case, f"student-raise-{after}-{i}") for i, case in enumerate(mixed)]
        tasks += [one(case, f"plain-{after}-{i}") for i, case in enumerate(plain)]
        return await asyncio.gather(*tasks, return_exceptions=True)

    outputs = sampler.engine.loop.run_until_complete(everything())
    for error in outputs[:3]:
        assert getattr(error, "status_code", None) == 500, error
        assert "the student's forward failed: RuntimeError: injected: out of luck" in error.detail
    check_all(tiny_oracle, plain, outputs[3:])
    for i, case in enumerate(mixed):
        assert check_greedy(tiny_oracle, case, generate(sampler, case, f"again-raise-{after}-{i}")) == 20


@pytest.mark.parametrize("student", [[13, 14], None])
def test_a_request_that_masks_everything(sampler, student):
    """The grammar is at its end, and the request wants more tokens: SGLang alone would die of sampling that row."""
    case = Case([10, 11, 12], student, 30)
    params = {"ignore_eos": False, "temperature": 1.0, "top_p": 0.9, "top_k": 5, "min_p": 0.1}
    params |= {"min_new_tokens": 20, "regex": "[a-p ]{3,5}"}
    with pytest.raises(ValueError, match="^regex, min_new_tokens: no token is left to sample: "):
        sampler.engine.generate(input_ids=case.teacher, sampling_params=case.params(**params))


def test_in_a_stream(sampler):
    """What was good comes; then the end, with the message, and no token of the failed step."""
    rng = random.Random(66)
    case = Case(random_ids(rng, 20), random_ids(rng, 30), 20)
    stream = sampler.engine.generate(
        input_ids=case.teacher, sampling_params=case.params(), rid="student-nan-5-stream", stream=True
    )
    *_, last = stream
    reason = last["meta_info"]["finish_reason"]
    assert reason["type"] == "abort" and reason["status_code"] == 500
    assert "the student's logits are not finite" in reason["message"]
    ids = last["output_ids"]
    assert 4 <= len(ids) <= 5 + sampler.most_tokens
    assert all(len(last["meta_info"][name]) == len(ids) for name in ("alpha", "kl_to_student"))
    assert all(value is not None for value in last["meta_info"]["alpha"])


def test_optimal_sampler_raises_with_the_message(sampler, monkeypatch):
    """The offline API says it as a RuntimeError."""
    case = Case([10, 11, 12], [13, 14], 4)
    request = type(sampler)._request

    def with_rid(self, *args, **kwargs):
        made = request(self, *args, **kwargs)
        made.arguments["rid"] = ["student-nan-0-sampler"]
        return made

    monkeypatch.setattr(type(sampler), "_request", with_rid)
    with pytest.raises(RuntimeError, match="the student's logits are not finite"):
        sampler.generate(case.teacher, case.student, max_new_tokens=4)
    with pytest.raises(RuntimeError, match="the student's logits are not finite"):
        asyncio.run(sampler.async_generate(case.teacher, case.student, max_new_tokens=4))
