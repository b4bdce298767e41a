"""Chat messages of the mixing fields: checked, and combined per side. `chat_side` renders them."""

from __future__ import annotations

from typing import Any

from sglang_optimal.names import RESERVED_VARIABLES


def checked_messages(value: Any, name: str) -> list[dict[str, Any]]:
    """Copies of the messages; a content is a string, a list of text parts, or None beside tool calls.

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
        _check_content(content, f"{where}.content")
        checked.append(dict(message))
    return checked


def _check_content(content: Any, where: str) -> None:
    if content is None or isinstance(content, str):
        return
    if not isinstance(content, list | tuple):
        raise ValueError(f"{where}: must be a string or a list of text parts, got {type(content).__name__}.")
    for position, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"{where}[{position}]: only text parts are supported in a mixed request.")


_OF_TEXT = ("text", "thinking", "reasoning", "tool_reference")


def check_only_text(messages: list[dict[str, Any]], name: str) -> None:
    """A chat template may leave out what it has no words for, such as an image, and a mixture would not be of it.

    Args:
        messages: as SGLang's route takes them. name: the field.

    Raises:
        ValueError: names the first part that is no text.
    """
    for position, message in enumerate(messages):
        content = message.get("content")
        for place, part in enumerate(content if isinstance(content, list) else ()):
            kind = part.get("type")
            if kind not in _OF_TEXT:
                where = f"{name}[{position}].content[{place}]"
                raise ValueError(f"{where}: only text is supported in a mixed request, and no {kind}; remove it.")


def characters(messages: list[dict[str, Any]]) -> int:
    """How long the messages are, separators among them: no fewer than one a message."""
    return sum(len(text) + 1 for message in messages for text in _texts(message.get("content")))


def _texts(content: Any) -> list[str]:
    if isinstance(content, list | tuple):
        return [part["text"] for part in content]
    return [content or ""]


def checked_template_kwargs(value: Any, name: str, allowed: tuple[str, ...] = ()) -> dict[str, Any]:
    """Extra variables for a chat template, such as ``enable_thinking``.

    Args:
        value: as the client sent it.
        name: the field.
        allowed: names that this server lets requests set although they are not a template's variables.

    Raises:
        ValueError: not a mapping, or a key that is not a template's variable.
    """
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{name}: must be a mapping from names to values.")
    for key in value:
        if key in RESERVED_VARIABLES and key not in allowed:
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
    """One message of two. A content in parts keeps them, so that a template reads them as on the other side."""
    first, then = a.get("content") or "", b.get("content") or ""
    if isinstance(first, str) and isinstance(then, str):
        return {**a, **b, "content": f"{first}\n\n{then}"}
    *before, last = _parts(first)
    following, *after = _parts(then)
    return {**a, **b, "content": [*before, _text_part(f"{last['text']}\n\n{following['text']}"), *after]}


def _parts(content: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [_text_part(content)]
    return list(content) or [_text_part("")]


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}
