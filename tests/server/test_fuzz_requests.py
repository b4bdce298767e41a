"""Random requests, all fields of them, mixed and plain: an answer or a 400, never a 500, a death or a lost KV slot."""

from __future__ import annotations

import functools
import json
import os
import time
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import generate, wait_until_free
from test_fuzz import any_number, any_text, anything, custom_params

SECONDS = float(os.getenv("FUZZ_SECONDS", "0"))
"""How long the slow test goes on; `make fuzz` says an hour."""

ids = st.lists(st.one_of(st.integers(0, 63), st.integers(-2, 70), any_number), max_size=6)
text = st.one_of(st.sampled_from(["hello", "", " ", "a" * 3000, "\x00"]), any_text)
small_int = st.integers(-3, 5)
number = st.one_of(st.floats(-3, 3), any_number, st.sampled_from([0, 1e-300, 1e30, 1e300, -0.0, True, "1", None]))
maybe_list = lambda strategy: st.one_of(strategy, st.lists(strategy, max_size=3))  # noqa: E731

sampling = {
    "max_new_tokens": st.one_of(st.integers(-1, 4), st.sampled_from([None, 10**6, 2**70, 2.5, "3"])),
    "min_new_tokens": st.one_of(small_int, st.sampled_from([None, 2**70])),
    "temperature": number,
    "top_p": number,
    "top_k": st.one_of(small_int, any_number),
    "min_p": number,
    "frequency_penalty": number,
    "presence_penalty": number,
    "repetition_penalty": number,
    "stop": maybe_list(st.one_of(any_text, anything)),
    "stop_token_ids": st.one_of(ids, anything),
    "stop_regex": maybe_list(st.sampled_from(["a+", "[0-9", "(", "(a|b)*c", "\\", "(?<x>y)", "", 5, None])),
    "ignore_eos": st.one_of(st.booleans(), anything),
    "skip_special_tokens": st.one_of(st.booleans(), st.none()),
    "spaces_between_special_tokens": st.booleans(),
    "no_stop_trim": st.booleans(),
    "n": st.one_of(st.integers(0, 2), st.sampled_from([-1, 10**9, 2**70, "2", None, 1.5])),
    "beam_width": st.one_of(st.integers(-1, 2), st.none()),
    "json_schema": st.one_of(st.sampled_from(['{"type": "integer"}', "{", "", "5"]), anything),
    "regex": st.one_of(st.sampled_from(["[0-9]+", "[", "", "a{2,1}"]), anything),
    "ebnf": st.one_of(st.sampled_from(['root ::= "a"', "root", ""]), anything),
    "structural_tag": st.one_of(st.sampled_from(["", "{}"]), anything),
    "logit_bias": st.one_of(
        st.dictionaries(st.sampled_from(["1", "63", "64", "-1", "x"]), number, max_size=2), anything
    ),
    "sampling_seed": st.one_of(small_int, any_number),
    "stream_interval": st.one_of(small_int, anything),
    "custom_params": custom_params,
    "watermark": anything,
    "unheard_of": anything,
}
fields = {
    "rid": st.one_of(any_text, st.lists(any_text, max_size=2), anything),
    "return_logprob": maybe_list(st.booleans()),
    "logprob_start_len": maybe_list(st.one_of(small_int, st.sampled_from([10**6, 2**70, None]))),
    "top_logprobs_num": maybe_list(st.one_of(small_int, st.sampled_from([64, 65, 10**9, None]))),
    "token_ids_logprob": st.one_of(ids, st.lists(ids, max_size=2), anything),
    "return_text_in_logprobs": st.booleans(),
    "return_flat_raw_top_logprobs": st.booleans(),
    "return_sampling_mask": maybe_list(st.booleans()),
    "sampling_logprobs_mode": st.sampled_from(["selected", "support", "x", None]),
    "stream": st.booleans(),
    "return_hidden_states": st.one_of(st.booleans(), st.just("last")),
    "return_routed_experts": st.booleans(),
    "routed_experts_start_len": small_int,
    "return_indexer_topk": st.booleans(),
    "return_prompt_token_ids": st.booleans(),
    "return_entropy": st.booleans(),
    "log_metrics": st.booleans(),
    "modalities": anything,
    "image_data": st.one_of(st.sampled_from([[], None, [None], "x"]), anything),
    "video_data": st.one_of(st.sampled_from([[], None]), anything),
    "audio_data": st.one_of(st.sampled_from([[], None]), anything),
    "input_embeds": st.one_of(st.none(), st.just([[0.5] * 4]), anything),
    "session_params": st.one_of(st.sampled_from([{}, {"id": None}, {"id": "x"}, {"mixing": {}}]), anything),
    "session_id": anything,
    "lora_path": st.one_of(st.sampled_from([None, "", "student", "x"]), anything),
    "custom_logit_processor": st.one_of(st.sampled_from([None, "", "x"]), anything),
    "bootstrap_host": anything,
    "bootstrap_port": anything,
    "bootstrap_room": st.one_of(small_int, any_number),
    "routed_dp_rank": small_int,
    "data_parallel_rank": small_int,
    "priority": st.one_of(small_int, any_number),
    "extra_key": maybe_list(any_text),
    "cache_salt": maybe_list(any_text),
    "conversation_id": anything,
    "require_reasoning": st.booleans(),
    "max_thinking_tokens": st.one_of(small_int, st.none()),
    "custom_labels": anything,
    "kv_hints": anything,
    "http_worker_ipc": st.one_of(st.none(), any_text),
    "token_indices_to_pool": anything,
    "multi_item_delimiter_indices": anything,
    "positional_embed_overrides": anything,
    "need_wait_for_mm_inputs": st.booleans(),
    "num_items_assigned": anything,
    "encoder_urls": anything,
    "watermark": anything,
    "unheard_of": anything,
}
# A few odd fields a request, so that some get far.
few = lambda strategies, most: st.lists(  # noqa: E731
    st.sampled_from(sorted(strategies)), max_size=most, unique=True
).flatmap(lambda names: st.fixed_dictionaries({name: strategies[name] for name in names}))
params = st.builds(
    lambda base, odd, mixed: {**base, **({"custom_params": mixed} if mixed else {}), **odd},
    st.just({"max_new_tokens": 2}),
    few(sampling, 3),
    st.sampled_from([None, {"student_text": "hello"}, {"student_input_ids": [9, 10], "fixed_alpha": 0.5}]),
)
prompt = st.one_of(
    st.builds(lambda value: {"text": value}, st.one_of(text, st.lists(text, max_size=3))),
    st.builds(lambda value: {"input_ids": value}, st.one_of(ids, st.lists(ids, max_size=3))),
    st.just({"text": "hello"}),
    st.just({"text": ["hello", "you"]}),
)
body = st.builds(
    lambda what, sampling_params, odd: {**what, "sampling_params": sampling_params, **odd},
    prompt,
    st.one_of(params, params, st.lists(params, max_size=3), anything),
    few(fields, 2),
)
message = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool", "developer", "wizard"])},
    optional={"content": st.one_of(text, anything), "name": anything, "tool_calls": anything},
)
openai_fields = {
    **{name: sampling[name] for name in ("temperature", "top_p", "top_k", "min_p", "frequency_penalty", "n", "regex")},
    **{
        name: sampling[name] for name in ("stop", "stop_token_ids", "stop_regex", "logit_bias", "custom_params", "ebnf")
    },
    **{
        name: fields[name]
        for name in ("rid", "stream", "lora_path", "session_params", "priority", "return_hidden_states")
    },
    "max_tokens": sampling["max_new_tokens"],
    "min_tokens": sampling["min_new_tokens"],
    "logprobs": st.one_of(st.booleans(), small_int),
    "top_logprobs": small_int,
    "seed": any_number,
    "response_format": anything,
    "tools": anything,
    "tool_choice": anything,
    "chat_template_kwargs": anything,
    "continue_final_message": st.booleans(),
    "stream_options": anything,
    "echo": st.booleans(),
    "suffix": text,
    "input_ids": ids,
}
chat = st.builds(
    lambda messages, odd: {"model": "m", "max_tokens": 2, "messages": messages, **odd},
    st.one_of(st.just([{"role": "user", "content": "hi"}]), st.lists(message, max_size=3), anything),
    few(openai_fields, 3),
)
completion = st.builds(
    lambda what, odd: {"model": "m", "max_tokens": 2, "prompt": what, **odd},
    st.one_of(text, ids, st.lists(text, max_size=2), anything),
    few(openai_fields, 3),
)
chats = st.one_of(st.just([{"role": "user", "content": "hi"}]), st.lists(message, max_size=3), anything)
messages_route = st.builds(
    lambda messages, odd: {"model": "m", "max_tokens": 2, "messages": messages, **odd},
    chats,
    few(
        {
            **{
                name: openai_fields[name]
                for name in ("temperature", "top_p", "top_k", "stream", "tools", "tool_choice")
            },
            "max_tokens": sampling["max_new_tokens"],
            "stop_sequences": maybe_list(any_text),
            "system": st.one_of(text, anything),
            "thinking": anything,
            "metadata": anything,
        },
        3,
    ),
)
responses_route = st.builds(
    lambda what, odd: {"model": "m", "max_output_tokens": 2, "input": what, "store": False, **odd},
    st.one_of(text, chats),
    few(
        {
            **{name: openai_fields[name] for name in ("temperature", "top_p", "top_k", "stop", "tools", "tool_choice")},
            "max_output_tokens": sampling["max_new_tokens"],
            "instructions": st.one_of(text, anything),
            "text": anything,
            "reasoning": anything,
            "previous_response_id": st.one_of(any_text, st.none()),
            "stream": st.booleans(),
            "background": st.booleans(),
            "include": anything,
        },
        3,
    ),
)
options = few({**{name: sampling[name] for name in ("temperature", "top_p", "top_k", "stop")}, "seed": any_number}, 3)
ollama_fields = few({"stream": st.booleans(), "format": anything, "system": text, "keep_alive": anything}, 2)
ollama_generate = st.builds(
    lambda what, chosen, odd: {"model": "m", "prompt": what, "options": {"num_predict": 2, **chosen}, **odd},
    st.one_of(text, anything),
    options,
    ollama_fields,
)
ollama_chat = st.builds(
    lambda what, chosen, odd: {"model": "m", "messages": what, "options": {"num_predict": 2, **chosen}, **odd},
    chats,
    options,
    ollama_fields,
)
token_routes = few({"model": any_text, "prompt": anything, "tokens": st.one_of(ids, anything), "text": text}, 4)
score = few(
    {
        "model": st.just("m"),
        "query": st.one_of(text, ids, anything),
        "items": st.one_of(st.lists(text, max_size=2), ids, anything),
        "label_token_ids": st.one_of(ids, anything),
        "apply_softmax": st.booleans(),
        "item_first": st.booleans(),
    },
    6,
)
REQUESTS = {"/generate": body, "/v1/chat/completions": chat, "/v1/completions": completion}
OTHERS = {
    "/v1/messages": messages_route,
    "/v1/responses": responses_route,
    "/api/generate": ollama_generate,
    "/api/chat": ollama_chat,
    "/v1/tokenize": token_routes,
    "/v1/detokenize": token_routes,
    "/v1/score": score,
    "/v1/embeddings": few({"model": st.just("m"), "input": st.one_of(text, ids, anything), "dimensions": anything}, 3),
}
"""Routes that cannot mix."""
EVERY = {**REQUESTS, **OTHERS}
quick = settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
seen: Counter = Counter()


@functools.cache
def served_model(client) -> str:
    return client.get("/v1/models").json()["data"][0]["id"]


def post(client, path: str, request: dict) -> None:
    headers = {"Content-Type": "application/json", "Connection": "close"}
    if path == "/v1/responses":  # the one that looks at the name
        request = {**request, "model": served_model(client)}
    response = client.post(path, content=json.dumps(request).encode(), headers=headers, timeout=60)
    assert response.status_code in (200, 400, 422), (response.status_code, response.text, json.dumps(request))
    assert '"code": 500' not in response.text, (response.text, json.dumps(request))
    seen[path, response.status_code] += 1


def still_serves(client) -> None:
    mixed = {"temperature": 0, "max_new_tokens": 3, "ignore_eos": True, "custom_params": {"student_text": "a"}}
    assert len(generate(client, text="b", sampling_params=mixed)["output_ids"]) == 3
    wait_until_free(client)


@pytest.mark.parametrize("path", REQUESTS)
def test_whole_requests(client, path):
    @quick
    @given(request=REQUESTS[path])
    def run(request):
        post(client, path, request)

    run()
    assert seen[path, 200] > 5 and seen[path, 400] > 5, seen
    still_serves(client)


@pytest.mark.slow
@pytest.mark.parametrize("path", OTHERS)
def test_whole_requests_that_cannot_mix(client, path):
    @quick
    @given(request=OTHERS[path])
    def run(request):
        post(client, path, request)

    run()
    still_serves(client)


@pytest.mark.slow
def test_random_traffic_for_long(client):
    """With FUZZ_SECONDS, new requests all the time."""
    end = time.monotonic() + max(SECONDS, 30)
    endless = settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck), derandomize=False)

    def random_requests(path: str) -> None:
        @endless
        @given(request=EVERY[path])
        def run(request):
            if time.monotonic() < end:
                post(client, path, request)

        run()

    while time.monotonic() < end:
        for path in EVERY:
            random_requests(path)
            still_serves(client)
    print(dict(seen))
