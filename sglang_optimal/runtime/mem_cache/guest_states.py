"""The states of a guest's recurrent layers (Mamba, gated delta nets, short convolutions): one slot a request.

SGLang's pool of rows (``HybridReqToTokenPool``) has them, and a map from rows to slots that the layers follow. The
host's requests take theirs with their rows; the guest's take one with their KV slots, and give it back with them.
Where both sides have one model, they have one pool of states, in which the host's radix cache keeps some.
"""

from __future__ import annotations

import torch
from sglang.srt.mem_cache.base_prefix_cache import BasePrefixCache, EvictParams
from sglang.srt.mem_cache.memory_pool import HybridReqToTokenPool, ReqToTokenPool


class GuestStates:
    """The free slots, and the map.

    Args:
        pool: the model runner's.
    """

    def __init__(self, pool: HybridReqToTokenPool):
        self._pool = pool

    @classmethod
    def of(cls, pool: ReqToTokenPool) -> GuestStates | None:
        """None for a model without recurrent layers."""
        return cls(pool) if isinstance(pool, HybridReqToTokenPool) else None

    @property
    def size(self) -> int:
        return self._pool.mamba_pool.size

    def available(self) -> int:
        """How many more requests can have one."""
        return self._pool.mamba_allocator.available_size()

    def alloc(self, tree: BasePrefixCache) -> torch.Tensor:
        """A slot, [1] int64; it holds another request's state until the prefill has cleared it.

        Args:
            tree: which may give up one that it keeps, where it keeps any.

        Raises:
            RuntimeError: none is free, which admission has asked for, or the number of requests has seen to.
        """
        slot = self._pool.mamba_allocator.alloc(1)
        if slot is None and tree.supports_mamba():
            tree.evict_for_alloc(EvictParams(num_tokens=0, mamba_num=1))
            slot = self._pool.mamba_allocator.alloc(1)
        if slot is None:
            raise RuntimeError(f"no slot of {self.size} is free for the state of the guest's recurrent layers")
        return slot

    def bind(self, row: int, slot: torch.Tensor) -> None:
        """Let the layers find the state of a row of the model runner's table."""
        self._pool.req_index_to_mamba_index_mapping[row] = slot[0].to(torch.int32)

    def free(self, slot: torch.Tensor) -> None:
        self._pool.mamba_allocator.free(slot)

    def reset(self) -> None:
        """Drop everything; only when no request holds one."""
        self._pool.mamba_allocator.clear()
