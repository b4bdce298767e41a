"""Two models whose vocabularies differ by what was added to one of them."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from harness import Case, check_all, check_pools, oracle_settings, random_cases, random_ids, run, start
from oracle import MixedOracle
from tiny_models import build_tiny_tokenizer_model
from transformers import AutoTokenizer

from sglang_optimal.runtime.configs.vocabularies import Vocabularies

ADDED = ("<think>", "</think>")
IDS = (64, 65)
ENDS = 20
"""What ends a text of the student alone."""


def build(folder: Path, seed: int, added: tuple[str, ...], **more) -> Path:
    """A model with 80 rows of logits, whose tokenizer has 64 tokens and those that were added."""
    build_tiny_tokenizer_model(folder, seed=seed, vocab_size=80, **more)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(list(added))
    tokenizer.save_pretrained(folder)
    return folder


def end_with(folder: Path, token: int) -> None:
    for name in ("config.json", "generation_config.json"):
        file = folder / name
        values = json.loads(file.read_text()) if file.is_file() else {}
        file.write_text(json.dumps({**values, "eos_token_id": token}))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """{whose tokenizer has more: (teacher, student)}."""
    root = tmp_path_factory.mktemp("vocabularies")
    pairs = {}
    for longer in ("teacher", "student"):
        of = {side: ADDED if side == longer else () for side in ("teacher", "student")}
        teacher = build(root / f"{longer}-teacher", 1, of["teacher"])
        pairs[longer] = teacher, build(root / f"{longer}-student", 2, of["student"], hidden_size=32, num_layers=1)
    end_with(pairs["student"][1], ENDS)
    return pairs


@pytest.fixture(scope="module", params=["teacher", "student"])
def longer(request):
    return request.param


@pytest.fixture(scope="module")
def sampler(models, longer):
    with start(models[longer], mixing_self_check="on") as engine:
        yield engine
        check_pools(engine)


@pytest.fixture(scope="module")
def oracle(models, longer):
    return MixedOracle(*models[longer], of_one=IDS)


def generate(sampler, prompt, custom, **params):
    params = {"temperature": 0.0, "max_new_tokens": 8, "ignore_eos": True, "custom_params": custom, **params}
    return sampler.engine.generate(input_ids=prompt, sampling_params=params)


def test_the_mixture_is_on_the_common_ids(sampler, oracle):
    """Plain requests beside it keep all of the served model's."""
    cases = random_cases(31, 14, 6)
    outputs = run(sampler, cases)
    check_all(oracle, cases, outputs)
    mixed = [output for case, output in zip(cases, outputs, strict=True) if case.student]
    assert not {token for output in mixed for token in output["output_ids"]} & set(IDS)


def test_without_the_mask_it_would_be_another(models, longer):
    """The ids matter: else the test above shows nothing."""
    oracle = MixedOracle(*models[longer])
    texts = [
        oracle.generate_greedy(case.teacher, case.student, case.n, **oracle_settings(case.alpha)).token_ids
        for case in random_cases(31, 14, 6)
        if case.student
    ]
    assert {token for text in texts for token in text} & set(IDS)


def test_no_sample_and_no_series_has_them(sampler):
    prompt = random_ids(random.Random(1), 10)
    custom = {"student_input_ids": prompt[:4], "return_top_k": 60, "return_mixing_info": True}
    output = generate(sampler, prompt, custom, temperature=3.0, max_new_tokens=100, sampling_seed=7)
    assert not set(output["output_ids"]) & set(IDS)
    top = output["meta_info"]["top_k"]
    ids = [index for side in top.values() for row in side["ids"] for index in row]
    assert ids and not set(ids) & set(IDS)


def test_each_side_reads_its_own(sampler, longer):
    """An id that one alone has is fine where that one reads it, and refused elsewhere."""
    own, other = [9, IDS[0], 10], [11, 12]
    prompts = {"teacher": own, "student": other} if longer == "teacher" else {"teacher": other, "student": own}
    output = generate(sampler, prompts["teacher"], {"student_input_ids": prompts["student"], "return_prompts": True})
    assert output["meta_info"][f"{longer}_prompt_ids"] == own
    text = {"student_text": "a<think>b"} if longer == "student" else {"student_input_ids": [9]}
    assert len(generate(sampler, prompts["teacher"], text)["output_ids"]) == 8
    message = r"\[1\]: 64 is '<think>' of the other model, which this one cannot read"
    with pytest.raises(ValueError, match=message):
        generate(sampler, prompts["student"], {"student_input_ids": prompts["teacher"]})
    with pytest.raises(ValueError, match="completion_input_ids" + message):
        generate(sampler, [9], {"student_input_ids": [9], "completion_input_ids": own}, max_new_tokens=0)
    with pytest.raises(ValueError, match=r"outside the vocabulary \[0, 80\)"):
        generate(sampler, [9], {"student_input_ids": [9, 80]})


def test_a_stop_that_is_never_sampled(sampler, longer):
    with pytest.raises(ValueError, match=f"stop_token_ids: 65 is '</think>' of the {longer} alone"):
        generate(sampler, [9], {"student_input_ids": [10]}, stop_token_ids=[9, 65])
    params = {"max_new_tokens": 4, "ignore_eos": True, "stop_token_ids": [65]}  # a plain one may
    assert sampler.engine.generate(input_ids=[9], sampling_params=params)["output_ids"]


def test_scoring_is_on_the_common_ids(sampler, oracle):
    teacher, student, completion = [9, 10, 11], [12], [13, 14, 15, 16]
    custom = {"student_input_ids": student, "completion_input_ids": completion, "return_mixing_info": True}
    scored = generate(sampler, teacher, custom, max_new_tokens=0)["meta_info"]
    for position, token in enumerate(completion):
        t, s = oracle.next_logits(teacher, student, completion[:position])
        assert scored["teacher_logprob"][position] == pytest.approx(float(t.log_softmax(-1)[token]), abs=1e-3)
        assert scored["student_logprob"][position] == pytest.approx(float(s.log_softmax(-1)[token]), abs=1e-3)


def test_the_end_of_either_ends_it(sampler, oracle, longer):
    """The teacher's text ends elsewhere than the student's, in one of the pairs."""
    rng = random.Random(4)
    ended = 0
    for _ in range(30):
        prompt, student = random_ids(rng, 6), random_ids(rng, 6)
        output = generate(sampler, prompt, {"student_input_ids": student}, max_new_tokens=30, ignore_eos=False)
        ends = {2, ENDS} if longer == "student" else {2}
        expected = oracle.generate_greedy(prompt, student, 30, eos_ids=ends).token_ids
        assert output["output_ids"] == expected
        ended += expected[-1] == ENDS and len(expected) < 30
    assert ended or longer == "teacher"


def vocabulary(size: int, **more: int) -> dict[str, int]:
    return {**{f"t{index}": index for index in range(size)}, **more}


def test_what_is_common():
    found = Vocabularies.compared(vocabulary(100, a=100, b=101), vocabulary(100, a=100, c=102))
    assert found.common == 101 and found.of_one == {101: ("teacher", "b"), 102: ("student", "c")}
    assert found.share == pytest.approx(101 / 103)
    assert Vocabularies.compared(vocabulary(9), vocabulary(9)).of_one == {}


def test_pairs_that_cannot_mix():
    with pytest.raises(ValueError, match="2 ids mean different tokens: id 9 is 'a' for the teacher and 'b' for the st"):
        Vocabularies.compared(vocabulary(9, a=9, b=10), vocabulary(9, b=9, a=10))
    with pytest.raises(ValueError, match="only 50 of 100 ids are in both, and at least 90%"):
        Vocabularies.compared(vocabulary(50), vocabulary(100))


def test_an_id_that_one_head_alone_has(tmp_path):
    """The teacher's own prompt may have it; nobody else reads it."""
    teacher = build(tmp_path / "teacher", 1, ADDED)
    student = build_tiny_tokenizer_model(tmp_path / "student", seed=2, hidden_size=32, num_layers=1)  # 64 rows
    case = Case([9, IDS[1], 10], [11, 12], 12)
    with start((teacher, student)) as sampler:
        (output,) = run(sampler, [case])
        for custom in ({"student_input_ids": [9, IDS[1]]}, {"student_input_ids": [9, 70]}):
            with pytest.raises(ValueError, match=r"student_input_ids\[1\]: .* is outside the vocabulary \[0, 64\)"):
                generate(sampler, [9], custom)
        own = {"teacher_input_ids": [9, IDS[0]]}
        assert len(generate(sampler, [9], own)["output_ids"]) == 8
    check_all(MixedOracle(teacher, student), [case], [output])
