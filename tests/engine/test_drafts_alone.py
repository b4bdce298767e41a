"""Drafting with engines of their own: the smallest pool, and lengths chosen online."""

from __future__ import annotations

import random

import pytest
from harness import Case, check_all, check_greedy, check_pools, random_cases, random_ids, run, start

DRAFTS = 4


def test_a_pool_that_holds_the_text_but_not_the_slots_ahead(tiny_pair, tiny_oracle):
    """Refused at once; what fits with them runs to the end of the pool."""
    rng = random.Random(37)
    ahead = 2 * (DRAFTS + 1)
    arguments = {"max_total_tokens": 60, "max_running_requests": 4, "context_length": 512}
    with start(tiny_pair, mixing_mode="speculative", draft_tokens=DRAFTS, **arguments) as small:
        for lengths in ((60 - ahead, 5), (5, 60 - ahead)):
            case = Case(random_ids(rng, lengths[0]), random_ids(rng, lengths[1]), 8)
            with pytest.raises(ValueError, match="too long"):
                small.engine.generate(input_ids=case.teacher, sampling_params=case.params())
        case = Case(random_ids(rng, 20), random_ids(rng, 30), 100, bias={2: -100.0})
        (output,) = run(small, [case])
        n = len(output["output_ids"])
        assert 60 - 30 - ahead - 2 <= n <= 60 - 30
        case.n = n
        check_greedy(tiny_oracle, case, output)
        check_pools(small)


@pytest.mark.slow
def test_auto_starts_and_is_right(tiny_pair, tiny_oracle):
    """Whatever it chooses from step to step."""
    with start(tiny_pair, mixing_mode="auto", max_total_tokens=2000) as engine:
        cases = random_cases(38, 10, 3, tokens=(30, 60))
        outputs = run(engine, cases)
        check_all(tiny_oracle, cases, outputs)
        assert any(
            output["meta_info"]["spec_verify_ct"] < case.n - 1 for output, case in zip(outputs, cases, strict=True)
        )
        check_pools(engine)
        # SGLang's configuration is the process's: it would count this one's drafts, which it has not.
        with pytest.raises(ValueError, match="mixing_mode: an engine that drafts and one that does not"):
            start(tiny_pair)
