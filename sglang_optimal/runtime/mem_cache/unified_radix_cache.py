"""The host's radix cache, which tells the guest's KV when a request is checkpointed, released or flushed.

Every way out of the scheduler (finish, abort, retraction) goes through the tree cache's ``on_release``, so following it
needs no change to the scheduler's control flow.
"""

from __future__ import annotations

from sglang.srt.managers.schedule_batch import Req
from sglang.srt.mem_cache.base_prefix_cache import BasePrefixCache
from sglang.srt.mem_cache.registry import TreeCacheBuildContext, create_unified_radix_cache
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from sglang_optimal.runtime.core import guest_of
from sglang_optimal.runtime.mem_cache.guest_kv import GuestKV


class MixedUnifiedRadixCache(UnifiedRadixCache):
    """SGLang's own radix cache plus the guest's side of the same events."""

    _guest_kv: GuestKV | None = None

    @property
    def guest_kv(self) -> GuestKV:
        """The guest's KV.

        Raises:
            RuntimeError: `attach` has not been called.
        """
        if self._guest_kv is None:
            raise RuntimeError("the host's radix cache has no guest")
        return self._guest_kv

    def attach(self, guest_kv: GuestKV) -> None:
        """Tell this guest of what happens from now on."""
        self._guest_kv = guest_kv
        guest_kv.attach(self)

    def checkpoint(self, req: Req, *, up_to: int, **kwargs) -> None:
        """SGLang's; the guest's prompt enters its radix cache at the same moment."""
        super().checkpoint(req, up_to=up_to, **kwargs)
        # A finished request is checkpointed once more on its way out; on_release covers that one.
        if guest_of(req) is not None and not req.finished():
            self.guest_kv.checkpoint(req)

    def on_release(self, req: Req, *, checkpointed: bool) -> None:
        """SGLang's; the guest's slots go at the same moment."""
        super().on_release(req, checkpointed=checkpointed)
        if guest_of(req) is not None:
            self.guest_kv.release(req, keep=checkpointed)

    def reset(self) -> None:
        """SGLang's, and the guest's."""
        super().reset()
        if self._guest_kv is not None:  # SGLang resets a cache as it makes it
            self._guest_kv.reset()


def create_mixed_unified_radix_cache(ctx: TreeCacheBuildContext) -> BasePrefixCache:
    """Factory of ``--radix-cache-backend optimal``.

    Raises:
        RuntimeError: SGLang's own scheduler asked for it, which has no guest.
    """
    cache = create_unified_radix_cache(ctx, cache_class=MixedUnifiedRadixCache)
    guest_kv = getattr(ctx.tp_worker, "guest_kv", None)
    if guest_kv is None:
        raise RuntimeError(
            "--radix-cache-backend optimal needs a student: start the server with python -m "
            "sglang_optimal.launch_server."
        )
    cache.attach(guest_kv)
    return cache
