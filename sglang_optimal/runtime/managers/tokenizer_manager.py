"""The tokenizer manager: checks a mixed request and tokenizes its student context before the scheduler sees it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import AsyncGenerator, Callable
from typing import Any

from sglang.srt.constants import HEALTH_CHECK_RID_PREFIX
from sglang.srt.entrypoints.engine import init_tokenizer_manager
from sglang.srt.managers.io_struct import GenerateReqInput, LoadLoRAAdapterReqInput, UpdateWeightFromDiskReqInput
from sglang.srt.managers.tokenizer_manager import ServerStatus, TokenizerManager
from sglang.srt.model_executor.forward_batch_info import get_server_return_hidden_states_mode
from sglang.srt.runtime_context import get_model, get_serving
from sglang.srt.utils.hf_transformers_utils import get_tokenizer

from sglang_optimal.config import MixingConfig
from sglang_optimal.names import ALL_SERIES, OTHER_MODEL, SIDES, STUDENT_ADAPTER, TOP_K
from sglang_optimal.runtime.configs.model_config import guest_model_config
from sglang_optimal.runtime.entrypoints.openai.chat_side import ChatSide
from sglang_optimal.runtime.entrypoints.openai.stream_series import (
    SERIES_RECORDER,
    changed,
    with_public_top_k,
    with_scores,
)
from sglang_optimal.runtime.entrypoints.protocol import (
    STUDENT_FIELDS,
    TEACHER_FIELDS,
    SideReader,
    check_has_student,
    contexts_of,
    is_on_the_wire,
    mixing_fields,
    take_carried,
    take_teacher_messages,
    to_wire,
)
from sglang_optimal.runtime.managers.dead_ends import blame_request
from sglang_optimal.runtime.managers.request_checks import (
    check_batch,
    check_ids,
    check_request,
    check_sampling,
    client_errors,
)
from sglang_optimal.runtime.managers.tokenizer_control_mixin import MixedTokenizerControlMixin
from sglang_optimal.runtime.model_executor.weight_updater import (
    HELD,
    SAFETENSORS,
    is_for_student,
    mark_for_student,
)
from sglang_optimal.scores import SCORED
from sglang_optimal.wanted import wanted_by

_NOT_OF_A_COMPLETION: dict[str, Any] = {
    "n": 1,
    "regex": None,
    "json_schema": None,
    "ebnf": None,
    "structural_tag": None,
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "repetition_penalty": 1,
    "min_new_tokens": 0,
    "stop": None,
    "stop_token_ids": None,
    "stop_regex": None,
}
"""Sampling parameters that act on what is generated, and what they are where they do not."""

# Request features whose meaning for two contexts is not defined; refused rather than answered by the teacher alone.
_UNSUPPORTED = (
    "input_embeds",
    "image_data",
    "video_data",
    "audio_data",
    "session_params",
    "session_id",
    "lora_path",
    "positional_embed_overrides",
    "multi_item_delimiter_indices",
    "watermark",
)


@dataclasses.dataclass(frozen=True)
class ChatSides:
    """How each model reads chats; one object where both are one model."""

    teacher: ChatSide
    student: ChatSide


class MixedTokenizerManager(MixedTokenizerControlMixin, TokenizerManager):
    """SGLang's tokenizer manager, for requests with two contexts.

    Args:
        mixing_config: the student and the defaults of this manager's engine; others may run in the process.

    Attributes:
        chat_sides: set after construction, when SGLang has read its templates; None without a student or a tokenizer.
        side_readers: {side: how it reads}; only with a student.
    """

    chat_sides: ChatSides | None = None
    side_readers: dict[str, SideReader]
    # SGLang's, which sets them in a method.
    model_path: str
    served_model_name: str

    def __init__(self, *args, mixing_config: MixingConfig, **kwargs):
        self.mixing_config = mixing_config
        self.init_control()
        super().__init__(*args, **kwargs)

    def init_tokenizer_and_processor(self) -> None:
        """SGLang's, and how both sides read."""
        super().init_tokenizer_and_processor()
        config = self.mixing_config
        self.guest_tokenizer = None
        if config.student_model_path is None:
            return
        model_config = guest_model_config(self.server_args, config.guest_path, config.guest_revision)
        self.guest_model_config = model_config
        if self.tokenizer is not None:
            # SGLang puts a template into the tokenizer, so that another one needs another tokenizer.
            one = self._one_tokenizer() and config.guest_chat_template is None
            self.guest_tokenizer = self.tokenizer if one else self._guest_s_own_tokenizer()
        sizes: dict[str, int] = {config.host: self.model_config.vocab_size, config.guest: model_config.vocab_size}
        size = min(sizes.values())
        of_one = config.tokens_of_one.items()
        lengths: dict[str, int] = {config.host: self.model_config.context_len, config.guest: model_config.context_len}
        self.side_readers = {
            side: SideReader(
                encode_text=functools.partial(self._encode_text, side),
                encode_messages=functools.partial(self._encode_messages, side),
                encode_completion=self._encode_completion,
                vocab_size=size,
                context_length=lengths[side],
                max_chars=_max_chars(self._tokenizer_of(side), lengths[side]),
                unreadable={index: token for index, (of, token) in of_one if of != side},
                beyond=frozenset(index for index, (of, _) in of_one if of == side and size <= index < sizes[side]),
            )
            for side in SIDES[:2]
        }

    def _tokenizer_of(self, side: str):
        return self.tokenizer if side == self.mixing_config.host else self.guest_tokenizer

    def _one_tokenizer(self) -> bool:
        config, model = self.mixing_config, get_model()
        one_model = (config.guest_path, config.guest_revision) == (model.model_path, model.revision)
        return config.shared_weights or one_model

    def _guest_s_own_tokenizer(self):
        return get_tokenizer(
            self.mixing_config.guest_path,
            tokenizer_mode=get_serving().tokenizer_mode,
            trust_remote_code=get_model().trust_remote_code,
            revision=self.mixing_config.guest_revision,
            tokenizer_backend=get_serving().tokenizer_backend,
        )

    def init_chat_sides(self, templates) -> None:
        """``templates``: SGLang's, which it makes after this manager."""
        config = self.mixing_config
        if config.student_model_path is None or self.tokenizer is None:
            return
        host = guest = ChatSide.of_host(self, templates)
        if self.guest_tokenizer is not self.tokenizer:
            guest = ChatSide.of_guest(
                self, self.guest_tokenizer, self.guest_model_config, config.guest_path, config.guest_chat_template
            )
        self.chat_sides = ChatSides(**{config.host: host, config.guest: guest})

    @property
    def serving_chat_class(self):
        """Of the chat route: the one for both sides, where there is a student."""
        if self.mixing_config.student_model_path is None:
            return super().serving_chat_class
        from sglang_optimal.runtime.entrypoints.openai.serving_chat import MixedOpenAIServingChat

        return MixedOpenAIServingChat

    def generate_request(self, obj, request=None):
        """SGLang's, after what belongs to the whole request has been unpacked and checked."""
        if isinstance(obj, GenerateReqInput):
            if not hasattr(obj, "is_single"):
                # SGLang asks for it when the answer has ended, even if the request was refused before it looked at it;
                # failing there would close a connection that has gone on to the next request.
                obj.is_single = True
            _unpack_carried(obj)
            self._render_teacher_messages(obj)
            check_batch(obj)
        if self.released and _is_health_check(obj):
            return self._scheduler_answers()
        outputs = self._between_updates(obj, super().generate_request(obj, request))
        recorder = SERIES_RECORDER.get()
        if recorder is None:
            return changed(outputs, lambda output: with_public_top_k(self._with_scores(output)))
        return recorder.wrap(changed(outputs, self._with_scores))

    async def _between_updates(self, obj, outputs: AsyncGenerator[dict[str, Any], None]):
        """The answers of a request, which waits while a session of weight updates is open."""
        if not _is_health_check(obj):
            await self._no_session.wait()
        async with contextlib.aclosing(outputs):
            async for output in outputs:
                yield output

    # -- weights, and memory: the rest is in tokenizer_control_mixin.py ---------------------------------------------

    async def update_weights_from_disk(self, obj: UpdateWeightFromDiskReqInput, request=None) -> tuple[bool, str, int]:
        """SGLang's, for the policy."""
        if self._mixes and not is_for_student(obj) and self.mixing_config.updated == "student":
            return await self.update_student_weights_from_disk(obj, request)
        return await super().update_weights_from_disk(obj, request)

    async def update_student_weights_from_disk(
        self, obj: UpdateWeightFromDiskReqInput, request=None
    ) -> tuple[bool, str, int]:
        """SGLang's ``update_weights_from_disk`` for the student: waits for running requests, then updates.

        Returns:
            (success, message, number of paused requests)
        """
        if not self._mixes:
            return False, "this server has no student model; start it without --student-weights none.", 0
        if not isinstance(obj.model_path, str) or not obj.model_path:
            return False, "model_path: must be a folder or a Hugging Face id.", 0
        if obj.load_format not in (None, "auto", SAFETENSORS):
            return False, "load_format: only safetensors are read; leave it out.", 0
        if self.mixing_config.student_lora_path is not None:
            return await self._adapter_from_disk(obj, request)
        obj.load_format = SAFETENSORS
        version = obj.weight_version
        mark_for_student(obj)
        load = super().update_weights_from_disk
        success, message, paused = await self._once_left(
            lambda: load(obj, request), held=lambda result: not result[0] and HELD in result[1]
        )
        if success and version is not None:
            if self.mixing_config.updated == "student":
                self._update_weight_version_if_provided(version)
            self._student_version = version
        return success, message, paused

    async def _adapter_from_disk(self, obj: UpdateWeightFromDiskReqInput, request=None) -> tuple[bool, str, int]:
        adapter = LoadLoRAAdapterReqInput(lora_name=STUDENT_ADAPTER, lora_path=obj.model_path)
        result = await self.load_lora_adapter(adapter, request)
        if result.success:
            await self.student_adapter_is(obj.weight_version)
        return result.success, result.error_message or "Succeeded to load the student's adapter.", 0

    async def _wait_for_model_update_from_disk(self, obj: UpdateWeightFromDiskReqInput):
        """SGLang's; what is served by name stays the host when the guest is updated."""
        host = self.model_path, self.served_model_name
        result = await super()._wait_for_model_update_from_disk(obj)
        if is_for_student(obj) and self.mixing_config.guest == "student":
            self.model_path, self.served_model_name = host
        return result

    async def continue_generation(self, obj):
        """SGLang's; requests that wait in the scheduler need the memory."""
        self.check_awake("continue_generation")
        return await super().continue_generation(obj)

    # -- requests ------------------------------------------------------------------------------------------------

    def _render_teacher_messages(self, obj: GenerateReqInput) -> None:
        """``teacher_messages`` become the request's token ids, before SGLang looks at its text."""
        batch = isinstance(obj.sampling_params, list)
        params = obj.sampling_params if batch else [obj.sampling_params]
        customs = [p.get("custom_params") if isinstance(p, dict) else None for p in params]
        config = self.mixing_config
        limit = self.side_readers["teacher"].max_chars if self._mixes else 0
        parts = [take_teacher_messages(c, config, limit) if isinstance(c, dict) else None for c in customs]
        given = [part for part in parts if part is not None]
        if not given:
            return
        if len(given) < len(parts):
            raise ValueError(
                f"teacher_messages: sampling_params[{parts.index(None)}] has none; give it in each or none."
            )
        if obj.text or obj.input_ids is not None or obj.input_embeds is not None:
            raise ValueError("teacher_messages: takes the place of text and input_ids; send one of them.")
        side = self.sides_of_a_chat("teacher_messages", "send input_ids").teacher
        ids = [side.ids(messages, "teacher_messages", kwargs) for messages, kwargs, _ in given]
        params = [{**p, "custom_params": rest} for p, (_, _, rest) in zip(params, given, strict=True)]
        obj.text = None
        obj.input_ids, obj.sampling_params = (ids, params) if batch else (ids[0], params[0])

    def _create_tokenized_object(self, obj, input_text, input_ids, input_embeds=None, mm_inputs=None, *args, **kwargs):
        """SGLang's, after the request has been checked and its student context tokenized."""
        if not self.is_pause:  # else it waits in the scheduler. Under SGLang's lock for updates, as releasing is
            self.check_awake("the models sleep")
        vocab_size = self.model_config.vocab_size
        with client_errors():
            if input_embeds is None and mm_inputs is None:  # a processor's placeholders may lie outside
                check_ids(input_ids, vocab_size)
            check_request(obj, vocab_size)
            if isinstance(obj, GenerateReqInput):
                if input_ids is not None and len(input_ids) == 0:
                    # Stock SGLang ends over it; beside other requests it would be answered from their logits.
                    raise ValueError("text: gives no tokens at all; send some text, or input_ids.")
                input_ids = self._prepare_mixing(obj, input_text, input_ids)
            tokenized = super()._create_tokenized_object(
                obj, input_text, input_ids, input_embeds, mm_inputs, *args, **kwargs
            )
            check_sampling(tokenized.sampling_params, vocab_size)
        return tokenized

    def _prepare_mixing(self, obj: GenerateReqInput, input_text: str | None, input_ids: list[int]) -> list[int]:
        """Check and complete a mixed request; returns what the served model reads."""
        params = obj.sampling_params or {}
        custom = params.get("custom_params")
        if self.mixing_config.student_lora_path is not None and params.get("beam_width") not in (None, 1):
            # SGLang counts an adapter for each request, where beam search has more rows, and ends the process.
            raise ValueError("beam_width: beam search is not supported beside --student-lora-path; remove it.")
        fields = mixing_fields(custom, others_read=bool(obj.custom_logit_processor))
        if custom is None or not fields:
            self._check_plain(obj)
            return input_ids
        check_has_student(fields, self.mixing_config)
        if "behaviour_logprob" in wanted_by(fields).series and obj.custom_logit_processor:
            raise ValueError(
                "return_mixing_info: behaviour_logprob is not known beside a custom_logit_processor; leave one out."
            )
        contexts = contexts_of(
            custom, fields, self._own_ids(fields, input_text, input_ids), self.mixing_config, self.side_readers,
            params.get("max_new_tokens"),
        )  # fmt: skip
        for name in _UNSUPPORTED:
            if _is_given(getattr(obj, name, None)):
                other = OTHER_MODEL[contexts.own]
                raise ValueError(f"{name}: not supported in a mixed request; remove it or the {other} context.")
        if params.get("beam_width") not in (None, 1):
            raise ValueError("beam_width: beam search is not supported in a mixed request; remove one of the two.")
        stops = params.get("stop_token_ids")
        for token in stops if isinstance(stops, list) else ():  # else SGLang refuses it
            if token in self.mixing_config.tokens_of_one:
                side, text = self.mixing_config.tokens_of_one[token]
                raise ValueError(f"stop_token_ids: {token} is {text!r} of the {side} alone, which no mixture samples.")
        host, guest = self.mixing_config.host, self.mixing_config.guest
        if contexts.own != host and obj.return_logprob and _starts_in_prompt(obj.logprob_start_len):
            raise ValueError(
                f"logprob_start_len: the prompt is the {contexts.own}'s, and the served model reads the {host}'s; "
                "leave it out, and score what you want to know of it as a completion."
            )
        # A new dict: the requests of one batch may share theirs.
        length = contexts.completion_length
        wire = to_wire(contexts.settings, contexts.of(guest), self.mixing_config, length)
        obj.sampling_params = {**params, "custom_params": wire}
        if contexts.own != host:
            obj.mixing_prompt_tokens = contexts.own_length + length
        if fields.get("return_prompts"):
            prompts = (ids[: len(ids) - length] for ids in (contexts.teacher, contexts.student))
            obj.mixing_prompts = self._prompts(*prompts)
        if length:
            self._check_scored(obj)
        return contexts.of(host)

    def _own_ids(self, fields: dict[str, Any], text: str | None, input_ids: list[int]) -> list[int]:
        """Of the request's own prompt, as its side's tokenizer reads it; SGLang has asked the served model's."""
        own = "student" if any(fields.get(name) is not None for name in TEACHER_FIELDS) else "teacher"
        if text is not None and self._tokenizer_of(own) is not self.tokenizer:
            return list(self.side_readers[own].encode_text(text))
        return list(input_ids)

    def _check_scored(self, obj: GenerateReqInput) -> None:
        """Of a request whose completion is given.

        Raises:
            ValueError: another field has no meaning then.
        """
        params = obj.sampling_params
        for name, nothing in _NOT_OF_A_COMPLETION.items():
            value = params.get(name)
            if value is not None and value != nothing and value != []:
                raise ValueError(f"{name}: has no meaning for a completion that is given; leave it out.")
        for name in ("return_logprob", "custom_logit_processor", "return_hidden_states"):
            if getattr(obj, name, None):
                raise ValueError(f"{name}: not supported where a completion is scored; ask for series.")
        if get_server_return_hidden_states_mode().need_capture():
            raise ValueError(
                "completion_text, completion_input_ids: not supported on a server that returns hidden states."
            )
        params["max_new_tokens"] = 1  # what is sampled beyond the completion is dropped

    def _with_scores(self, output: dict[str, Any]) -> dict[str, Any]:
        return with_scores(output, self._completion_text)

    def _completion_text(self, token_ids: list[int]) -> str:
        return "" if self.tokenizer is None else self.tokenizer.decode(token_ids, skip_special_tokens=True)

    def _prompts(self, teacher: list[int], student: list[int]) -> dict[str, list[int] | str]:
        prompts: dict[str, list[int] | str] = {"teacher_prompt_ids": teacher, "student_prompt_ids": student}
        for side in SIDES[:2]:
            tokenizer = self._tokenizer_of(side)
            if tokenizer is not None:
                prompts[f"{side}_prompt_text"] = tokenizer.decode(prompts[f"{side}_prompt_ids"])
        return prompts

    def _check_plain(self, obj: GenerateReqInput) -> None:
        if self.mixing_config.plain_requests == "allow" or self.server_status == ServerStatus.Starting:
            return  # SGLang warms the server up with a plain request
        if _is_health_check(obj):
            return
        raise ValueError(
            f"a mixed request needs one of {', '.join(STUDENT_FIELDS)} or {', '.join(TEACHER_FIELDS)} in custom_params "
            "(behind sglang-router, in session_params.mixing); this server takes no plain requests (--plain-requests "
            "refuse)."
        )

    def _encode_text(self, side: str, text: str) -> list[int]:
        tokenizer = self._tokenizer_of(side)
        if tokenizer is None:
            raise ValueError(f"{side}_text: the server runs with --skip-tokenizer-init; send {side}_input_ids.")
        return tokenizer.encode(text)

    def _encode_completion(self, text: str) -> list[int]:
        tokenizer = self._tokenizer_of("student")
        if tokenizer is None:
            raise ValueError("completion_text: the server runs with --skip-tokenizer-init; send completion_input_ids.")
        return tokenizer.encode(text, add_special_tokens=False)

    def _encode_messages(self, side: str, messages: list[dict], kwargs: dict) -> list[int]:
        sides = self.sides_of_a_chat(f"{side}_messages", f"send {side}_input_ids")
        return getattr(sides, side).ids(messages, f"{side}_messages", kwargs)

    def sides_of_a_chat(self, field: str, instead: str) -> ChatSides:
        """How each model reads ``field``.

        Raises:
            ValueError: neither does, without a tokenizer; ``instead``: what can be sent.
        """
        if self.chat_sides is None:
            raise ValueError(f"{field}: the server runs with --skip-tokenizer-init; {instead}.")
        return self.chat_sides

    def update_request_meta_info(self, meta_info, state, customized_info, index, finish_reason) -> None:
        """SGLang's, without series in plain requests, and with the prompts that were asked for."""
        # SGLang pads plain requests with None when a mixed one shares the message; leave their meta_info as it was.
        own = {
            key: values
            for key, values in customized_info.items()
            if key not in (*ALL_SERIES, TOP_K, SCORED)
            or key in state.customized_info_accumulated
            or (values[index] and values[index][0] is not None)
        }
        super().update_request_meta_info(meta_info, state, own, index, finish_reason)
        if finish_reason is not None:
            meta_info.update(getattr(state.obj, "mixing_prompts", {}))
        # Where the request's own prompt is not the served model's, SGLang has counted the other.
        meta_info["prompt_tokens"] = getattr(state.obj, "mixing_prompt_tokens", meta_info["prompt_tokens"])
        if is_on_the_wire((state.obj.sampling_params or {}).get("custom_params")):
            meta_info |= self._student_versions(meta_info)

    def _student_versions(self, meta_info: dict[str, Any]) -> dict[str, Any]:
        """Of the weights that the tokens came from; SGLang's versions are the policy's."""
        if self.mixing_config.updated == "teacher":
            return {"student_weight_version": self._student_version}
        names = [name for name in ("weight_version", "weight_versions") if name in meta_info]
        return {f"student_{name}": meta_info[name] for name in names}

    async def _handle_abort_finish_reason(self, out, state, *args, **kwargs):
        """SGLang's; a request that left itself nothing to sample is a bad one."""
        # A request that leaves itself nothing to sample is a bad one, and no fault of the server's.
        blame_request(out["meta_info"]["finish_reason"], state.obj.sampling_params)
        return await super()._handle_abort_finish_reason(out, state, *args, **kwargs)


def _starts_in_prompt(start: Any) -> bool:
    return start not in (None, -1)


def _is_health_check(obj) -> bool:
    return isinstance(obj.rid, str) and obj.rid.startswith(HEALTH_CHECK_RID_PREFIX)


def _unpack_carried(obj: GenerateReqInput) -> None:
    """Mixing fields that came in ``session_params`` go to ``custom_params``, for each prompt of a batch."""
    sessions = obj.session_params
    if isinstance(sessions, dict) and isinstance(obj.sampling_params, list):
        sessions = [sessions] * len(obj.sampling_params)
    if not isinstance(sessions, list):
        params = obj.sampling_params or {}
        if not isinstance(params, dict):
            return  # SGLang refuses it
        custom, obj.session_params = take_carried(params.get("custom_params"), sessions)
        if custom is not params.get("custom_params"):
            obj.sampling_params = {**params, "custom_params": custom}
        return
    params = obj.sampling_params
    params = params if isinstance(params, list) else [params or {}] * len(sessions)
    if len(params) != len(sessions) or not all(isinstance(p, dict) for p in params):
        return  # SGLang refuses it
    taken = [take_carried(p.get("custom_params"), session) for p, session in zip(params, sessions, strict=True)]
    obj.sampling_params = [
        p if custom is p.get("custom_params") else {**p, "custom_params": custom}
        for p, (custom, _) in zip(params, taken, strict=True)
    ]
    rest = [session for _, session in taken]
    obj.session_params = rest if any(rest) else None


def _is_given(value) -> bool:
    """Whether a field says anything: empty lists and mappings, and those of nothing but None, are absent ones."""
    if isinstance(value, dict):
        return any(map(_is_given, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_is_given, value))
    return value is not None


def _max_chars(tokenizer, context_length: int) -> int:
    """No text with more characters fits ``context_length`` tokens; generous, as some tokenizers drop characters."""
    longest = 0 if tokenizer is None else max(map(len, tokenizer.get_vocab()), default=0)
    return context_length * max(longest, 32)


def _init(config: MixingConfig, server_args, port_args):
    configured = functools.partial(MixedTokenizerManager, mixing_config=config)
    manager, templates = init_tokenizer_manager(server_args, port_args, configured)
    manager.init_chat_sides(templates)
    return manager, templates


def tokenizer_manager_init(config: MixingConfig) -> Callable:
    """The function to hand to SGLang's Engine or launch_server as ``init_tokenizer_manager_func``."""
    return functools.partial(_init, config)
