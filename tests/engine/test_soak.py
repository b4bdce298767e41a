"""Minutes of random traffic on small pools: mixed and plain, sampled and greedy, aborted at random."""

from __future__ import annotations

import asyncio
import random
import time

import pytest
from harness import check_all, check_pools, random_cases, run, start

SECONDS = 120


@pytest.mark.slow
@pytest.mark.parametrize("disable_overlap_schedule", [False, True])
def test_random_traffic(tiny_pair, tiny_oracle, disable_overlap_schedule):
    arguments = {
        "max_total_tokens": 400,
        "chunked_prefill_size": 16,
        "context_length": 256,
        "schedule_conservativeness": 0.05,
        "max_running_requests": 16,
        "disable_overlap_schedule": disable_overlap_schedule,
    }
    rng = random.Random(17)
    deadline = time.monotonic() + SECONDS
    seen = {"stop": 0, "length": 0, "abort": 0, "retracted": 0}

    async def one(sampler, rid: str, case) -> None:
        params = case.params(ignore_eos=False, temperature=rng.choice([0.0, 1.0]), top_p=rng.choice([1.0, 0.8]))
        task = asyncio.ensure_future(
            sampler.engine.async_generate(input_ids=case.teacher, sampling_params=params, rid=rid)
        )
        if rng.random() < 0.25:
            await asyncio.sleep(rng.random())
            sampler.engine.tokenizer_manager.abort_request(rid)
        meta = (await task)["meta_info"]
        seen[meta["finish_reason"]["type"]] += 1
        seen["retracted"] += meta.get("num_retractions", 0) > 0

    async def burst(sampler, number: int) -> None:
        cases = random_cases(number, 12, 4, longest=70, tokens=(1, 90))
        await asyncio.gather(*[one(sampler, f"{number}-{i}", case) for i, case in enumerate(cases)])

    with start(tiny_pair, **arguments) as sampler:
        number = 0
        while time.monotonic() < deadline:
            number += 1
            sampler.engine.loop.run_until_complete(asyncio.wait_for(burst(sampler, number), 120))
            check_pools(sampler)
        assert number > 3 and all(seen.values()), (number, seen)
        cases = random_cases(99, 6, 2)
        check_all(tiny_oracle, cases, run(sampler, cases))
