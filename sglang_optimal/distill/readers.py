"""What a model reads of a context, where its tokenizer is on this machine: text with the chat template applied."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_optimal.config import OWN_TEMPLATE
from sglang_optimal.distill.export_check import load_tokenizer
from sglang_optimal.distill.records import Context

if TYPE_CHECKING:
    from sglang_optimal.distill.config import DistillConfig


@dataclasses.dataclass(frozen=True)
class Reading:
    """text: what the model reads; of messages that could not be rendered their contents alone. tokens: how many, or
    None. note: why the messages are not rendered, or None."""

    text: str
    tokens: int | None = None
    note: str | None = None


class SideReader:
    """How one side of a run reads. Nothing is downloaded unless ``tokenizer`` is an id, and no code of a model is run.

    Args:
        config: of the run.
        side: ``teacher`` or ``student``.
        tokenizer: folder or id; by default the model's folder in the run's file (``server.model_path``,
            ``mixing.student_model_path``, ``mixing.teacher_model_path``).

    Attributes:
        name: of the tokenizer, or None. note: why chats cannot be rendered, or None.

    Raises:
        ValueError: ``tokenizer`` cannot be loaded.
    """

    def __init__(self, config: DistillConfig, side: str, tokenizer: str | None = None):
        self._server = {str(name).replace("-", "_"): value for name, value in config.server.items()}
        self._variables = {**self._server_s_variables(), **config.contexts.variables_of(side)}
        self._tokenizer: Any = None
        self._template: str | None = None
        self.name: str | None = None
        self.note: str | None = None
        self._load(_model(config, self._server, side), tokenizer)
        if self.note is None:
            self.note = self._find_template(_template(config, self._server, side))

    def read(self, context: Context) -> Reading:
        """What the model reads of it."""
        if isinstance(context, str):
            ids = self._tokenizer(context)["input_ids"] if self._tokenizer is not None else None
            return Reading(context, None if ids is None else len(ids))
        plain = "\n".join(f"[{message['role']}] {message['content']}" for message in context)
        if self.note is not None:
            return Reading(plain, note=self.note)
        # As SGLang does it: the beginning of an answer comes behind the turn that the template opens, as its own text.
        *turns, last = context
        prefix = last["content"] if last["role"] == "assistant" else ""
        try:
            text = self._tokenizer.apply_chat_template(
                turns if last["role"] == "assistant" else context,
                tokenize=False, add_generation_prompt=True, chat_template=self._template, **self._variables,
            )  # fmt: skip
        except Exception as error:  # whatever a template raises
            return Reading(plain, note=f"the chat template of {self.name} refuses them: {error}")
        parts = [self._tokenizer(part, add_special_tokens=False)["input_ids"] for part in (text, prefix) if part]
        return Reading(text + prefix, sum(map(len, parts)))

    def _server_s_variables(self) -> dict[str, Any]:
        given = self._server.get("default_chat_template_kwargs") or {}
        return json.loads(given) if isinstance(given, str) else dict(given)

    def _load(self, model: str | None, tokenizer: str | None) -> None:
        if tokenizer is not None:
            self._tokenizer, self.name = load_tokenizer(tokenizer), tokenizer
            return
        if model is None:
            self.note = "the run's file names no model (server.model_path); give --tokenizer"
        elif not Path(model).is_dir():
            self.note = f"{model} is no folder here; give --tokenizer"
        else:
            try:
                self._tokenizer, self.name = load_tokenizer(model), model
            except ValueError as error:
                self.note = str(error).removeprefix("--tokenizer: ")

    def _find_template(self, given: str | None) -> str | None:
        """Sets the template in place of the tokenizer's default; returns why there is none."""
        own = self._tokenizer.chat_template
        if given is None:
            named = self._server.get("hf_chat_template_name")
            if isinstance(own, dict) and named is not None:
                self._template = own.get(named)
                return None if named in own else f"{self.name} has no chat template {named!r}"
            return None if own else f"{self.name} has no chat template"
        path = Path(given)
        if path.suffix != ".jinja" or not path.is_file():
            return f"the chat template {given} is no .jinja file here, and SGLang's own are not applied"
        self._template = path.read_text(encoding="utf-8").strip("\n").replace("\\n", "\n")  # as SGLang reads it
        return None


def _guest(config: DistillConfig) -> str:
    return "teacher" if config.mixing.given().get("teacher_model_path") else "student"


def _model(config: DistillConfig, server: dict[str, Any], side: str) -> str | None:
    """The folder or id with the side's tokenizer."""
    guest = getattr(config.mixing, f"{side}_model_path") if side == _guest(config) else None
    return guest or server.get("tokenizer_path") or server.get("model_path")


def _template(config: DistillConfig, server: dict[str, Any], side: str) -> str | None:
    """What the server's settings give the side in place of its model's own chat template."""
    own = getattr(config.mixing, f"{side}_chat_template") if side == _guest(config) else None
    given = server.get("chat_template") if own is None else own
    return None if own == OWN_TEMPLATE else given
