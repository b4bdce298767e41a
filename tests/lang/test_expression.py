"""mixed_gen without a server: what it checks, and the request that it makes of both contexts."""

from __future__ import annotations

import inspect
import json
import time

import pytest
import sglang as sgl
from sglang.lang.backend.base_backend import BaseBackend
from sglang.lang.backend.runtime_endpoint import RuntimeEndpoint
from sglang.lang.chat_template import get_chat_template
from sglang.lang.interpreter import cache_program

import sglang_optimal as so


class Recorder(RuntimeEndpoint):
    """Answers every request with a number and keeps what it was asked."""

    def __init__(self, template="default"):
        BaseBackend.__init__(self)
        self.chat_template = get_chat_template(template)
        self.asked: list[tuple[str, dict]] = []

    def generate(self, s, sampling_params):
        self.asked.append((s.text_, sampling_params.to_srt_kwargs()))
        return f"<{len(self.asked)}>", {"alpha": [0.5]}

    def generate_stream(self, s, sampling_params):
        text, meta = self.generate(s, sampling_params)
        time.sleep(0.1)  # text_iter gives nothing when the program ends before it begins
        yield from ((character, meta) for character in text)

    def cache_prefix(self, prefix_str):
        self.cached = prefix_str


@pytest.fixture
def backend():
    return Recorder()


def run(backend, *parts, **more):
    @sgl.function
    def program(s):
        for part in parts:
            s += part

    state = program.run(backend=backend, **more)
    state.sync()
    assert state.error() is None
    return state


def custom(backend, index=-1) -> dict:
    return backend.asked[index][1]["custom_params"]


def test_both_contexts(backend):
    state = run(backend, "Q: 2+2?", so.mixed_gen("x", teacher_ctx="Copy 4.", student_ctx="2+2?"), " done")
    assert state.text() == "Q: 2+2?<1> done"
    assert state["x"] == "<1>" and state.get_meta_info("x") == {"alpha": [0.5]}
    text, params = backend.asked[0]
    assert text == "Copy 4."
    assert params["custom_params"] == {"student_text": "2+2?", "return_mixing_info": True}
    json.dumps(params)


@pytest.mark.parametrize("side", ["teacher_ctx", "student_ctx"])
def test_none_is_the_state_so_far(backend, side):
    run(backend, "Q: 2+2?", so.mixed_gen("x", **{side: "other"}))
    texts = {"teacher_ctx": backend.asked[0][0], "student_ctx": custom(backend)["student_text"]}
    assert texts.pop(side) == "other"
    assert texts.popitem()[1] == "Q: 2+2?"


def test_messages_go_to_the_server(backend):
    teacher, student = [{"role": "user", "content": "t"}], [{"role": "user", "content": "s"}]
    run(backend, "x", so.mixed_gen("x", teacher, student))
    assert backend.asked[0][0] == ""
    assert custom(backend)["teacher_messages"] == teacher
    assert custom(backend)["student_messages"] == student
    run(backend, "x", so.mixed_gen("x", "t", [1, 2, 3]))
    assert custom(backend)["student_input_ids"] == [1, 2, 3]


def test_expressions_over_the_state(backend):
    parts = (
        "Q: 2+2?",
        so.mixed_gen("first", "t"),
        so.mixed_gen(
            "second",
            teacher_ctx="Hint: 4. " + so.state_text() + " First: " + so.state_var("first"),
            student_ctx=so.state_var("first"),
        ),
    )
    run(backend, *parts)
    assert backend.asked[1][0] == "Hint: 4. Q: 2+2?<1> First: <1>"
    assert custom(backend)["student_text"] == "<1>"


def test_roles_in_a_context_are_a_conversation_of_their_own():
    backend = Recorder("qwen")
    chat = sgl.user("hello") + sgl.assistant_begin()
    state = run(backend, sgl.user("question"), sgl.assistant(so.mixed_gen("x", student_ctx=chat)))
    text, params = backend.asked[0]
    assert "question" in text and text.endswith("<|im_start|>assistant\n")
    student = params["custom_params"]["student_text"]
    assert student.endswith("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n")
    assert "question" not in student
    assert student.startswith("<|im_start|>system\n")  # the template's default, as in the state's own conversation
    assert state.messages()[-1] == {"role": "assistant", "content": "<1>"}
    assert params["stop"] == ["<|im_end|>"]


def test_sampling_arguments_and_defaults_of_the_run(backend):
    gen = so.mixed_gen("x", "t", fixed_alpha=1.5, max_tokens=7, stop="\n", top_k=3, json_schema="{}", regex="a+")
    run(backend, "q", gen, temperature=0.25)
    params = backend.asked[0][1]
    assert (params["max_new_tokens"], params["stop"], params["top_k"], params["temperature"]) == (7, "\n", 3, 0.25)
    assert (params["json_schema"], params["regex"]) == ("{}", "a+")
    assert params["custom_params"]["fixed_alpha"] == 1.5
    assert "alpha_method" not in params["custom_params"]  # the server's default stays one


def test_every_argument_of_gen():
    arguments = inspect.signature(so.mixed_gen).parameters
    assert set(inspect.signature(sgl.gen).parameters) <= set(arguments)


def test_plain_gen_is_left_alone(backend):
    run(backend, "q", so.mixed_gen("x", "t"), sgl.gen("y"))
    assert "custom_params" not in backend.asked[1][1]
    assert backend.asked[1][0] == "q<1>"


def test_stream(backend):
    @sgl.function
    def program(s):
        s += "q" + so.mixed_gen("x", "t")

    state = program.run(backend=backend, stream=True)
    assert "".join(state.text_iter("x")) == "<1>"
    assert state.get_meta_info("x") == {"alpha": [0.5]}


def test_fork(backend):
    @sgl.function
    def program(s):
        s += "q"
        forks = s.fork(3)
        forks += lambda i: so.mixed_gen("x", teacher_ctx=f"hint {i}")
        forks.join()
        s += str(len(s["x"]))

    backend.commit_lazy_operations = lambda s: None
    assert program.run(backend=backend).text() == "q3"
    assert sorted(text for text, _ in backend.asked) == ["hint 0", "hint 1", "hint 2"]
    assert all(params["custom_params"]["student_text"] == "q" for _, params in backend.asked)


def test_tracing_finds_the_common_prefix(backend):
    @sgl.function
    def program(s, problem):
        s += "x" * 100
        s += so.mixed_gen("x", teacher_ctx="hint " + problem) + problem

    cache_program(program, backend)
    assert backend.cached == "x" * 100
    assert not backend.asked


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"teacher_ctx": ""}, "teacher_ctx: is empty"),
        ({"teacher_ctx": 7}, "teacher_ctx: must be text"),
        ({"teacher_ctx": [1, 2]}, "teacher_ctx: must be text, chat messages or an expression, got a list with int"),
        ({"student_ctx": [1, "a"]}, "student_ctx: must be text, chat messages, token ids or an expression"),
        ({"student_ctx": [{"role": "user"}]}, r"student_ctx\[0\]: must be a mapping with 'role' and 'content'"),
        ({"student_ctx": "a" + sgl.gen("y")}, "student_ctx: Gen.* has no place in a context"),
        ({"alpha_method": "kl"}, "alpha_method: 'kl' is not one of"),
        ({"alpha_min": 0.8, "alpha_max": 0.2}, "alpha_min: 0.8 is greater"),
        ({"fixed_alpha": "x"}, "fixed_alpha: must be a finite number"),
        ({"fixed_alpha": 0.5, "alpha_method": "entropy"}, "fixed_alpha: only read when"),
        ({"return_mixing_info": 1}, "return_mixing_info: must be true or false"),
        ({"return_mixing_info": ["alfa"]}, "return_mixing_info: .*alfa.*Did you mean 'alpha'"),
        ({"return_top_k": 2000}, "return_top_k: must be an integer from 0 to 1024"),
        ({"top_k_of": "teacher"}, "top_k_of: only read with return_top_k"),
        ({"choices": ["a", "b"]}, "choices: .* use sgl.select"),
        ({"n": 2}, r"n: .* use s.fork"),
        ({"regex": "("}, "regex: "),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        so.mixed_gen("x", **arguments)


def failing(backend, *parts, **more) -> str:
    @sgl.function(**more)
    def program(s):
        for part in parts:
            s += part

    with pytest.warns(UserWarning, match="stream_executor"):
        state = program.run(backend=backend)
        error = state.error()
    assert error is not None
    with pytest.raises(KeyError):  # and not a wait for ever
        state["x"]
    return str(error)


def test_a_backend_that_cannot_mix():
    message = failing(BaseBackend(), "q", so.mixed_gen("x", "t"))
    assert "BaseBackend cannot mix; it needs a server started with `python -m sglang_optimal.launch_server" in message


@pytest.mark.parametrize(
    "parts,message",
    [
        ((so.mixed_gen("x", student_ctx="s"),), "teacher_ctx: is empty here"),
        ((so.mixed_gen("x", teacher_ctx="t"),), "student_ctx: is empty here"),
        (("q", so.mixed_gen("x", so.state_var("nothing"))), "state_var: the state has no text 'nothing' yet"),
    ],
)
def test_what_only_the_run_can_tell(backend, parts, message):
    assert message in failing(backend, *parts)


def test_api_speculative_execution(backend):
    assert "num_api_spec_tokens" in failing(backend, "q", so.mixed_gen("x", "t"), num_api_spec_tokens=8)
