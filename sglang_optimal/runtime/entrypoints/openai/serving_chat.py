"""Mixed requests on the OpenAI routes: the contexts of both sides from one chat, and the mixing series in the answer.

A chat request is mixed when its ``custom_params`` (or ``session_params.mixing``) has a mixing field. The teacher reads
``teacher_only_messages`` + ``messages``; the student reads ``messages``, or its own ``student_*`` field. SGLang's own
code renders the messages of either side, with the request's tools and template variables. The series come back in
``sglext.mixing``, one entry for each entry of ``choices``.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

import orjson
from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest, ChatCompletionResponse, CompletionResponse
from sglang.srt.entrypoints.openai.serving_chat import OpenAIServingChat
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from sglang.srt.runtime_context import get_serving

from sglang_optimal.names import OTHER_MODEL
from sglang_optimal.runtime.entrypoints.messages import (
    check_only_text,
    checked_messages,
    checked_template_kwargs,
    joined,
    with_system_prompt,
)
from sglang_optimal.runtime.entrypoints.openai.chat_side import as_request
from sglang_optimal.runtime.entrypoints.openai.stream_series import (
    SERIES_RECORDER,
    SeriesRecorder,
    for_client,
    prompts_of,
    series_of,
)
from sglang_optimal.runtime.entrypoints.protocol import (
    STUDENT_FIELDS,
    TEACHER_FIELDS,
    RenderedPrompt,
    check_has_student,
    check_size_of,
    ids_of_side,
    mixing_fields,
    take_carried,
)

_OF = {
    "teacher": ("teacher_only_messages", "teacher_system_prompt", "teacher_chat_template_kwargs"),
    "student": ("student_system_prompt", "student_chat_template_kwargs"),
}
"""{side: its fields beside messages that both read}."""


class MixedOpenAIServingChat(OpenAIServingChat):
    """SGLang's ``/v1/chat/completions`` for both sides of a mixed request."""

    def _convert_to_internal_request(self, request: ChatCompletionRequest, raw_request=None):
        """SGLang's, of a request whose two sides have been split."""
        custom, session = take_carried(request.custom_params, request.session_params)
        if custom is not request.custom_params:
            request = request.model_copy(update={"custom_params": custom, "session_params": session})
        fields = _fields_of(request)
        if fields:
            request = self._split_sides(request, fields)
        return super()._convert_to_internal_request(request, raw_request)

    def _split_sides(self, request: ChatCompletionRequest, fields: dict[str, Any]) -> ChatCompletionRequest:
        """A copy whose ``messages`` are the served model's, and whose ``custom_params`` hold the other's token ids.

        Args:
            fields: its mixing fields; not empty.

        Raises:
            ValueError: names the field and the fix.
        """
        config = self.tokenizer_manager.mixing_config
        check_has_student(fields, config)
        students, teachers = (_given(fields, names) for names in (STUDENT_FIELDS, TEACHER_FIELDS))
        if teachers and (students or len(teachers) > 1):
            raise ValueError(f"{', '.join([*students, *teachers])}: give one of them; messages are the other side's.")
        if request.chat_template_kwargs:
            _checked_variables(request.chat_template_kwargs, "chat_template_kwargs")
        of_one = {"teacher": [*teachers, *_given(fields, _OF["teacher"])]}
        of_one["student"] = [*students, *_given(fields, _OF["student"])]
        # Whose prompt the messages are, where both read them: the side's that has no field of its own.
        own: str = config.host
        if of_one["teacher"] or of_one["student"]:
            own = "teacher" if of_one["student"] and not teachers else "student"
        other = OTHER_MODEL[own]
        whole = teachers or students
        if len(whole) > 1:
            return request  # `contexts_of` refuses several
        if request.input_ids is not None:
            self._check_input_ids(fields, own, whole)
        messages = [message.model_dump(exclude_none=True) for message in request.messages]
        check_only_text(messages, "messages")
        sides = {}
        for side in (own, other):
            if side == other and whole and not whole[0].endswith("_messages"):
                for name in _given(fields, _OF[side]):
                    raise ValueError(
                        f"{name}: is beside messages that both sides read; {whole[0]} takes the place of those."
                    )
                sides[side] = whole[0], ids_of_side(fields, whole[0], self.tokenizer_manager.side_readers[side])
            elif side == own and request.input_ids is not None:
                reader = self.tokenizer_manager.side_readers[side]
                sides[side] = "input_ids", ids_of_side({"input_ids": request.input_ids}, "input_ids", reader)
            else:
                sides[side] = self._chat_of(request, messages, fields, side)
        name, host = sides[config.host]
        if isinstance(host, list):
            update: dict[str, Any] = {"input_ids": host}
        else:
            update = {
                "messages": host.messages, "chat_template_kwargs": host.chat_template_kwargs, "input_ids": None
            }  # fmt: skip
        name, guest = sides[config.guest]
        if not isinstance(guest, list):
            sides_of_chats = self.tokenizer_manager.sides_of_a_chat("messages", "use /generate with token ids")
            # Rendering may change a request, and the host's has the same messages.
            guest = getattr(sides_of_chats, config.guest).ids_of(guest.model_copy(deep=True), name)
        custom = {name: value for name, value in request.custom_params.items() if name not in fields}
        custom |= {name: value for name, value in fields.items() if not name.startswith(("student_", "teacher_"))}
        custom[f"{config.guest}_input_ids"] = RenderedPrompt(guest, name, is_own=own == config.guest)
        return request.model_copy(update={**update, "custom_params": custom})

    @staticmethod
    def _check_input_ids(fields: dict[str, Any], own: str, whole: list[str]) -> None:
        """SGLang takes token ids in place of ``messages``; those are the request's own prompt, and one side's alone."""
        for name in _given(fields, _OF[own]):
            raise ValueError(f"input_ids: takes the place of the {own}'s messages; remove it or {name}.")
        if not whole:
            raise ValueError(
                "input_ids: would be read by the teacher alone; say what the student reads as well, with "
                f"{', '.join(STUDENT_FIELDS)}, or remove it."
            )

    def _chat_of(
        self, request: ChatCompletionRequest, shared: list[dict], fields: dict[str, Any], side: str
    ) -> tuple[str, ChatCompletionRequest]:
        """(the field with its messages, the request as one side reads it): its own messages, system prompt and template
        variables in place of what both read.

        Args:
            shared: the request's messages.
        """
        name, messages = "messages", shared
        if fields.get(f"{side}_messages") is not None:
            name = f"{side}_messages"
            messages = checked_messages(fields[name], name)
            if fields.get("teacher_only_messages") is not None and side == "teacher":
                raise ValueError(
                    f"teacher_only_messages: is beside messages that both sides read; {name} takes the place of those."
                )
        elif side == "teacher" and fields.get("teacher_only_messages") is not None:
            name = "teacher_only_messages"
            messages = joined(checked_messages(fields[name], name), checked_messages(shared, "messages"))
        messages = with_system_prompt(messages, fields, f"{side}_system_prompt")
        chat = request.model_copy(update={"stream": False, "custom_params": None, "input_ids": None})
        if messages is not shared:
            chat.messages = as_request({"messages": messages}, name).messages
        check_size_of(chat.messages, self.tokenizer_manager.side_readers[side].max_chars, name)
        kwargs_name = f"{side}_chat_template_kwargs"
        own = fields.get(kwargs_name)
        if own is not None:
            own = _checked_variables(own, kwargs_name)
            chat.chat_template_kwargs = {**(chat.chat_template_kwargs or {}), **own}
        return name, chat

    def _build_chat_response(self, request, ret, created):
        """SGLang's answer, with the series in ``sglext.mixing``."""
        response = super()._build_chat_response(request, ret, created)
        return _with_series(response, ret) if isinstance(response, ChatCompletionResponse) else response

    def _generate_chat_stream(self, adapted_request, request, raw_request):
        """SGLang's events, with the series of the tokens they bring."""
        chunks = super()._generate_chat_stream
        return _recorded_stream(chunks, request, adapted_request, request, raw_request)


def _given(fields: dict[str, Any], names: Sequence[str]) -> list[str]:
    return [name for name in names if fields.get(name) is not None]


def _fields_of(request: Any) -> dict[str, Any]:
    return mixing_fields(request.custom_params, others_read=bool(request.custom_logit_processor))


def _checked_variables(value: Any, name: str) -> dict[str, Any]:
    trusted = ("chat_template",) if get_serving().trust_request_chat_template else ()
    return checked_template_kwargs(value, name, trusted)


def _with_series(response: Any, outputs: list[dict[str, Any]]) -> Any:
    """The response with ``sglext.mixing``, or itself for a plain request. Pydantic would drop a field that SGLang's
    classes do not declare, so the mixed answer is a class of its own with the same content."""
    series = [{**for_client(series_of(output["meta_info"])), **prompts_of(output["meta_info"])} for output in outputs]
    if not any(series):
        return response
    ext = response.sglext.model_dump() if response.sglext is not None else {}
    cls = MixedChatCompletionResponse if isinstance(response, ChatCompletionResponse) else MixedCompletionResponse
    return cls.model_construct(**{**dict(response), "sglext": {**ext, "mixing": series}})


class MixedChatCompletionResponse(ChatCompletionResponse):
    sglext: dict[str, Any] | None = None


class MixedCompletionResponse(CompletionResponse):
    sglext: dict[str, Any] | None = None


def _recorded_stream(chunks: Callable, openai_request, *args) -> AsyncGenerator[str, None]:
    """SGLang's server-sent events; those of a mixed request carry the series of the tokens they bring."""
    events, fields = chunks(*args), _fields_of(openai_request)
    return _with_stream_series(events) if fields else events


async def _with_stream_series(events: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
    recorder = SeriesRecorder()
    async with contextlib.aclosing(events) as stream:
        token = SERIES_RECORDER.set(recorder)
        try:
            event = await anext(stream, None)  # starts the request, and so hands it the recorder
        finally:
            SERIES_RECORDER.reset(token)
        while event is not None:
            yield _with_chunk_series(event, recorder)
            event = await anext(stream, None)


def _with_chunk_series(event: str, recorder: SeriesRecorder) -> str:
    if not event.startswith("data: {"):
        return event
    chunk = json.loads(event.removeprefix("data: "))
    series = [recorder.pop_new(choice["index"]) if _has_news(choice) else {} for choice in chunk.get("choices") or ()]
    if not any(series):
        return event
    chunk["sglext"] = {**(chunk.get("sglext") or {}), "mixing": series}
    return f"data: {orjson.dumps(chunk).decode()}\n\n"  # which has null for what JSON cannot say


def _has_news(choice: dict[str, Any]) -> bool:
    """Whether the chunk brings tokens; a chat stream opens with one that only names the role."""
    if choice.get("finish_reason") is not None or "text" in choice:
        return True
    delta = choice.get("delta") or {}
    return any(delta.get(name) for name in ("content", "reasoning_content", "tool_calls"))


def _build_completion_response(original: Callable, serving, request, ret, created):
    return _with_series(original(serving, request, ret, created), ret)


def _generate_completion_stream(original: Callable, serving, adapted_request, request, raw_request):
    return _recorded_stream(original, request, serving, adapted_request, request, raw_request)


def install() -> None:
    """Follow ``/v1/completions``. SGLang lets a server choose the class of its chat route, but not of this one."""
    base = "sglang.srt.entrypoints.openai.serving_completions.OpenAIServingCompletion."
    HookRegistry.register(base + "_build_completion_response", _build_completion_response, HookType.AROUND)
    HookRegistry.register(base + "_generate_completion_stream", _generate_completion_stream, HookType.AROUND)
    HookRegistry.apply_hooks()
