"""The teacher's radix cache, which tells the student's KV when a request is checkpointed, released or flushed.

Every way out of the scheduler (finish, abort, retraction) goes through the tree cache's ``on_release``, so following it
needs no change to the scheduler's control flow.
"""

from __future__ import annotations

from sglang.srt.managers.schedule_batch import Req
from sglang.srt.mem_cache.base_prefix_cache import BasePrefixCache
from sglang.srt.mem_cache.registry import TreeCacheBuildContext, create_unified_radix_cache
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from sglang_optimal.runtime.core import student_of
from sglang_optimal.runtime.mem_cache.student_kv import StudentKV


class MixedUnifiedRadixCache(UnifiedRadixCache):
    """SGLang's own radix cache plus the student's side of the same events."""

    student_kv: StudentKV | None = None

    def checkpoint(self, req: Req, *, up_to: int, **kwargs) -> None:
        super().checkpoint(req, up_to=up_to, **kwargs)
        # A finished request is checkpointed once more on its way out; on_release covers that one.
        if student_of(req) is not None and not req.finished():
            self.student_kv.checkpoint(req)

    def on_release(self, req: Req, *, checkpointed: bool) -> None:
        super().on_release(req, checkpointed=checkpointed)
        if student_of(req) is not None:
            self.student_kv.release(req, keep=checkpointed)

    def reset(self) -> None:
        super().reset()
        if self.student_kv is not None:
            self.student_kv.reset()


def create_mixed_unified_radix_cache(ctx: TreeCacheBuildContext) -> BasePrefixCache:
    """Factory of ``--radix-cache-backend optimal``."""
    cache = create_unified_radix_cache(ctx, cache_class=MixedUnifiedRadixCache)
    cache.student_kv = getattr(ctx.tp_worker, "student_kv", None)
    if cache.student_kv is not None:
        cache.student_kv.attach(cache)
    return cache
