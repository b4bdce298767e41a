"""SGLang's memory saver on a CPU: what is released becomes garbage, and comes back only where it was backed up.

The real one gives the device's memory back and takes other pages under the same addresses later. Here the bytes of all
tensors that were made within a region are overwritten while it is paused.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from sglang.srt.constants import GPU_MEMORY_TYPE_WEIGHTS
from sglang.srt.utils.torch_memory_saver_adapter import TorchMemorySaverAdapter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_regions: dict[str, list[tuple[bool, dict[int, torch.UntypedStorage]]]] = {}
_paused: dict[str, list[tuple[torch.UntypedStorage, torch.Tensor | None]]] = {}


def install() -> None:
    """In a scheduler process."""
    create = TorchMemorySaverAdapter.create
    TorchMemorySaverAdapter.create = staticmethod(
        lambda enable: ImitatedMemorySaver() if enable else create(enable=False)
    )
    module = torch.get_device_module

    @functools.wraps(module)  # torch's compiler looks beneath it
    def of_the_cpu(device=None):
        return module("cpu" if device is None else device)  # torch itself names a GPU's where there is none

    torch.get_device_module = of_the_cpu


class ImitatedMemorySaver(TorchMemorySaverAdapter):
    """One state a process, as the real one has."""

    enabled = True

    @contextlib.contextmanager
    def region(self, tag: str, enable_cpu_backup: bool = False) -> Iterator[None]:
        with _Made() as made:
            yield
        _regions.setdefault(tag, []).append((enable_cpu_backup, made.storages))

    @contextlib.contextmanager
    def cuda_graph(self, **kwargs: Any) -> Iterator[None]:
        yield

    configure_subprocess = disable = contextlib.nullcontext

    def pause(self, tag: str) -> None:
        if tag in _paused:
            raise RuntimeError(f"{tag} is paused already")
        _forget_what_was_made_of_weights(tag)
        _paused[tag] = []
        for backed_up, storages in _regions.get(tag, ()):
            for storage in storages.values():
                data = _bytes(storage)
                _paused[tag].append((storage, data.clone() if backed_up else None))
                data[: len(data) // 2 * 2].view(torch.int16).fill_(0x7FFF)  # NaN, or an index that is none

    def resume(self, tag: str) -> None:
        _forget_what_was_made_of_weights(tag)
        for storage, backup in _paused.pop(tag):  # KeyError: it was not paused
            if backup is not None:
                _bytes(storage).copy_(backup)


class _Made(TorchDispatchMode):
    """Collects the memory that is taken within; not that of files that are read."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, torch.UntypedStorage] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {_address(value) for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)}
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor) and value.device.type == "cpu" and _address(value) not in given:
                self.storages.setdefault(_address(value), value.untyped_storage())
        return result


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(storage)


def _forget_what_was_made_of_weights(tag: str) -> None:
    """A CPU's packed weights are not where the saver looks."""
    if tag == GPU_MEMORY_TYPE_WEIGHTS:
        from sglang_optimal.platforms import packed_linear

        packed_linear.forget()
