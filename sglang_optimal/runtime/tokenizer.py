"""The tokenizer manager: checks a mixed request and tokenizes its student context before the scheduler sees it."""

from __future__ import annotations

import functools
from collections.abc import Callable

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.entrypoints.engine import init_tokenizer_manager
from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.utils.hf_transformers_utils import get_tokenizer

from sglang_optimal.config import MixingConfig
from sglang_optimal.runtime.observer import SERIES
from sglang_optimal.runtime.request import mixing_fields, to_wire

# Request features whose meaning for two contexts is not defined; refused rather than answered by the teacher alone.
_UNSUPPORTED = ("input_embeds", "image_data", "video_data", "audio_data", "session_params", "session_id", "lora_path")


class MixedTokenizerManager(TokenizerManager):
    """SGLang's tokenizer manager; ``mixing_config`` is set by ``tokenizer_manager_init`` before construction."""

    mixing_config: MixingConfig

    def init_tokenizer_and_processor(self) -> None:
        super().init_tokenizer_and_processor()
        config = self.mixing_config
        self.student_tokenizer = None
        if config.student_model_path is None:
            return
        model_config = ModelConfig.from_server_args(
            self.server_args, model_path=config.student_model_path, model_revision=config.student_revision
        )
        self.student_context_length = model_config.context_len
        self.common_vocab_size = min(self.model_config.vocab_size, model_config.vocab_size)
        if self.tokenizer is not None:
            self.student_tokenizer = get_tokenizer(
                config.student_model_path,
                tokenizer_mode=self.server_args.tokenizer_mode,
                trust_remote_code=self.server_args.trust_remote_code,
                revision=config.student_revision,
            )

    def _create_tokenized_object(self, obj, *args, **kwargs):
        if isinstance(obj, GenerateReqInput):
            self._prepare_mixing(obj)
        return super()._create_tokenized_object(obj, *args, **kwargs)

    def _prepare_mixing(self, obj: GenerateReqInput) -> None:
        params = obj.sampling_params or {}
        custom = params.get("custom_params")
        if not mixing_fields(custom):
            return
        has_student = self.mixing_config.student_model_path is not None
        wire = to_wire(
            custom,
            self.mixing_config,
            encode_text=self._encode_student_text,
            encode_messages=self._encode_student_messages,
            vocab_size=self.common_vocab_size if has_student else 0,
            context_length=self.student_context_length if has_student else 0,
            max_new_tokens=params.get("max_new_tokens"),
        )
        for name in _UNSUPPORTED:
            if getattr(obj, name, None) is not None:
                raise ValueError(f"{name}: not supported in a mixed request; remove it or the student context.")
        # A new dict: the requests of one batch may share theirs.
        obj.sampling_params = {**params, "custom_params": wire}

    def _encode_student_text(self, text: str) -> list[int]:
        return self._student_tokenizer("student_text").encode(text)

    def _encode_student_messages(self, messages: list[dict]) -> list[int]:
        tokenizer = self._student_tokenizer("student_messages")
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # jinja raises whatever the template raises
            raise ValueError(f"student_messages: the student's chat template refused them: {error}") from None
        return tokenizer.encode(text, add_special_tokens=False)

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


def _init(config: MixingConfig, server_args, port_args):
    MixedTokenizerManager.mixing_config = config
    return init_tokenizer_manager(server_args, port_args, MixedTokenizerManager)


def tokenizer_manager_init(config: MixingConfig) -> Callable:
    """The function to hand to SGLang's Engine or launch_server as ``init_tokenizer_manager_func``."""
    return functools.partial(_init, config)
