"""New weights for a running model: what is checked before any is touched, and how they are undone.

An update of the student from disk travels as SGLang's own ``UpdateWeightFromDiskReqInput``, marked in its
``manifest``: the scheduler process decodes no message types but SGLang's.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from sglang.srt.distributed import get_tp_group
from sglang.srt.managers.io_struct import UpdateWeightsFromTensorReqInput
from sglang.srt.runtime_context import get_parallel
from sglang.srt.utils import MultiprocessingSerializer

from sglang_optimal.local_model import model_folder
from sglang_optimal.platforms import packed_linear

logger = logging.getLogger(__name__)

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_TARGET = "sglang_optimal"

SAFETENSORS = "safetensors"
"""The ``load_format`` of weights that nothing unpickles."""
HELD = "running requests hold KV of the old weights"
"""In the message of an update that came too early."""
PART_BYTES = 1 << 28
"""Of tensors that are sent at once."""
ANOTHER_RANK = "Another rank could not load the weights; see its log."
CLOSED = "The session is closed; begin again."
"""In the message of a part that failed."""
LEAVING_SECONDS = 1.0
"""How long requests may take to end whose clients have left: the server has forgotten them, the scheduler not yet."""


def mark_for_student(request: Any) -> None:
    """Address an ``UpdateWeightFromDiskReqInput`` to the student. A version it brings is the student's."""
    request.manifest = {_TARGET: "student", "weight_version": request.weight_version}
    request.weight_version = None


def is_for_student(request: Any) -> bool:
    return (request.manifest or {}).get(_TARGET) == "student"


def student_version(request: Any) -> str | None:
    return request.manifest["weight_version"]


def checkpoint_layout(path: str, revision: str | None = None) -> dict[str, list[int]] | None:
    """{tensor name: shape} of a checkpoint in a folder or in the hub's local cache; None for one that is not there, or
    has no safetensors.

    Raises:
        ValueError: a file is truncated or no safetensors file.
    """
    files = sorted(_folder(path, revision).glob("*.safetensors"))
    if not files:
        return None
    layout = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                layout.update({name: list(tensors.get_slice(name).get_shape()) for name in tensors.keys()})  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file.name} cannot be read: {error}") from None
    return layout


def _folder(path: str, revision: str | None) -> Path:
    return model_folder(path, revision) or Path(path).expanduser()


def check_checkpoint(path: str, expected: dict[str, list[int]] | None, side: str = "student") -> None:
    """Refuse a checkpoint that would leave a model half updated, before any weight is touched.

    Args:
        path: folder or Hugging Face id of the new weights.
        expected: layout of the checkpoint that the model was loaded from, if known.
        side: whose it is, for messages.

    Raises:
        ValueError: no such folder, not safetensors, truncated, or other tensors than the model has.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        if path.startswith(("/", ".", "~")) or path.count("/") > 1:
            raise ValueError(f"model_path: no folder at {path}.")
        return  # an id on the hub
    layout = checkpoint_layout(path)
    if layout is None:
        raise ValueError(f"model_path: no *.safetensors in {path}; other formats are not read (they can run code).")
    if expected is None:
        return
    for name in sorted(expected.keys() | layout.keys()):
        old, new = expected.get(name), layout.get(name)
        # Models with tied embeddings may or may not store the second copy.
        if old != new and not (name == "lm_head.weight" and (old is None or new is None)):
            raise ValueError(f"model_path: tensor {name!r} has shape {new} in {path}, but {old} in the {side}.")


def check_tensors(named: Sequence[tuple[str, torch.Tensor]], expected: dict[str, list[int]] | None, side: str) -> None:
    """Refuse tensors that are no part of a model, or that no request could be answered with.

    Args:
        named: as in the model's checkpoint; any part of it.
        expected: layout of the checkpoint that the model was loaded from, if known.
        side: whose it is, for messages.

    Raises:
        ValueError: names the tensor.
    """
    for name, tensor in named:
        if expected is None or (name == "lm_head.weight" and name not in expected):  # tied embeddings, sent twice
            continue
        if name not in expected:
            near = difflib.get_close_matches(name, expected, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{name}: the {side} has no tensor of this name.{hint}")
        if list(tensor.shape) != expected[name]:
            raise ValueError(f"{name}: has shape {list(tensor.shape)}, but {expected[name]} in the {side}.")
    check_finite(named)


def check_finite(named: Sequence[tuple[str, torch.Tensor]]) -> None:
    """Raise ValueError for tensors with NaN or infinity, which no request could be answered with."""
    finite = [tensor.isfinite().all() for _, tensor in named if tensor.dtype in _FLOATS]
    if finite and not bool(torch.stack(finite).all()):  # one wait for all of them
        names = (name for name, tensor in named if tensor.dtype in _FLOATS and not bool(tensor.isfinite().all()))
        raise ValueError(f"{next(names)}: has NaN or infinity.")


def own_payload(payloads: Sequence[bytes]) -> bytes:
    """This rank's of the serialized tensors of a request: one for all, or one for each.

    Raises:
        ValueError: another number of them.
    """
    if len(payloads) not in (1, get_parallel().tp_size):
        raise ValueError(f"serialized_named_tensors: {len(payloads)} for {get_parallel().tp_size} ranks.")
    return payloads[get_parallel().tp_rank if len(payloads) > 1 else 0]


def parts_of(weights: Mapping[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """The tensors, some at a time: of one device, and of `PART_BYTES` or a single one."""
    part: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in weights.items():
        tensor = tensor.detach()
        if part and (size + tensor.nbytes > PART_BYTES or tensor.device != next(iter(part.values())).device):
            yield part
            part, size = {}, 0
        part[name] = tensor
        size += tensor.nbytes
    if part:
        yield part


def for_safetensors(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors on the CPU, those copied that share memory with another: safetensors takes no two names for one, as
    tied embeddings have."""
    separate: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in weights.items():
        tensor = tensor.detach().cpu().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return separate


def tensors_request(part: dict[str, torch.Tensor], **fields: Any) -> UpdateWeightsFromTensorReqInput:
    """SGLang's request for one of `parts_of`: as safetensors, or handles of memory on an accelerator."""
    load_format = None
    if all(tensor.device.type == "cpu" for tensor in part.values()):
        payloads, load_format = [safetensors.torch.save(for_safetensors(part))], SAFETENSORS
    else:  # of each rank its own: memory that is sent is held until the one who read it lets go
        named = list(part.items())
        payloads = [MultiprocessingSerializer.serialize(named) for _ in range(get_parallel().tp_size)]
    return UpdateWeightsFromTensorReqInput(serialized_named_tensors=payloads, load_format=load_format, **fields)


def everywhere(success: bool) -> bool:
    """Combine ``success`` of all ranks: true where it is true on each."""
    if get_parallel().tp_size == 1:
        return success
    every = torch.tensor(int(success))
    torch.distributed.all_reduce(every, torch.distributed.ReduceOp.MIN, group=get_tp_group().cpu_group)
    return bool(every)


class UpdatedModel:
    """A running model whose weights are updated, and undone where that fails.

    Args:
        side: ``teacher``, ``student`` or ``model`` (of both sides), for messages.
        runner: its model runner.
        path, revision: what it was loaded from.
        keeps: whether the old weights are kept during an update.

    Attributes:
        whole: whether all of its weights are of one version; false during an update, after one that failed half way
            where nothing was kept, and where they were released without a backup.
    """

    def __init__(self, side: str, runner: Any, path: str, revision: str | None, *, keeps: bool):
        self.side = side
        self.runner = runner
        self.keeps = keeps
        self.whole = True
        self._layout = checkpoint_layout(path, revision)
        self._path = path
        self._old: dict[str, torch.Tensor] = {}
        self._is_kept = False
        self._is_lost = False

    def keep(self) -> None:
        """Copy the weights to the CPU, into memory that is taken once, where they are whole."""
        if not self.keeps or not self.whole:
            return
        self._path = self.runner.model_config.model_path
        pin = torch.accelerator.is_available()
        with torch.no_grad():
            for name, tensor in self.runner.model.state_dict().items():
                old = self._old.get(name)
                if old is None or (old.shape, old.dtype) != (tensor.shape, tensor.dtype):
                    old = self._old[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=pin)
                old.copy_(tensor, non_blocking=True)
        if pin:
            torch.accelerator.synchronize()
        self._is_kept = True

    def lose(self) -> None:
        """The weights are gone: they were released, and nothing kept them."""
        self.whole = self._is_kept = False
        self._is_lost = True

    def done(self) -> None:
        """An update has ended."""
        self.whole, self._is_lost = True, False

    def put_back(self) -> None:
        """The weights as they were when they were kept."""
        if not self._is_kept:
            return
        with torch.no_grad():
            for name, tensor in self.runner.model.state_dict().items():
                tensor.copy_(self._old[name])
        packed_linear.forget()
        self.runner.model_config.model_path = self._path
        self.whole = True

    def words_of_the_old(self) -> str:
        """What became of the weights after a failure."""
        if self.whole:
            return f"The {self.side}'s old weights are in place."
        if self._is_lost:
            return (
                f"The {self.side}'s weights were released, and nothing kept them (--enable-weights-cpu-backup would): "
                "no request is answered until an update has ended."
            )
        return (
            f"The {self.side}'s weights are partly new (--weight-rollback off): no request is answered until the next "
            "update has ended."
        )

    @contextlib.contextmanager
    def checked(self) -> Iterator[None]:
        """Within, the model refuses tensors that it has not, before it takes any of them."""
        model = self.runner.model
        load = model.load_weights

        def load_checked(weights: Iterable[tuple[str, torch.Tensor]], *args: Any, **kwargs: Any) -> Any:
            named = list(weights)
            check_tensors(named, self._layout, self.side)
            return load(named, *args, **kwargs)

        model.load_weights = load_checked
        try:
            yield
        finally:
            del model.load_weights

    def refusal_of(self, request: Any) -> str | None:
        """What is wrong with the checkpoint of an ``UpdateWeightFromDiskReqInput``, before any weight is touched."""
        if request.load_format not in (None, "auto", SAFETENSORS):
            return None
        try:
            check_checkpoint(request.model_path, self._layout, self.side)
        except ValueError as error:
            return str(error)
        except Exception as error:  # a folder that cannot be read
            logger.exception("weights")
            return self._failure(error)
        return None

    def _failure(self, error: Exception) -> str:
        return f"Failed to update the {self.side}'s weights: {error}"

    def from_disk(self, request: Any) -> tuple[bool, str]:
        """New weights of the same shapes from a folder or the hub, in place.

        Args:
            request: SGLang's ``UpdateWeightFromDiskReqInput``, which `refusal_of` let through.

        Returns:
            (success, message)
        """
        path = request.model_path
        self.whole = False
        try:
            success, message = self.runner.weight_updater.update_weights_from_disk(
                path, request.load_format, recapture_cuda_graph=request.recapture_cuda_graph
            )
            if success:
                check_finite(list(self.runner.model.state_dict().items()))
        except ValueError as error:
            success, message = False, f"model_path: {path}: {error}"
        except Exception as error:  # whatever the loader raises; the server goes on with the old weights
            logger.exception("weights")
            success, message = False, self._failure(error)
        return success, message
