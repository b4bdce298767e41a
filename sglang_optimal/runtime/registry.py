"""The names that SGLang's arguments give our parts, in SGLang's own registries."""

from __future__ import annotations

_registered: set[str] = set()


def register() -> None:
    """Register them; safe to call again.

    SGLang only logs what its plugins raise. After a failure the next call does what is missing, and so raises it again.
    """
    from sglang.srt.layers.sampler import register_sampler_backend
    from sglang.srt.mem_cache.registry import register_radix_cache_backend

    from sglang_optimal.runtime.speculative import spec_info as speculation

    steps = {
        "sampler": lambda: register_sampler_backend("optimal", _sampler),
        "radix cache": lambda: register_radix_cache_backend("optimal", _radix_cache),
        "speculation": speculation.register,
    }
    for name, step in steps.items():
        if name not in _registered:
            step()
            _registered.add(name)


def _sampler():
    from sglang_optimal.runtime.sampling.sampler import create_mixture_sampler

    return create_mixture_sampler()


def _radix_cache(ctx):
    from sglang_optimal.runtime.mem_cache.unified_radix_cache import create_mixed_unified_radix_cache

    return create_mixed_unified_radix_cache(ctx)
