"""New weights for a running student, read from disk; the teacher and its caches are not touched.

Travels as SGLang's own ``UpdateWeightFromDiskReqInput``, marked in its ``manifest``: the scheduler process decodes no
message types but SGLang's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open

from sglang_optimal.platforms import packed_linear

logger = logging.getLogger(__name__)

_TARGET = "sglang_optimal"

HELD = "running requests hold student KV of the old weights"
"""In the message of an update that came too early."""
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
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(path, revision=revision, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        return folder


def check_checkpoint(path: str, expected: dict[str, list[int]] | None) -> None:
    """Refuse a checkpoint that would leave the student half updated, before any weight is touched.

    Args:
        path: folder or Hugging Face id of the new weights.
        expected: layout of the checkpoint that the student was loaded from, if known.

    Raises:
        ValueError: no such folder, not safetensors, truncated, or other tensors than the student has.
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
            raise ValueError(f"model_path: tensor {name!r} has shape {new} in {path}, but {old} in the student.")


def update_from_disk(
    runner: Any,
    path: str,
    layout: dict[str, list[int]] | None,
    load_format: str | None,
    recapture_cuda_graph: bool,
    everywhere: Callable[[bool], bool],
) -> tuple[bool, str]:
    """Load new weights into a model runner; on failure the old ones are put back.

    SGLang's own rollback reads the checkpoint that has just failed once more, so the old weights are kept here.

    Args:
        runner: the student's model runner.
        path: folder or Hugging Face id of the new weights.
        layout: of the checkpoint that the student was loaded from, see `check_checkpoint`.
        load_format, recapture_cuda_graph: as in SGLang's request.
        everywhere: given whether it went well here, says whether it did on every rank.

    Returns:
        (success, message)
    """
    model, config = runner.model, runner.model_config
    old_path = config.model_path
    backup: dict[str, torch.Tensor] = {}
    try:
        check_checkpoint(path, layout)
        with torch.no_grad():
            backup = {name: tensor.detach().to("cpu", copy=True) for name, tensor in model.state_dict().items()}
        success, message = runner.weight_updater.update_weights_from_disk(
            path, load_format, recapture_cuda_graph=recapture_cuda_graph
        )
        if success:
            _check_finite(model, path)
    except ValueError as error:
        success, message = False, str(error)
    except Exception as error:  # whatever the loader raises; the server goes on with the old weights
        logger.exception("student weights")
        success, message = False, f"Failed to update the student's weights: {error}"
    if everywhere(success):
        return True, "Succeeded to update the student's weights."
    if success:
        message = "Another rank could not load the weights; see its log."
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name in backup:
                tensor.copy_(backup[name])
    packed_linear.forget()
    config.model_path = old_path
    return False, f"{message} The student's old weights are in place."


def _check_finite(model: torch.nn.Module, path: str) -> None:
    """Raises ValueError for weights with NaN or infinity, which no request could be answered with."""
    for name, tensor in model.state_dict().items():
        if tensor.dtype in (torch.float32, torch.float16, torch.bfloat16) and not bool(tensor.isfinite().all()):
            raise ValueError(f"model_path: {name!r} has NaN or infinity in {path}.")
