"""Random mixing fields on every route: an answer or a 400, never a 500, a crash or a lost KV slot."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import generate, wait_until_free

from sglang_optimal.config import ALPHA_KEYS, ALPHA_METHODS
from sglang_optimal.names import ALL_SERIES, SIDES
from sglang_optimal.runtime.entrypoints.protocol import MIXING_FIELDS

# -- what a client may send ------------------------------------------------------------------------------------------

any_text = st.text(st.characters(), max_size=20)  # lone surrogates too: JSON can carry them
any_number = st.one_of(st.integers(-(2**70), 2**70), st.floats(allow_nan=False, allow_infinity=False))
anything = st.recursive(
    st.one_of(st.none(), st.booleans(), any_number, any_text),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(any_text, inner, max_size=3)),
    max_leaves=8,
)
message = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["system", "user", "assistant", "tool", "wizard"]),
        "content": st.one_of(any_text, anything),
    },
    optional={"name": anything, "tool_calls": anything},
)
messages = st.lists(st.one_of(message, anything), max_size=3)
good_messages = st.just([{"role": "user", "content": "hello"}])
plausible = {
    "student_text": any_text,
    "student_input_ids": st.lists(st.integers(-2, 70), max_size=6),
    "student_messages": st.one_of(messages, good_messages),
    "teacher_text": any_text,
    "teacher_input_ids": st.lists(st.integers(-2, 70), max_size=6),
    "teacher_messages": st.one_of(messages, good_messages),
    "teacher_only_messages": st.one_of(messages, good_messages),
    "teacher_system_prompt": any_text,
    "student_system_prompt": any_text,
    "teacher_chat_template_kwargs": st.dictionaries(st.sampled_from(["messages", "x", "tokenize", "tools"]), anything),
    "student_chat_template_kwargs": st.dictionaries(st.sampled_from(["messages", "x", "tokenize", "tools"]), anything),
    "alpha_method": st.sampled_from([*ALPHA_METHODS, "kl"]),
    "alpha_min": st.floats(-0.1, 1.1),
    "alpha_max": st.floats(-0.1, 1.1),
    "fixed_alpha": st.one_of(st.floats(-2, 3), any_number),
    "kl_budget": st.one_of(st.floats(0, 3), any_number),
    "kl_budget_teacher": st.one_of(st.floats(0, 3), any_number),
    "return_mixing_info": st.one_of(st.booleans(), st.lists(st.sampled_from([*ALL_SERIES, "kl"]), max_size=4)),
    "return_top_k": st.one_of(st.integers(-1, 70), st.integers()),
    "top_k_of": st.one_of(st.sampled_from([*SIDES, "judge"]), st.lists(st.sampled_from(SIDES), max_size=3)),
    "top_k_format": st.sampled_from(["lists", "base64", "npz"]),
    "completion_text": any_text,
    "completion_input_ids": st.lists(st.integers(-2, 70), max_size=6),
    "return_prompts": st.booleans(),
}


def test_every_field_is_fuzzed():
    assert set(plausible) == set(MIXING_FIELDS)


def fields(names) -> st.SearchStrategy[dict]:
    """Some fields with plausible values, or with anything."""
    return st.fixed_dictionaries(
        {}, optional={name: st.one_of(plausible[name], plausible[name], anything) for name in names}
    )


custom_params = st.one_of(
    fields(MIXING_FIELDS),
    # Fewer fields, so that some requests are good.
    *(
        st.fixed_dictionaries({name: st.just("hello")}, optional={name: plausible[name] for name in ALPHA_KEYS})
        for name in ("student_text", "teacher_text")
    ),
    st.dictionaries(st.sampled_from(["student", "alpha", "student_txt", "alpha_maxx"]), anything, max_size=2),
    anything,
)
fuzz = settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))


seen: Counter = Counter()


def post(client, path: str, body: dict) -> tuple[int, str]:
    # A connection that hypothesis left idle for seconds may be closed under the next request.
    headers = {"Content-Type": "application/json", "Connection": "close"}
    response = client.post(path, content=json.dumps(body).encode(), headers=headers)
    assert response.status_code in (200, 400), (response.status_code, response.text)
    seen[path, response.status_code] += 1
    if response.status_code == 400:
        assert response.json()  # an error in SGLang's form, not a bare page
    return response.status_code, response.text


def still_serves(client, path: str) -> None:
    assert seen[path, 200] > 5 and seen[path, 400] > 5, seen  # else the strategies try too little
    params = {"temperature": 0, "max_new_tokens": 3, "ignore_eos": True, "custom_params": {"student_text": "a"}}
    assert len(generate(client, text="b", sampling_params=params)["output_ids"]) == 3
    wait_until_free(client)


def is_mixed(custom) -> bool:
    return isinstance(custom, dict) and any(custom.get(name) is not None for name in MIXING_FIELDS)


def test_generate(client):
    @fuzz
    @given(custom=custom_params, with_text=st.booleans(), stream=st.booleans())
    def run(custom, with_text, stream):
        params = {"max_new_tokens": 2, "custom_params": custom}
        body = {"sampling_params": params, "stream": stream, **({"text": "hello"} if with_text else {})}
        status, text = post(client, "/generate", body)
        # Never a plain answer where a mixture was asked for.
        if status == 200 and is_mixed(custom) and '"error"' not in text:
            assert '"alpha"' in text

    run()
    still_serves(client, "/generate")


def test_batch(client):
    @fuzz
    @given(customs=st.lists(custom_params, min_size=1, max_size=3))
    def run(customs):
        params = [{"max_new_tokens": 2, "custom_params": custom} for custom in customs]
        post(client, "/generate", {"text": ["hello"] * len(customs), "sampling_params": params})

    run()
    still_serves(client, "/generate")


@pytest.mark.parametrize(
    "path,prompt",
    [
        ("/v1/completions", {"prompt": "hello"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hello"}]}),
    ],
)
def test_openai_routes(client, path, prompt):
    @fuzz
    @given(custom=custom_params, stream=st.booleans(), n=st.integers(1, 2))
    def run(custom, stream, n):
        body = {"model": "m", "max_tokens": 2, "custom_params": custom, "stream": stream, "n": n, **prompt}
        status, text = post(client, path, body)
        if status == 200 and is_mixed(custom) and '"error"' not in text:
            assert '"mixing"' in text

    run()
    still_serves(client, path)


def test_student_update(client):
    path = "/update_student_weights_from_disk"

    @fuzz
    @given(body=st.one_of(anything, st.fixed_dictionaries({"model_path": anything}, optional={"manifest": anything})))
    def run(body):
        post(client, path, body)

    run()
    assert seen[path, 400] > 5
    still_serves(client, "/generate")
