"""The tokenizer manager: checks a mixed request and tokenizes its student context before the scheduler sees it."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable

from sglang.srt.constants import HEALTH_CHECK_RID_PREFIX
from sglang.srt.entrypoints.engine import init_tokenizer_manager
from sglang.srt.managers.io_struct import GenerateReqInput, UpdateWeightFromDiskReqInput
from sglang.srt.managers.tokenizer_manager import ServerStatus, TokenizerManager
from sglang.srt.utils.hf_transformers_utils import get_tokenizer

from sglang_optimal.config import MixingConfig
from sglang_optimal.runtime.architectures import student_model_config
from sglang_optimal.runtime.messages import render
from sglang_optimal.runtime.request import (
    STUDENT_FIELDS,
    mixing_fields,
    take_carried,
    take_teacher_messages,
    to_wire,
)
from sglang_optimal.runtime.student_weights import HELD, LEAVING_SECONDS, is_for_student, mark_for_student
from sglang_optimal.runtime.tap import MIXING_TAP
from sglang_optimal.series import SERIES

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


class MixedTokenizerManager(TokenizerManager):
    """SGLang's tokenizer manager; ``mixing_config`` is set by ``tokenizer_manager_init`` before construction."""

    mixing_config: MixingConfig

    def init_tokenizer_and_processor(self) -> None:
        super().init_tokenizer_and_processor()
        config = self.mixing_config
        self.student_tokenizer = None
        self.teacher_max_chars = self.student_max_chars = 0
        if config.student_model_path is None:
            return
        model_config = student_model_config(self.server_args, config.student_model_path, config.student_revision)
        self.student_context_length = model_config.context_len
        self.common_vocab_size = min(self.model_config.vocab_size, model_config.vocab_size)
        if self.tokenizer is not None:
            self.student_tokenizer = get_tokenizer(
                config.student_model_path,
                tokenizer_mode=self.server_args.tokenizer_mode,
                trust_remote_code=self.server_args.trust_remote_code,
                revision=config.student_revision,
            )
        self.teacher_max_chars = _max_chars(self.tokenizer, self.model_config.context_len)
        self.student_max_chars = _max_chars(self.student_tokenizer, self.student_context_length)

    @property
    def serving_chat_class(self):
        if self.mixing_config.student_model_path is None:
            return super().serving_chat_class
        from sglang_optimal.runtime.openai_api import MixedServingChat

        return MixedServingChat

    def generate_request(self, obj, request=None):
        if isinstance(obj, GenerateReqInput):
            if not hasattr(obj, "is_single"):
                # SGLang asks for it when the answer has ended, even if the request was refused before it looked at it;
                # failing there would close a connection that has gone on to the next request.
                obj.is_single = True
            _unpack_carried(obj)
            self._render_teacher_messages(obj)
        outputs = super().generate_request(obj, request)
        tap = MIXING_TAP.get()
        return outputs if tap is None else tap.follow(outputs)

    async def update_student_weights_from_disk(
        self, obj: UpdateWeightFromDiskReqInput, request=None
    ) -> tuple[bool, str, int]:
        """SGLang's ``update_weights_from_disk`` for the student: waits for running requests, then updates.

        Returns:
            (success, message, number of paused requests)
        """
        if self.mixing_config.student_model_path is None:
            return False, "this server has no student model; start it without --student-weights none.", 0
        if not isinstance(obj.model_path, str) or not obj.model_path:
            return False, "model_path: must be a folder or a Hugging Face id.", 0
        mark_for_student(obj)
        deadline = time.monotonic() + LEAVING_SECONDS
        while True:
            success, message, paused = await self.update_weights_from_disk(obj, request)
            if success or HELD not in message or time.monotonic() > deadline:
                return success, message, paused
            await asyncio.sleep(0.05)

    async def _wait_for_model_update_from_disk(self, obj: UpdateWeightFromDiskReqInput):
        # What SGLang serves by name is the teacher.
        teacher = self.model_path, self.served_model_name
        result = await super()._wait_for_model_update_from_disk(obj)
        if is_for_student(obj):
            self.model_path, self.served_model_name = teacher
        return result

    def _render_teacher_messages(self, obj: GenerateReqInput) -> None:
        """``teacher_messages`` become the request's token ids, before SGLang looks at its text."""
        batch = isinstance(obj.sampling_params, list)
        params = obj.sampling_params if batch else [obj.sampling_params]
        customs = [p.get("custom_params") if isinstance(p, dict) else None for p in params]
        config, limit = self.mixing_config, self.teacher_max_chars
        parts = [take_teacher_messages(c, config, limit) if isinstance(c, dict) else None for c in customs]
        if not any(parts):
            return
        if not all(parts):
            raise ValueError(
                f"teacher_messages: sampling_params[{parts.index(None)}] has none; give it in each or none."
            )
        if obj.text or obj.input_ids is not None or obj.input_embeds is not None:
            raise ValueError("teacher_messages: takes the place of text and input_ids; send one of them.")
        if self.tokenizer is None:
            raise ValueError("teacher_messages: the server runs with --skip-tokenizer-init; send input_ids.")
        ids = [render(self.tokenizer, messages, "teacher_messages", kwargs) for messages, kwargs, _ in parts]
        params = [{**p, "custom_params": rest} for p, (_, _, rest) in zip(params, parts, strict=True)]
        obj.text = None
        obj.input_ids, obj.sampling_params = (ids, params) if batch else (ids[0], params[0])

    def _create_tokenized_object(self, obj, input_text, input_ids, *args, **kwargs):
        if isinstance(obj, GenerateReqInput):
            if input_ids is not None and len(input_ids) == 0:
                # Stock SGLang ends over it; beside other requests it would be answered from their logits.
                raise ValueError("text: gives no tokens at all; send some text, or input_ids.")
            self._prepare_mixing(obj)
        return super()._create_tokenized_object(obj, input_text, input_ids, *args, **kwargs)

    def _prepare_mixing(self, obj: GenerateReqInput) -> None:
        params = obj.sampling_params or {}
        custom = params.get("custom_params")
        if self.mixing_config.student_lora_path is not None and params.get("beam_width") not in (None, 1):
            # SGLang counts an adapter for each request, where beam search has more rows, and ends the process.
            raise ValueError("beam_width: beam search is not supported beside --student-lora-path; remove it.")
        if not mixing_fields(custom):
            self._check_plain(obj)
            return
        has_student = self.mixing_config.student_model_path is not None
        wire = to_wire(
            custom,
            self.mixing_config,
            encode_text=self._encode_student_text,
            encode_messages=self._encode_student_messages,
            vocab_size=self.common_vocab_size if has_student else 0,
            context_length=self.student_context_length if has_student else 0,
            max_chars=self.student_max_chars if has_student else 0,
            max_new_tokens=params.get("max_new_tokens"),
        )
        for name in _UNSUPPORTED:
            if getattr(obj, name, None) is not None:
                raise ValueError(f"{name}: not supported in a mixed request; remove it or the student context.")
        if params.get("beam_width") not in (None, 1):
            raise ValueError("beam_width: beam search is not supported in a mixed request; remove one of the two.")
        # A new dict: the requests of one batch may share theirs.
        obj.sampling_params = {**params, "custom_params": wire}

    def _check_plain(self, obj: GenerateReqInput) -> None:
        if self.mixing_config.plain_requests == "allow" or self.server_status == ServerStatus.Starting:
            return  # SGLang warms the server up with a plain request
        if isinstance(obj.rid, str) and obj.rid.startswith(HEALTH_CHECK_RID_PREFIX):
            return
        raise ValueError(
            f"a mixed request needs one of {', '.join(STUDENT_FIELDS)} in custom_params (behind sglang-router, in "
            "session_params.mixing); this server takes no plain requests (--plain-requests refuse)."
        )

    def _encode_student_text(self, text: str) -> list[int]:
        return self._student_tokenizer("student_text").encode(text)

    def _encode_student_messages(self, messages: list[dict], kwargs: dict) -> list[int]:
        return render(self._student_tokenizer("student_messages"), messages, "student_messages", kwargs)

    def _student_tokenizer(self, field: str):
        if self.student_tokenizer is None:
            raise ValueError(f"{field}: the server runs with --skip-tokenizer-init; send student_input_ids.")
        return self.student_tokenizer

    def update_request_meta_info(self, meta_info, state, customized_info, index, finish_reason) -> None:
        # SGLang pads plain requests with None when a mixed one shares the message; leave their meta_info as it was.
        own = {
            key: values
            for key, values in customized_info.items()
            if key not in SERIES
            or key in state.customized_info_accumulated
            or (values[index] and values[index][0] is not None)
        }
        super().update_request_meta_info(meta_info, state, own, index, finish_reason)


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


def _max_chars(tokenizer, context_length: int) -> int:
    """No text with more characters fits ``context_length`` tokens; generous, as some tokenizers drop characters."""
    longest = 0 if tokenizer is None else max(map(len, tokenizer.get_vocab()), default=0)
    return context_length * max(longest, 32)


def _init(config: MixingConfig, server_args, port_args):
    MixedTokenizerManager.mixing_config = config
    return init_tokenizer_manager(server_args, port_args, MixedTokenizerManager)


def tokenizer_manager_init(config: MixingConfig) -> Callable:
    """The function to hand to SGLang's Engine or launch_server as ``init_tokenizer_manager_func``."""
    return functools.partial(_init, config)
