"""A mixed request: the fields a client may send in ``sampling_params.custom_params``, and what they become."""

from __future__ import annotations

import dataclasses
import difflib
from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sglang_optimal.config import ALPHA_KEYS, AlphaSettings, MixingConfig, check_known
from sglang_optimal.names import CARRIER, OTHER_MODEL, WIRE
from sglang_optimal.runtime.core import MixedRequest, Score, Side
from sglang_optimal.runtime.entrypoints.messages import (
    characters,
    checked_messages,
    checked_template_kwargs,
    with_system_prompt,
)
from sglang_optimal.wanted import TOP_K_FIELDS, check_amount, wanted_by

STUDENT_FIELDS = ("student_text", "student_input_ids", "student_messages")
"""What the student reads, where the request's own prompt is the teacher's."""
TEACHER_FIELDS = ("teacher_text", "teacher_input_ids", "teacher_messages")
"""What the teacher reads, where the request's own prompt is the student's. Beside one of the student's fields
``teacher_messages`` are the request's own prompt."""
CONTEXT_FIELDS = {"student": STUDENT_FIELDS, "teacher": TEACHER_FIELDS}
_OF_MESSAGES = ("teacher_only_messages", "teacher_system_prompt", "teacher_chat_template_kwargs")
COMPLETION_FIELDS = ("completion_text", "completion_input_ids")
"""A completion to score in place of generating one."""
MIXING_FIELDS = (
    STUDENT_FIELDS
    + TEACHER_FIELDS
    + _OF_MESSAGES
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

_ONLY_WITH = {
    "teacher_only_messages": "only /v1/chat/completions reads it, beside messages.",
    "teacher_system_prompt": "needs messages for the teacher: teacher_messages, or /v1/chat/completions.",
    "teacher_chat_template_kwargs": "only read with teacher_messages, or in a chat.",
    "student_system_prompt": "only read with student_messages, or in a chat.",
    "student_chat_template_kwargs": "only read with student_messages, or in a chat.",
}


class RenderedPrompt(list):
    """Token ids of one side's prompt that came of something else than ``…_input_ids``.

    source: the field they came from, for the messages of errors.
    is_own: whether they are what the client calls its prompt, and not the other side's.
    """

    def __init__(self, ids: Sequence[int], source: str, *, is_own: bool = False):
        super().__init__(ids)
        self.source, self.is_own = source, is_own


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
    if WIRE in custom_params:
        raise ValueError(f"custom_params: {WIRE!r} is this server's own; remove it.")
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
    """Split off the messages that the teacher reads on ``/generate``, where the student's context is a field.

    Returns:
        (messages, extra variables for the chat template, custom_params without the teacher's fields); None where the
        request has no ``teacher_messages``, or they are beside a prompt of the student's.

    Raises:
        ValueError: names the field and the fix.
    """
    if not isinstance(custom_params, dict) or custom_params.get("teacher_messages") is None:
        return None
    if all(custom_params.get(name) is None for name in STUDENT_FIELDS):
        return None  # the request's own prompt is the student's
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
class SideReader:
    """How one of a server's models reads.

    Attributes:
        encode_text, encode_messages: its tokenizer; and its chat template, with extra variables for it.
        encode_completion: the tokenizer without what it puts around a text.
        vocab_size: number of ids both models have; ids must lie in [0, vocab_size), or be in ``beyond``.
        beyond: tokens of this model alone, of which the other has no ids. unreadable: {id: token} of the other's alone.
        context_length: in tokens. max_chars: characters that can fit into it at the most.
    """

    encode_text: Callable[[str], Sequence[int]]
    encode_messages: Callable[[list[dict], dict], Sequence[int]]
    encode_completion: Callable[[str], Sequence[int]]
    vocab_size: int
    context_length: int
    max_chars: int
    unreadable: Mapping[int, str] = dataclasses.field(default_factory=dict)
    beyond: frozenset[int] = frozenset()

    def check_readable(self, ids: Sequence[int], field: str) -> None:
        """Raise ValueError for an id that is no token of this model's."""
        if not self.unreadable:
            return
        for position, token in enumerate(ids):
            if token in self.unreadable:
                raise ValueError(
                    f"{field}[{position}]: {token} is {self.unreadable[token]!r} of the other model, which this one "
                    "cannot read."
                )


@dataclasses.dataclass(frozen=True)
class Contexts:
    """What both sides read.

    Attributes:
        teacher, student: token ids, a completion to score among them.
        own: the side whose prompt is the request's own. own_length: of it, without a completion.
        completion_length: of the completion to score; 0 where one is generated.
        settings: the request's new custom_params, with every setting filled in.
    """

    teacher: list[int]
    student: list[int]
    own: str
    own_length: int
    completion_length: int
    settings: dict[str, Any]

    def of(self, side: str) -> list[int]:
        """What a side reads."""
        return self.teacher if side == "teacher" else self.student


def other_side(fields: dict[str, Any]) -> tuple[str, str]:
    """(the side that is not the request's own, the field with its context).

    Raises:
        ValueError: none was given, or several.
    """
    given = [(side, name) for side, names in CONTEXT_FIELDS.items() for name in names if fields.get(name) is not None]
    if len(given) == 1:
        return given[0]
    names = [name for _, name in given]
    what = "none was given" if not given else f"got {' and '.join(names)}"
    raise ValueError(
        f"a mixed request needs exactly one of {', '.join(STUDENT_FIELDS)}, or, where its own prompt is the student's, "
        f"of {', '.join(TEACHER_FIELDS)}; {what}."
    )


def contexts_of(
    custom_params: dict[str, Any],
    fields: dict[str, Any],
    own_ids: Sequence[int],
    config: MixingConfig,
    readers: dict[str, SideReader],
    max_new_tokens: int | None,
) -> Contexts:
    """Check a request's mixing fields and tokenize its other context (in the tokenizer manager).

    Args:
        custom_params: as the client sent them. fields: those of them that are `mixing_fields`; not empty.
        own_ids: token ids of the request's own prompt.
        readers: {side: how it reads}.
        max_new_tokens: the request's limit, or None.

    Raises:
        ValueError: names the field and the fix.
    """
    side, given = other_side(fields)
    for name, why in _ONLY_WITH.items():
        if fields.get(name) is not None and not (name.startswith(side) and given.endswith("_messages")):
            raise ValueError(f"{name}: {why}")
    reader, value = readers[side], fields[given]
    name = value.source if isinstance(value, RenderedPrompt) else given
    ids = ids_of_side(fields, given, reader)
    readers[OTHER_MODEL[side]].check_readable(own_ids, "the prompt")
    if not ids:
        raise ValueError(f"{name}: the {side} context has no tokens.")
    completion = completion_of(fields, reader, readers[OTHER_MODEL[side]], max_new_tokens)
    new = 1 if completion is not None else max_new_tokens or 1
    own = OTHER_MODEL[side]
    tail = completion or []
    both = {side: ids + tail, own: [*own_ids, *tail]}
    checked = [(side, name)]
    if tail or own != config.host:  # else SGLang has
        checked.append((own, "the prompt"))
    for of, what in checked:
        if len(both[of]) + max(new, 1) > readers[of].context_length:
            raise ValueError(
                f"{what}: the {of} context is too long: {len(both[of])} tokens and {new} new ones exceed the "
                f"{of}'s context length of {readers[of].context_length}. Shorten it or lower max_new_tokens."
            )
    if not isinstance(fields.get("return_prompts"), bool | None):
        raise ValueError(f"return_prompts: must be true or false, got {fields['return_prompts']!r}.")
    of_tokens = wanted_by(fields)
    check_amount(of_tokens, len(completion) if completion is not None else max_new_tokens or reader.context_length)
    alpha = config.alpha.updated({k: fields[k] for k in ALPHA_KEYS if k in fields})
    settings = {
        **{k: v for k, v in custom_params.items() if k not in fields},
        "return_mixing_info": list(of_tokens.series),
        "return_top_k": of_tokens.top_k,
        "top_k_of": list(of_tokens.sides) or None,
        "top_k_format": of_tokens.top_k_format,
        **alpha.model_dump(),
    }
    rendered_own = isinstance(value, RenderedPrompt) and value.is_own
    return Contexts(
        both["teacher"],
        both["student"],
        own=side if rendered_own else own,
        own_length=len(ids if rendered_own else own_ids),
        completion_length=len(tail),
        settings=settings,
    )


def ids_of_side(fields: dict[str, Any], name: str, reader: SideReader) -> list[int]:
    """Token ids of a side's context, given in the field ``name``.

    Raises:
        ValueError: names the field and the fix.
    """
    value = fields[name]
    if name.endswith("_text"):
        return _encoded(value, reader.encode_text, reader.max_chars, name)
    if name.endswith("_messages"):
        return list(reader.encode_messages(*messages_of(fields, name.partition("_")[0], reader.max_chars)))
    if isinstance(value, RenderedPrompt):
        return list(value)
    return _checked_ids(value, reader, name)


def completion_of(
    fields: dict[str, Any], reader: SideReader, other: SideReader, max_new_tokens: int | None
) -> list[int] | None:
    """Token ids of the completion to score, which both models read; None where one is to be generated.

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
        ids = _checked_ids(value, reader, name)
    for one in (reader, other):
        one.check_readable(ids, name)
    if not ids:
        raise ValueError(f"{name}: has no tokens.")
    if len(ids) + 2 > reader.context_length:
        raise ValueError(f"{name}: {len(ids)} tokens are too long for a context length of {reader.context_length}.")
    return ids


def to_wire(
    settings: dict[str, Any], guest_ids: Sequence[int], config: MixingConfig, completion_length: int = 0
) -> dict[str, Any]:
    """A mixed request's custom_params on the way to the scheduler; its own ids there are what the host reads.

    Args:
        settings: every one filled in. guest_ids: what the guest reads.
        completion_length: of the completion to score behind both contexts; 0 where one is generated.
    """
    request = {"guest": config.guest, "guest_ids": list(guest_ids), "completion_length": completion_length}
    return {**settings, WIRE: request}


def is_on_the_wire(custom_params: Any) -> bool:
    """Whether they are a mixed request's, after `to_wire`."""
    return isinstance(custom_params, dict) and WIRE in custom_params


def from_wire(custom_params: Any, host_ids: array) -> MixedRequest | None:
    """What `contexts_of` has checked and `to_wire` has sent; None for a plain request.

    Args:
        host_ids: token ids of the request there.
    """
    if not is_on_the_wire(custom_params):
        return None
    settings: dict[str, Any] = {name: custom_params.get(name) for name in ALPHA_KEYS}
    request = custom_params[WIRE]
    guest, length = request["guest"], request["completion_length"]
    return MixedRequest(
        sides=[Side(OTHER_MODEL[guest], host_ids), Side(guest, array("q", request["guest_ids"]))],
        alpha=AlphaSettings(**settings),
        wanted=wanted_by(custom_params),
        score=Score(length) if length else None,
    )


def _encoded(value: Any, encode: Callable[[str], Sequence[int]], max_chars: int, field: str) -> list[int]:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{field}: must be a non-empty string.")
    check_size(len(value), max_chars, field)
    return list(encode(value))


def _checked_ids(value: Any, reader: SideReader, field: str) -> list[int]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{field}: must be a list of token ids, got {type(value).__name__}.")
    for position, token in enumerate(value[: reader.context_length + 1]):  # a longer one is refused for its length
        if isinstance(token, bool) or not isinstance(token, int):
            raise ValueError(f"{field}[{position}]: must be an integer, got {token!r}.")
        if not 0 <= token < reader.vocab_size and token not in reader.beyond:
            raise ValueError(f"{field}[{position}]: {token} is outside the vocabulary [0, {reader.vocab_size}).")
    reader.check_readable(value, field)
    return list(value)
