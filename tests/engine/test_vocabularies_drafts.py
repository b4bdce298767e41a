"""Drafts over vocabularies that differ; apart, because an engine that drafts is alone in its process."""

from __future__ import annotations

from harness import check_all, check_pools, random_cases, run, start
from oracle import MixedOracle
from test_vocabularies import ADDED, IDS, build


def test_drafts(tmp_path):
    teacher = build(tmp_path / "teacher", 1, ADDED)
    student = build(tmp_path / "student", 2, (), hidden_size=32, num_layers=1)
    cases = random_cases(37, 12, 4)
    with start((teacher, student), mixing_mode="speculative", draft_tokens=3) as sampler:
        outputs = run(sampler, cases)
        hot = [{**case.params(), "temperature": 3.0, "max_new_tokens": 60} for case in cases if case.student]
        prompts = [case.teacher for case in cases if case.student]
        sampled = sampler.engine.generate(input_ids=prompts, sampling_params=hot)
        check_pools(sampler)
    check_all(MixedOracle(teacher, student, of_one=IDS), cases, outputs)
    mixed = [output for case, output in zip(cases, outputs, strict=True) if case.student]
    assert not {token for output in (*mixed, *sampled) for token in output["output_ids"]} & set(IDS)
