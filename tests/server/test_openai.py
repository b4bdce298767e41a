"""The OpenAI routes, asked with OpenAI's own client: two sides of one chat, and the series in ``sglext.mixing``."""

from __future__ import annotations

import numpy as np
import openai
import pytest
from serving import events, generate, message_of
from tiny_models import small_chat_ids, small_ids, small_text

from sglang_optimal import decode_top_k
from sglang_optimal.names import SERIES

PROBLEM, HINT = "what is 12+30?", "the answer is 42."
USER = {"role": "user", "content": PROBLEM}
SYSTEM = {"role": "system", "content": "be brief."}
COMMON = {"model": "tiny", "temperature": 0, "max_tokens": 12}
INFO = {"return_mixing_info": True}


@pytest.fixture(scope="module")
def ai(client):
    return openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0)


def chat(ai, custom, messages=(USER,), **more):
    extra = {"custom_params": custom, "ignore_eos": True, **more.pop("extra_body", {})}
    return ai.chat.completions.create(messages=list(messages), extra_body=extra, **COMMON, **more)


def refusal(client, custom, messages=(USER,), **more) -> str:
    """The message of the 400, which the OpenAI routes put at the top level."""
    body = {**COMMON, "messages": list(messages), "custom_params": custom, **more}
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 400, response.text
    return response.json()["message"]


def check(oracle, response, teacher: list[int], student: list[int], **alpha) -> None:
    expected = oracle.generate_greedy(teacher, student, COMMON["max_tokens"], **alpha)
    choice = response.choices[0]
    text = choice.message.content if hasattr(choice, "message") else choice.text
    assert text == small_text(expected.token_ids)
    (mixing,) = response.sglext["mixing"]
    assert mixing["alpha"] == pytest.approx(expected.alphas, abs=1e-4)


# -- the two sides of a chat -----------------------------------------------------------------------------------------

PLAIN = small_chat_ids(("user", PROBLEM))


@pytest.mark.parametrize(
    "custom,messages,teacher,student",
    [
        # The smallest request of semi on-policy sampling: the teacher is told more than the student.
        (
            {"teacher_only_messages": [{"role": "system", "content": HINT}]},
            (USER,),
            small_chat_ids(("system", HINT), ("user", PROBLEM)),
            PLAIN,
        ),
        # Two system messages become one, as chat templates want it.
        (
            {"teacher_only_messages": [{"role": "system", "content": HINT}], "student_messages": None},
            (SYSTEM, USER),
            small_chat_ids(("system", f"{HINT}\n\nbe brief."), ("user", PROBLEM)),
            small_chat_ids(("system", "be brief."), ("user", PROBLEM)),
        ),
        # So do two messages of one role.
        (
            {"teacher_only_messages": [{"role": "user", "content": HINT}]},
            (SYSTEM, USER),
            small_chat_ids(("system", "be brief."), ("user", f"{HINT}\n\n{PROBLEM}")),
            small_chat_ids(("system", "be brief."), ("user", PROBLEM)),
        ),
        (
            {"teacher_system_prompt": HINT},
            (SYSTEM, USER),
            small_chat_ids(("system", HINT), ("user", PROBLEM)),
            small_chat_ids(("system", "be brief."), ("user", PROBLEM)),
        ),
        (
            {"student_system_prompt": HINT},
            (USER,),
            PLAIN,
            small_chat_ids(("system", HINT), ("user", PROBLEM)),
        ),
        ({"student_text": "hm:"}, (USER,), PLAIN, small_ids("hm:")),
        (
            {"student_messages": [SYSTEM, USER]},
            (USER,),
            PLAIN,
            small_chat_ids(("system", "be brief."), ("user", PROBLEM)),
        ),
        # Text parts, and an assistant's turn in between.
        (
            {"teacher_system_prompt": HINT},
            (
                {"role": "user", "content": [{"type": "text", "text": "hello"}]},
                {"role": "assistant", "content": "yes?"},
                USER,
            ),
            small_chat_ids(("system", HINT), ("user", "hello"), ("assistant", "yes?"), ("user", PROBLEM)),
            small_chat_ids(("user", "hello"), ("assistant", "yes?"), ("user", PROBLEM)),
        ),
    ],
)
def test_both_sides_of_a_chat(ai, tiny_oracle, custom, messages, teacher, student):
    check(tiny_oracle, chat(ai, custom, messages), teacher, student)


def test_an_alpha_alone_mixes_two_models_on_one_prompt(ai, tiny_oracle):
    check(tiny_oracle, chat(ai, {"fixed_alpha": 0.5}), PLAIN, PLAIN, alpha_method="fixed", fixed_alpha=0.5)


def test_continue_final_message(ai, tiny_oracle):
    begun = {"role": "assistant", "content": "it is"}
    custom = {"teacher_system_prompt": HINT}
    response = chat(ai, custom, (USER, begun), extra_body={"continue_final_message": True})
    prefix = small_ids("it is")
    teacher = small_chat_ids(("system", HINT), ("user", PROBLEM)) + prefix
    check(tiny_oracle, response, teacher, PLAIN + prefix)
    # Without it SGLang reads the last message as the user's; so does the student.
    response = chat(ai, custom, (USER, begun))
    turns = ("user", PROBLEM), ("user", "it is")
    check(tiny_oracle, response, small_chat_ids(("system", HINT), *turns), small_chat_ids(*turns))


def test_generate_with_messages_for_both(client, tiny_oracle):
    custom = {"teacher_messages": [USER], "teacher_system_prompt": HINT, "student_messages": [USER], **INFO}
    params = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True, "custom_params": custom}
    teacher = small_chat_ids(("system", HINT), ("user", PROBLEM))
    expected = tiny_oracle.generate_greedy(teacher, PLAIN, 12)
    for more in ({}, {"text": ""}):
        output = generate(client, sampling_params=params, **more)
        assert output["output_ids"] == expected.token_ids
        assert output["meta_info"]["prompt_tokens"] == len(teacher)
    other = {**params, "custom_params": {**custom, "teacher_messages": [SYSTEM, USER], "teacher_system_prompt": None}}
    first, second = generate(client, sampling_params=[params, other])
    assert first["output_ids"] == expected.token_ids
    teacher = small_chat_ids(("system", "be brief."), ("user", PROBLEM))
    assert second["output_ids"] == tiny_oracle.generate_greedy(teacher, PLAIN, 12).token_ids


# -- where the series are --------------------------------------------------------------------------------------------


def test_series_of_a_chat(ai):
    answer = chat(ai, {"teacher_system_prompt": HINT, **INFO}, n=2)
    assert answer.usage.completion_tokens == 24
    assert [set(mixing) for mixing in answer.sglext["mixing"]] == [set(SERIES)] * 2
    assert all(len(values) == 12 for mixing in answer.sglext["mixing"] for values in mixing.values())


def test_plain_requests_have_no_series(ai):
    for custom in (None, {"another": 1}):
        assert not hasattr(chat(ai, custom), "sglext")
    assert all(not hasattr(chunk, "sglext") for chunk in chat(ai, None, stream=True))


@pytest.mark.parametrize("n", [1, 2])
def test_chat_stream(ai, n):
    whole = chat(ai, {"teacher_system_prompt": HINT, **INFO}, n=n)
    texts, series = {}, {}
    for chunk in chat(ai, {"teacher_system_prompt": HINT, **INFO}, n=n, stream=True):
        for position, choice in enumerate(chunk.choices):
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
            if hasattr(chunk, "sglext"):
                for name, values in chunk.sglext["mixing"][position].items():
                    series.setdefault(choice.index, {}).setdefault(name, []).extend(values)
    for choice, mixing in zip(whole.choices, whole.sglext["mixing"], strict=True):
        assert texts[choice.index] == choice.message.content
        assert series[choice.index].keys() == mixing.keys() == set(SERIES)
        for name, values in mixing.items():
            assert series[choice.index][name] == pytest.approx(values, abs=1e-4)


@pytest.mark.parametrize("form", ["lists", "base64"])
def test_the_most_likely_tokens_of_a_chat(ai, form):
    """A stream's chunks have those of their own tokens."""
    asked = {"return_top_k": 3, "top_k_of": ["student", "mixture"], "top_k_format": form}
    custom = {"teacher_system_prompt": HINT, **asked, "return_mixing_info": ["student_entropy"]}
    (whole,) = chat(ai, custom).sglext["mixing"]
    assert whole.keys() == {"alpha", "student_entropy", "top_k"} and whole["top_k"].keys() == {"student", "mixture"}
    expected = decode_top_k(whole["top_k"])
    assert expected["mixture"]["ids"].shape == (12, 3)
    parts = []
    for chunk in chat(ai, custom, stream=True):
        if hasattr(chunk, "sglext") and "top_k" in chunk.sglext["mixing"][0]:
            (new,) = chunk.sglext["mixing"]
            parts.append(decode_top_k(new["top_k"]))
            assert len(parts[-1]["student"]["ids"]) == len(new["student_entropy"])
    for side, entry in expected.items():
        for name, array in entry.items():
            assert np.allclose(np.concatenate([part[side][name] for part in parts]), array, atol=1e-4)


def test_completions(ai, tiny_oracle):
    extra = {"custom_params": {"student_text": PROBLEM, **INFO}, "ignore_eos": True}
    prompt = f"{PROBLEM} {HINT}"
    whole = ai.completions.create(prompt=prompt, extra_body=extra, **COMMON)
    check(tiny_oracle, whole, small_ids(prompt), small_ids(PROBLEM))
    text, alphas = "", []
    for chunk in ai.completions.create(prompt=prompt, extra_body=extra, stream=True, **COMMON):
        text += "".join(choice.text for choice in chunk.choices)
        if hasattr(chunk, "sglext"):
            alphas += chunk.sglext["mixing"][0]["alpha"]
    assert text == whole.choices[0].text
    assert alphas == pytest.approx(whole.sglext["mixing"][0]["alpha"], abs=1e-5)
    two = ai.completions.create(prompt=[prompt, PROBLEM], extra_body=extra, **COMMON)
    assert [len(mixing["alpha"]) for mixing in two.sglext["mixing"]] == [12, 12]


def test_logprobs_are_the_mixture_s(ai):
    answer = chat(ai, {"teacher_system_prompt": HINT, **INFO}, logprobs=True)
    logprobs = [token.logprob for token in answer.choices[0].logprobs.content]
    assert logprobs == pytest.approx(answer.sglext["mixing"][0]["mixture_logprob"], abs=1e-3)


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "custom,message",
    [
        ({"teacher_only_messages": []}, "teacher_only_messages: must be a non-empty list"),
        ({"teacher_only_messages": "hi"}, "teacher_only_messages: must be a non-empty list"),
        ({"teacher_only_messages": [{"role": "system"}]}, "teacher_only_messages[0]: must be a mapping with 'role'"),
        ({"teacher_only_messages": [{"role": "wizard", "content": "x"}]}, "teacher_only_messages[0].role: 'role' must"),
        ({"teacher_system_prompt": ""}, "teacher_system_prompt: must be a non-empty string"),
        ({"student_system_prompt": 7}, "student_system_prompt: must be a non-empty string"),
        (
            {"student_system_prompt": "x", "student_text": "y"},
            "student_system_prompt: is beside messages that both sides",
        ),
        ({"teacher_messages": [USER], "student_text": "y"}, "student_text, teacher_messages: give one of them"),
        ({"student_messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "content[0]: only text parts"),
        ({"student_messages": [USER], "student_text": "x"}, "exactly one of student_text"),
        ({"student_chat_template_kwargs": {"chat_template": "x"}}, "'chat_template' may not be set by a request"),
        ({"student_chat_template_kwargs": [1]}, "student_chat_template_kwargs: must be a mapping"),
        ({"alpha_method": "kl"}, "alpha_method: 'kl' is not one of"),
        ({"teacher_only_mesages": [USER]}, "Did you mean 'teacher_only_messages'?"),
        ({"return_mixing_info": "yes"}, "return_mixing_info: must be true or false"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_field_of_a_chat(client, custom, message, stream):
    assert message in refusal(client, custom, stream=stream)


def test_openai_s_client_gets_a_bad_request_error(ai):
    with pytest.raises(openai.BadRequestError, match="alpha_min: 0.9 is greater than alpha_max 0.2"):
        chat(ai, {"alpha_min": 0.9, "alpha_max": 0.2})


@pytest.mark.parametrize(
    "body,message",
    [
        ({"text": "hi", "custom": {"teacher_messages": [USER]}}, "teacher_messages: takes the place of text"),
        ({"input_ids": [9], "custom": {"teacher_messages": [USER]}}, "teacher_messages: takes the place of text"),
        ({"custom": {"teacher_messages": {}}}, "teacher_messages: must be a non-empty list"),
        ({"custom": {"teacher_messages": [{"role": "assistant", "content": "x"}]}}, "needs a message before the assis"),
        (
            {"custom": {"teacher_messages": [{"role": "wizard", "content": "x"}]}},
            "teacher_messages[0].role: 'role'",
        ),
        ({"text": "hi", "custom": {"teacher_system_prompt": "x"}}, "teacher_system_prompt: needs messages"),
        ({"text": "hi", "custom": {"teacher_only_messages": [USER]}}, "only /v1/chat/completions reads it"),
    ],
)
def test_bad_field_of_generate(client, body, message):
    custom = {"student_text": "x", **body.pop("custom")}
    request = {**body, "sampling_params": {"max_new_tokens": 2, "custom_params": custom}}
    assert message in message_of(client.post("/generate", json=request))
    (event,) = events(client, "/generate", {**request, "stream": True})
    assert message in event["error"]["message"]


def test_teacher_messages_missing_in_one_of_a_batch(client):
    with_it = {"max_new_tokens": 2, "custom_params": {"teacher_messages": [USER], "student_text": "x"}}
    without = {"max_new_tokens": 2, "custom_params": {"student_text": "x"}}
    response = client.post("/generate", json={"sampling_params": [with_it, without]})
    assert "teacher_messages: sampling_params[1] has none" in message_of(response)
