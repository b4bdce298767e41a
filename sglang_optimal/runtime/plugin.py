"""Entry point of the group ``sglang.srt.plugins``: registers the names that server arguments refer to."""

from __future__ import annotations

_registered = False


def register() -> None:
    """Register the names that we give to SGLang's arguments; safe to call again."""
    global _registered
    if _registered:
        return
    _registered = True
    from sglang.srt.layers.sampler import register_sampler_backend
    from sglang.srt.mem_cache.registry import register_radix_cache_backend

    from sglang_optimal.runtime import speculation

    register_sampler_backend("optimal", _sampler)
    register_radix_cache_backend("optimal", _radix_cache)
    speculation.register()


def _sampler():
    from sglang_optimal.runtime.sampler import create_mixture_sampler

    return create_mixture_sampler()


def _radix_cache(ctx):
    from sglang_optimal.runtime.radix_cache import create_mixed_radix_cache

    return create_mixed_radix_cache(ctx)
