"""What one model reads of a chat: SGLang's own rendering, with that model's tokenizer and chat template.

Both sides of a mixed request go this way on every route, so that equal messages give equal token ids whatever the
request and the server's flags say about templates.
"""

from __future__ import annotations

from typing import Any

import jinja2
from pydantic import ValidationError
from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest
from sglang.srt.entrypoints.openai.serving_chat import OpenAIServingChat
from sglang.srt.parser.template_manager import TemplateManager
from sglang.srt.runtime_context import get_serving

from sglang_optimal.config import OWN_TEMPLATE
from sglang_optimal.runtime.releases import python_chat_template

# What a template raises, or an expression within, over messages that it was not made for.
_REFUSALS = (ValueError, TypeError, LookupError, ArithmeticError, RecursionError, jinja2.TemplateError)


class _GuestView:
    """The tokenizer manager as SGLang's chat handler sees it, with the student's tokenizer and model in it."""

    processor = None

    def __init__(self, manager: Any, tokenizer: Any, model_config: Any, model_path: str):
        self._manager = manager
        self.tokenizer, self.model_config, self.model_path = tokenizer, model_config, model_path

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)


class ChatSide:
    """How one model reads chats.

    Args:
        serving: SGLang's handler of ``/v1/chat/completions`` over the model's tokenizer and templates.
    """

    def __init__(self, serving: OpenAIServingChat):
        self.serving = serving

    @classmethod
    def of_host(cls, manager: Any, templates: TemplateManager) -> ChatSide:
        """Args: SGLang's tokenizer manager and its templates."""
        return cls(OpenAIServingChat(manager, templates))

    @classmethod
    def of_guest(
        cls, manager: Any, tokenizer: Any, model_config: Any, model_path: str, chat_template: str | None = None
    ) -> ChatSide:
        """The side of the other model, with a tokenizer of its own; the server's flags about templates hold for it too,
        but for ``--chat-template`` where it has a ``chat_template``, see `sglang_optimal.config.MixingConfig`.

        Raises:
            ValueError: it has no template of the name that --hf-chat-template-name gives, or reads none at all.
        """
        given = get_serving().chat_template if chat_template is None else chat_template
        explicit = None if given == OWN_TEMPLATE else given
        view = _GuestView(manager, tokenizer, model_config, model_path)
        wanted, named = get_serving().hf_chat_template_name, tokenizer.chat_template
        # As SGLang has it, a template that is given takes the place of one that is named.
        if explicit is None and wanted is not None and isinstance(named, dict) and wanted not in named:
            raise ValueError(f"--hf-chat-template-name: {model_path} has no template {wanted!r}: {', '.join(named)}.")
        templates = TemplateManager()
        templates.load_chat_template(view, explicit, model_path)
        side = cls(OpenAIServingChat(view, templates))
        if chat_template is not None and side.serving.chat_encoding_spec is not None:
            raise ValueError(
                f"student_chat_template, teacher_chat_template: SGLang encodes the chats of {model_path} without a "
                f"template ({side.serving.chat_encoding_spec}); leave it out."
            )
        return side

    def ids(self, messages: list[dict[str, Any]], name: str, kwargs: dict[str, Any] | None = None) -> list[int]:
        """Token ids of a conversation, ready for the assistant to go on; a last message of the assistant is continued.

        Args:
            messages: as `sglang_optimal.runtime.entrypoints.messages.checked_messages` returns them.
            name: the field they came from, for the message of an error.
            kwargs: extra variables for the template; ``tools`` are the chat's.

        Raises:
            ValueError: the model has no chat template, or it refuses the messages.
        """
        last = messages[-1]
        continues = last["role"] == "assistant" and not last.get("tool_calls")
        if continues:
            if len(messages) == 1:
                raise ValueError(f"{name}: needs a message before the assistant's.")
            if not isinstance(last["content"], str):  # SGLang continues strings alone
                messages = [*messages[:-1], {**last, "content": " ".join(part["text"] for part in last["content"])}]
        variables = dict(kwargs or {})
        values = {"messages": messages, "continue_final_message": continues, "tools": variables.pop("tools", None)}
        return self.ids_of(as_request({**values, "chat_template_kwargs": variables or None}, name), name)

    def ids_of(self, request: ChatCompletionRequest, name: str) -> list[int]:
        """Token ids that SGLang's route would give this model for the request, which is changed.

        Raises:
            ValueError: as `ids`.
        """
        self._check_template(name)
        try:
            # The base class's: a subclass would take the request for a mixed one.
            adapted, _ = OpenAIServingChat._convert_to_internal_request(self.serving, request)
        except _REFUSALS as error:
            raise ValueError(f"{name}: the model's chat template refused them: {error}") from error
        if adapted.contains_mm_input():
            raise ValueError(f"{name}: only text is supported in a mixed request.")
        if adapted.input_ids is None:  # SGLang gives a model that sees images its text, and tokenizes that
            return list(self.serving.tokenizer_manager.tokenizer.encode(adapted.text))
        return list(adapted.input_ids)

    def _check_template(self, name: str) -> None:
        serving, templates = self.serving, self.serving.template_manager
        others = templates.chat_template_name, python_chat_template(templates), serving.chat_encoding_spec
        if not serving.tokenizer_manager.tokenizer.chat_template and all(other is None for other in others):
            raise ValueError(f"{name}: the model has no chat template; send text or token ids.")


def as_request(values: dict[str, Any], name: str) -> ChatCompletionRequest:
    """The request of SGLang's route with these values.

    Raises:
        ValueError: names the field ``name`` and what is wrong with its messages.
    """
    try:
        return ChatCompletionRequest.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        _, *place = first["loc"] or ("",)
        # Beside keys and positions there are names of the classes that were tried.
        keys = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place if _is_key(part))
        raise ValueError(f"{name}{keys}: {first['msg'].removeprefix('Value error, ')}") from None


def _is_key(part: str | int) -> bool:
    return isinstance(part, int) or (part.isidentifier() and part.islower())
