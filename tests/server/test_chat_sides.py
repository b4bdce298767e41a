"""Without a field of the student's own both sides read the same: equal token ids for whatever a chat request, a chat
template and the server's flags about templates can be. No model runs: SGLang's and our code up to the token ids."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import trl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sglang.srt.entrypoints.openai import protocol, serving_base, serving_chat
from sglang.srt.parser import template_manager
from tiny_models import SMALL_CHAT_TEMPLATE, smollm2_tokenizer_dir
from transformers import AutoTokenizer

from sglang_optimal.config import MixingConfig
from sglang_optimal.runtime.entrypoints.openai import chat_side
from sglang_optimal.runtime.entrypoints.openai import serving_chat as openai_api
from sglang_optimal.runtime.entrypoints.openai.chat_side import ChatSide
from sglang_optimal.runtime.entrypoints.openai.serving_chat import MixedOpenAIServingChat
from sglang_optimal.runtime.entrypoints.protocol import SideReader
from sglang_optimal.runtime.managers.tokenizer_manager import ChatSides, MixedTokenizerManager

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
FAMILIES = (
    "cohere2 deepseekv3 gemma gemma3 gemma4 glm4moe gptoss lfm2 llama3 llama3_1 llama3_2 phi3 qwen2_5 qwen2_5_vl qwen3 "
    "qwen3_5_think qwen3_instruct_2507"
)
# The model's own, those of big families, SGLang's own by name, and one that says nothing but text.
SOURCES = ["own", "small", *FAMILIES.split(), "name:chatml", "name:llama-2", "name:vicuna_v1.1"]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(smollm2_tokenizer_dir())


class Serving(SimpleNamespace):
    """SGLang's section of that name; what a test does not set is unset."""

    def __getattr__(self, name: str):
        return None


@pytest.fixture
def flags(monkeypatch):
    """Sets SGLang's server configuration of this process."""

    def become(**values) -> None:
        serving = Serving(**values)
        for module in (serving_chat, template_manager, chat_side, openai_api):
            monkeypatch.setattr(module, "get_serving", lambda: serving)
        observability = SimpleNamespace(tokenizer_metrics_allowed_custom_labels=None)
        observability.tokenizer_metrics_custom_labels_header = None
        monkeypatch.setattr(serving_base, "get_observability", lambda: observability)
        monkeypatch.setattr(serving_chat, "get_model", lambda: SimpleNamespace(context_length=None, revision=None))

    return become


class Manager(SimpleNamespace):
    """What SGLang's chat handler asks of the tokenizer manager."""

    sides_of_a_chat = MixedTokenizerManager.sides_of_a_chat

    def config_value(self, name: str):
        return None


LARGE = SideReader(str.encode, list, str.encode, vocab_size=10**6, context_length=10**6, max_chars=10**6)


def build(
    tokenizer,
    source: str,
    *,
    chat_template=None,
    two_models: bool,
    student_template=None,
    architecture="LlamaForCausalLM",
) -> MixedOpenAIServingChat:
    """A handler of chats whose teacher and student are one model, loaded once or twice."""

    def with_template():
        own = copy.deepcopy(tokenizer)
        if source == "small":
            own.chat_template = SMALL_CHAT_TEMPLATE
        elif source not in ("own", "none") and not source.startswith("name:"):
            own.chat_template = (TEMPLATES / f"{source}.jinja").read_text()
        elif source == "none":
            own.chat_template = None
        return own

    config = SimpleNamespace(model_type="llama", architectures=[architecture])
    model = SimpleNamespace(hf_config=config, is_multimodal=False, get_default_sampling_params=dict)
    manager = Manager(
        tokenizer=with_template(), model_config=model, server_args=None, served_model_name="m", model_path="/m/model",
        processor=None, mixing_config=MixingConfig(student_model_path="/m/model"),
        side_readers=dict.fromkeys(("teacher", "student"), LARGE),
    )  # fmt: skip
    templates = template_manager.TemplateManager()
    templates.load_chat_template(manager, chat_template, "/m/model")
    teacher = student = ChatSide.of_host(manager, templates)
    if two_models:
        student = ChatSide.of_guest(manager, with_template(), model, "/m/model", student_template)
    manager.chat_sides = ChatSides(teacher, student)
    return MixedOpenAIServingChat(manager, templates)


def sides(chat: MixedOpenAIServingChat, body: dict) -> tuple[list[int], list[int]]:
    request = protocol.ChatCompletionRequest(**{"custom_params": {"fixed_alpha": 0.5}, **copy.deepcopy(body)})
    refusal = chat._validate_request(request)
    if refusal:
        raise ValueError(refusal)
    adapted, _ = chat._convert_to_internal_request(request)
    return list(adapted.input_ids), list(adapted.sampling_params["custom_params"]["student_input_ids"])


# -- conversations ---------------------------------------------------------------------------------------------------

words = st.sampled_from(["hi", " a b ", "li\nne", "", "\n", "<think>x</think>y", "{{ x }}", "<|im_end|>", "é 漢 🙂"])
parts = st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": words}), min_size=1, max_size=3)
content = st.one_of(words, parts)
TOOL = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},
}
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
user = st.fixed_dictionaries({"role": st.just("user"), "content": content}, optional={"name": st.just("bob")})
assistant = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": content}, optional={"reasoning_content": words}
)
tool_use = st.just([{"role": "assistant", "content": None, "tool_calls": [CALL]}])
tool_turn = st.builds(lambda text: {"role": "tool", "tool_call_id": "c1", "content": text}, content)
turn = st.one_of(
    st.tuples(user, assistant).map(list), st.tuples(user, tool_use, tool_turn).map(lambda t: [t[0], *t[1], t[2]])
)
opening = st.one_of(
    st.just([]),
    st.fixed_dictionaries({"role": st.sampled_from(["system", "developer"]), "content": content}).map(lambda m: [m]),
)
closing = st.one_of(user.map(lambda m: [m]), st.tuples(user, assistant).map(list), st.just([]))
conversation = st.tuples(opening, st.lists(turn, max_size=2), closing).map(lambda t: [*t[0], *sum(t[1], []), *t[2]])
variables = st.dictionaries(
    st.sampled_from(["enable_thinking", "thinking", "add_vision_id", "reasoning_effort"]),
    st.sampled_from([True, False, "low", "high"]),
    max_size=2,
)
chat_request = st.fixed_dictionaries(
    {"messages": conversation.filter(bool)},
    optional={
        "continue_final_message": st.booleans(),
        "tools": st.just([TOOL]),
        "tool_choice": st.sampled_from(["none", "auto"]),
        "reasoning_effort": st.sampled_from(["none", "low", "high"]),
        "chat_template_kwargs": variables,
        "stop": st.sampled_from(["x", ["y", "z"]]),
        "stream": st.booleans(),
        "n": st.just(2),
        "logprobs": st.booleans(),
    },
)
thorough = settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("two_models", [False, True], ids=["one model", "two models"])
@pytest.mark.parametrize("source", SOURCES)
def test_both_sides_read_the_same(tokenizer, flags, source, two_models):
    name = source.removeprefix("name:") if source.startswith("name:") else None
    seen = Counter()
    flags(chat_template=name)
    chat = build(tokenizer, source, chat_template=name, two_models=two_models)
    both = chat.tokenizer_manager.chat_sides

    @thorough
    @given(body=chat_request, defaults=st.one_of(st.just({}), variables))
    def run(body, defaults):
        for handler in (chat, both.teacher.serving, both.student.serving):
            handler.default_chat_template_kwargs = defaults  # as --default-chat-template-kwargs sets it
        try:
            teacher, student = sides(chat, body)
        except ValueError as error:  # a template may refuse a conversation
            seen[str(error)[:150]] += 1
            return
        seen["equal"] += 1
        assert teacher == student, chat.tokenizer_manager.tokenizer.decode(student)

    run()
    assert seen["equal"] > 2, seen


def test_a_template_of_the_server_is_both_sides(tokenizer, flags, tmp_path):
    """A base model has none of its own."""
    file = tmp_path / "given.jinja"
    file.write_text("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[answer]")
    flags(chat_template=str(file))
    chat = build(tokenizer, "none", chat_template=str(file), two_models=True)
    teacher, student = sides(chat, {"messages": [{"role": "user", "content": "hi"}]})
    assert teacher == student == tokenizer.encode("[user]hi[answer]", add_special_tokens=False)
    for side in (chat.tokenizer_manager.chat_sides.teacher, chat.tokenizer_manager.chat_sides.student):
        assert side.ids([{"role": "user", "content": "hi"}], "x") == teacher


def test_variables_of_the_server_reach_messages_of_generate_too(tokenizer, flags):
    message = [{"role": "user", "content": "hi"}]
    texts = []
    for defaults in (None, {"enable_thinking": False}):
        flags(default_chat_template_kwargs=defaults)
        chat = build(tokenizer, "qwen3", two_models=True).tokenizer_manager.chat_sides
        teacher, student = (side.ids(message, "x") for side in (chat.teacher, chat.student))
        assert teacher == student
        assert chat.teacher.ids(message, "x", {"enable_thinking": True}) == chat.student.ids(
            message, "x", {"enable_thinking": True}
        )
        texts.append(tokenizer.decode(teacher))
    assert texts[0] == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert texts[1] == texts[0] + "<think>\n\n</think>\n\n"


@pytest.mark.parametrize(
    "custom,messages,expected",
    [
        ({"teacher_only_messages": [{"role": "user", "content": "T"}]}, "S", "T\n\nS"),
        (
            {"teacher_only_messages": [{"role": "user", "content": "T"}]},
            [{"type": "text", "text": "S"}, {"type": "text", "text": "s"}],
            "T\n\nS s",
        ),
        (
            {"teacher_only_messages": [{"role": "user", "content": [{"type": "text", "text": "T"}]}]},
            "S",
            "T\n\nS",
        ),
    ],
    ids=["text", "parts behind", "parts before"],
)
def test_what_the_teacher_reads_first_joins_the_same_text(tokenizer, flags, custom, messages, expected):
    flags()
    chat = build(tokenizer, "small", two_models=False)
    teacher, student = sides(chat, {"messages": [{"role": "user", "content": messages}], "custom_params": custom})
    assert tokenizer.decode(teacher) == f"<bos><usr>{expected}<ast>"
    assert tokenizer.decode(student) == f"<bos><usr>{'S' if isinstance(messages, str) else 'S s'}<ast>"


def test_messages_of_the_student_s_own_are_read_as_the_chat_s(tokenizer, flags):
    """With the request's tools, variables and continuation."""
    flags()
    chat = build(tokenizer, "qwen3", two_models=True)
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": [{"type": "text", "text": "so"}]}]
    for more in ({}, {"continue_final_message": True}, {"tools": [TOOL]}, {"chat_template_kwargs": {"x": 1}}):
        body = {"messages": messages, "custom_params": {"student_messages": messages}, **more}
        teacher, student = sides(chat, body)
        assert teacher == student
        assert tokenizer.decode(teacher).endswith("so") == ("continue_final_message" in more)


@pytest.mark.parametrize(
    "body,message",
    [
        ({"input_ids": [5, 6]}, "input_ids: would be read by the teacher alone"),
        (
            {"input_ids": [5, 6], "custom_params": {"student_text": "x", "teacher_system_prompt": "y"}},
            "input_ids: takes the place of the teacher's messages; remove it or teacher_system_prompt",
        ),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs: 'tokenize' may not be set"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "not allowed"),
    ],
)
def test_what_one_side_alone_would_read_is_refused(tokenizer, flags, body, message):
    flags()
    chat = build(tokenizer, "own", two_models=False)
    with pytest.raises(ValueError, match=message):
        sides(chat, {"messages": [{"role": "user", "content": "hi"}], **body})
    # Token ids for the teacher beside a context of the student's own are two contexts, and fine.
    request = protocol.ChatCompletionRequest(
        messages=[{"role": "user", "content": "hi"}], input_ids=[5, 6], custom_params={"student_input_ids": [7]}
    )
    adapted, _ = chat._convert_to_internal_request(request)
    assert adapted.input_ids == [5, 6]
    assert adapted.sampling_params["custom_params"]["student_input_ids"] == [7]


def test_a_template_that_a_trusting_server_takes_is_both_sides(tokenizer, flags):
    flags(trust_request_chat_template=True)
    chat = build(tokenizer, "own", two_models=True)
    body = {"messages": [{"role": "user", "content": "hi"}], "chat_template_kwargs": {"chat_template": "just this"}}
    teacher, student = sides(chat, body)
    assert teacher == student == tokenizer.encode("just this")


def test_a_named_template_that_the_student_lacks_ends_the_start(tokenizer, flags):
    flags(hf_chat_template_name="rag")
    student = copy.deepcopy(tokenizer)
    student.chat_template = {"default": "x"}
    with pytest.raises(ValueError, match="--hf-chat-template-name: /m has no template 'rag': default"):
        ChatSide.of_guest(Manager(), student, None, "/m")


HI = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize("one", ["student", "teacher"])
def test_a_text_beside_a_chat(tokenizer, flags, one):
    """A base model reads plain text, with none of the other's template in it."""
    flags()
    chat = build(tokenizer, "small", two_models=True)
    custom = {f"{one}_text": "Q: hi A:"}
    teacher, student = sides(chat, {"messages": HI, "custom_params": custom})
    text, messages = (student, teacher) if one == "student" else (teacher, student)
    assert text == list(b"Q: hi A:") and tokenizer.decode(messages) == "<bos><usr>hi<ast>"
    with pytest.raises(ValueError, match=f"{one}_chat_template_kwargs: is beside messages that both sides read"):
        sides(chat, {"messages": HI, "custom_params": {**custom, f"{one}_chat_template_kwargs": {"a": 1}}})


@pytest.mark.parametrize("given", [None, "file"])
def test_a_template_of_the_student_s_own(tokenizer, flags, tmp_path, given):
    """Beside one that the server gives to the teacher, or none."""
    for name in ("teacher", "student"):
        (tmp_path / f"{name}.jinja").write_text(f"[{name}]{{% for m in messages %}}{{{{ m.content }}}}{{% endfor %}}")
    server_s = str(tmp_path / "teacher.jinja") if given else None
    flags(chat_template=server_s)
    own = "<bos><usr>hi<ast>"

    def texts(student_template):
        chat = build(tokenizer, "small", chat_template=server_s, two_models=True, student_template=student_template)
        teacher, student = sides(chat, {"messages": HI})
        messages = chat.tokenizer_manager.chat_sides.student.ids(HI, "x")  # as /generate does it
        assert messages == student
        return tokenizer.decode(teacher), tokenizer.decode(student)

    teacher = "[teacher]hi" if given else own
    assert texts(None) == (teacher, teacher)
    assert texts("own") == (teacher, own)
    assert texts(str(tmp_path / "student.jinja")) == (teacher, "[student]hi")
    assert texts("chatml")[1].endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")


def test_a_given_template_takes_the_place_of_a_named_one(tokenizer, flags, tmp_path):
    flags(hf_chat_template_name="rag")
    student = copy.deepcopy(tokenizer)
    student.chat_template = {"default": "x"}
    with pytest.raises(ValueError, match="has no template 'rag': default"):
        ChatSide.of_guest(Manager(), student, None, "/m", "own")
    file = tmp_path / "given.jinja"
    file.write_text("given")
    flags(hf_chat_template_name="rag")
    chat = build(tokenizer, "small", two_models=True, student_template=str(file))
    assert tokenizer.decode(chat.tokenizer_manager.chat_sides.student.ids(HI, "x")) == "given"


def test_a_template_that_nobody_would_read_ends_the_start(tokenizer, flags):
    """SGLang has code for the chats of some models."""
    flags()
    with pytest.raises(ValueError, match="student_chat_template.*without a template .dsv32.; leave it out"):
        build(tokenizer, "none", two_models=True, student_template="chatml", architecture="DeepseekV3ForCausalLM")


@pytest.mark.parametrize(
    ("flags_", "message"),
    [
        (["--student-chat-template", "no-such"], "student_chat_template: no-such is no name of SGLang's and no .jinja"),
        (["--student-chat-template", __file__], "student_chat_template: .* is no name of SGLang's and no .jinja"),
        (["--student-chat-template", "own", "--skip-tokenizer-init"], "no effect with --skip-tokenizer-init"),
        (["--teacher-chat-template", "own"], "teacher_chat_template: has no effect without teacher_model_path"),
        (
            ["--student-chat-template", "own", "--teacher-model-path", "t"],
            "student_chat_template: with teacher_model_path the served model is the student",
        ),
        (
            ["--student-chat-template", "own", "--student-weights", "none"],
            "student_chat_template: has no effect with student_weights 'none'",
        ),
    ],
)
def test_a_template_without_effect_is_refused(tmp_path, flags_, message):
    from sglang_optimal import launch_server

    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}')
    with pytest.raises(ValueError, match=message):
        launch_server.parse(["--model-path", str(tmp_path), *flags_])


@pytest.mark.parametrize("template", ["own", "chatml", "file"])
def test_a_template_of_the_student_s_is_taken(tmp_path, template):
    from sglang_optimal import launch_server

    if template == "file":
        template = str(tmp_path / "x.jinja")
        Path(template).write_text("x")
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}')
    _, config = launch_server.parse(["--model-path", str(tmp_path), "--student-chat-template", template])
    assert config.guest_chat_template == template and config.shared_weights
