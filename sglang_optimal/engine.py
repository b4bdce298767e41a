"""OptimalSampler: mixed sampling in this process's SGLang engine, without a server."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import tempfile
from array import array
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_optimal.config import ALPHA_KEYS, SETTINGS, MixingConfig, check_known, takes_settings

if TYPE_CHECKING:
    import numpy as np
    import torch

# The student is an argument of its own, and a call here is always of a mixture.
_SETTINGS = tuple(name for name in SETTINGS if name not in ("student_model_path", "plain_requests"))

Prompt = str | Sequence[int] | Sequence[dict[str, Any]]
"""Text, token ids, or chat messages."""


@dataclasses.dataclass(frozen=True)
class AlphaStats:
    """Statistics of alpha over the tokens of one or more generations. std: the population's; NaN without tokens."""

    mean: float
    std: float
    min: float
    max: float
    count: int

    @classmethod
    def of(cls, alphas: Sequence[float]) -> AlphaStats:
        n = len(alphas)
        if n == 0:
            return cls(math.nan, math.nan, math.nan, math.nan, 0)
        mean = math.fsum(alphas) / n
        std = math.sqrt(math.fsum((a - mean) ** 2 for a in alphas) / n)
        return cls(mean, std, min(alphas), max(alphas), n)


@dataclasses.dataclass(frozen=True)
class GenerationResult:
    """One generation; while streaming, what there is of it so far.

    Attributes:
        text: the generated text.
        token_ids: its token ids.
        finish_reason: "stop", "length" or "abort"; None while streaming.
        alphas: the teacher's weight for each token.
        mixing_info: with ``return_mixing_info`` a list of floats for each of teacher_logprob, student_logprob,
            mixture_logprob, kl_to_student, kl_to_teacher, ess_ratio, or for those that were named; all aligned with
            ``token_ids``. Else empty.
        top_k: with ``return_top_k`` the arrays of `sglang_optimal.decode_top_k` for each of ``top_k_of``. Else empty.
        index: number of the prompt in the call.
        meta_info: everything SGLang says about the request.
    """

    text: str
    token_ids: list[int]
    finish_reason: str | None
    alphas: list[float]
    mixing_info: dict[str, list[float]]
    index: int
    meta_info: dict[str, Any] = dataclasses.field(repr=False)
    top_k: dict[str, dict[str, np.ndarray]] = dataclasses.field(default_factory=dict, repr=False)

    @functools.cached_property
    def alpha(self) -> AlphaStats:
        """Statistics of ``alphas``."""
        return AlphaStats.of(self.alphas)


class OptimalSampler:
    """Samples every token from q* ∝ π_student^(1−α)·π_teacher^α, each model reading its own prompt.

    Args:
        teacher: Hugging Face id or folder of the teacher.
        student: the same for the student; None: the teacher itself (self-distillation).
        teacher_system_prompt, student_system_prompt: put before the prompts of each side: as a system message with
            ``enable_chat_template``, else as a first paragraph. Not used for token ids.
        enable_chat_template: wrap text prompts as a user message in each model's own chat template.
        **arguments: settings of mixing (``alpha_method``, ``student_weights``, …; all are in docs/api.md), those of
            alpha being defaults for every generation, and any argument of SGLang's ServerArgs
            (``mem_fraction_static``, ``context_length``, …).

    Raises:
        ValueError: names the argument: unknown, out of range, models that are missing or do not fit together. Or the
            self-check found a fault, which is printed.

    Example:
        >>> with OptimalSampler("Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-1.5B-Instruct") as sampler:
        ...     result = sampler.generate("2+2=? (the answer is 4)", "2+2=?", max_new_tokens=32)
        ...     print(result.text, result.alpha.mean)
    """

    @takes_settings(_SETTINGS)
    def __init__(
        self,
        teacher: str,
        student: str | None = None,
        *,
        teacher_system_prompt: str | None = None,
        student_system_prompt: str | None = None,
        enable_chat_template: bool = False,
        **arguments: Any,
    ):
        mixing = {name: arguments.pop(name) for name in _SETTINGS if name in arguments}
        mixing["student_model_path"] = str(student if student is not None else teacher)
        self.config = MixingConfig.from_dict(mixing, "OptimalSampler")
        self._system_prompts = (teacher_system_prompt, student_system_prompt)
        self._enable_chat_template = enable_chat_template
        self._history: list[tuple[int, array]] = []
        self._calls = 0
        self.engine = None
        self.engine = _start_engine(str(teacher), self.config, arguments)

    # -- generation ------------------------------------------------------------------------------------------------

    @takes_settings(ALPHA_KEYS)
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        student_prompts: Prompt | Sequence[Prompt] | None = None,
        *,
        sampling_params: dict[str, Any] | None = None,
        return_mixing_info: bool | Sequence[str] = False,
        return_top_k: int | None = None,
        top_k_of: str | Sequence[str] | None = None,
        stream: bool = False,
        **sampling: Any,
    ) -> GenerationResult | list[GenerationResult] | Iterator[GenerationResult]:
        """Generate from the mixture.

        Args:
            prompts: what the teacher reads: one prompt or a sequence of them. A prompt is text, token ids or messages.
            student_prompts: what the student reads, one for each prompt; None: the same prompts.
            sampling_params: SGLang's sampling parameters; ``**sampling`` adds to them (``max_new_tokens=64``).
            return_mixing_info: fill ``GenerationResult.mixing_info``; or the names of series, see docs/api.md.
            return_top_k: fill ``GenerationResult.top_k`` with that many of the most likely tokens at each position.
            top_k_of: of which distributions: "teacher", "student", "mixture" or several; None: of both models.
            stream: return an iterator of growing results instead, ``index`` telling which prompt.
            **sampling: sampling parameters, and the settings of alpha (``alpha_method``, … see AlphaSettings) over the
                sampler's defaults.

        Returns:
            One result for one prompt, else a list, prompt by prompt; with ``n`` > 1, a list of ``n`` a prompt.

        Raises:
            ValueError: no prompts, an empty prompt, lengths that differ, or parameters that are wrong.
            RuntimeError: a model failed; see docs/operations.md. A stream ends with finish_reason "abort" instead.
        """
        request = self._request(
            prompts, student_prompts, sampling_params, sampling, _returned(return_mixing_info, return_top_k, top_k_of)
        )
        with _plain_errors():
            output = self._running().generate(**request.arguments, stream=stream)
        if stream:
            return self._stream(request, output)
        return self._results(request, output)

    @takes_settings(ALPHA_KEYS)
    async def async_generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        student_prompts: Prompt | Sequence[Prompt] | None = None,
        *,
        sampling_params: dict[str, Any] | None = None,
        return_mixing_info: bool | Sequence[str] = False,
        return_top_k: int | None = None,
        top_k_of: str | Sequence[str] | None = None,
        stream: bool = False,
        **sampling: Any,
    ) -> GenerationResult | list[GenerationResult] | AsyncIterator[GenerationResult]:
        """`generate` for asyncio, in any event loop; with ``stream``, await it and iterate with ``async for``."""
        request = self._request(
            prompts, student_prompts, sampling_params, sampling, _returned(return_mixing_info, return_top_k, top_k_of)
        )
        engine = self._running()
        with _plain_errors():
            output = await engine.loop.run(engine.async_generate(**request.arguments, stream=stream))
        if stream:
            return self._async_stream(request, output)
        return self._results(request, output)

    @takes_settings(ALPHA_KEYS)
    def score(
        self,
        prompts: Prompt | Sequence[Prompt],
        student_prompts: Prompt | Sequence[Prompt] | None,
        completions: str | Sequence[int] | Sequence[str | Sequence[int]],
        *,
        sampling_params: dict[str, Any] | None = None,
        return_mixing_info: bool | Sequence[str] = True,
        return_top_k: int | None = None,
        top_k_of: str | Sequence[str] | None = None,
        **sampling: Any,
    ) -> GenerationResult | list[GenerationResult]:
        """What both models and their mixture say of completions that are given, as if each token had been drawn.

        One prefill for each side. A mixed sample's own tokens give its series back.

        Args:
            prompts, student_prompts: as for `generate`.
            completions: one for each prompt: text, tokenized without special tokens, or token ids.
            sampling_params, **sampling: temperature, ``logit_bias``, and for ``behaviour_logprob`` top-k, top-p and
                min-p; and the settings of alpha. What acts on generated text alone is refused.
            return_mixing_info, return_top_k, top_k_of: as for `generate`.

        Returns:
            As `generate`: ``token_ids`` and ``text`` are the completion's.

        Raises:
            ValueError: as `generate`; or a completion is empty, or too long for a model beside its prompt.
            RuntimeError: a model failed.
        """
        returned = _returned(return_mixing_info, return_top_k, top_k_of)
        sampling = {**sampling, "max_new_tokens": 0}
        request = self._request(prompts, student_prompts, sampling_params, sampling, returned)
        batch: list[Any] = [completions] if request.single else list(completions)
        params = request.arguments["sampling_params"]
        if len(batch) != len(params):
            raise ValueError(f"completions: {len(batch)} of them for {len(params)} prompts; give one for each prompt.")
        for own, completion in zip(params, batch, strict=True):
            kind = "text" if isinstance(completion, str) else "input_ids"
            own["custom_params"][f"completion_{kind}"] = completion if isinstance(completion, str) else list(completion)
        with _plain_errors():
            output = self._running().generate(**request.arguments)
        return self._results(request, output)

    # -- alpha history ---------------------------------------------------------------------------------------------

    def alpha_stats(self) -> AlphaStats:
        """Statistics over every token generated since the start or ``clear_alpha_history``."""
        return AlphaStats.of([a for _, alphas in self._history for a in alphas])

    def save_alpha_history(self, path: str | Path) -> None:
        """Write the alphas of every finished generation as JSON:
        ``{"stats": {...}, "generations": [{"call": 0, "stats": {...}, "alphas": [...]}, ...]}``."""
        generations = [
            {"call": call, "stats": _json_stats(AlphaStats.of(alphas)), "alphas": [round(a, 6) for a in alphas]}
            for call, alphas in self._history
        ]
        content = {"stats": _json_stats(self.alpha_stats()), "generations": generations}
        Path(path).write_text(json.dumps(content) + "\n")

    def clear_alpha_history(self) -> None:
        self._history.clear()

    @property
    def student_is_adapter(self) -> bool:
        """Whether the student is the teacher with a LoRA adapter, whose weights `update_student_weights` takes then."""
        return self._running().mixing_config.student_lora_path is not None

    # -- student weights -------------------------------------------------------------------------------------------

    def update_student_weights(
        self, weights: str | Path | Mapping[str, torch.Tensor], version: str | None = None
    ) -> None:
        """Give the student new weights; the teacher keeps its own, and the student's radix cache is cleared.

        Waits for the requests that run; those that come meanwhile wait for it.

        Args:
            weights: a folder of safetensors, a Hugging Face id, or {name in the checkpoint: tensor}, on the CPU or on
                the engine's device. Tensors that a mapping has not stay as they are. Of a student that is an adapter:
                another adapter's folder, or all of its tensors by peft's names.
            version: what ``student_weight_version`` says of samples from now on.

        Raises:
            ValueError: they do not fit the student or cannot be read; the old weights stay.
        """
        if isinstance(weights, str | Path):
            return self._update_student_from_disk(str(weights), version)
        engine = self._running()
        if engine.mixing_config.updated == "student" and engine.server_args.dp_size == 1:
            return self._update_student_in_memory(weights, version)
        from safetensors.torch import save_file

        from sglang_optimal.runtime.model_executor.weight_updater import for_safetensors

        with tempfile.TemporaryDirectory(prefix="sglang-optimal-weights-") as folder:
            save_file(for_safetensors(weights), Path(folder) / "model.safetensors")
            self._update_student_from_disk(folder, version)

    def _update_student_from_disk(self, path: str, version: str | None) -> None:
        from sglang.srt.managers.io_struct import UpdateWeightFromDiskReqInput

        engine = self._running()
        request = UpdateWeightFromDiskReqInput(model_path=path, weight_version=version)
        success, message, _ = engine.loop.run_until_complete(
            engine.tokenizer_manager.update_student_weights_from_disk(request)
        )
        if not success:
            raise ValueError(message)

    def _update_student_in_memory(self, weights: Mapping[str, torch.Tensor], version: str | None) -> None:
        engine = self._running()
        engine.loop.run_until_complete(engine.tokenizer_manager.update_student_weights_in_memory(weights, version))

    # -- life ------------------------------------------------------------------------------------------------------

    @functools.cached_property
    def endpoint(self):
        """The backend of SGLang's frontend language, which looks for this name: give the sampler as ``backend``."""
        from sglang_optimal.lang.engine_backend import EngineRuntimeEndpoint

        return EngineRuntimeEndpoint(self._running())

    def shutdown(self) -> None:
        """Stop the engine and free its memory; safe to call again."""
        if self.engine is not None:
            engine, self.engine = self.engine, None
            engine.shutdown()

    def __enter__(self) -> OptimalSampler:
        return self

    def __exit__(self, *exc_info) -> None:
        self.shutdown()

    def _running(self):
        if self.engine is None:
            raise RuntimeError("this OptimalSampler has been shut down.")
        return self.engine

    # -- requests and results --------------------------------------------------------------------------------------

    def _request(self, prompts, student_prompts, sampling_params, sampling, returned) -> _Request:
        single, teachers = _as_batch(prompts, "prompts")
        if student_prompts is None:
            students = teachers
        else:
            student_single, students = _as_batch(student_prompts, "student_prompts")
            if len(students) != len(teachers) or student_single != single:
                raise ValueError(
                    f"student_prompts: {len(students)} of them for {len(teachers)} prompts; give one for each prompt."
                )
        alpha = {name: sampling.pop(name) for name in ALPHA_KEYS if name in sampling}
        params = {**(sampling_params or {}), **sampling}
        _check_sampling(params)
        custom = dict(params.pop("custom_params", None) or {})
        custom.update({k: v for k, v in alpha.items() if v is not None})
        custom.update(returned)
        ids = [self._teacher_ids(prompt) for prompt in teachers]
        per_prompt = [{**params, "custom_params": {**custom, **self._student_fields(prompt)}} for prompt in students]
        call, self._calls = self._calls, self._calls + 1
        return _Request({"input_ids": ids, "sampling_params": per_prompt}, single, int(params.get("n") or 1), call)

    def _teacher_ids(self, prompt: Prompt) -> list[int]:
        kind, value = self._rendered(prompt, self._system_prompts[0])
        if kind == "input_ids":
            return value
        tokenizer = self._running().tokenizer_manager.tokenizer
        if tokenizer is None:
            raise ValueError("prompts: the engine runs with skip_tokenizer_init; give token ids.")
        if kind == "text":
            return tokenizer.encode(value)
        from sglang_optimal.runtime.entrypoints.messages import checked_messages

        manager = self._running().tokenizer_manager
        return manager.chat_sides.teacher.ids(checked_messages(value, "prompts"), "prompts")

    def _student_fields(self, prompt: Prompt) -> dict[str, Any]:
        kind, value = self._rendered(prompt, self._system_prompts[1])
        return {f"student_{kind}": value}

    def _rendered(self, prompt: Prompt, system: str | None) -> tuple[str, Any]:
        if isinstance(prompt, str):
            if self._enable_chat_template:
                prompt = [{"role": "user", "content": prompt}]
            else:
                return "text", prompt if not system else f"{system}\n\n{prompt}"
        elif not isinstance(prompt[0], dict):
            return "input_ids", list(prompt)
        messages: list[Any] = list(prompt)
        if system and messages[0].get("role") != "system":
            messages.insert(0, {"role": "system", "content": system})
        return "messages", messages

    def _results(self, request: _Request, output) -> GenerationResult | list[GenerationResult]:
        results = [self._result(request, i, entry) for i, entry in enumerate(output)]
        return results[0] if request.single and request.n == 1 else results

    def _result(self, request: _Request, position: int, entry: dict[str, Any]) -> GenerationResult:
        from sglang_optimal.names import ALL_SERIES, TOP_K
        from sglang_optimal.top_k import decode_top_k

        meta = entry["meta_info"]
        series = {name: meta[name] for name in ALL_SERIES if name in meta}
        alphas = series.pop("alpha", [])
        reason = meta.get("finish_reason")
        result = GenerationResult(
            text=entry.get("text", ""),
            token_ids=list(entry.get("output_ids", [])),
            finish_reason=reason["type"] if reason else None,
            alphas=list(alphas),
            mixing_info=series,
            index=position // request.n,
            meta_info=meta,
            top_k=decode_top_k(meta.get(TOP_K, {})),
        )
        if reason:
            self._history.append((request.call, array("f", alphas)))
        return result

    def _stream(self, request: _Request, chunks) -> Iterator[GenerationResult]:
        with contextlib.closing(chunks):
            for chunk in chunks:
                yield self._result(request, chunk.get("index", 0), chunk)

    async def _async_stream(self, request: _Request, chunks) -> AsyncIterator[GenerationResult]:
        async with contextlib.aclosing(self._running().loop.iterate(chunks)) as chunks:
            async for chunk in chunks:
                yield self._result(request, chunk.get("index", 0), chunk)


@dataclasses.dataclass
class _Request:
    """arguments: for SGLang's engine. single: one prompt was given. n: samples a prompt. call: number of the call."""

    arguments: dict[str, Any]
    single: bool
    n: int
    call: int


def _returned(return_mixing_info, return_top_k, top_k_of) -> dict[str, Any]:
    """The fields of a request about what comes back."""
    if not isinstance(return_mixing_info, bool | str):
        return_mixing_info = list(return_mixing_info)
    fields: dict[str, Any] = {"return_mixing_info": return_mixing_info}
    if return_top_k is not None:
        fields |= {"return_top_k": return_top_k, "top_k_format": "base64"}
    if top_k_of is not None:
        fields["top_k_of"] = top_k_of if isinstance(top_k_of, str) else list(top_k_of)
    return fields


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    """What SGLang raises for its HTTP server, as an exception that a program expects."""
    from fastapi import HTTPException

    try:
        yield
    except HTTPException as error:
        raise RuntimeError(error.detail) from error


def _start_engine(teacher: str, config: MixingConfig, server_args: dict[str, Any]):
    from sglang_optimal.platforms import cpu_processes
    from sglang_optimal.runtime import launch, plugin

    with cpu_processes.fork_server.begun():
        with cpu_processes.without_gc():
            launch.check_sglang_version()  # before anything of SGLang is imported
            plugin.prepare()
            parsed, config = launch.checked_server_args(
                teacher, config, {"log_level": "error", **server_args}, "OptimalSampler"
            )
            from sglang_optimal.runtime.entrypoints.engine import MixedEngine
        return MixedEngine(parsed, config)


def _as_batch(prompts: Any, name: str) -> tuple[bool, list]:
    """(whether it was one prompt, list of prompts)."""
    batch: list[Any]
    if isinstance(prompts, str):
        single, batch = True, [prompts]
    elif not isinstance(prompts, Sequence) or isinstance(prompts, bytes):
        raise ValueError(f"{name}: must be text, token ids, messages, or a sequence of these; got {prompts!r}.")
    else:
        single = bool(prompts) and isinstance(prompts[0], int | dict)
        batch = [prompts] if single else list(prompts)
    if not batch:
        raise ValueError(f"{name}: is empty; give at least one prompt.")
    for i, prompt in enumerate(batch):
        where = name if single else f"{name}[{i}]"
        if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
            raise ValueError(f"{where}: must be text, token ids or messages; got {prompt!r}.")
        if len(prompt) == 0:
            raise ValueError(f"{where}: is empty.")
        kinds = {dict} if isinstance(prompt[0], dict) else {int} if not isinstance(prompt, str) else {str}
        if any(type(item) not in kinds for item in prompt):
            raise ValueError(f"{where}: must be text, or all token ids, or all messages.")
    return single, batch


def _check_sampling(params: dict[str, Any]) -> None:
    from sglang.srt.sampling.sampling_params import SamplingParams

    allowed = [name for name in SamplingParams.__struct_fields__ if not name.startswith("_")]
    check_known(params, allowed, "sampling_params")


def _json_stats(stats: AlphaStats) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in dataclasses.asdict(stats).items()}
