"""The frontend language's backend for an engine in this process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sglang.lang.backend.base_backend import BaseBackend
from sglang.lang.backend.runtime_endpoint import RuntimeEndpoint
from sglang.lang.chat_template import get_chat_template_by_model_path
from sglang.lang.global_config import global_config
from sglang.lang.interpreter import StreamExecutor
from sglang.lang.ir import SglSamplingParams

_OUTSIDE_SAMPLING_PARAMS = ("return_logprob", "logprob_start_len", "top_logprobs_num", "return_text_in_logprobs")


class EngineRuntimeEndpoint(RuntimeEndpoint):
    """What RuntimeEndpoint is to a server, for an engine: the same requests, without HTTP.

    Calls come from the threads of many programs at once and run in one batch; the engine's loop must take them from
    any thread (`LoopThread`).
    """

    def __init__(self, engine: Any):
        BaseBackend.__init__(self)  # RuntimeEndpoint's own would ask a server
        self.engine = engine
        self.model_info = {"model_path": engine.tokenizer_manager.model_path}
        self.chat_template = get_chat_template_by_model_path(self.model_info["model_path"])

    def generate(self, s: StreamExecutor, sampling_params: SglSamplingParams) -> tuple[str, dict[str, Any]]:
        """As SGLang's, by the engine."""
        output = self._generate_http_request(s, self._data(s, sampling_params))
        return output["text"], output["meta_info"]

    def generate_stream(
        self, s: StreamExecutor, sampling_params: SglSamplingParams
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """As SGLang's, by the engine."""
        chunks = self._start({**self._data(s, sampling_params), "stream": True})
        position = 0
        try:
            while True:
                try:
                    chunk = self.engine.loop.run_until_complete(anext(chunks))
                except StopAsyncIteration:
                    return
                yield chunk["text"][position:], chunk["meta_info"]
                position = len(chunk["text"])
        finally:
            self.engine.loop.run_until_complete(chunks.aclose())

    def _data(self, s: StreamExecutor, sampling_params: SglSamplingParams) -> dict[str, Any]:
        self._handle_dtype_to_regex(sampling_params)
        data = {
            "text": s.text_,
            "sampling_params": {
                "skip_special_tokens": global_config.skip_special_tokens_in_output,
                "spaces_between_special_tokens": global_config.spaces_between_special_tokens_in_out,
                **sampling_params.to_srt_kwargs(),
            },
        }
        given = {name: getattr(sampling_params, name, None) for name in _OUTSIDE_SAMPLING_PARAMS}
        return {**data, **{name: value for name, value in given.items() if value is not None}}

    def _start(self, data: dict[str, Any]):
        from sglang.srt.managers.io_struct import GenerateReqInput

        return self.engine.tokenizer_manager.generate_request(GenerateReqInput(**data), None)

    def _generate_http_request(self, s: StreamExecutor, data: dict[str, Any]) -> Any:
        """``select``, which is inherited, asks through this."""
        self._add_images(s, data)
        return self.engine.loop.run_until_complete(anext(self._start(data)))

    def commit_lazy_operations(self, s: StreamExecutor) -> None:
        """By a generation of nothing, as SGLang's."""
        self._generate_http_request(s, {"text": s.text_, "sampling_params": {"max_new_tokens": 0}})

    fill_image = commit_lazy_operations

    def cache_prefix(self, prefix_str: str) -> None:
        """Of the engine, by a generation of nothing."""
        data = {"text": prefix_str, "sampling_params": {"max_new_tokens": 0}}
        self.engine.loop.run_until_complete(anext(self._start(data)))

    def flush_cache(self) -> None:
        """The engine's."""
        self.engine.flush_cache()

    def get_server_info(self) -> dict[str, Any]:
        """The engine's."""
        return self.engine.get_server_info()

    def start_profile(self) -> None:
        """The engine's."""
        self.engine.start_profile()

    def stop_profile(self) -> None:
        """The engine's."""
        self.engine.stop_profile()
