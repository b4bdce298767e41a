"""Seeds on the mixture. SGLang reads ``sampling_seed`` in deterministic mode only."""

from __future__ import annotations

import pytest
from harness import Case, check_pools, start

TEACHER, STUDENT = [10, 11, 12, 13], [20, 21]


@pytest.fixture(scope="module")
def sampler(tiny_pair):
    with start(tiny_pair, enable_deterministic_inference=True) as engine:
        yield engine
        check_pools(engine)


def draw(sampler, seeds, **alpha):
    case = Case(TEACHER, STUDENT, 12, alpha)
    outputs = sampler.engine.generate(
        input_ids=[TEACHER] * len(seeds),
        sampling_params=[case.params(temperature=1.0, sampling_seed=seed) for seed in seeds],
    )
    return [output["output_ids"] for output in outputs]


def test_a_seed_decides_the_tokens_whatever_else_is_in_the_batch(sampler):
    alone = [draw(sampler, [seed])[0] for seed in (1, 2, 3)]
    assert len({tuple(ids) for ids in alone}) == 3
    assert draw(sampler, [5, 3, 1, 1, 2, 9])[1:5] == [alone[2], alone[0], alone[0], alone[1]]


def test_a_seed_means_what_it_means_in_sglang(sampler):
    """With all weight on the teacher the same seed draws the teacher's own tokens."""
    plain = Case(TEACHER, None, 12).params(temperature=1.0, sampling_seed=4)
    expected = sampler.engine.generate(input_ids=TEACHER, sampling_params=plain)["output_ids"]
    assert draw(sampler, [4], fixed_alpha=1.0)[0] == expected
    assert draw(sampler, [4])[0] != expected
