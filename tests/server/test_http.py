"""Mixed text over HTTP, from a server that is configured by a file and flags."""

from __future__ import annotations

import dataclasses
import random
import time

import httpx
import numpy as np
import pytest
import yaml
from harness import SMALL, Case, check_greedy, random_ids
from serving import events, generate, message_of, serve, server_info, wait_until_free
from tiny_models import small_chat_ids as chat_ids
from tiny_models import small_ids as ids
from tiny_models import small_text as text_of

from sglang_optimal import decode_top_k
from sglang_optimal.config import METHOD_OF_NUMBER, override
from sglang_optimal.names import SERIES

API_KEY = "a-key-for-this-test"
# What the server is started with; the file says more than that, see `client`.
DEFAULTS = {"alpha_method": "kl_symmetry", "alpha_min": 0.1, "alpha_max": 0.3}


@pytest.fixture(scope="module")
def client(tiny_pair, tmp_path_factory):
    folder = tmp_path_factory.mktemp("http")
    config = {
        "mixing": {
            "student_model_path": "/no/such/student",  # the flag wins
            "alpha_method": "entropy",  # the flag wins
            "alpha_min": 0.1,
            "alpha_max": 0.3,
        },
        "server": {
            **SMALL,
            "max_running_requests": 7,  # the flag wins
            "disable_radix_cache": False,
            "served_model_name": "tiny",
            "preferred_sampling_params": {"max_new_tokens": 9},
            "log_requests_target": ["stdout"],
        },
    }
    (folder / "server.yaml").write_text(yaml.safe_dump(config))
    teacher, student = map(str, tiny_pair)
    argv = ["--config", str(folder / "server.yaml"), "--model-path", teacher, "--student-model-path", student]
    argv += ["--alpha-method", "kl_symmetry", "--max-running-requests", "64"]
    # No fork: the server of this module starts as a user's does, also beside other workers.
    with serve("sglang_optimal.launch_server", argv, folder / "log", api_key=API_KEY, fork=False) as ready:
        yield ready


def check(oracle, case: Case, output: dict) -> None:
    """The output is the oracle's, under the server's defaults where the case has no setting of its own."""
    if case.student is not None:
        case = dataclasses.replace(case, alpha=override(DEFAULTS, case.alpha))
    # The cases of this module are fixed, and none of them has a tie.
    assert check_greedy(oracle, case, output) == case.n
    if case.student is not None:
        assert all(len(output["meta_info"][name]) == case.n for name in SERIES)


def body(case: Case, **more) -> dict:
    return {"input_ids": case.teacher, "sampling_params": case.params(), **more}


# -- mixed requests --------------------------------------------------------------------------------------------------

TEACHER_TEXT, STUDENT_TEXT = "what is 12+30? (it is 42)", "what is 12+30?"
MESSAGES = [{"role": "system", "content": "be brief."}, {"role": "user", "content": STUDENT_TEXT}]
MESSAGE_IDS = chat_ids(("system", "be brief."), ("user", STUDENT_TEXT))


@pytest.mark.parametrize(
    "field,value,student",
    [
        ("student_text", STUDENT_TEXT, ids(STUDENT_TEXT)),
        ("student_input_ids", ids(STUDENT_TEXT), ids(STUDENT_TEXT)),
        ("student_messages", MESSAGES, MESSAGE_IDS),
    ],
)
def test_each_student_field(client, tiny_oracle, field, value, student):
    case = Case(ids(TEACHER_TEXT), student, 16)
    params = case.params()
    params["custom_params"] = {field: value, "return_mixing_info": True}
    output = generate(client, text=TEACHER_TEXT, sampling_params=params)
    check(tiny_oracle, case, output)
    assert output["text"] == text_of(output["output_ids"])
    assert output["meta_info"]["prompt_tokens"] == len(case.teacher)
    assert max(output["meta_info"]["alpha"]) == pytest.approx(0.3)  # the server's bound


@pytest.mark.parametrize("form", ["lists", "base64"])
def test_the_most_likely_tokens(client, form):
    """Of a batch with two samples each, and growing with a stream; plain requests beside have none."""
    case = Case(ids(TEACHER_TEXT), ids(STUDENT_TEXT), 6)
    params = case.params()
    params["custom_params"] |= {"return_top_k": 3, "top_k_of": "teacher", "top_k_format": form}
    batch = [case.teacher, case.teacher, case.teacher]
    outputs = generate(client, input_ids=batch, sampling_params=[params, params, {"max_new_tokens": 6}])
    assert "top_k" not in outputs[2]["meta_info"]
    one, other = (output["meta_info"]["top_k"] for output in outputs[:2])
    expected = decode_top_k(one)["teacher"]
    for name, values in decode_top_k(other)["teacher"].items():  # they need not have been in one prefill
        np.testing.assert_allclose(values, expected[name], atol=1e-4)
    assert expected["ids"].shape == (6, 3) and expected["teacher_tail"].shape == (6,)
    if form == "base64":
        assert one["teacher"]["ids"].keys() == {"dtype", "shape", "base64"} and one["teacher"]["ids"]["dtype"] == "<i4"
    else:
        assert len(one["teacher"]["ids"][0]) == 3 and isinstance(one["teacher"]["teacher_logprobs"][0][0], float)
    seen = 0
    for event in events(client, "/generate", {"input_ids": case.teacher, "sampling_params": params, "stream": True}):
        part = decode_top_k(event["meta_info"]["top_k"])["teacher"]
        seen = len(part["ids"])
        assert seen == len(event["output_ids"]) and np.array_equal(part["ids"], expected["ids"][:seen])
    assert seen == 6


def test_scores_over_http(client):
    """On /generate and on /score_mixture, in a batch, in a stream and through session_params; a series that cannot be
    written is null."""
    custom = {"student_text": STUDENT_TEXT, "return_mixing_info": True}
    params = {"temperature": 1.0, "max_new_tokens": 8, "ignore_eos": True, "custom_params": custom}
    drawn = generate(client, text=TEACHER_TEXT, sampling_params=params)
    given = {**custom, "completion_input_ids": drawn["output_ids"]}
    scoring = {"temperature": 1.0, "custom_params": given}
    for name in ("alpha", "kl_to_student", "mixture_logprob"):
        expected = pytest.approx(drawn["meta_info"][name], abs=2e-4)
        one = generate(client, text=TEACHER_TEXT, sampling_params={**scoring, "max_new_tokens": 0})
        assert one["output_ids"] == drawn["output_ids"] and one["meta_info"][name] == expected
    batch = client.post(
        "/score_mixture", json={"text": [TEACHER_TEXT] * 2, "sampling_params": [scoring, scoring]}
    ).json()
    assert [answer["meta_info"]["alpha"] for answer in batch] == [
        pytest.approx(drawn["meta_info"]["alpha"], abs=2e-4)
    ] * 2
    carried = {"text": TEACHER_TEXT, "session_params": {"mixing": given}, "sampling_params": {"temperature": 1.0}}
    answer = client.post("/score_mixture", json=carried).json()
    bare = client.post(
        "/score_mixture", json={name: value for name, value in carried.items() if name != "sampling_params"}
    )
    assert bare.json()["output_ids"] == answer["output_ids"]
    assert answer["meta_info"]["completion_tokens"] == 8 and answer["text"] == drawn["text"]
    streamed = list(
        events(client, "/score_mixture", {"text": TEACHER_TEXT, "sampling_params": scoring, "stream": True})
    )
    assert streamed[-1]["meta_info"]["alpha"] == pytest.approx(drawn["meta_info"]["alpha"], abs=2e-4)
    never = {**custom, "completion_text": "zq", "return_mixing_info": ["behaviour_logprob"]}
    answer = client.post(
        "/score_mixture", json={"text": TEACHER_TEXT, "sampling_params": {"top_k": 2, "custom_params": never}}
    ).json()
    assert None in answer["meta_info"]["behaviour_logprob"]
    for body in ({"text": "a"}, {"text": "a", "sampling_params": {"custom_params": custom}}):
        response = client.post("/score_mixture", json=body)
        assert response.status_code == 400 and "completion_text or completion_input_ids: give one" in message_of(
            response
        )


def test_alpha_comes_unasked_and_the_other_series_do_not(client, tiny_oracle):
    case = Case(ids(TEACHER_TEXT), ids(STUDENT_TEXT), 12)
    params = case.params()
    del params["custom_params"]["return_mixing_info"]
    output = generate(client, text=TEACHER_TEXT, sampling_params=params)
    expected = tiny_oracle.generate_greedy(case.teacher, case.student, case.n, **DEFAULTS)
    assert output["output_ids"] == expected.token_ids
    assert output["meta_info"]["alpha"] == pytest.approx(expected.alphas, abs=1e-4)
    assert not set(SERIES[1:]) & set(output["meta_info"])


@pytest.mark.parametrize(
    "alpha",
    [
        {"alpha_max": 1.0},
        {"alpha_method": "ess_balance", "alpha_min": 0.4, "alpha_max": 0.9},
        {"fixed_alpha": 1.3},
        {"kl_budget": 0.2, "alpha_max": 0.9},
        {"kl_budget_teacher": 0.3, "alpha_max": 0.9},
    ],
    ids=str,
)
def test_request_overrides_the_defaults(client, tiny_oracle, alpha):
    case = Case(ids(TEACHER_TEXT), ids(STUDENT_TEXT), 10, alpha)
    output = generate(client, **body(case))
    check(tiny_oracle, case, output)
    assert max(output["meta_info"]["alpha"]) > 0.3


def test_plain_request(client, tiny_oracle):
    case = Case(ids(TEACHER_TEXT), None, 16)
    output = generate(client, **body(case))
    check(tiny_oracle, case, output)
    assert not set(SERIES) & set(output["meta_info"])


def batch(seed: int) -> list[Case]:
    rng = random.Random(seed)
    cases = [Case(random_ids(rng, 5 + i), random_ids(rng, 30 - 2 * i), 6 + i) for i in range(6)]
    cases[2].student = cases[4].student = None
    cases[3].alpha = {"fixed_alpha": -0.3}
    return cases


def test_batch_of_mixed_and_plain(client, tiny_oracle):
    cases = batch(41)
    outputs = generate(
        client, input_ids=[case.teacher for case in cases], sampling_params=[case.params() for case in cases]
    )
    for case, output in zip(cases, outputs, strict=True):
        check(tiny_oracle, case, output)


def test_batch_with_shared_parameters(client, tiny_oracle):
    """One sampling_params for all prompts: every one of them has the same student context."""
    rng = random.Random(42)
    cases = [Case(random_ids(rng, 8 + i), ids(STUDENT_TEXT), 8) for i in range(3)]
    outputs = generate(client, input_ids=[case.teacher for case in cases], sampling_params=cases[0].params())
    for case, output in zip(cases, outputs, strict=True):
        check(tiny_oracle, case, output)


def test_several_samples_of_one_request(client):
    params = {**Case([10], ids(STUDENT_TEXT), 8).params(), "n": 3, "temperature": 1.0}
    outputs = generate(client, text=TEACHER_TEXT, sampling_params=params)
    assert len(outputs) == 3
    assert len({tuple(output["output_ids"]) for output in outputs}) == 3
    assert all(len(output["meta_info"]["alpha"]) == 8 for output in outputs)


def test_stream(client, tiny_oracle):
    case = Case(ids(TEACHER_TEXT), ids(STUDENT_TEXT), 14)
    chunks = events(client, "/generate", body(case, stream=True))
    assert len(chunks) > 1
    for chunk in chunks:  # each one repeats what came before it
        assert all(len(chunk["meta_info"][name]) == len(chunk["output_ids"]) for name in SERIES)
    check(tiny_oracle, case, chunks[-1])
    assert chunks[-1]["meta_info"]["finish_reason"]["type"] == "length"


def test_stream_of_a_batch(client, tiny_oracle):
    cases = batch(43)
    last = {}
    request = {
        "input_ids": [case.teacher for case in cases],
        "sampling_params": [case.params() for case in cases],
        "stream": True,
    }
    for chunk in events(client, "/generate", request):
        last[chunk["index"]] = chunk
    for i, case in enumerate(cases):
        check(tiny_oracle, case, last[i])


def test_openai_endpoints(client, tiny_oracle):
    """custom_params of the OpenAI endpoints carries the same fields."""
    common = {
        "model": "tiny",
        "temperature": 0,
        "ignore_eos": True,
        "max_tokens": 12,
        "custom_params": {"student_messages": MESSAGES},
    }
    completion = client.post("/v1/completions", json={**common, "prompt": TEACHER_TEXT})
    assert completion.status_code == 200, completion.text
    expected = tiny_oracle.generate_greedy(ids(TEACHER_TEXT), MESSAGE_IDS, 12, **DEFAULTS)
    assert completion.json()["choices"][0]["text"] == text_of(expected.token_ids)

    chat = {**common, "messages": [{"role": "user", "content": TEACHER_TEXT}]}
    response = client.post("/v1/chat/completions", json=chat)
    assert response.status_code == 200, response.text
    teacher = chat_ids(("user", TEACHER_TEXT))
    expected = tiny_oracle.generate_greedy(teacher, MESSAGE_IDS, 12, **DEFAULTS)
    assert response.json()["choices"][0]["message"]["content"] == text_of(expected.token_ids)

    wrong = {**chat, "custom_params": {"student_messages": MESSAGES, "alpha_method": "kl"}}
    response = client.post("/v1/chat/completions", json=wrong)
    assert response.status_code == 400
    assert "alpha_method: 'kl' is not one of" in response.text


# -- refusals --------------------------------------------------------------------------------------------------------

STUDENT = {"student_input_ids": [10, 11]}


@pytest.mark.parametrize(
    "custom_params,message",
    [
        ({**STUDENT, "alpha_method": "kl_symetry"}, "alpha_method: 'kl_symetry' is not one of"),
        ({**STUDENT, "alpha_min": 0.8, "alpha_max": 0.2}, "alpha_min: 0.8 is greater than alpha_max 0.2"),
        ({**STUDENT, "alpha_min": 0.8}, "alpha_min: 0.8 is greater than alpha_max 0.3"),  # the server's default
        ({**STUDENT, "student_text": "hi"}, "exactly one of student_text, student_input_ids, student_messages"),
        ({"student_input_ids": [10, 64]}, "student_input_ids[1]: 64 is outside the vocabulary [0, 64)"),
        ({**STUDENT, "alpha_maximum": 0.2}, "unknown key 'alpha_maximum'. Did you mean 'alpha_max'?"),
        ({"student_txt": "hi"}, "unknown key 'student_txt'. Did you mean 'student_text'?"),
    ],
)
def test_bad_field_is_a_400_that_names_it(client, tiny_oracle, custom_params, message):
    request = {"input_ids": [10, 11], "sampling_params": {"max_new_tokens": 4, "custom_params": custom_params}}
    assert message in message_of(client.post("/generate", json=request))
    good = Case([10, 11], [12], 4)
    check(tiny_oracle, good, generate(client, **body(good)))


def test_bad_field_in_a_stream(client):
    params = {"max_new_tokens": 4, "custom_params": {"student_input_ids": [-1]}}
    (event,) = events(client, "/generate", {"input_ids": [10, 11], "sampling_params": params, "stream": True})
    assert "student_input_ids[0]: -1 is outside" in event["error"]["message"]


def test_a_refused_stream_leaves_its_connection_alone(client):
    """SGLang looks after every stream again two seconds later; the connection may be busy with the next one by then."""
    bad = {"input_ids": [10, 11], "sampling_params": {"custom_params": {"teacher_messages": 5}}, "stream": True}
    params = {"max_new_tokens": 40, "ignore_eos": True, "custom_params": {"student_input_ids": [12, 13]}}
    (event,) = events(client, "/generate", bad)
    assert "teacher_messages" in event["error"]["message"]
    end = time.monotonic() + 3.0
    while time.monotonic() < end:
        last = events(client, "/generate", {"input_ids": [10, 11], "sampling_params": params, "stream": True})[-1]
        assert len(last["output_ids"]) == 40


def test_bad_field_in_a_batch(client):
    good, bad = Case([10, 11], [12, 13], 4), Case([10, 11], [12, 99], 4)
    request = {"input_ids": [good.teacher] * 3, "sampling_params": [c.params() for c in (good, bad, good)]}
    assert "student_input_ids[1]: 99 is outside" in message_of(client.post("/generate", json=request))


def test_api_key(client):
    request = body(Case([10, 11], [12], 4))
    for headers in ({}, {"Authorization": "Bearer another-key"}):
        response = httpx.post(client.base_url.join("/generate"), json=request, headers=headers, timeout=60)
        assert response.status_code == 401
    assert len(generate(client, **request)["output_ids"]) == 4


# -- what the server says about itself -------------------------------------------------------------------------------


def test_file_and_flags_reach_the_server(client, tiny_pair):
    info = server_info(client)
    mixing = info["internal_states"][0]["mixing"]
    assert mixing["student_model_path"] == str(tiny_pair[1])
    assert mixing["alpha"] == {**DEFAULTS, **dict.fromkeys(METHOD_OF_NUMBER)}
    assert info["model_path"] == str(tiny_pair[0])
    assert info["max_running_requests"] == 64
    assert info["disable_radix_cache"] is False
    assert info["served_model_name"] == "tiny"
    assert info["preferred_sampling_params"] == {"max_new_tokens": 9}
    assert info["log_requests_target"] == ["stdout"]
    assert mixing["teacher_pool"]["size"] == mixing["student_pool"]["size"] == SMALL["max_total_tokens"]
    assert len(generate(client, input_ids=[10, 11], sampling_params={"ignore_eos": True})["output_ids"]) == 9


def test_every_slot_is_free_at_the_end(client):
    wait_until_free(client)


@pytest.mark.parametrize("custom", [None, {"student_text": "tell me a story."}])
@pytest.mark.parametrize("text", ["", ["what is 12?", ""]], ids=["alone", "beside another"])
def test_a_side_with_nothing_in_it(client, text, custom):
    """It would be answered from another request's logits, or end the server."""
    params = {"max_new_tokens": 4, "temperature": 0}
    if custom:
        params["custom_params"] = {**custom, "fixed_alpha": 1.0}
    response = client.post("/generate", json={"text": text, "sampling_params": params})
    assert response.status_code == 400 and "text: gives no tokens at all" in message_of(response)
    assert client.post("/generate", json={"text": "hello", "sampling_params": {"max_new_tokens": 2}}).status_code == 200


@pytest.mark.parametrize("custom", [{}, {"custom_params": {"student_text": "b"}}], ids=["plain", "mixed"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("masks", "blamed"),
    [
        ({"min_new_tokens": 3, "stop_token_ids": list(range(64))}, "min_new_tokens"),
        ({"logit_bias": {str(token): -1e39 for token in range(64)}}, "logit_bias"),
    ],
    ids=["stops", "bias"],
)
def test_a_request_that_forbids_every_token(client, custom, temperature, masks, blamed):
    """Without a grammar: sampling such a row would end the server, and a greedy one would take any."""
    params = {"max_new_tokens": 5, "temperature": temperature, "top_p": 0.9, **masks, **custom}
    response = client.post("/generate", json={"text": "a", "sampling_params": params})
    assert response.status_code == 400, response.text
    assert message_of(response).startswith(f"{blamed}: ")
    assert client.post("/generate", json={"text": "a", "sampling_params": {"max_new_tokens": 2}}).status_code == 200


@pytest.mark.parametrize("custom", [{}, {"custom_params": {"student_text": "b"}}], ids=["plain", "mixed"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("max_new_tokens", "ends_by"),
    [(3, {}), (1, {}), (3, {"stop_token_ids": list(range(400))})],
    ids=["", "last", "stop"],
)
def test_a_grammar_that_the_vocabulary_cannot_go_on_with(client, custom, stream, max_new_tokens, ends_by):
    """No token of the tiny model has a '<' that the grammar would take: the client's fault, and not the server's.

    Whatever is drawn in its place: it may be the request's last token, or one that ends it in order.
    """
    params = {"max_new_tokens": max_new_tokens, "regex": "<", **custom, **ends_by}
    body = {"text": "a", "sampling_params": params, "stream": stream}
    if stream:
        ends = [event["meta_info"]["finish_reason"] for event in events(client, "/generate", body)]
        assert ends[-1]["type"] == "abort" and ends[-1]["status_code"] == 400, ends
        assert ends[-1]["message"].startswith("regex: no token is left to sample")
    else:
        response = client.post("/generate", json=body)
        assert response.status_code == 400 and message_of(response).startswith("regex: no token is left to sample")
