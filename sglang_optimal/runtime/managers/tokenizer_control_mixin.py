"""Calls that act on a model and not on a request: weights are the policy's, memory is both models'."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
from sglang.srt.constants import GPU_MEMORY_ALL_TYPES, GPU_MEMORY_TYPE_WEIGHTS
from sglang.srt.lora.lora_registry import LoRARef
from sglang.srt.managers.io_struct import (
    BeginWeightUpdateReqInput,
    EndWeightUpdateReqInput,
    LoadLoRAAdapterFromTensorsReqInput,
    LoRAUpdateOutput,
    ReleaseMemoryOccupationReqInput,
    ResumeMemoryOccupationReqInput,
    UpdateWeightVersionReqInput,
)
from sglang.srt.managers.tokenizer_control_mixin import TokenizerControlMixin
from sglang.srt.runtime_context import get_device, get_parallel
from sglang.srt.utils import normalize_serialized_named_tensor_payloads

from sglang_optimal.config import MixingConfig
from sglang_optimal.names import STUDENT_ADAPTER
from sglang_optimal.runtime import launch
from sglang_optimal.runtime.model_executor.weight_updater import (
    CLOSED,
    HELD,
    LEAVING_SECONDS,
    SAFETENSORS,
    for_safetensors,
    parts_of,
    tensors_request,
)

Result = TypeVar("Result")

PLAIN = "--student-weights none serves without mixing"


class RouteRefused(ValueError):
    """A route or call of SGLang's that this server cannot honour; HTTP 400."""


class MixedTokenizerControlMixin(TokenizerControlMixin):
    """SGLang's, beside a student.

    Attributes:
        released: the kinds of memory that are released at the moment.
    """

    mixing_config: MixingConfig

    def init_control(self) -> None:
        """Nothing is updated or released yet."""
        self._no_session = asyncio.Event()
        self._no_session.set()
        self._student_version: str | None = None
        self.released: set[str] = set()

    # -- weights ---------------------------------------------------------------------------------------------------

    async def begin_weight_update(self, obj, request=None) -> tuple[bool, str]:
        """SGLang's; requests that come wait until the session ends."""
        result = await super().begin_weight_update(obj, request)
        if result[0]:
            self._no_session.clear()
        return result

    async def end_weight_update(self, obj, request=None) -> tuple[bool, str]:
        """SGLang's; the requests that wait go on."""
        result = await super().end_weight_update(obj, request)
        if result[0]:
            self._no_session.set()
        return result

    async def update_weights_from_tensor(self, obj, request=None) -> tuple[bool, str]:
        """SGLang's; what came over HTTP is not unpickled unless the server was told to."""
        if request is not None and (refusal := self._unpickling(obj)) is not None:
            return False, refusal
        return self._heeded(await super().update_weights_from_tensor(obj, request))

    def _unpickling(self, obj: Any) -> str | None:
        """Why tensors that came over HTTP are not read, if they are not."""
        if obj.load_format == SAFETENSORS or self.mixing_config.pickled_weights == "allow" or not self._mixes:
            return None
        return (
            "load_format: send 'safetensors', with safetensors' bytes in serialized_named_tensors; other formats are "
            "unpickled, which --pickled-weights allow lets them be."
        )

    async def update_weights_from_distributed(self, obj, request=None) -> tuple[bool, str]:
        """SGLang's; where it fails, the session is over."""
        return self._heeded(await super().update_weights_from_distributed(obj, request))

    def _heeded(self, result: tuple[bool, str]) -> tuple[bool, str]:
        if not result[0] and CLOSED in result[1]:
            self._no_session.set()
        return result

    async def update_student_weights_in_memory(self, weights: Mapping[str, torch.Tensor], version: str | None) -> None:
        """A session of its own with some of the policy's tensors, a part of them at a time; an adapter's as a whole.

        Raises:
            ValueError: they do not fit; the old weights stay.
        """
        if self.mixing_config.student_lora_path is not None and self.mixing_config.updated == "student":
            return await self._adapter_in_memory(weights, version)
        await self._step_of_session(self.begin_weight_update(BeginWeightUpdateReqInput()))
        try:
            for number, part in enumerate(parts_of(weights)):
                # The first empties the caches, or is refused; meanwhile nothing fills them.
                request = tensors_request(part, flush_cache=number == 0, weight_version=version)
                await self._step_of_session(self.update_weights_from_tensor(request))
            await self._step_of_session(self.end_weight_update(EndWeightUpdateReqInput()))
        except BaseException:
            if not self._no_session.is_set():  # the next session begins with the weights from before this one
                await self.begin_weight_update(BeginWeightUpdateReqInput())
                await self.end_weight_update(EndWeightUpdateReqInput())
            raise

    async def _adapter_in_memory(self, weights: Mapping[str, torch.Tensor], version: str | None) -> None:
        """Raises ValueError: they do not fit; the old adapter stays."""
        file = Path(self.mixing_config.student_lora_path or "").expanduser() / "adapter_config.json"
        result = await self.load_lora_adapter_from_tensors(
            LoadLoRAAdapterFromTensorsReqInput(
                lora_name=STUDENT_ADAPTER,
                config_dict=json.loads(file.read_text()),
                serialized_named_tensors=[safetensors.torch.save(for_safetensors(weights))],
                load_format=SAFETENSORS,
            )
        )
        if not result.success:
            raise ValueError(result.error_message)
        await self.student_adapter_is(version)

    async def student_adapter_is(self, version: str | None) -> None:
        """What answers say of the student's weights from now on."""
        if version is not None:
            await self.update_weight_version(UpdateWeightVersionReqInput(new_version=version, abort_all_requests=False))

    @staticmethod
    async def _step_of_session(step: Coroutine[Any, Any, tuple[bool, str]]) -> None:
        success, message = await step
        if not success:
            raise ValueError(message)

    async def init_weights_send_group_for_remote_instance(self, obj, request=None) -> tuple[bool, str]:
        """SGLang's; refused beside a student with weights of its own, which the other instance would not get."""
        return self._no_sending() or await super().init_weights_send_group_for_remote_instance(obj, request)

    async def send_weights_to_remote_instance(self, obj, request=None) -> tuple[bool, str]:
        """SGLang's; refused as its group is."""
        return self._no_sending() or await super().send_weights_to_remote_instance(obj, request)

    def _no_sending(self) -> tuple[bool, str] | None:
        if self._mixes and not self.mixing_config.shared_weights:
            return False, "sending weights to another instance is not supported beside a student with its own."
        return None

    async def set_internal_state(self, obj):
        """SGLang's; refused beside a student, where nothing reads what it sets."""
        self._refuse("set_internal_state", "what it sets is for pipelines and SGLang's own drafting")
        return await super().set_internal_state(obj)

    async def start_expert_distribution_record(self):
        """SGLang's; refused beside a student, where one record would be of two models."""
        self._refuse("start_expert_distribution_record", "one record would be of two models")
        return await super().start_expert_distribution_record()

    async def stop_expert_distribution_record(self):
        """SGLang's; refused as its start is."""
        self._refuse("stop_expert_distribution_record", "one record would be of two models")
        return await super().stop_expert_distribution_record()

    async def dump_expert_distribution_record(self):
        """SGLang's; refused as its start is."""
        self._refuse("dump_expert_distribution_record", "one record would be of two models")
        return await super().dump_expert_distribution_record()

    def _refuse(self, route: str, why: str) -> None:
        if self._mixes:
            raise RouteRefused(f"{route}: not supported beside a student: {why}; {PLAIN}.")

    @property
    def _mixes(self) -> bool:
        return self.mixing_config.student_model_path is not None

    # -- memory ----------------------------------------------------------------------------------------------------

    async def release_memory_occupation(self, obj, request=None):
        """SGLang's, of both models, once the running requests have ended; those that come are refused meanwhile.

        Raises:
            RouteRefused: there is nothing to release, or requests hold it.
        """
        route = "release_memory_occupation"
        tags = self._memory_tags(route, obj)
        if not self._mixes:
            return await super().release_memory_occupation(obj, request)
        if not self._no_session.is_set():
            raise RouteRefused(f"{route}: a session of weight updates is open; call end_weight_update() first.")
        self.auto_create_handle_loop()
        async with self._without_requests():
            refusal = await self._once_left(lambda: self._release(tags), held=bool)
            if refusal:
                raise RouteRefused(f"{route}: {refusal}. Let them finish, abort or retract them.")
            self.released.update(tags)

    async def _release(self, tags: list[str]) -> str | None:
        """Why not, if not. Where one of several schedulers refuses, the others take theirs again."""
        answers = await self.release_memory_occupation_communicator(ReleaseMemoryOccupationReqInput(tags=tags))
        refusal = next((answer.rid for answer in answers if answer.rid), None)
        if refusal is not None and len(answers) > 1:
            again = [tag for tag in tags if tag not in self.released]
            await self.resume_memory_occupation_communicator(ResumeMemoryOccupationReqInput(tags=again))
        return refusal

    @staticmethod
    async def _once_left(attempt: Callable[[], Awaitable[Result]], held: Callable[[Result], bool]) -> Result:
        """What ``attempt`` gives, made again for a moment where it is ``held`` by requests whose clients have left."""
        deadline = time.monotonic() + LEAVING_SECONDS
        while held(result := await attempt()) and time.monotonic() <= deadline:
            await asyncio.sleep(0.05)
        return result

    @contextlib.asynccontextmanager
    async def _without_requests(self) -> AsyncIterator[None]:
        """Within, none is running, as SGLang waits before an update from disk; a paused engine's wait anyway."""
        async with self.is_pause_cond:
            is_paused = self.is_pause
        async with contextlib.nullcontext() if is_paused else self.model_update_lock.writer_lock:
            yield

    async def resume_memory_occupation(self, obj, request=None):
        """SGLang's, of both models; what was not released is there already.

        Raises:
            RouteRefused: there was nothing to release.
        """
        tags = self._memory_tags("resume_memory_occupation", obj)
        if not self._mixes:
            return await super().resume_memory_occupation(obj, request)
        tags = [tag for tag in tags if tag in self.released]
        if tags:
            await super().resume_memory_occupation(ResumeMemoryOccupationReqInput(tags=tags), request)
            self.released.difference_update(tags)

    def _memory_tags(self, route: str, obj: Any) -> list[str]:
        """What a request names; all where it names none."""
        if not launch.can_release(get_device().device):
            raise RouteRefused(f"{route}: the models are on the CPU, where there is nothing to release.")
        tags = list(obj.tags or GPU_MEMORY_ALL_TYPES)
        unknown = [tag for tag in tags if tag not in GPU_MEMORY_ALL_TYPES]
        if unknown:
            raise RouteRefused(f"{route}: tags: {unknown[0]!r} is none of {', '.join(GPU_MEMORY_ALL_TYPES)}.")
        return tags

    def check_awake(self, what: str, tags: tuple[str, ...] = tuple(GPU_MEMORY_ALL_TYPES)) -> None:
        """Refuse what would read or write memory that is released.

        Raises:
            RouteRefused: names what is released, and the way out.
        """
        missing = [tag for tag in tags if tag in self.released]
        if missing:
            raise RouteRefused(f"{what}: {', '.join(missing)} released; call resume_memory_occupation() first.")

    async def get_weights_by_name(self, obj, request=None):
        """SGLang's; refused while they are released."""
        self.check_awake("get_weights_by_name", (GPU_MEMORY_TYPE_WEIGHTS,))
        return await super().get_weights_by_name(obj, request)

    async def check_weights(self, obj, request=None):
        """SGLang's; refused while they are released."""
        self.check_awake("weights_checker", (GPU_MEMORY_TYPE_WEIGHTS,))
        return await super().check_weights(obj, request)

    async def _scheduler_answers(self) -> AsyncGenerator[dict[str, Any], None]:
        """In place of a health check's token, which needs the memory: SGLang looks at when it last heard anything."""
        await self.get_internal_state()
        yield {}

    # -- adapters --------------------------------------------------------------------------------------------------

    async def load_lora_adapter(self, obj, request=None) -> LoRAUpdateOutput:
        """SGLang's; beside a student that is an adapter, another one of the same layers in its place."""
        if self.mixing_config.student_lora_path is None:
            return await super().load_lora_adapter(obj, request)
        if not any(Path(obj.lora_path).expanduser().glob("*.safetensors")):
            return _not_loaded(f"lora_path: no *.safetensors in {obj.lora_path}; other formats are not read.")
        return await self._exchange_adapter(obj)

    async def load_lora_adapter_from_tensors(self, obj, request=None) -> LoRAUpdateOutput:
        """SGLang's; beside a student that is an adapter, another one of the same layers in its place."""
        if request is not None and (refusal := self._unpickling(obj)) is not None:
            return _not_loaded(refusal)
        if self.mixing_config.student_lora_path is None:
            return await super().load_lora_adapter_from_tensors(obj, request)
        obj.serialized_named_tensors = normalize_serialized_named_tensor_payloads(obj.serialized_named_tensors)
        return await self._exchange_adapter(obj)

    async def _exchange_adapter(self, obj: Any) -> LoRAUpdateOutput:
        """Once the running requests have ended; those that come wait for it."""
        if obj.lora_name != STUDENT_ADAPTER:
            return _not_loaded(
                f"lora_name: beside --student-lora-path there is the student's adapter alone, {STUDENT_ADAPTER!r}; "
                f"got {obj.lora_name!r}."
            )
        if get_parallel().dp_size > 1:
            return _not_loaded("data-parallel replicas are not supported for dynamic lora loading.")
        self.auto_create_handle_loop()
        adapter = LoRARef(lora_name=STUDENT_ADAPTER, lora_path=getattr(obj, "lora_path", "__tensor__"))
        obj.lora_id = adapter.lora_id
        async with self._without_requests(), self.lora_update_lock:
            (result, *_) = await self._once_left(
                lambda: self.update_lora_adapter_communicator(obj),
                held=lambda results: not results[0].success and HELD in results[0].error_message,
            )
            if result.success:  # for plain requests that ask for it
                await self.lora_registry.unregister(STUDENT_ADAPTER)
                await self.lora_registry.register(adapter)
                self.lora_ref_cache[STUDENT_ADAPTER] = adapter
        return result

    async def unload_lora_adapter(self, obj, request=None) -> LoRAUpdateOutput:
        """SGLang's; refused beside a student that is an adapter."""
        if self.mixing_config.student_lora_path is None:
            return await super().unload_lora_adapter(obj, request)
        return _not_loaded("the student's adapter cannot be unloaded; load another one in its place.")


def _not_loaded(message: str) -> LoRAUpdateOutput:
    return LoRAUpdateOutput(success=False, error_message=message)
