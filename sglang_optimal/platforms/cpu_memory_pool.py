"""The KV pool of a CPU's model: memory that the system gives when a slot is first written.

SGLang fills its pool with zeros, which on a CPU takes memory a page at a time: 24 s for the 14 GB that it takes of a
machine with 23, most of which a small model never needs.
"""

from __future__ import annotations

import math
import mmap
from typing import Any

import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from torch.overrides import TorchFunctionMode

_LARGE = 1 << 20  # bytes; smaller ones come from where torch takes all its memory


class LazyMHATokenToKVPool(MHATokenToKVPool):
    """SGLang's, with buffers that are zero without having been written."""

    def _create_buffers_normal(self) -> None:
        """SGLang's, from memory that is not there before it is used."""
        with _LazyZeros():
            super()._create_buffers_normal()


class _LazyZeros(TorchFunctionMode):
    """Within, ``torch.zeros`` of much memory on a CPU takes fresh pages of the system's, which are zero."""

    def __torch_function__(self, function, types, args=(), kwargs=None) -> Any:
        kwargs = kwargs or {}
        if function is torch.zeros and kwargs.keys() == {"dtype", "device"} and str(kwargs["device"]) == "cpu":
            shape, dtype = torch.Size(args[0] if len(args) == 1 else args), kwargs["dtype"]
            size = math.prod(shape) * dtype.itemsize
            if size >= _LARGE:
                return torch.frombuffer(_pages(size), dtype=dtype).view(shape)
        return function(*args, **kwargs)


def _pages(size: int) -> mmap.mmap:
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return pages
