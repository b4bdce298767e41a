"""How SGLang's interpreter runs a `mixed_gen`: as a ``gen`` whose backend sees both contexts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

from sglang.lang.backend.base_backend import BaseBackend
from sglang.lang.backend.runtime_endpoint import RuntimeEndpoint
from sglang.lang.interpreter import StreamExecutor
from sglang.lang.ir import SglGen, SglSamplingParams
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from sglang_optimal.lang.contexts import resolve
from sglang_optimal.lang.expr import MixedSglGen


@dataclasses.dataclass
class MixedSglSamplingParams(SglSamplingParams):
    """SGLang's sampling parameters with the mixing fields, which go to the server as ``custom_params``."""

    custom_params: dict[str, Any] = dataclasses.field(default_factory=dict)

    def to_srt_kwargs(self) -> dict[str, Any]:
        """SGLang's, with the mixing fields."""
        return {**super().to_srt_kwargs(), "custom_params": self.custom_params}


class MixedBackend:
    """The state's backend during one `mixed_gen`: turns the two contexts into a request of the real backend.

    Raises:
        RuntimeError: a backend that cannot mix.
        ValueError: a state with images, or with API speculative execution.
    """

    def __init__(self, backend: BaseBackend, expr: MixedSglGen, executor: StreamExecutor):
        if not isinstance(backend, RuntimeEndpoint):
            raise RuntimeError(
                f"mixed_gen: {type(backend).__name__} cannot mix; it needs a server started with `python -m "
                "sglang_optimal.launch_server --student-model-path …` (RuntimeEndpoint), a sglang_optimal.Runtime, or "
                "an OptimalSampler."
            )
        if executor.num_api_spec_tokens is not None:
            raise ValueError("mixed_gen: num_api_spec_tokens is for API models; leave it out of the function.")
        self._backend = backend
        self._expr = expr

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def generate(self, state: StreamExecutor, sampling_params: SglSamplingParams) -> tuple[str, dict[str, Any]]:
        text, meta = self._backend.generate(*self._request(state, sampling_params))
        _check_mixed(meta)
        return text, meta

    def generate_stream(
        self, state: StreamExecutor, sampling_params: SglSamplingParams
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        for text, meta in self._backend.generate_stream(*self._request(state, sampling_params)):
            _check_mixed(meta)
            yield text, meta

    def _request(self, state: StreamExecutor, sampling_params: SglSamplingParams):
        """What stands for the state (its text is the teacher's), and the parameters with the student's context."""
        if state.images_:
            raise ValueError("mixed_gen: images are not supported; take them out of the state.")
        custom = dict(self._expr.mixing)
        teacher = resolve(self._expr.teacher_ctx, state)
        if not isinstance(teacher, str):
            custom["teacher_messages"], teacher = teacher, ""
        elif not teacher:
            raise ValueError("teacher_ctx: is empty here; add text to the state before mixed_gen, or give a context.")
        student = resolve(self._expr.student_ctx, state)
        if isinstance(student, str):
            if not student:
                raise ValueError("student_ctx: is empty here; add text before mixed_gen, or give a context.")
            custom["student_text"] = student
        else:
            custom["student_messages" if isinstance(student[0], dict) else "student_input_ids"] = student
        params = MixedSglSamplingParams(**vars(sampling_params), custom_params=custom)
        return SimpleNamespace(text_=teacher, images_=[]), params


def _check_mixed(meta: dict[str, Any]) -> None:
    aborted = (meta.get("finish_reason") or {}).get("type") == "abort"
    if "alpha" not in meta and not aborted:
        raise RuntimeError(
            "mixed_gen: the server answered with the teacher alone. Ask a server of `python -m "
            "sglang_optimal.launch_server` directly; sglang-router drops what the student reads."
        )


def _execute_gen(original: Callable[..., None], executor: StreamExecutor, expr: SglGen) -> None:
    if not isinstance(expr, MixedSglGen):
        return original(executor, expr)
    backend = executor.backend
    executor.backend = MixedBackend(backend, expr, executor)
    try:
        original(executor, expr)
    finally:
        executor.backend = backend


def install() -> None:
    """Teach SGLang's interpreter the expression, through its own registry of hooks; safe to call again."""
    target = "sglang.lang.interpreter.StreamExecutor._execute_gen"
    if target not in HookRegistry._patched:
        HookRegistry.register(target, _execute_gen, HookType.AROUND)
        HookRegistry.apply_hooks()
