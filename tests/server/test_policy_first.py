"""The request's own prompt is the student's, and what the teacher reads is a field, as trainers of a policy have it."""

from __future__ import annotations

import random

import pytest
from harness import Case, random_ids
from serving import events, generate, message_of

GREEDY = {"temperature": 0.0, "max_new_tokens": 8, "ignore_eos": True}
SERIES = ("alpha", "teacher_logprob", "student_logprob", "mixture_logprob", "kl_to_student", "kl_to_teacher")
MESSAGES = [{"role": "user", "content": "what is 2 + 3?"}]
HINT = [{"role": "system", "content": "it is 5."}]


def params(**fields) -> dict:
    return {**GREEDY, "custom_params": {"return_mixing_info": True, **fields}}


def same(one: dict, other: dict) -> None:
    """Two answers of one mixture."""
    assert one["output_ids"] == other["output_ids"]
    for name in SERIES:
        assert one["meta_info"][name] == pytest.approx(other["meta_info"][name], abs=1e-5), name


def test_ids(mixed_server, tiny_oracle):
    rng = random.Random(1)
    for _ in range(3):
        case = Case(random_ids(rng, rng.randint(3, 30)), random_ids(rng, rng.randint(3, 30)), 8)
        first = generate(mixed_server, input_ids=case.student, sampling_params=params(teacher_input_ids=case.teacher))
        expected = tiny_oracle.generate_greedy(case.teacher, case.student, 8).token_ids
        assert first["output_ids"] == expected
        assert first["meta_info"]["prompt_tokens"] == len(case.student)
        same(first, generate(mixed_server, input_ids=case.teacher, sampling_params=case.params()))


def test_text_messages_and_batches(mixed_server):
    texts = ["what is 2 + 3?", "a colour?"]
    hints = ["it is 5.", "red"]
    own = generate(
        mixed_server, text=texts, sampling_params=[params(teacher_text=hint, return_prompts=True) for hint in hints]
    )
    usual = generate(mixed_server, text=hints, sampling_params=[params(student_text=text) for text in texts])
    for mine, theirs in zip(own, usual, strict=True):
        same(mine, theirs)
        meta = mine["meta_info"]
        assert meta["prompt_tokens"] == len(meta["student_prompt_ids"]) != len(meta["teacher_prompt_ids"])
    first = generate(
        mixed_server, text="a", sampling_params=params(teacher_messages=MESSAGES, teacher_system_prompt="it is 5.")
    )
    same(
        first,
        generate(
            mixed_server,
            sampling_params=params(student_text="a", teacher_messages=MESSAGES, teacher_system_prompt="it is 5."),
        ),
    )


def test_completions(mixed_server):
    body = {"model": "m", "prompt": "what is 2 + 3?", "max_tokens": 6, "temperature": 0}
    mine = mixed_server.post("/v1/completions", json={**body, "custom_params": {"teacher_text": "it is 5."}}).json()
    usual = {**body, "prompt": "it is 5.", "custom_params": {"student_text": "what is 2 + 3?"}}
    theirs = mixed_server.post("/v1/completions", json=usual).json()
    assert mine["choices"][0]["text"] == theirs["choices"][0]["text"]
    plain = mixed_server.post("/v1/completions", json=body).json()
    assert mine["usage"]["prompt_tokens"] == plain["usage"]["prompt_tokens"] != theirs["usage"]["prompt_tokens"]


def chat(client, **more) -> dict:
    body = {"model": "m", "messages": MESSAGES, "max_tokens": 6, "temperature": 0}
    custom = {"return_mixing_info": True, "return_prompts": True, **more.pop("custom", {})}
    response = client.post("/v1/chat/completions", json={**body, **more, "custom_params": custom})
    assert response.status_code == 200, response.text
    return response.json()


def mixing(answer: dict) -> dict:
    return answer["sglext"]["mixing"][0]


def test_chats(mixed_server):
    """The usage is the student's prompt's wherever the teacher alone has fields of its own."""
    hinted = chat(mixed_server, custom={"teacher_only_messages": HINT})
    ids = mixing(hinted)
    assert hinted["usage"]["prompt_tokens"] == len(ids["student_prompt_ids"]) < len(ids["teacher_prompt_ids"])
    whole = chat(mixed_server, custom={"teacher_messages": [*HINT, *MESSAGES]})
    assert mixing(whole)["teacher_prompt_ids"] == ids["teacher_prompt_ids"]
    by_ids = chat(mixed_server, custom={"teacher_input_ids": ids["teacher_prompt_ids"]})
    both = chat(
        mixed_server, input_ids=ids["student_prompt_ids"], custom={"teacher_input_ids": ids["teacher_prompt_ids"]}
    )
    text = chat(mixed_server, custom={"teacher_text": "it is 5."})
    for answer in (whole, by_ids, both):
        assert answer["choices"][0]["message"] == hinted["choices"][0]["message"]
        assert mixing(answer)["student_prompt_ids"] == ids["student_prompt_ids"]
    for answer in (whole, by_ids, both, text):
        assert answer["usage"]["prompt_tokens"] == hinted["usage"]["prompt_tokens"]
    # With fields of the student's, or of none, the messages are the teacher's.
    for custom in ({"student_messages": HINT, "teacher_system_prompt": "x"}, {"fixed_alpha": 0.5}):
        answer = chat(mixed_server, custom=custom)
        assert answer["usage"]["prompt_tokens"] == len(mixing(answer)["teacher_prompt_ids"])


def test_streams_and_scores(mixed_server):
    custom = {"teacher_input_ids": [9, 10, 11]}
    body = {"input_ids": [12, 13], "sampling_params": params(**custom), "stream": True}
    last = events(mixed_server, "/generate", body)[-1]
    assert last["meta_info"]["prompt_tokens"] == 2
    scored = {"completion_input_ids": [20, 21, 22], "return_mixing_info": True}
    mine = mixed_server.post(
        "/score_mixture", json={"input_ids": [12, 13], "sampling_params": {"custom_params": {**custom, **scored}}}
    ).json()
    usual = {"input_ids": [9, 10, 11], "sampling_params": {"custom_params": {"student_input_ids": [12, 13], **scored}}}
    theirs = mixed_server.post("/score_mixture", json=usual).json()
    same(mine, theirs)
    assert mine["meta_info"]["prompt_tokens"] == 2


@pytest.mark.parametrize(
    "body,message",
    [
        ({"custom": {"teacher_text": "a", "teacher_input_ids": [9]}}, "got teacher_text and teacher_input_ids"),
        ({"custom": {"teacher_text": "a", "student_text": "b"}}, "got student_text and teacher_text"),
        ({"custom": {"teacher_input_ids": [99]}}, "teacher_input_ids[0]: 99 is outside the vocabulary [0, 64)"),
        ({"custom": {"teacher_input_ids": [9] * 1100}}, "teacher_input_ids: the teacher context is too long"),
        ({"custom": {"teacher_text": ""}}, "teacher_text: must be a non-empty string"),
        ({"custom": {"teacher_txt": "a"}}, "Did you mean 'teacher_text'"),
        ({"custom": {"teacher_text": "a", "teacher_system_prompt": "b"}}, "teacher_system_prompt: needs messages"),
        ({"custom": {"teacher_text": "a", "student_system_prompt": "b"}}, "student_system_prompt: only read with"),
        (
            {"custom": {"teacher_text": "a"}, "return_logprob": True, "logprob_start_len": 0},
            "logprob_start_len: the prompt is the student's",
        ),
    ],
)
def test_bad_requests(mixed_server, body, message):
    body = dict(body)
    custom = body.pop("custom")
    response = mixed_server.post(
        "/generate", json={"input_ids": [9, 10], "sampling_params": {**GREEDY, "custom_params": custom}, **body}
    )
    assert message in message_of(response)


@pytest.mark.parametrize(
    "custom,message",
    [
        ({"teacher_messages": HINT, "student_messages": HINT}, "student_messages, teacher_messages: give one of them"),
        ({"teacher_text": "a", "teacher_input_ids": [9]}, "teacher_text, teacher_input_ids: give one of them"),
        ({"teacher_text": "a", "teacher_only_messages": HINT}, "teacher_only_messages: is beside messages that both"),
        ({"teacher_text": "a", "teacher_system_prompt": "b"}, "teacher_system_prompt: is beside messages that both"),
    ],
)
def test_bad_chats(mixed_server, custom, message):
    response = mixed_server.post(
        "/v1/chat/completions", json={"model": "m", "messages": MESSAGES, "custom_params": custom}
    )
    assert response.status_code == 400 and message in response.json()["message"]
