"""The adapter that is the student, and other weights in its place while the server runs."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import safetensors.torch
import torch
from sglang.srt.lora.lora_registry import LoRARef
from sglang.srt.managers.io_struct import (
    LoadLoRAAdapterFromTensorsReqInput,
    LoadLoRAAdapterReqInput,
    LoRAUpdateOutput,
    UnloadLoRAAdapterReqInput,
)
from sglang.srt.managers.tp_worker import TpModelWorker
from sglang.srt.model_executor.model_runner import ModelRunner

from sglang_optimal.names import STUDENT_ADAPTER
from sglang_optimal.runtime.model_executor.weight_updater import (
    ANOTHER_RANK,
    SAFETENSORS,
    check_finite,
    everywhere,
    own_payload,
)

logger = logging.getLogger(__name__)

OLD_ADAPTER = "The student's old adapter is in place."
"""In the message of an exchange that failed."""


class StudentAdapter:
    """The adapter with which the student's rows run.

    SGLang knows each by an id, with which the KV of its rows is kept apart; another one has another id, so that nothing
    computed with the old one is found again.

    Args:
        path: of ``--student-lora-path``, which SGLang has loaded or will.

    Attributes:
        lora_id: SGLang's id of it.
    """

    def __init__(self, path: str):
        self.lora_id = LoRARef.deterministic_id(STUDENT_ADAPTER, path)

    def exchange(
        self, worker: TpModelWorker, request: LoadLoRAAdapterReqInput | LoadLoRAAdapterFromTensorsReqInput
    ) -> LoRAUpdateOutput:
        """Load another adapter in its place; on a failure of any rank the old one stays. No row may run with it.

        Args:
            request: SGLang's, with an id that no adapter has. Its tensors may be a file of safetensors.
        """
        runner = worker.model_runner
        # SGLang takes no second adapter of one name.
        request.lora_name = f"{STUDENT_ADAPTER}-{request.lora_id}"
        problem = self._load(worker, request)
        if not everywhere(problem is None):
            runner.unload_lora_adapter(request.to_ref())
            problem = problem or ANOTHER_RANK
            logger.error(problem)
            return LoRAUpdateOutput(success=False, error_message=f"{problem} {OLD_ADAPTER}")
        old, self.lora_id = self.lora_id, request.lora_id
        runner.unload_lora_adapter(UnloadLoRAAdapterReqInput(lora_name=STUDENT_ADAPTER, lora_id=old).to_ref())
        return LoRAUpdateOutput(success=True)

    def _load(self, worker: TpModelWorker, request: Any) -> str | None:
        """The new adapter beside the old one; what is wrong with it, if anything."""
        try:
            if isinstance(request, LoadLoRAAdapterReqInput):
                result = TpModelWorker.load_lora_adapter(worker, request)
            elif request.load_format == SAFETENSORS:
                tensors = safetensors.torch.load(own_payload(request.serialized_named_tensors))
                result = worker.model_runner.load_lora_adapter_from_tensors(
                    request.to_ref(), tensors, request.config_dict, request.added_tokens_config
                )
            else:
                result = TpModelWorker.load_lora_adapter_from_tensors(worker, request)
            if not result.success:
                return result.error_message
            self._check(worker.model_runner, request.lora_id)
        except ValueError as error:
            return str(error)
        except Exception as error:  # whatever a loader raises; the server goes on with the old adapter
            logger.exception("adapter")
            return f"Failed to load the adapter: {type(error).__name__}: {error}."
        return None

    def _check(self, runner: ModelRunner, lora_id: str) -> None:
        """Raise ValueError where the new adapter has other tensors than the old one but for their rank, or no numbers.

        SGLang leaves out what it does not know, is silent about what is not there, and ends its process over a shape
        when a request first uses the adapter.
        """
        old, new = (dict(_tensors(runner, one)) for one in (self.lora_id, lora_id))
        ranks = [runner.lora_manager.configs[one].r for one in (self.lora_id, lora_id)]
        for name in sorted(old.keys() ^ new.keys()):
            what = "the new adapter has no tensor of this name" if name in old else "the student's adapter has none"
            raise ValueError(f"{name}: {what}; it must adapt the same layers.")
        for name, tensor in new.items():
            expected = _with_rank(name, list(old[name].shape), *ranks)
            if list(tensor.shape) != expected:
                raise ValueError(f"{name}: has shape {list(tensor.shape)}, but {expected} in the student's adapter.")
        check_finite(list(new.items()))


def _with_rank(name: str, shape: list[int], old: int, new: int) -> list[int]:
    """The shape of a tensor of an adapter whose rank is another."""
    place = -2 if "lora_A" in name else -1
    return [*shape[:place], shape[place] // old * new, *shape[len(shape) + place + 1 :]]


def _tensors(runner: ModelRunner, lora_id: str) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of an adapter as SGLang holds it, with those of one module together."""
    adapter = runner.lora_manager.loras[lora_id]
    for layer in adapter.layers:
        yield from layer.weights.items()
    yield from adapter.embedding_layers.items()
