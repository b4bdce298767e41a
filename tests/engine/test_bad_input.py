"""Every wrong field gets a clear error that names it, and the engine goes on."""

from __future__ import annotations

import random

import pytest
from harness import Case, check_all, check_pools, random_cases, random_ids, run, start

CONTEXT_LENGTH = 256


@pytest.fixture(scope="module")
def sampler(tiny_pair):
    # The student's pool is the smaller one, so that it can be the reason to refuse.
    with start(tiny_pair, context_length=CONTEXT_LENGTH, student_max_total_tokens=200) as engine:
        yield engine


@pytest.fixture(autouse=True)
def engine_is_well(sampler, tiny_oracle):
    yield
    cases = random_cases(31, 2, 1)
    check_all(tiny_oracle, cases, run(sampler, cases))
    check_pools(sampler)


def ask(sampler, custom_params, **params):
    return sampler.engine.generate(
        input_ids=[10, 11, 12],
        sampling_params={"temperature": 0.0, "max_new_tokens": 4, **params, "custom_params": custom_params},
    )


IDS = {"student_input_ids": [10, 11]}
BAD = {
    "no student field": ({"alpha_method": "kl_symmetry"}, "exactly one of student_text.*none was given"),
    "no student field, info": ({"return_mixing_info": True}, "exactly one of"),
    "two student fields": ({**IDS, "student_text": "hi"}, "exactly one of.*student_text and student_input_ids"),
    "unknown method": ({**IDS, "alpha_method": "kl_symetry"}, "alpha_method: 'kl_symetry'.*Did you mean 'kl_symmetry'"),
    "bounds out of order": ({**IDS, "alpha_min": 0.6, "alpha_max": 0.4}, "alpha_min: 0.6 is greater than alpha_max"),
    "bound out of range": ({**IDS, "alpha_max": 1.5}, r"alpha_min, alpha_max: must lie in \[0, 1\]"),
    "bound not a number": ({**IDS, "alpha_min": "low"}, "alpha_min: must be a finite number"),
    "alpha is NaN": ({**IDS, "fixed_alpha": float("nan")}, "fixed_alpha: must be a finite number"),
    "fixed without alpha": ({**IDS, "alpha_method": "fixed"}, "fixed_alpha: required"),
    "fixed_alpha for another method": (
        {**IDS, "alpha_method": "entropy", "fixed_alpha": 0.5},
        "fixed_alpha: only read when",
    ),
    "budget below 0": ({**IDS, "kl_budget": -0.1}, "kl_budget: must be a finite number, 0 or more, got -0.1"),
    "budget is infinite": ({**IDS, "kl_budget_teacher": float("inf")}, "kl_budget_teacher: must be a finite number"),
    "two budgets": ({**IDS, "kl_budget": 1, "kl_budget_teacher": 1}, "kl_budget, kl_budget_teacher: give only one"),
    "budget beside a fixed alpha": ({**IDS, "kl_budget": 1, "fixed_alpha": 1}, "fixed_alpha, kl_budget: give only one"),
    "method without its budget": ({**IDS, "alpha_method": "kl_budget"}, "kl_budget: required when"),
    "budget for another method": ({**IDS, "alpha_method": "entropy", "kl_budget": 1}, "kl_budget: only read when"),
    "misspelt budget": ({**IDS, "kl_budgt": 0.1}, "unknown key 'kl_budgt'.*Did you mean 'kl_budget'"),
    "misspelt field": ({**IDS, "alpha_methd": "entropy"}, "unknown key 'alpha_methd'.*Did you mean 'alpha_method'"),
    "misspelt student field": ({"student_prompt": "hi"}, "unknown key 'student_prompt'"),
    "id above the vocabulary": ({"student_input_ids": [10, 64]}, r"student_input_ids\[1\]: 64 is outside"),
    "negative id": ({"student_input_ids": [-1]}, r"student_input_ids\[0\]: -1 is outside"),
    "id not an integer": ({"student_input_ids": [10, 1.5]}, r"student_input_ids\[1\]: must be an integer"),
    "id a boolean": ({"student_input_ids": [True]}, r"student_input_ids\[0\]: must be an integer"),
    "ids not a list": ({"student_input_ids": "10"}, "student_input_ids: must be a list"),
    "no ids": ({"student_input_ids": []}, "student_input_ids: the student context has no tokens"),
    "empty text": ({"student_text": ""}, "student_text: must be a non-empty string"),
    "text not a string": ({"student_text": 5}, "student_text: must be a non-empty string"),
    "messages not a list": ({"student_messages": "hi"}, "student_messages: must be a non-empty list"),
    "message without a role": ({"student_messages": [{"content": "hi"}]}, r"student_messages\[0\]: must be a mapping"),
    "unknown role": (
        {"student_messages": [{"role": "judge", "content": "hi"}]},
        r"student_messages\[0\].role: 'role' must be one of 'system'",
    ),
    "text of megabytes": (
        {"student_text": "a" * 100_000},
        r"student_text: 100000 characters are too long; at most \d+ can fit the context length",
    ),
    "messages of megabytes": (
        {"student_messages": [{"role": "user", "content": "a" * 60_000}] * 2},
        "student_messages: 120002 characters are too long",
    ),
    "too many ids, and a bad one": (
        {"student_input_ids": [10] * 99_999 + ["x"]},
        "student context is too long: 100000",
    ),
    "a pickle": ({"student_input_ids": b"\x80\x04."}, "student_input_ids: must be a list of token ids, got bytes"),
    "info not a boolean": ({**IDS, "return_mixing_info": "yes"}, "return_mixing_info: must be true or false"),
    "an unknown series": (
        {**IDS, "return_mixing_info": ["alpha", "kl_student"]},
        "return_mixing_info: unknown .*kl_student.*Did you mean",
    ),
    "a series that is no name": ({**IDS, "return_mixing_info": [7]}, "return_mixing_info: a series is a name, got 7"),
    "too many of the most likely": ({**IDS, "return_top_k": 1025}, "return_top_k: must be an integer from 0 to 1024"),
    "less than none": ({**IDS, "return_top_k": -1}, "return_top_k: must be an integer from 0 to 1024, got -1"),
    "top k not a number": ({**IDS, "return_top_k": True}, "return_top_k: must be an integer"),
    "top k of nobody": ({**IDS, "return_top_k": 3, "top_k_of": "judge"}, "top_k_of: 'judge' is not one of teacher"),
    "top k of nothing": ({**IDS, "return_top_k": 3, "top_k_of": []}, "top_k_of: must be one of"),
    "top k of a number": ({**IDS, "return_top_k": 3, "top_k_of": 7}, "top_k_of: must be one of"),
    "sides without top k": ({**IDS, "top_k_of": "teacher"}, "top_k_of: only read with return_top_k"),
    "an unknown format": (
        {**IDS, "return_top_k": 3, "top_k_format": "npz"},
        "top_k_format: must be one of lists, base64",
    ),
    "format without top k": ({**IDS, "top_k_format": "base64"}, "top_k_format: only read with return_top_k"),
    "top k misspelt": ({**IDS, "return_topk": 3}, "Did you mean 'return_top_k'"),
    "top k without a context": ({"return_top_k": 3}, "exactly one of student_text"),
    "both completions": (
        {**IDS, "completion_text": "a", "completion_input_ids": [10]},
        "completion_text, completion_input_ids: give one of them",
    ),
    "a completion, and tokens to generate": (
        {**IDS, "completion_input_ids": [10]},
        "completion_input_ids: is scored, and nothing generated; give max_new_tokens 0, got 4",
    ),
    "a completion misspelt": ({**IDS, "completion_ids": [10]}, "Did you mean 'completion_input_ids'"),
    "student longer than its context": (
        {"student_input_ids": [10] * (CONTEXT_LENGTH + 1)},
        "student_input_ids: the student context is too long: 257 tokens",
    ),
    "student longer than its pool": ({"student_input_ids": [10] * 220}, "student context too long: 220 tokens"),
}


@pytest.mark.parametrize("custom_params,message", BAD.values(), ids=BAD.keys())
def test_message_names_the_field(sampler, custom_params, message):
    with pytest.raises(ValueError, match=message):
        ask(sampler, custom_params)


def test_more_most_likely_tokens_than_an_answer_may_have(sampler, monkeypatch):
    monkeypatch.setattr("sglang_optimal.wanted.LARGEST_TOP_K", 12_000)
    sides = {**IDS, "top_k_of": ["teacher", "student", "mixture"]}
    with pytest.raises(
        ValueError, match="return_top_k: 41 tokens of 3 sides for each of up to 100 output tokens are 12300"
    ):
        ask(sampler, {**sides, "return_top_k": 41}, max_new_tokens=100)
    with pytest.raises(ValueError, match="return_top_k: 17 tokens of 3 sides for each of up to 256 output tokens"):
        ask(sampler, {**sides, "return_top_k": 17}, max_new_tokens=None)
    ask(sampler, {**sides, "return_top_k": 40}, max_new_tokens=100)


@pytest.mark.parametrize(
    "completion,more,message",
    [
        ({"completion_input_ids": []}, {}, "completion_input_ids: has no tokens"),
        ({"completion_text": ""}, {}, "completion_text: must be a non-empty string"),
        ({"completion_text": 7}, {}, "completion_text: must be a non-empty string"),
        ({"completion_input_ids": "abc"}, {}, "completion_input_ids: must be a list of token ids"),
        ({"completion_input_ids": [10, 64]}, {}, r"completion_input_ids\[1\]: 64 is outside the vocabulary"),
        ({"completion_input_ids": [10] * 256}, {}, "completion_input_ids: 256 tokens are too long"),
        (
            {"student_input_ids": [10] * 100, "completion_input_ids": [10] * 200},
            {},
            "the student context is too long: 300 tokens and 1 new",
        ),
        ({"completion_input_ids": [10]}, {"regex": "a"}, "regex: has no meaning for a completion that is given"),
        ({"completion_input_ids": [10]}, {"n": 2}, "n: has no meaning"),
        ({"completion_input_ids": [10]}, {"frequency_penalty": 0.1}, "frequency_penalty: has no meaning"),
        ({"completion_input_ids": [10]}, {"stop": ["a"]}, "stop: has no meaning"),
        ({"completion_input_ids": [10], "student_input_ids": None}, {}, "exactly one of student_text"),
    ],
)
def test_a_completion_that_cannot_be_scored(sampler, completion, more, message):
    with pytest.raises(ValueError, match=message):
        ask(sampler, {**IDS, **completion}, max_new_tokens=0, **more)


def test_a_completion_too_long_for_the_teacher(sampler):
    custom = {**IDS, "completion_input_ids": [10] * 100}
    with pytest.raises(
        ValueError, match="the teacher context is too long: 300 tokens and 1 new ones exceed the teacher's"
    ):
        sampler.engine.generate(input_ids=[10] * 200, sampling_params={"max_new_tokens": 0, "custom_params": custom})
    with pytest.raises(ValueError, match="return_logprob: not supported where a completion is scored"):
        sampler.engine.generate(
            input_ids=[10], sampling_params={"max_new_tokens": 0, "custom_params": custom}, return_logprob=True
        )


def test_student_context_and_new_tokens_too_long(sampler):
    with pytest.raises(ValueError, match="too long: 200 tokens and 100 new ones"):
        ask(sampler, {"student_input_ids": [10] * 200}, max_new_tokens=100)


def test_teacher_context_too_long(sampler):
    with pytest.raises(ValueError, match="longer than the model's context length"):
        sampler.engine.generate(
            input_ids=[10] * (CONTEXT_LENGTH + 1), sampling_params={"max_new_tokens": 4, "custom_params": IDS}
        )


def test_bad_request_in_a_batch_and_in_a_stream(sampler):
    good, bad = Case([10, 11], [12, 13], 4), Case([10, 11], [12, 99], 4)
    with pytest.raises(ValueError, match=r"student_input_ids\[1\]: 99"):
        run(sampler, [good, bad, good])
    with pytest.raises(ValueError, match=r"student_input_ids\[1\]: 99"):
        list(sampler.engine.generate(input_ids=bad.teacher, sampling_params=bad.params(), stream=True))


def test_unlimited_length_ends_with_the_students_room(sampler):
    """A request that fits, but whose student would run out of context, ends with "length" instead of failing."""
    rng = random.Random(32)
    case = Case(random_ids(rng, 5), random_ids(rng, 150), 80)
    output = sampler.engine.generate(input_ids=case.teacher, sampling_params=case.params(max_new_tokens=80))
    assert output["meta_info"]["finish_reason"]["type"] == "length"
    assert 40 <= len(output["output_ids"]) < 50  # the student's pool has 200 slots


def test_the_student_s_pool_is_the_bottleneck(sampler, tiny_oracle):
    """One student of these fits at a time, and ten teachers: requests wait or come back, and none is cut short."""
    rng = random.Random(33)
    cases = [Case(random_ids(rng, 5), random_ids(rng, 60), 60, bias={2: -100.0}) for _ in range(6)]
    cases += [Case(random_ids(rng, 80), random_ids(rng, 5), 40, bias={2: -100.0}) for _ in range(4)]
    cases.append(Case(random_ids(rng, 30), None, 40, bias={2: -100.0}))
    outputs = run(sampler, cases, ignore_eos=False)
    check_all(tiny_oracle, cases, outputs)


def test_features_that_do_not_go_with_a_mixture(sampler):
    with pytest.raises(ValueError, match="beam_width: beam search is not supported in a mixed request"):
        ask(sampler, IDS, beam_width=3)
    with pytest.raises(ValueError, match="lora_path: not supported in a mixed request|LoRA is not enabled"):
        sampler.engine.generate(
            input_ids=[10], sampling_params={"max_new_tokens": 2, "custom_params": IDS}, lora_path="x"
        )


def test_other_custom_params_are_left_alone(sampler):
    """custom_params belongs to custom logit processors too."""
    output = ask(sampler, {"my_processor_setting": 3})
    assert len(output["output_ids"]) == 4
    assert "alpha" not in output["meta_info"]
