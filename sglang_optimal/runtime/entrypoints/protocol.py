"""A mixed request: the fields a client may send in ``sampling_params.custom_params``, and what they become."""

from __future__ import annotations

import dataclasses
import difflib
from array import array
from collections.abc import Callable, Sequence
from typing import Any

from sglang_optimal.config import ALPHA_KEYS, AlphaSettings, MixingConfig, check_known
from sglang_optimal.names import CARRIER
from sglang_optimal.runtime.core import MixedRequest, Score, Side
from sglang_optimal.runtime.entrypoints.messages import (
    characters,
    checked_messages,
    checked_template_kwargs,
    with_system_prompt,
)
from sglang_optimal.wanted import TOP_K_FIELDS, check_amount, wanted_by

STUDENT_FIELDS = ("student_text", "student_input_ids", "student_messages")
TEACHER_FIELDS = ("teacher_messages", "teacher_only_messages", "teacher_system_prompt", "teacher_chat_template_kwargs")
"""Fields about the teacher's messages; none of them is left when the request reaches the scheduler."""
COMPLETION_FIELDS = ("completion_text", "completion_input_ids")
"""A completion to score in place of generating one."""
MIXING_FIELDS = (
    STUDENT_FIELDS
    + TEACHER_FIELDS
    + ("student_system_prompt", "student_chat_template_kwargs", "return_mixing_info", "return_prompts")
    + TOP_K_FIELDS
    + COMPLETION_FIELDS
    + ALPHA_KEYS
)
# Keys with these beginnings are meant for us: a typo must not quietly give plain teacher samples.
_OUR_PREFIXES = (
    "student",
    "alpha",
    "fixed_alpha",
    "kl_budget",
    "return_mixing",
    "return_prompts",
    "return_top_k",
    "top_k_",
    "completion_",
    "teacher",
)
_TYPO, _SURE_TYPO = 0.8, 0.93
"""From which likeness (`difflib`) on a key is one of ours misspelt: where nobody else reads custom_params, and where a
custom logit processor of the client's own does."""

_TEACHER_ONLY_WITH = {
    "teacher_messages": "only /generate reads it, in place of text and input_ids.",
    "teacher_only_messages": "only /v1/chat/completions reads it, beside messages.",
    "teacher_system_prompt": "needs messages for the teacher: teacher_messages, or /v1/chat/completions.",
    "teacher_chat_template_kwargs": "only read with teacher_messages; a chat request has chat_template_kwargs.",
}


class RenderedPrompt(list):
    """Token ids of the student's prompt that came of something else than ``student_input_ids``.

    source: the field they came from, for the messages of errors.
    """

    def __init__(self, ids: Sequence[int], source: str):
        super().__init__(ids)
        self.source = source


def mixing_fields(custom_params: Any, *, others_read: bool = False) -> dict[str, Any]:
    """The fields of ``custom_params`` that belong to mixing; empty for a plain request.

    Args:
        custom_params: as the client sent them.
        others_read: whether the request has a custom logit processor, whose parameters they may be.

    Raises:
        ValueError: not a mapping, or a key that looks like ours is not known.
    """
    if custom_params is None:
        return {}
    if not isinstance(custom_params, dict):
        raise ValueError(f"custom_params: must be a mapping with the fields, got {type(custom_params).__name__}.")
    names = [name for name in custom_params if isinstance(name, str)]
    ours = [name for name in names if name in MIXING_FIELDS]
    if others_read:
        looks_ours = [name for name in names if is_typo(name, _SURE_TYPO)]
    else:
        looks_ours = [name for name in names if name.startswith(_OUR_PREFIXES) or is_typo(name, _TYPO)]
    check_known(dict.fromkeys([*ours, *looks_ours]), MIXING_FIELDS, "custom_params")
    return {name: custom_params[name] for name in ours}


def is_typo(name: str, likeness: float = _SURE_TYPO) -> bool:
    """Whether ``name`` is nearly, and not quite, one of ours."""
    return name not in MIXING_FIELDS and bool(difflib.get_close_matches(name.lower(), MIXING_FIELDS, 1, likeness))


def take_carried(custom_params: Any, session_params: Any) -> tuple[Any, Any]:
    """Move mixing fields that came in ``session_params`` to where they belong.

    Returns:
        (custom_params, session_params), as they would be had the fields come in the first; unchanged if they did.

    Raises:
        ValueError: names the field and the fix.
    """
    if not isinstance(session_params, dict) or CARRIER not in session_params:
        return custom_params, session_params
    fields = session_params[CARRIER]
    if not isinstance(fields, dict) or not fields:
        raise ValueError(f"session_params.{CARRIER}: must be a mapping with the mixing fields.")
    check_known(fields, MIXING_FIELDS, f"session_params.{CARRIER}")
    custom = dict(custom_params) if isinstance(custom_params, dict) else {}
    for name in fields:
        if name in custom:
            raise ValueError(f"{name}: is in custom_params and in session_params.{CARRIER}; give it once.")
    rest = {key: value for key, value in session_params.items() if key != CARRIER}
    return {**custom, **fields}, rest or None


def check_has_student(fields: dict[str, Any], config: MixingConfig) -> None:
    """Raise ValueError for mixing fields sent to a server without a student."""
    if config.student_model_path is None:
        raise ValueError(
            f"{next(iter(fields))}: this server has no student model; start it without --student-weights none to mix."
        )


def check_size(chars: int, max_chars: int, name: str) -> None:
    """Refuse, before any tokenizer sees it, what no tokenization could fit into the context length.

    Raises:
        ValueError: names the field.
    """
    if chars > max_chars:
        raise ValueError(f"{name}: {chars} characters are too long; at most {max_chars} can fit the context length.")


def check_size_of(messages: Sequence[Any], max_chars: int, name: str) -> None:
    """`check_size` of SGLang's own message objects."""
    contents = ({"content": message.content} for message in messages if isinstance(message.content, str))
    check_size(characters(list(contents)), max_chars, name)


def take_teacher_messages(
    custom_params: dict[str, Any], config: MixingConfig, max_chars: int
) -> tuple[list[dict], dict[str, Any], dict[str, Any]] | None:
    """Split off the messages that the teacher reads on ``/generate``.

    Returns:
        (messages, extra variables for the chat template, custom_params without the teacher's fields); None where the
        request has no ``teacher_messages``.

    Raises:
        ValueError: names the field and the fix.
    """
    if not isinstance(custom_params, dict) or custom_params.get("teacher_messages") is None:
        return None
    fields = mixing_fields(custom_params)
    check_has_student(fields, config)
    messages, kwargs = messages_of(fields, "teacher", max_chars)
    used = ("teacher_messages", "teacher_system_prompt", "teacher_chat_template_kwargs")
    return messages, kwargs, {k: v for k, v in custom_params.items() if k not in used}


def messages_of(fields: dict[str, Any], side: str, max_chars: int) -> tuple[list[dict], dict[str, Any]]:
    """The messages of ``side`` with its own system prompt, and the extra variables for its chat template."""
    messages = checked_messages(fields[f"{side}_messages"], f"{side}_messages")
    messages = with_system_prompt(messages, fields, f"{side}_system_prompt")
    check_size(characters(messages), max_chars, f"{side}_messages")
    name = f"{side}_chat_template_kwargs"
    return messages, checked_template_kwargs(fields.get(name) or {}, name)


@dataclasses.dataclass(frozen=True)
class StudentReader:
    """How a server's student reads.

    Attributes:
        encode_text, encode_messages: its tokenizer; and its chat template, with extra variables for it.
        encode_completion: the tokenizer without what it puts around a text.
        vocab_size: number of ids both models know; ids must lie in [0, vocab_size).
        context_length: in tokens. max_chars: characters that can fit into it at the most.
    """

    encode_text: Callable[[str], Sequence[int]]
    encode_messages: Callable[[list[dict], dict], Sequence[int]]
    encode_completion: Callable[[str], Sequence[int]]
    vocab_size: int
    context_length: int
    max_chars: int


def to_wire(
    custom_params: dict[str, Any],
    fields: dict[str, Any],
    config: MixingConfig,
    reader: StudentReader,
    max_new_tokens: int | None,
) -> dict[str, Any]:
    """Check a request's mixing fields and tokenize its student context (in the tokenizer manager).

    Args:
        custom_params: as the client sent them. fields: those of them that are `mixing_fields`; not empty.
        max_new_tokens: the request's limit, or None.

    Returns:
        New custom_params, with ``student_input_ids`` and every setting filled in.

    Raises:
        ValueError: names the field and the fix.
    """
    for name in TEACHER_FIELDS:
        if fields.get(name) is not None:
            raise ValueError(f"{name}: {_TEACHER_ONLY_WITH[name]}")
    given = [name for name in STUDENT_FIELDS if fields.get(name) is not None]
    if len(given) != 1:
        what = "none was given" if not given else f"got {' and '.join(given)}"
        raise ValueError(f"a mixed request needs exactly one of {', '.join(STUDENT_FIELDS)}; {what}.")
    name = given[0]
    value = fields[name]
    if name == "student_text":
        ids = _encoded(value, reader.encode_text, reader.max_chars, name)
    elif name == "student_messages":
        ids = list(reader.encode_messages(*messages_of(fields, "student", reader.max_chars)))
    elif isinstance(value, RenderedPrompt):
        name, ids = value.source, list(value)
    else:
        ids = _checked_ids(value, reader.vocab_size, reader.context_length)
    if given[0] != "student_messages":
        for extra in ("student_system_prompt", "student_chat_template_kwargs"):
            if fields.get(extra) is not None:
                raise ValueError(f"{extra}: only read with student_messages, not with {name}.")
    if not ids:
        raise ValueError(f"{name}: the student context has no tokens.")
    completion = completion_of(fields, reader, max_new_tokens)
    if completion is not None:
        ids, max_new_tokens = ids + completion, 1
    wanted = len(ids) + max(max_new_tokens or 1, 1)
    if wanted > reader.context_length:
        raise ValueError(
            f"{name}: the student context is too long: {len(ids)} tokens and {max_new_tokens or 1} new ones exceed the "
            f"student's context length of {reader.context_length}. Shorten it or lower max_new_tokens."
        )
    if not isinstance(fields.get("return_prompts"), bool | None):
        raise ValueError(f"return_prompts: must be true or false, got {fields['return_prompts']!r}.")
    of_tokens = wanted_by(fields)
    check_amount(of_tokens, len(completion) if completion is not None else max_new_tokens or reader.context_length)
    alpha = config.alpha.updated({k: fields[k] for k in ALPHA_KEYS if k in fields})
    others = {k: v for k, v in custom_params.items() if k not in fields}
    return {
        **others,
        "student_input_ids": ids,
        "completion_length": None if completion is None else len(completion),
        "return_mixing_info": list(of_tokens.series),
        "return_top_k": of_tokens.top_k,
        "top_k_of": list(of_tokens.sides) or None,
        "top_k_format": of_tokens.top_k_format,
        **alpha.model_dump(),
    }


def completion_of(fields: dict[str, Any], reader: StudentReader, max_new_tokens: int | None) -> list[int] | None:
    """Token ids of the completion to score; None where one is to be generated.

    Raises:
        ValueError: names the field and the fix.
    """
    given = [name for name in COMPLETION_FIELDS if fields.get(name) is not None]
    if not given:
        return None
    if len(given) > 1:
        raise ValueError(f"{', '.join(given)}: give one of them.")
    (name,) = given
    if max_new_tokens != 0:
        raise ValueError(f"{name}: is scored, and nothing generated; give max_new_tokens 0, got {max_new_tokens}.")
    value = fields[name]
    if name == "completion_text":
        ids = _encoded(value, reader.encode_completion, reader.max_chars, name)
    else:
        ids = _checked_ids(value, reader.vocab_size, reader.context_length, name)
    if not ids:
        raise ValueError(f"{name}: has no tokens.")
    if len(ids) + 2 > reader.context_length:
        raise ValueError(
            f"{name}: {len(ids)} tokens are too long for the student's context length of {reader.context_length}."
        )
    return ids


def from_wire(custom_params: Any, teacher_ids: array) -> MixedRequest | None:
    """What ``to_wire`` has checked; None for a plain request.

    Args:
        teacher_ids: token ids of the request's own prompt.
    """
    if not isinstance(custom_params, dict) or custom_params.get("student_input_ids") is None:
        return None
    settings: dict[str, Any] = {name: custom_params.get(name) for name in ALPHA_KEYS}
    return MixedRequest(
        sides=[Side("teacher", teacher_ids), Side("student", array("q", custom_params["student_input_ids"]))],
        alpha=AlphaSettings(**settings),
        wanted=wanted_by(custom_params),
        score=Score(custom_params["completion_length"]) if custom_params.get("completion_length") else None,
    )


def _encoded(value: Any, encode: Callable[[str], Sequence[int]], max_chars: int, field: str) -> list[int]:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{field}: must be a non-empty string.")
    check_size(len(value), max_chars, field)
    return list(encode(value))


def _checked_ids(value: Any, vocab_size: int, context_length: int, field: str = "student_input_ids") -> list[int]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{field}: must be a list of token ids, got {type(value).__name__}.")
    for position, token in enumerate(value[: context_length + 1]):  # a longer one is refused for its length
        if isinstance(token, bool) or not isinstance(token, int):
            raise ValueError(f"{field}[{position}]: must be an integer, got {token!r}.")
        if not 0 <= token < vocab_size:
            raise ValueError(f"{field}[{position}]: {token} is outside the vocabulary [0, {vocab_size}).")
    return list(value)
