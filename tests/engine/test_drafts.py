"""What is particular to steps in which the student drafts; that the text is right, the other engine tests show."""

from __future__ import annotations

import asyncio
import math
import random

import pytest
from harness import VOCAB, Case, check_all, check_greedy, check_pools, random_cases, random_ids, run, start

DRAFTS, CONTEXT, POOL = 4, 160, 700


@pytest.fixture(scope="module")
def sampler(tiny_pair):
    arguments = {"context_length": CONTEXT, "max_total_tokens": POOL, "max_running_requests": 16}
    with start(tiny_pair, mixing_mode="speculative", draft_tokens=DRAFTS, **arguments) as engine:
        yield engine


@pytest.fixture(autouse=True)
def pools_are_full_again(sampler):
    yield
    check_pools(sampler)


def steps(output: dict) -> int:
    return output["meta_info"].get("spec_verify_ct", 0)


@pytest.mark.parametrize("params", [{}, {"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.8, "top_k": 20}], ids=str)
def test_all_drafts_are_kept_where_the_mixture_is_the_student(sampler, params):
    """With alpha 0 q* is what was drafted from."""
    rng = random.Random(31)
    cases = [Case(random_ids(rng, 12), random_ids(rng, 9), n, {"fixed_alpha": 0.0}) for n in (1, 2, 6, 7, 30, 41)]
    for case, output in zip(cases, run(sampler, cases, **params), strict=True):
        assert len(output["output_ids"]) == case.n
        # The first token comes from the prefill.
        assert steps(output) == math.ceil((case.n - 1) / (DRAFTS + 1))
        if case.n % (DRAFTS + 1) == 1 and case.n > 1:
            assert output["meta_info"]["spec_accept_rate"] == 1.0


def test_fewer_steps_than_tokens(sampler, tiny_oracle):
    """Two unrelated models agree now and then; every row has its own pace."""
    cases = random_cases(32, 8, 0, tokens=(20, 30))
    outputs = run(sampler, cases)
    check_all(tiny_oracle, cases, outputs)
    counts = [steps(output) for output in outputs]
    assert all(math.ceil((case.n - 1) / (DRAFTS + 1)) <= n <= case.n - 1 for n, case in zip(counts, cases, strict=True))
    assert sum(counts) < sum(case.n - 1 for case in cases)


def test_the_end_within_a_run(sampler, tiny_oracle):
    """A stop token among kept drafts ends the text there; what lies behind it enters neither radix cache."""
    rng = random.Random(33)
    case = Case(random_ids(rng, 20), random_ids(rng, 15), 40, {"fixed_alpha": 0.0})
    (whole,) = run(sampler, [case])
    ids = whole["output_ids"]
    ends = [i for i in range(3, 30) if ids[i] not in ids[:i] and (i - 1) % (DRAFTS + 1) not in (0, DRAFTS)]
    assert ends, "no token of this text can be the stop of one"
    stop = ids[ends[0]]
    (cut,) = run(sampler, [case], stop_token_ids=[stop], ignore_eos=False)
    assert cut["output_ids"] == ids[: ends[0] + 1]
    assert len(cut["meta_info"]["alpha"]) == len(cut["output_ids"])
    # The next request has that text in its prompts, and then another one.
    longer = [
        Case(case.teacher + cut["output_ids"] + tail, case.student + cut["output_ids"] + tail, 12)
        for tail in ([], random_ids(rng, 3))
    ]
    check_all(tiny_oracle, longer, run(sampler, longer))


def test_rows_that_cannot_be_drafted_for(sampler, tiny_oracle):
    """Grammars, penalties and plain requests go on in lockstep, in one batch with drafted rows; with logprobs."""
    cases = random_cases(34, 6, 2, longest=30, tokens=(12, 20))
    more: list[dict] = [{} for _ in cases]
    mixed = [i for i, case in enumerate(cases) if case.student is not None]
    more[mixed[0]], more[mixed[1]] = {"regex": "[0-9]+"}, {"presence_penalty": 0.5}
    outputs = sampler.engine.generate(
        input_ids=[case.teacher for case in cases],
        sampling_params=[case.params(**extra) for case, extra in zip(cases, more, strict=True)],
        return_logprob=True,
        top_logprobs_num=2,
        token_ids_logprob=[20, 21],
    )
    for i, (case, output) in enumerate(zip(cases, outputs, strict=True)):
        meta, n = output["meta_info"], len(output["output_ids"])
        assert [entry[1] for entry in meta["output_token_logprobs"]] == output["output_ids"]
        assert len(meta["output_top_logprobs"]) == len(meta["output_token_ids_logprobs"]) == n
        for own, top, asked in zip(
            meta["output_token_logprobs"], meta["output_top_logprobs"], meta["output_token_ids_logprobs"], strict=True
        ):
            assert len(top) == 2 and top[0][0] >= top[1][0] and top[0][0] >= own[0] - 1e-4
            assert [entry[1] for entry in asked] == [20, 21]
        if case.student is not None:
            values = [entry[0] for entry in meta["output_token_logprobs"]]
            assert values == pytest.approx(meta["mixture_logprob"], abs=1e-4)
        if i in mixed[:2] or case.student is None:
            assert steps(output) == n - 1
        if not more[i]:
            check_greedy(tiny_oracle, case, output)


@pytest.mark.parametrize("student", [None, [13, 14]], ids=["plain", "mixed"])
def test_a_row_without_a_token_beside_drafted_ones(sampler, tiny_oracle, student):
    """Whatever is drawn from it, a token that stops the request among them, it ends with an error, and alone."""
    cases = random_cases(36, 3, 1, tokens=(20, 24))
    dead = Case([10, 11, 12], student, 30)
    masks = {"regex": "[a-p ]{3,5}", "min_new_tokens": 20, "ignore_eos": False}
    requests = [(case, {}) for case in cases] + [(dead, masks), (dead, {**masks, "stop_token_ids": list(range(VOCAB))})]

    async def everything():
        waiting = [
            sampler.engine.async_generate(input_ids=case.teacher, sampling_params=case.params(**more))
            for case, more in requests
        ]
        return await asyncio.gather(*waiting, return_exceptions=True)

    *outputs, at_the_end, at_once = sampler.engine.loop.run_until_complete(everything())
    check_all(tiny_oracle, cases, outputs)
    for error in (at_the_end, at_once):
        assert isinstance(error, ValueError), error
        assert str(error).startswith("regex, min_new_tokens: no token is left to sample")


@pytest.mark.parametrize("teacher,student", [(10, 90), (90, 10), (60, 60)])
def test_up_to_the_context_length(sampler, teacher, student):
    """The slots ahead of the last tokens lie beyond the context length; drafts there do no harm."""
    rng = random.Random(35)
    longest = CONTEXT - max(teacher, student)
    case = Case(random_ids(rng, teacher), random_ids(rng, student), longest, {"fixed_alpha": 0.0}, {2: -100.0})
    outputs = run(sampler, [case] * 3)
    for output in outputs:
        assert longest - 2 <= len(output["output_ids"]) <= longest
        assert output["output_ids"] == outputs[0]["output_ids"]


def test_more_rows_than_requests_may_run(sampler, tiny_oracle):
    """A verification of all rows is larger than the largest batch of lockstep."""
    cases = random_cases(36, 16, 0, longest=10, tokens=(8, 12))
    check_all(tiny_oracle, cases, run(sampler, cases))
