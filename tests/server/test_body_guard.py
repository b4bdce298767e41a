"""Where mixing fields are found in a body, and where the client's own words are left alone. No server."""

from __future__ import annotations

import inspect
import json

import pytest

from sglang_optimal.runtime.entrypoints.body_guard import misplaced

GENERATE, CHAT, COMPLETION, RESPONSES, MESSAGES = (
    "/generate", "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages",
)  # fmt: skip
FIELD = {"student_text": "b"}
USER = {"role": "user", "content": "hi"}


def deep(levels: int, value: object) -> object:
    for _ in range(levels):
        value = {"x": [value]}
    return value


@pytest.mark.parametrize(
    ("path", "body", "where"),
    [
        (GENERATE, FIELD, "at the top level"),
        (GENERATE, {"text": FIELD}, "in text"),
        (GENERATE, {"text": [{"text": "a", **FIELD}]}, "in text[0]"),
        (GENERATE, {"sampling_params": {"prompt": FIELD}}, "in sampling_params.prompt"),
        (GENERATE, {"sampling_params": {"custom_params": {"x": FIELD}}}, "in sampling_params.custom_params.x"),
        (GENERATE, {"sampling_params": [{"custom_params": FIELD}, FIELD]}, "in sampling_params[1]"),
        (GENERATE, {"custom_labels": json.dumps(FIELD)}, "in custom_labels (text, not a mapping)"),
        (GENERATE, {"custom_labels": json.dumps({"a": json.dumps([FIELD])})}, "(text, not a mapping)[0]"),
        (GENERATE, deep(300, FIELD), "in x[0]"),
        (CHAT, {"messages": [{**USER, **FIELD}]}, "in messages[0]"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi", **FIELD}]}]}, "content[0]"),
        (CHAT, {"tools": [{"type": "function", "function": {"name": "f", **FIELD}}]}, "in tools[0].function"),
        (CHAT, {"response_format": {"type": "json_schema", **FIELD}}, "in response_format"),
        (CHAT, {"messages": [{**USER, "alpha_method": "fixed"}]}, "in messages[0]"),
        (CHAT, {"messages": [USER], "student_txt": "b"}, "at the top level"),
        (COMPLETION, {"prompt": {"text": "a", **FIELD}}, "in prompt"),
        (RESPONSES, {"text": {"format": {"type": "text"}, **FIELD}}, "in text"),
        (RESPONSES, {"input": [{**USER, **FIELD}]}, "in input[0]"),
        (MESSAGES, {"system": [{"type": "text", "text": "s", **FIELD}]}, "in system[0]"),
        ("/v1/rerank", {"query": "q", "documents": ["d"], "options": FIELD}, "in options"),
    ],
)
def test_found(path, body, where):
    found = list(misplaced(path, json.loads(json.dumps(body))))
    assert len(found) == 1 and where in found[0][0], found


SCHEMA = {"type": "object", "properties": {"student_text": {"type": "string"}, "alpha_method": {"type": "string"}}}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (GENERATE, {"text": json.dumps(FIELD), "sampling_params": {"custom_params": FIELD}}),
        (GENERATE, {"text": ["a", json.dumps([FIELD])], "session_params": {"mixing": FIELD}}),
        (GENERATE, {"sampling_params": {"json_schema": json.dumps(SCHEMA)}}),
        (CHAT, {"messages": [{**USER, "content": json.dumps(FIELD)}], "custom_params": FIELD}),
        (CHAT, {"messages": [{**USER, "content": [{"type": "text", "text": json.dumps(FIELD)}]}]}),
        (CHAT, {"tools": [{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}]}),
        (
            CHAT,
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": json.dumps(FIELD)}}]}]},
        ),
        (CHAT, {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}}),
        (RESPONSES, {"text": {"format": {"type": "json_schema", "schema": SCHEMA}}, "input": "student_text"}),
        (RESPONSES, {"input": [{"type": "function_call", "arguments": json.dumps(FIELD)}]}),
        (MESSAGES, {"messages": [{"role": "assistant", "content": [{"type": "tool_use", "input": FIELD}]}]}),
        (MESSAGES, {"tools": [{"name": "f", "input_schema": SCHEMA}]}),
        ("/api/chat", {"messages": [USER], "format": SCHEMA}),
        ("/v1/rerank", {"query": json.dumps(FIELD), "documents": [json.dumps(FIELD), FIELD]}),
    ],
)
def test_left_alone(path, body):
    assert list(misplaced(path, json.loads(json.dumps(body)))) == []


@pytest.mark.parametrize("where", ["", "sampling_params", "extra_body", "options"])
@pytest.mark.parametrize("key", ["student_prompt", "stuent_text", "teacher_x", "alpha_mode", "return_mixing_infos"])
def test_a_key_that_begins_as_ours_among_the_server_s(where, key):
    body = {where: {key: 1}} if where else {key: 1}
    assert [name for _, name in misplaced(GENERATE, body)] == [key]


def test_a_client_s_own_labels():
    body = {"metadata": {"student_id": "7", "teacher": "b"}, "custom_labels": {"alpha_team": "x"}}
    assert list(misplaced(CHAT, body)) == []


def test_no_field_of_sglang_s_begins_or_looks_as_ours_do():
    from sglang.srt.entrypoints.anthropic.protocol import AnthropicMessagesRequest
    from sglang.srt.entrypoints.ollama.protocol import OllamaChatRequest, OllamaGenerateRequest
    from sglang.srt.entrypoints.openai import protocol
    from sglang.srt.managers.io_struct import EmbeddingReqInput, GenerateReqInput
    from sglang.srt.sampling.sampling_params import SamplingParams

    models = [model for name, model in vars(protocol).items() if name.endswith("Request")]
    models += [AnthropicMessagesRequest, OllamaChatRequest, OllamaGenerateRequest]
    names = {field for model in models for field in getattr(model, "model_fields", {})}
    for model in (GenerateReqInput, EmbeddingReqInput):
        names |= set(model.__dataclass_fields__)
    names |= set(inspect.signature(SamplingParams).parameters)
    assert len(names) > 150
    assert list(misplaced(GENERATE, dict.fromkeys(names - {"custom_params"}, 1))) == []
