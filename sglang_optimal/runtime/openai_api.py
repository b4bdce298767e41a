"""Mixed requests on the OpenAI routes: the contexts of both sides from one chat, and the mixing series in the answer.

A chat request is mixed when its ``custom_params`` (or ``session_params.mixing``) has a mixing field. The teacher reads
``teacher_only_messages`` + ``messages``; the student reads ``messages``, or its own ``student_*`` field. The series
come back in ``sglext.mixing``, one entry for each entry of ``choices``.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from pydantic import ValidationError
from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest, ChatCompletionResponse, CompletionResponse
from sglang.srt.entrypoints.openai.serving_chat import OpenAIServingChat
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from sglang_optimal.runtime.messages import checked_messages, checked_template_kwargs, joined, with_system_prompt
from sglang_optimal.runtime.request import STUDENT_FIELDS, check_has_student, mixing_fields, take_carried
from sglang_optimal.runtime.tap import MIXING_TAP, MixingTap, series_of

_CHAT_FIELDS = ("teacher_only_messages", "teacher_system_prompt")


class MixedServingChat(OpenAIServingChat):
    """SGLang's ``/v1/chat/completions`` for both sides of a mixed request."""

    def _convert_to_internal_request(self, request: ChatCompletionRequest, raw_request=None):
        custom, session = take_carried(request.custom_params, request.session_params)
        if custom is not request.custom_params:
            request = request.model_copy(update={"custom_params": custom, "session_params": session})
        if mixing_fields(request.custom_params):
            request = self._split_sides(request)
        return super()._convert_to_internal_request(request, raw_request)

    def _split_sides(self, request: ChatCompletionRequest) -> ChatCompletionRequest:
        """A copy whose ``messages`` are the teacher's and whose ``custom_params`` hold the student's context.

        Raises:
            ValueError: names the field and the fix.
        """
        custom = dict(request.custom_params)
        fields = mixing_fields(custom)
        check_has_student(fields, self.tokenizer_manager.mixing_config)
        if fields.get("teacher_messages") is not None:
            raise ValueError("teacher_messages: only read by /generate; here the teacher's are messages.")
        if request.chat_template_kwargs:
            checked_template_kwargs(request.chat_template_kwargs, "chat_template_kwargs")
        shared = [message.model_dump(exclude_none=True) for message in request.messages]
        for name in _CHAT_FIELDS:
            custom.pop(name, None)
        if all(fields.get(name) is None for name in STUDENT_FIELDS):
            custom["student_messages"] = _without_last_assistant(shared, request.continue_final_message)
            custom.update(_template_variables(request, custom))
        return request.model_copy(
            update={"messages": self._teacher_messages(request, shared, fields), "custom_params": custom}
        )

    def _teacher_messages(self, request: ChatCompletionRequest, shared: list[dict], fields: dict[str, Any]) -> list:
        messages = shared
        if fields.get("teacher_only_messages") is not None:
            own = checked_messages(fields["teacher_only_messages"], "teacher_only_messages")
            messages = joined(own, checked_messages(shared, "messages"))
        messages = with_system_prompt(messages, fields, "teacher_system_prompt")
        if messages is shared:
            return request.messages
        try:
            return ChatCompletionRequest.model_validate({"model": request.model, "messages": messages}).messages
        except ValidationError as error:
            first = error.errors()[0]
            raise ValueError(f"teacher_only_messages: {first['msg']} (at {first['loc']})") from None

    def _build_chat_response(self, request, ret, created):
        response = super()._build_chat_response(request, ret, created)
        return _with_series(response, ret) if isinstance(response, ChatCompletionResponse) else response

    def _generate_chat_stream(self, adapted_request, request, raw_request):
        chunks = super()._generate_chat_stream
        return _tapped_stream(chunks, request, adapted_request, request, raw_request)


def _without_last_assistant(messages: list[dict], continues: bool) -> list[dict]:
    """SGLang reads a last message of the assistant as the user's unless the request continues it."""
    if continues or messages[-1]["role"] != "assistant" or not isinstance(messages[-1].get("content"), str):
        return messages
    return [*messages[:-1], {"role": "user", "content": messages[-1]["content"]}]


def _template_variables(request: ChatCompletionRequest, custom: dict[str, Any]) -> dict[str, Any]:
    """What the shared messages are rendered with for the teacher, for the student's template as well."""
    name = "student_chat_template_kwargs"
    kwargs = {**(request.chat_template_kwargs or {}), **checked_template_kwargs(custom.get(name) or {}, name)}
    if request.reasoning_effort is not None:
        kwargs.setdefault("reasoning_effort", request.reasoning_effort)
    if request.tools and request.tool_choice != "none":
        kwargs.setdefault("tools", [tool.model_dump() for tool in request.tools])
    return {"student_chat_template_kwargs": kwargs} if kwargs else {}


def _with_series(response: Any, outputs: list[dict[str, Any]]) -> Any:
    """The response with ``sglext.mixing``, or itself for a plain request. Pydantic would drop a field that SGLang's
    classes do not declare, so the mixed answer is a class of its own with the same content."""
    series = [series_of(output["meta_info"]) for output in outputs]
    if not any(series):
        return response
    ext = response.sglext.model_dump() if response.sglext is not None else {}
    cls = MixedChatCompletionResponse if isinstance(response, ChatCompletionResponse) else MixedCompletionResponse
    return cls.model_construct(**{**dict(response), "sglext": {**ext, "mixing": series}})


class MixedChatCompletionResponse(ChatCompletionResponse):
    sglext: dict[str, Any] | None = None


class MixedCompletionResponse(CompletionResponse):
    sglext: dict[str, Any] | None = None


def _tapped_stream(chunks: Callable, openai_request, *args) -> AsyncIterator[str]:
    """SGLang's server-sent events; those of a mixed request carry the series of the tokens they bring."""
    events = chunks(*args)
    return _with_stream_series(events) if mixing_fields(openai_request.custom_params) else events


async def _with_stream_series(events: AsyncIterator[str]) -> AsyncIterator[str]:
    tap = MixingTap()
    async with contextlib.aclosing(events) as stream:
        token = MIXING_TAP.set(tap)
        try:
            event = await anext(stream, None)  # starts the request, and so hands it the tap
        finally:
            MIXING_TAP.reset(token)
        while event is not None:
            yield _with_chunk_series(event, tap)
            event = await anext(stream, None)


def _with_chunk_series(event: str, tap: MixingTap) -> str:
    if not event.startswith("data: {"):
        return event
    chunk = json.loads(event.removeprefix("data: "))
    series = [tap.take(choice["index"]) if _has_news(choice) else {} for choice in chunk.get("choices") or ()]
    if not any(series):
        return event
    chunk["sglext"] = {**(chunk.get("sglext") or {}), "mixing": series}
    return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"


def _has_news(choice: dict[str, Any]) -> bool:
    """Whether the chunk brings tokens; a chat stream opens with one that only names the role."""
    if choice.get("finish_reason") is not None or "text" in choice:
        return True
    delta = choice.get("delta") or {}
    return any(delta.get(name) for name in ("content", "reasoning_content", "tool_calls"))


def _build_completion_response(original: Callable, serving, request, ret, created):
    return _with_series(original(serving, request, ret, created), ret)


def _generate_completion_stream(original: Callable, serving, adapted_request, request, raw_request):
    return _tapped_stream(original, request, serving, adapted_request, request, raw_request)


def install() -> None:
    """Follow ``/v1/completions``. SGLang lets a server choose the class of its chat route, but not of this one."""
    base = "sglang.srt.entrypoints.openai.serving_completions.OpenAIServingCompletion."
    HookRegistry.register(base + "_build_completion_response", _build_completion_response, HookType.AROUND)
    HookRegistry.register(base + "_generate_completion_stream", _generate_completion_stream, HookType.AROUND)
    HookRegistry.apply_hooks()
