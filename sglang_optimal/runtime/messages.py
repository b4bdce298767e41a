"""Chat messages: checked, combined per side, and rendered with a model's own chat template."""

from __future__ import annotations

import contextlib
import json
from typing import Any

# Arguments of apply_chat_template that decide what it returns or run a client's template; never a client's to set.
_RESERVED = (
    "add_generation_prompt",
    "chat_template",
    "continue_final_message",
    "conversation",
    "max_length",
    "padding",
    "return_assistant_tokens_mask",
    "return_dict",
    "return_tensors",
    "tokenize",
    "tokenizer_kwargs",
    "truncation",
)


def checked_messages(value: Any, name: str) -> list[dict[str, Any]]:
    """Copies of the messages, text parts joined into one string.

    Raises:
        ValueError: names the field and the first message that is wrong.
    """
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(f"{name}: must be a non-empty list of {{'role': …, 'content': …}}.")
    checked = []
    for position, message in enumerate(value):
        where = f"{name}[{position}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or not message["role"]:
            raise ValueError(f"{where}: must be a mapping with 'role' and 'content'.")
        content = message.get("content")
        if content is None and not message.get("tool_calls"):
            raise ValueError(f"{where}: must be a mapping with 'role' and 'content'.")
        checked.append({**message, "content": _as_text(content, f"{where}.content")})
    return checked


def _as_text(content: Any, where: str) -> str:
    if content is None:  # an assistant message that only calls tools
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise ValueError(f"{where}: must be a string or a list of text parts, got {type(content).__name__}.")
    texts = []
    for position, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"{where}[{position}]: only text parts are supported in a mixed request.")
        texts.append(part["text"])
    return "\n".join(texts)


def checked_template_kwargs(value: Any, name: str) -> dict[str, Any]:
    """Extra variables for a chat template, such as ``enable_thinking``.

    Raises:
        ValueError: not a mapping, or a key that is not a template's variable.
    """
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{name}: must be a mapping from names to values.")
    for key in value:
        if key in _RESERVED:
            raise ValueError(f"{name}: {key!r} may not be set by a request.")
    return dict(value)


def with_system_prompt(messages: list[dict[str, Any]], fields: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """The messages with ``fields[name]``, if given, as their system message, in place of one that is there.

    Raises:
        ValueError: not a non-empty string.
    """
    system = fields.get(name)
    if system is None:
        return messages
    if not isinstance(system, str) or not system:
        raise ValueError(f"{name}: must be a non-empty string.")
    rest = messages[1:] if messages and messages[0]["role"] == "system" else messages
    return [{"role": "system", "content": system}, *rest]


def joined(first: list[dict[str, Any]], then: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """``first`` before ``then``. Where both have a system message, or the last of ``first`` has the role of the next,
    the two become one with a blank line between them: chat templates refuse two in a row."""
    first, then = list(first), list(then)
    if then and then[0]["role"] == "system":
        system = then.pop(0)
        if first and first[0]["role"] == "system":
            first[0] = _merged(first[0], system)
        else:
            first.insert(0, system)
    if first and then and first[-1]["role"] == then[0]["role"]:
        then[0] = _merged(first.pop(), then[0])
    return first + then


def _merged(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    return {**a, **b, "content": f"{a['content']}\n\n{b['content']}"}


def render(tokenizer, messages: list[dict[str, Any]], name: str, kwargs: dict[str, Any] | None = None) -> list[int]:
    """Token ids of the conversation, ready for the assistant to go on; a last message of the assistant is continued.

    Args:
        tokenizer: a Hugging Face tokenizer; its own chat template is used.
        messages: as `checked_messages` returns them.
        name: the field they came from, for the message of an error.
        kwargs: extra variables for the template.

    Raises:
        ValueError: the model has no chat template, or its template refuses the messages.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(f"{name}: the model has no chat template; send text or token ids.")
    messages = [_with_parsed_arguments(message) for message in messages]
    begun = ""
    if messages[-1]["role"] == "assistant" and not messages[-1].get("tool_calls"):
        begun = messages.pop()["content"]
        if not messages:
            raise ValueError(f"{name}: needs a message before the assistant's.")
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **(kwargs or {}))
    except Exception as error:  # jinja raises whatever the template raises
        raise ValueError(f"{name}: the model's chat template refused them: {error}") from None
    # Encoded apart, as SGLang does for continue_final_message.
    return [token for part in (text, begun) if part for token in tokenizer.encode(part, add_special_tokens=False)]


def _with_parsed_arguments(message: dict[str, Any]) -> dict[str, Any]:
    """Templates want the arguments of a tool call as a mapping; the OpenAI API sends them as JSON text."""
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return message
    parsed = []
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            with contextlib.suppress(json.JSONDecodeError):  # the template decides about what is no JSON
                call = {**call, "function": {**function, "arguments": json.loads(function["arguments"])}}
        parsed.append(call)
    return {**message, "tool_calls": parsed}
