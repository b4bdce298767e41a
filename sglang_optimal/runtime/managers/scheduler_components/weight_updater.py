"""SGLang's updates of weights, for the side that a trainer trains (``policy``), and undone where they fail.

A session is what lies between ``begin_weight_update`` and ``end_weight_update``. Meanwhile no request is answered
(managers/tokenizer_manager.py). If one of its parts fails, on any rank, the session is closed and the weights are those
from before it; so they are where the next session begins before this one has ended.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import msgspec
import safetensors.torch
import torch
from sglang.srt.constants import GPU_MEMORY_ALL_TYPES, GPU_MEMORY_TYPE_KV_CACHE, GPU_MEMORY_TYPE_WEIGHTS
from sglang.srt.managers.io_struct import (
    BeginWeightUpdateReqInput,
    BeginWeightUpdateReqOutput,
    CheckWeightsReqInput,
    EndWeightUpdateReqInput,
    GetWeightsByNameReqInput,
    GetWeightsByNameReqOutput,
    ReleaseMemoryOccupationReqInput,
    ReleaseMemoryOccupationReqOutput,
    ResumeMemoryOccupationReqInput,
    ResumeMemoryOccupationReqOutput,
    UpdateWeightFromDiskReqInput,
    UpdateWeightFromDiskReqOutput,
    UpdateWeightsFromDistributedReqInput,
    UpdateWeightsFromDistributedReqOutput,
    UpdateWeightsFromIPCReqInput,
    UpdateWeightsFromIPCReqOutput,
    UpdateWeightsFromTensorReqInput,
    UpdateWeightsFromTensorReqOutput,
)
from sglang.srt.managers.scheduler_components.weight_updater import (
    SchedulerWeightUpdaterManager,
    _export_static_state,
    _import_static_state,
)
from sglang.srt.runtime_context import get_exec, get_serving

from sglang_optimal.config import MixingConfig
from sglang_optimal.runtime.model_executor.weight_updater import (
    ANOTHER_RANK,
    CLOSED,
    HELD,
    SAFETENSORS,
    UpdatedModel,
    everywhere,
    is_for_student,
    own_payload,
    student_version,
)

logger = logging.getLogger(__name__)

_Loaded = tuple[bool, str]

_RELEASED = "the weights are released; call resume_memory_occupation() first."


@dataclasses.dataclass(kw_only=True, slots=True)
class MixedSchedulerWeightUpdaterManager(SchedulerWeightUpdaterManager):
    """SGLang's, where what it calls the target is the policy.

    Attributes:
        config: the student, and whose weights are updated.
        version_before: of the weights when the session began.
        student_version: of a student that is not the policy.
        every_side: whether both models are meant for the time of a call.
        guest_static_state: the buffers of a guest with weights of its own, while they are released.
    """

    config: MixingConfig
    version_before: str | None = None
    student_version: str | None = None
    every_side: bool = False
    guest_static_state: Any = None
    # SGLang's: what lies between begin and end; None outside.
    _session: Any = None

    @classmethod
    def like(cls, manager: SchedulerWeightUpdaterManager, config: MixingConfig) -> MixedSchedulerWeightUpdaterManager:
        """The same manager, for both models."""
        names = [field.name for field in dataclasses.fields(SchedulerWeightUpdaterManager) if field.init]
        manager.tp_worker.updated_models  # noqa: B018  # reads the checkpoints' headers now
        return cls(config=config, **{name: getattr(manager, name) for name in names})

    # Explicit calls of SGLang's below, because a class with slots is made anew, and super() would look for the old one.

    def _select_runners(self, selector: str = "all") -> list[tuple[str, Any]]:
        """SGLang's; the checksums' are both models."""
        if self.every_side:
            return self.tp_worker.runners_by_side()
        return SchedulerWeightUpdaterManager._select_runners(self, selector)

    # -- sessions --------------------------------------------------------------------------------------------------

    def begin_weight_update(self, recv_req: BeginWeightUpdateReqInput) -> BeginWeightUpdateReqOutput:
        """SGLang's, on the policy; a session that was not ended is undone first."""
        refusal = self._refusal(recv_req.selector)
        if refusal is not None:
            return BeginWeightUpdateReqOutput(success=False, message=refusal)
        if self._session is not None:
            logger.warning("A session of weight updates was not ended; its weights are undone.")
            self._undo()
        self._keep()
        return SchedulerWeightUpdaterManager.begin_weight_update(self, recv_req)

    def end_weight_update(self, recv_req: EndWeightUpdateReqInput):
        """SGLang's; what was kept of the old weights is not needed any more."""
        output = SchedulerWeightUpdaterManager.end_weight_update(self, recv_req)
        if output.success:
            for model in self._models():
                model.done()
        return output

    def update_weights_from_tensor(self, recv_req: UpdateWeightsFromTensorReqInput):
        """SGLang's, on the policy; with ``load_format`` "safetensors" the payloads are files of those."""

        def load() -> _Loaded:
            load_format, payloads = recv_req.load_format, recv_req.serialized_named_tensors
            own = own_payload(payloads)
            if load_format == SAFETENSORS:
                named, load_format = list(safetensors.torch.load(own).items()), None
            else:
                named = self.tp_worker.deserialize_own_rank(payloads)
            return self._on_each(
                recv_req.selector,
                lambda updater: updater.update_weights_from_tensor(named_tensors=named, load_format=load_format),
                "Success",
            )

        success, message = self._load(recv_req, "tensor", load)
        return UpdateWeightsFromTensorReqOutput(success=success, message=message)

    def update_weights_from_distributed(self, recv_req: UpdateWeightsFromDistributedReqInput):
        """SGLang's, on the policy; the scheduler's own runner is the one that joined the group and receives."""

        def load() -> _Loaded:
            weights = self.tp_worker.model_runner.weight_updater.receive_weights_from_distributed(
                names=recv_req.names,
                dtypes=recv_req.dtypes,
                shapes=recv_req.shapes,
                group_name=recv_req.group_name,
                load_format=recv_req.load_format,
            )
            return self._on_each(
                recv_req.selector,
                lambda updater: updater.load_weights_from_distributed(weights),
                "Succeeded to update parameter online.",
            )

        success, message = self._load(recv_req, "distributed", load)
        return UpdateWeightsFromDistributedReqOutput(success=success, message=message)

    def update_weights_from_ipc(self, recv_req: UpdateWeightsFromIPCReqInput):
        """SGLang's, on the policy: a session of its own."""

        def load() -> _Loaded:
            return self._on_each(
                "all", lambda updater: updater.update_weights_from_ipc(recv_req), "Succeeded to update model weights."
            )

        success, message = self._load(recv_req, "ipc", load, alone=True)
        return UpdateWeightsFromIPCReqOutput(success=success, message=message)

    def _on_each(self, selector: str, load: Callable[[Any], _Loaded], done: str) -> _Loaded:
        """``load`` with the updater of each runner that is meant, until one fails; ``done`` says that none did."""
        for _, runner in self._select_runners(selector):
            success, message = load(runner.weight_updater)
            if not success:
                return success, message
        return True, done

    def _load(self, recv_req: Any, source: str, load: Callable[[], _Loaded], *, alone: bool = False) -> _Loaded:
        """Run ``load``, and undo everything since the session began where it fails on any rank.

        Args:
            source: SGLang's word for it in metrics and messages.
            alone: whether it needs no session around it.
        """
        refusal = self._refusal(getattr(recv_req, "selector", "all")) or self._still_held(recv_req, self._models())
        if alone:
            refusal = self._in_a_session() or refusal
        if refusal is not None:
            return False, refusal
        if alone:
            self._keep()
        elif self._session is None:
            return False, (
                f"update_weights_from_{source} must run between begin_weight_update() and end_weight_update()"
            )
        with self._observe_weight_load(source):
            success, message = self._attempt(load)
            if not everywhere(success):
                self._undo()
                if success:
                    message = ANOTHER_RANK
                return False, f"{message} {self._after_failure()} {CLOSED}"
            if alone:
                for model in self._models():
                    model.done()
            else:
                self._session = msgspec.structs.replace(self._session, loaded_weights=True)
            self.record_weight_version_after_update(recv_req.weight_version)
            return self.flush_cache_after_weight_update(recv_req, success, message)

    def _attempt(self, load: Callable[[], _Loaded]) -> _Loaded:
        try:
            with contextlib.ExitStack() as stack, torch.no_grad():
                for model in self._models():
                    model.whole = False
                    stack.enter_context(model.checked())
                success, message = load()
        except ValueError as error:
            success, message = False, str(error)
        except Exception as error:  # whatever a loader raises; the server goes on with the old weights
            logger.exception("weights")
            success, message = False, f"Failed to update the weights: {type(error).__name__}: {error}."
        if not success:
            logger.error(message)
        return success, message

    def _keep(self) -> None:
        self.version_before = get_serving().weight_version
        for model in self._models():
            model.keep()

    def _undo(self) -> None:
        """Close the session, if there is one, with the weights from before it."""
        if self._session is not None:
            SchedulerWeightUpdaterManager.end_weight_update(self, EndWeightUpdateReqInput())
        for model in self._models():
            model.put_back()
        if self.version_before is not None:
            self.record_weight_version_after_update(self.version_before)

    def _after_failure(self) -> str:
        return self._models()[0].words_of_the_old()

    def _models(self) -> list[UpdatedModel]:
        """Whose weights are updated."""
        return self.tp_worker.updated_models

    # -- refusals and caches ---------------------------------------------------------------------------------------

    def _refusal(self, selector: str) -> str | None:
        if GPU_MEMORY_TYPE_WEIGHTS in self.offload_tags:
            return _RELEASED
        if not self._models():
            return (
                "the student is an adapter, and the weights beneath it are the teacher's: --policy both lets them be "
                "updated."
            )
        if selector == "draft":
            return "selector: there is no draft model; 'all' and 'target' are the policy's weights (--policy)."
        return None

    def _still_held(self, recv_req: Any, models: list[UpdatedModel]) -> str | None:
        """Why the caches that the old weights filled cannot be emptied, so that nothing is loaded at all."""
        if not recv_req.flush_cache:
            return None
        if self._are_the_guest(models):
            held = self.tp_worker.guest_kv.num_active_reqs > 0
        else:
            held = not self.is_fully_idle(ignore_waiting=self.scheduler._engine_paused)
        if not held:
            return None
        return f"{HELD}. Let them finish, abort or retract them, or update with flush_cache=false."

    def _are_the_guest(self, models: list[UpdatedModel]) -> bool:
        """Whether they are the guest alone, whose caches are its own."""
        return [model.side for model in models] == [self.config.guest]

    def flush_cache_after_weight_update(self, recv_req: Any, success: bool, message: str) -> _Loaded:
        """SGLang's, where the policy is the guest of its caches alone."""
        return self._flush(recv_req, self._models(), success, message)

    def _flush(self, recv_req: Any, models: list[UpdatedModel], success: bool, message: str) -> _Loaded:
        if not self._are_the_guest(models):
            return SchedulerWeightUpdaterManager.flush_cache_after_weight_update(self, recv_req, success, message)
        if recv_req.flush_cache:
            self.tp_worker.guest_kv.reset()
        return success, message

    # -- from disk -------------------------------------------------------------------------------------------------

    def update_weights_from_disk(self, recv_req: UpdateWeightFromDiskReqInput) -> UpdateWeightFromDiskReqOutput:
        """SGLang's, on the policy or, so marked, on the student."""
        student, student_alone = is_for_student(recv_req), self.tp_worker.student_model
        if student and student_alone is None:
            return _from_disk(
                False,
                "the student shares the teacher's weights; start the server with --student-weights separate to update "
                "it.",
            )
        models = [student_alone] if student else self._models()
        refusal = (
            self._in_a_session()
            or (_RELEASED if GPU_MEMORY_TYPE_WEIGHTS in self.offload_tags else None)
            or (None if student else self._refusal("all"))
            or self._still_held(recv_req, models)
        )
        if refusal is not None:
            return _from_disk(False, refusal)
        with self._observe_weight_load("disk"):
            success, message = self._from_disk(models, recv_req)
            if success:
                version = student_version(recv_req) if student else recv_req.weight_version
                if student and self.config.updated == "teacher":
                    self.student_version = version
                else:
                    self.record_weight_version_after_update(version)
                success, message = self._flush(recv_req, models, success, message)
        return _from_disk(success, message)

    def _in_a_session(self) -> str | None:
        return None if self._session is None else "a weight-update session is open; call end_weight_update() first."

    def _from_disk(self, models: list[UpdatedModel], recv_req: UpdateWeightFromDiskReqInput) -> _Loaded:
        for model in models:
            refusal = model.refusal_of(recv_req)
            if not everywhere(refusal is None):
                return False, f"{refusal or ANOTHER_RANK} {model.words_of_the_old()}"
        for model in models:
            model.keep()
            success, message = model.from_disk(recv_req)
            if not everywhere(success):
                message = message if not success else ANOTHER_RANK
                for touched in models[: models.index(model) + 1]:
                    touched.put_back()
                return False, f"{message} {model.words_of_the_old()}"
            model.done()
        return True, f"Succeeded to update the {self._word(models)}'s weights."

    def _word(self, models: list[UpdatedModel]) -> str:
        return models[0].side if len(models) == 1 else "models"

    # -- memory ----------------------------------------------------------------------------------------------------

    def release_memory_occupation(self, recv_req: ReleaseMemoryOccupationReqInput) -> ReleaseMemoryOccupationReqOutput:
        """SGLang's, of both models, and of what is not released yet.

        Returns:
            SGLang's answer; ``rid`` says why nothing was released, where SGLang would end its process.
        """
        if not self.is_fully_idle(ignore_waiting=self.scheduler._engine_paused):
            return ReleaseMemoryOccupationReqOutput(rid="running requests hold it")
        tags = [tag for tag in recv_req.tags or GPU_MEMORY_ALL_TYPES if tag not in self.offload_tags]
        if not tags:
            return ReleaseMemoryOccupationReqOutput()
        if GPU_MEMORY_TYPE_WEIGHTS in tags and not self.config.shared_weights:
            self.guest_static_state = _export_static_state(self.tp_worker.guest_runner.model)
        return SchedulerWeightUpdaterManager.release_memory_occupation(self, ReleaseMemoryOccupationReqInput(tags=tags))

    def resume_memory_occupation(self, recv_req: ResumeMemoryOccupationReqInput) -> ResumeMemoryOccupationReqOutput:
        """SGLang's, of both models, and of what is released.

        The policy's weights are lost then, unless ``--enable-weights-cpu-backup`` keeps them; the other model's are
        kept always (managers/tp_worker.py).
        """
        tags = [tag for tag in recv_req.tags or GPU_MEMORY_ALL_TYPES if tag in self.offload_tags]
        if not tags:
            return ResumeMemoryOccupationReqOutput()
        output = SchedulerWeightUpdaterManager.resume_memory_occupation(self, ResumeMemoryOccupationReqInput(tags=tags))
        runners = (self.tp_worker.model_runner, self.tp_worker.guest_runner)
        if GPU_MEMORY_TYPE_WEIGHTS in tags:
            if self.guest_static_state is not None:
                _import_static_state(self.tp_worker.guest_runner.model, self.guest_static_state)
                self.guest_static_state = None
            if self.memory_saver_adapter.enabled and not get_exec().features.enable_weights_cpu_backup:
                for model in self._models():
                    model.lose()
        if GPU_MEMORY_TYPE_KV_CACHE in tags:
            for runner in runners:  # padded rows of graphs read row 0
                runner.req_to_token_pool.req_to_token.zero_()
        return output

    # -- what reads weights ----------------------------------------------------------------------------------------

    def get_weights_by_name(self, recv_req: GetWeightsByNameReqInput) -> GetWeightsByNameReqOutput:
        """SGLang's, of the policy."""
        (_, runner), *_ = self._select_runners()
        parameter = runner.weight_exporter.get_weights_by_name(recv_req.name, recv_req.truncate_size)
        return GetWeightsByNameReqOutput(parameter=parameter)

    def check_weights(self, recv_req: CheckWeightsReqInput):
        """SGLang's, on the policy; checksums are of both models, the other side's under its name."""
        self.every_side = recv_req.action == "checksum" and recv_req.selector == "all"
        try:
            return SchedulerWeightUpdaterManager.check_weights(self, recv_req)
        finally:
            self.every_side = False

    def save_sharded_model(self, params: dict[str, Any]) -> None:
        """SGLang's, of the policy."""
        (_, runner), *_ = self._select_runners()
        runner.weight_exporter.save_sharded_model(
            path=params["path"], pattern=params["pattern"], max_size=params["max_size"]
        )

    def save_remote_model(self, params: dict[str, Any]) -> None:
        """SGLang's, of the policy."""
        (_, runner), *_ = self._select_runners()
        runner.weight_exporter.save_remote_model(params["url"])


def _from_disk(success: bool, message: str) -> UpdateWeightFromDiskReqOutput:
    return UpdateWeightFromDiskReqOutput(success=success, message=message, num_paused_requests=0)
