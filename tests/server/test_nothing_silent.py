"""Against one server with flags about templates: no request that names one of our fields anywhere gets a plain answer,
one model with one prompt on both sides has no KL, and no request ends the server."""

from __future__ import annotations

import json

import pytest
from harness import SMALL
from serving import as_argv, events, generate, message_of, serve, wait_until_free
from tiny_models import build_tiny_model, smollm2_tokenizer_dir

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
    "{% if tone %}({{ tone }}){% endif %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
HELLO = {"role": "user", "content": "hello there"}


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nothing-silent")
    model = str(build_tiny_model(folder / "model", seed=5, tokenizer_dir=smollm2_tokenizer_dir()))
    (folder / "given.jinja").write_text(TEMPLATE)
    argv = ["--model-path", model, "--student-model-path", model, "--student-weights", "separate"]
    argv += ["--chat-template", str(folder / "given.jinja"), "--default-chat-template-kwargs", '{"tone": "kind"}']
    argv += ["--incremental-streaming-output", "--enable-custom-logit-processor", "--return-hidden-states-mode", "last"]
    with serve("sglang_optimal.launch_server", [*argv, *as_argv(SMALL)], folder / "log") as ready:
        yield ready


@pytest.fixture(autouse=True)
def still_serves(client):
    yield
    # A plain request, and not /health, which takes SGLang a second.
    answer = client.post("/generate", json={"text": "a", "sampling_params": {"max_new_tokens": 1}})
    assert answer.status_code == 200 and answer.json()["meta_info"]["completion_tokens"] == 1


# -- 1: a mixed request does not become a plain one ------------------------------------------------------------------

STUDENT = {"student_text": "b", "fixed_alpha": 0.5}
PARAMS = {"max_new_tokens": 2}
CHAT = {"model": "m", "max_tokens": 2, "messages": [HELLO]}
COMPLETION = {"model": "m", "max_tokens": 2, "prompt": "a"}
MESSAGES = {"model": "m", "max_tokens": 2, "messages": [HELLO]}
RESPONSES = {"model": "m", "max_output_tokens": 2, "input": "a"}
OLLAMA = {"model": "m", "prompt": "a", "stream": False, "options": {"num_predict": 2}}
OLLAMA_CHAT = {"model": "m", "messages": [HELLO], "stream": False, "options": {"num_predict": 2}}


@pytest.mark.parametrize(
    "path,body",
    [
        # /generate: other containers, other places.
        ("/generate", {"text": "a", "sampling_params": {**PARAMS, "custom_params": json.dumps(STUDENT)}}),
        ("/generate", {"text": "a", "sampling_params": {**PARAMS, "custom_params": [STUDENT]}}),
        ("/generate", {"text": ["a"], "sampling_params": [{**PARAMS, "custom_params": json.dumps(STUDENT)}]}),
        ("/generate", {"text": "a", "sampling_params": {**PARAMS, **STUDENT}}),
        ("/generate", {"text": "a", "sampling_params": {**PARAMS, "custom_params": {"custom_params": STUDENT}}}),
        ("/generate", {"text": "a", "sampling_params": PARAMS, "custom_params": STUDENT}),
        ("/generate", {"text": "a", "sampling_params": PARAMS, **STUDENT}),
        ("/generate", {"text": "a", "sampling_params": PARAMS, "student_txt": "b"}),
        ("/generate", {"text": "a", "sampling_params": PARAMS, "mixing": STUDENT}),
        ("/generate", {"text": "a", "sampling_params": PARAMS, "extra_body": {"custom_params": STUDENT}}),
        ("/generate", {"text": "a", "sampling_params": PARAMS, "session_params": STUDENT}),
        ("/generate", {"text": "a", "sampling_params": PARAMS, "session_params": json.dumps({"mixing": STUDENT})}),
        ("/generate?fixed_alpha=0.5", {"text": "a", "sampling_params": PARAMS}),
        ("/generate?kl_budget=0.5", {"text": "a", "sampling_params": PARAMS}),
        ("/generate", {"text": "a", "sampling_params": {**PARAMS, "kl_budget": 0.5}}),
        ("/generate", {"text": "a", "sampling_params": {**PARAMS, "kl_budget_studnt": 0.5}}),
        ("/vertex_generate", {"instances": [{"text": "a", **STUDENT}], "parameters": {"sampling_params": PARAMS}}),
        ("/vertex_generate", {"instances": [{"text": "a"}], "parameters": {"sampling_params": PARAMS}, **STUDENT}),
        # The OpenAI routes.
        ("/v1/chat/completions", {**CHAT, **STUDENT}),
        ("/v1/chat/completions", {**CHAT, "kl_budget_teacher": 0.5}),
        ("/v1/chat/completions", {**CHAT, "sampling_params": {"custom_params": STUDENT}}),
        ("/v1/chat/completions", {**CHAT, "custom_params": json.dumps(STUDENT)}),
        ("/v1/chat/completions", {**CHAT, "extra_body": {"custom_params": STUDENT}}),
        ("/v1/chat/completions", {**CHAT, "metadata": {"mixing": STUDENT}}),
        ("/v1/chat/completions", {**CHAT, "chat_template_kwargs": {"teacher_system_prompt": "x"}}),
        ("/v1/completions", {**COMPLETION, **STUDENT}),
        ("/v1/completions", {**COMPLETION, "custom_params": [STUDENT]}),
        ("/invocations", {**CHAT, **STUDENT}),
        # Routes that have no place for the fields.
        ("/v1/messages", {**MESSAGES, "custom_params": STUDENT}),
        ("/v1/messages", {**MESSAGES, "session_params": {"mixing": STUDENT}}),
        ("/v1/messages", {**MESSAGES, "metadata": STUDENT}),
        ("/v1/responses", {**RESPONSES, "custom_params": STUDENT}),
        ("/v1/responses", {**RESPONSES, **STUDENT}),
        ("/api/generate", {**OLLAMA, "custom_params": STUDENT}),
        ("/api/generate", {**OLLAMA, "options": {**OLLAMA["options"], **STUDENT}}),
        ("/api/chat", {**OLLAMA_CHAT, "custom_params": STUDENT}),
        ("/api/chat", {**OLLAMA_CHAT, "options": {"session_params": {"mixing": STUDENT}}}),
        ("/encode", {"text": "a", "custom_params": STUDENT}),
        ("/v1/embeddings", {"model": "m", "input": "a", **STUDENT}),
        ("/v1/score", {"model": "m", "query": "a", "items": ["b"], "label_token_ids": [1], **STUDENT}),
        ("/v1/rerank", {"query": "a", "documents": ["b"], **STUDENT}),
        ("/tokenize", {"model": "m", "prompt": "a", **STUDENT}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_field_that_nothing_reads(client, path, body):
    response = client.post(path, json=body)
    assert response.status_code == 400, (response.status_code, response.text)
    assert any(word in response.text for word in ("where nothing reads it", "must be a mapping")), response.text
    escaped = json.dumps(body).replace("student_text", "student_te\\u0078t").encode()
    response = client.post(path, content=escaped, headers={"Content-Type": "application/json"})
    assert response.status_code == 400, response.text


@pytest.mark.parametrize(
    "path,body",
    [
        ("/generate", {"text": "a", "sampling_params": {**PARAMS, "custom_params": STUDENT}}),
        ("/generate", {"text": "a", "sampling_params": PARAMS, "session_params": {"mixing": STUDENT}}),
        (
            "/vertex_generate",
            {"instances": [{"text": "a"}], "parameters": {"sampling_params": {**PARAMS, "custom_params": STUDENT}}},
        ),
        ("/v1/chat/completions", {**CHAT, "custom_params": STUDENT}),
        ("/v1/chat/completions", {**CHAT, "session_params": {"mixing": STUDENT}}),
        ("/v1/completions", {**COMPLETION, "custom_params": STUDENT}),
        ("/invocations", {**CHAT, "custom_params": STUDENT}),
    ],
)
def test_a_field_in_its_place(client, path, body):
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    assert '"alpha":[0.5,0.5]' in response.text.replace(" ", "")


def test_what_only_looks_like_our_fields(client):
    """Words, tools and schemas of the client's own."""
    tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"student_text": {}}}}}
    body = {
        **CHAT,
        "tools": [tool],
        "messages": [{"role": "user", "content": '{"custom_params": {"student_text": 1}}'}],
    }
    assert client.post("/v1/chat/completions", json=body).status_code == 200
    assert generate(client, text='{"student_text": 1}', sampling_params=PARAMS)
    assert client.post("/v1/messages", json=MESSAGES).status_code == 200
    assert client.post("/api/generate", json=OLLAMA).status_code == 200


class _OwnProcessor:
    """A client's; takes parameters whose names begin as ours do."""

    @staticmethod
    def text() -> str:
        from sglang.srt.sampling.custom_logit_processor import DisallowedTokensLogitsProcessor

        return DisallowedTokensLogitsProcessor().to_str()


def test_parameters_of_a_client_s_own_processor(client):
    custom = {"alpha": 2.0, "alpha_scale": 0.5, "teacher_x": 1, "student": [1], "token_ids": [5]}
    body = {"text": "a", "custom_logit_processor": _OwnProcessor.text()}
    output = generate(client, sampling_params={**PARAMS, "custom_params": custom}, **body)
    assert "alpha" not in output["meta_info"]
    for typo in ({"student_txt": "b"}, {"alpha_methd": "fixed"}, {"student_text": "b", "alpha_min": 2}):
        response = client.post("/generate", json={**body, "sampling_params": {"custom_params": typo}})
        assert response.status_code == 400
    # What the processor makes of the mixture is not known.
    mixed = {"student_text": "b", "return_mixing_info": ["behaviour_logprob"], "token_ids": [5]}
    response = client.post("/generate", json={**body, "sampling_params": {"custom_params": mixed}})
    assert "return_mixing_info: behaviour_logprob is not known beside a custom_logit" in message_of(response)
    # Where nobody else reads them they are typing errors.
    response = client.post("/generate", json={"text": "a", "sampling_params": {"custom_params": {"alpha": 2.0}}})
    assert "custom_params: unknown key 'alpha'" in message_of(response)


def test_parameters_with_the_names_of_what_a_mixed_request_has_in_the_scheduler(client):
    names = {"host": "x", "guest": "x", "guest_ids": [1], "guest_input_ids": [1], "token_ids": [5]}
    body = {"text": "a", "custom_logit_processor": _OwnProcessor.text()}
    output = generate(client, sampling_params={**PARAMS, "custom_params": names}, **body)
    assert "alpha" not in output["meta_info"] and output["meta_info"]["completion_tokens"] == PARAMS["max_new_tokens"]
    mixed = {**names, "student_text": "b", "return_mixing_info": ["alpha"], "alpha_method": "fixed", "fixed_alpha": 1.0}
    output = generate(client, sampling_params={**PARAMS, "custom_params": mixed}, **body)
    assert output["meta_info"]["alpha"] == [1.0] * PARAMS["max_new_tokens"]
    for more in ({}, {"custom_logit_processor": _OwnProcessor.text()}):
        for value in ({}, {"guest": "student", "guest_ids": [5], "completion_length": 0}, None):
            own = {"text": "a", "sampling_params": {"custom_params": {"sglang_optimal_request": value}}, **more}
            response = client.post("/generate", json=own)
            assert response.status_code == 400
            assert "'sglang_optimal_request' is this server's own; remove it" in message_of(response)


# -- 2: both sides read the same -------------------------------------------------------------------------------------

READ = "<|user|>hello there\n(kind)<|assistant|>"


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": t} for t in ("hello", "there")]}]},
        {"messages": [HELLO, {"role": "assistant", "content": [{"type": "text", "text": "so"}]}]},
        {"messages": [HELLO, {"role": "assistant", "content": "so"}], "continue_final_message": True},
        {"chat_template_kwargs": {"tone": "harsh"}},
    ],
    ids=["plain", "parts", "last assistant", "continued", "variables"],
)
def test_a_chat_of_one_model_has_no_kl(client, body):
    custom = {"alpha_min": 0.2, "return_mixing_info": True, "return_prompts": True}
    response = client.post("/v1/chat/completions", json={**CHAT, **body, "custom_params": custom})
    assert response.status_code == 200, response.text
    (mixing,) = response.json()["sglext"]["mixing"]
    assert mixing["kl_to_student"] == pytest.approx([0, 0], abs=1e-5)
    assert mixing["teacher_prompt_ids"] == mixing["student_prompt_ids"]
    assert mixing["teacher_prompt_text"] == mixing["student_prompt_text"]
    assert "(kind)" in mixing["student_prompt_text"] or "(harsh)" in mixing["student_prompt_text"]
    if not body:
        assert mixing["student_prompt_text"] == READ


def test_messages_of_generate_get_the_server_s_template(client):
    custom = {"teacher_messages": [HELLO], "student_messages": [HELLO], "return_mixing_info": True}
    output = generate(client, sampling_params={**PARAMS, "custom_params": {**custom, "return_prompts": True}})
    meta = output["meta_info"]
    assert meta["teacher_prompt_text"] == meta["student_prompt_text"] == READ
    assert meta["kl_to_teacher"] == pytest.approx([0, 0], abs=1e-5)
    assert (
        "teacher_prompt_ids" not in generate(client, sampling_params={**PARAMS, "custom_params": custom})["meta_info"]
    )


def test_prompts_come_with_the_end_of_a_stream(client):
    params = {**PARAMS, "n": 2, "custom_params": {"student_text": "hello", "return_prompts": True}}
    chunks = events(client, "/generate", {"text": "oh", "sampling_params": params, "stream": True})
    ends = [chunk["meta_info"] for chunk in chunks if chunk["meta_info"]["finish_reason"]]
    assert [(end["teacher_prompt_text"], end["student_prompt_text"]) for end in ends] == [("oh", "hello")] * 2
    custom = {"fixed_alpha": 0.5, "return_prompts": True}
    chunks = events(client, "/v1/chat/completions", {**CHAT, "stream": True, "custom_params": custom})
    mixing = [chunk["sglext"]["mixing"][0] for chunk in chunks if chunk.get("sglext")]
    assert [each["student_prompt_text"] for each in mixing if "student_prompt_text" in each] == [READ]
    assert sum(len(each["alpha"]) for each in mixing if "alpha" in each) == 2


# -- 7: no request ends the server -----------------------------------------------------------------------------------

MIXED = {"student_text": "b"}


@pytest.mark.parametrize("custom", [None, MIXED], ids=["plain", "mixed"])
@pytest.mark.parametrize(
    "body,params,message",
    [
        ({"text": ""}, {}, "text: gives no tokens at all"),
        ({"input_ids": [-1, 5]}, {}, "input_ids[0]: -1 is outside the vocabulary"),
        ({"input_ids": [5, 49152]}, {}, "input_ids[1]: 49152 is outside the vocabulary"),
        ({"input_ids": [[5], [5, 999999]]}, {}, "input_ids[1]: 999999 is outside the vocabulary"),
        ({}, {"stop_token_ids": [999999], "min_new_tokens": 1}, "stop_token_ids: 999999 is outside the vocabulary"),
        ({}, {"stop_token_ids": [-7], "min_new_tokens": 1}, "stop_token_ids: -7 is outside the vocabulary"),
        ({"return_logprob": True, "logprob_start_len": -2}, {}, "logprob_start_len: must be -1"),
        ({"return_logprob": True, "top_logprobs_num": 10**9}, {}, "top_logprobs_num: must lie in"),
        ({"return_logprob": True, "top_logprobs_num": -1}, {}, "top_logprobs_num: must lie in"),
        ({"text": ["a", "b"], "return_logprob": [True]}, {}, "return_logprob: has 1 entries for 2 prompts"),
        ({"text": ["a", "b"], "logprob_start_len": [0]}, {}, "logprob_start_len: has 1 entries for 2 prompts"),
        ({"text": ["a", "b"], "token_ids_logprob": [[]]}, {}, "token_ids_logprob: has 1 entries for 2 prompts"),
        ({"text": "a", "token_ids_logprob": [[1]]}, {}, "token_ids_logprob: is a list for one prompt"),
        ({}, {"stop_regex": "[0-9"}, "stop_regex: '[0-9' is no regular expression"),
        ({}, {"n": 10**8}, "n: 100000000 samples"),
        ({}, {"n": "2"}, "n"),
        ({}, {"temperature": "hot"}, "invalid type"),
        ({}, {"stream_interval": 0}, "stream_interval: must be at least 1"),
        ({}, {"sampling_seed": 2**70}, "expected i64"),
        ({"priority": 2**70}, {}, "priority"),
        ({"http_worker_ipc": "ipc:///tmp/x"}, {}, "http_worker_ipc: is SGLang's own to set"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_request_that_would_end_the_server(client, body, params, message, custom):
    params = {**PARAMS, **params, **({"custom_params": custom} if custom else {})}
    request = {**({} if "input_ids" in body else {"text": "a"}), **body, "sampling_params": params}
    response = client.post("/generate", json=request)
    # What SGLang's own contract of this route refuses has other forms.
    assert response.status_code == 400 and message in response.text
    assert len(generate(client, text="a", sampling_params=PARAMS)["output_ids"]) == 2


def test_a_list_of_parameters_that_is_too_short(client):
    for params in ([PARAMS], [PARAMS] * 3, [{**PARAMS, "custom_params": MIXED}]):
        response = client.post("/generate", json={"text": ["a", "b"], "sampling_params": params})
        assert f"sampling_params: has {len(params)} entries for 2 prompts" in message_of(response)


@pytest.mark.parametrize("route", ["release_memory_occupation", "resume_memory_occupation"])
def test_there_is_no_memory_to_release_on_a_cpu(client, route):
    response = client.post(f"/{route}", json={})
    assert f"{route}: the models are on the CPU" in message_of(response)


# -- 8: what is absent is not refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more",
    [
        {"image_data": []},
        {"image_data": None, "video_data": None, "audio_data": None},
        {"session_params": {}},
        {"session_params": {"id": None}},
        {"session_params": {"mixing": STUDENT, "id": None}},
    ],
    ids=str,
)
def test_empty_fields_are_absent_ones(client, more):
    params = {**PARAMS, **({} if "mixing" in (more.get("session_params") or {}) else {"custom_params": STUDENT})}
    assert len(generate(client, text="a", sampling_params=params, **more)["meta_info"]["alpha"]) == 2


def test_empty_media_of_a_batch(client):
    body = {"text": ["a", "b"], "sampling_params": {**PARAMS, "custom_params": STUDENT}}
    for image_data in ([], [None, None], [[], []]):
        outputs = generate(client, image_data=image_data, **body)
        assert [len(output["meta_info"]["alpha"]) for output in outputs] == [2, 2]


@pytest.mark.parametrize("alpha", [1e30, -1e7])
def test_an_alpha_beyond_all_measure(client, alpha):
    custom = {"student_text": "b", "fixed_alpha": alpha}
    response = client.post("/generate", json={"text": "a", "sampling_params": {**PARAMS, "custom_params": custom}})
    assert "fixed_alpha: must lie in [-1000000, 1000000]" in message_of(response)


def test_every_slot_is_free_at_the_end(client):
    wait_until_free(client)
