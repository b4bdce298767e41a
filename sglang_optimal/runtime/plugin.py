"""Entry point of the group ``sglang.srt.plugins``: registers the names that server arguments refer to.

Nothing of SGLang is patched, unless ``SGLANG_OPTIMAL_CONFIG`` asks for it (entrypoints/any_engine.py).
"""

from __future__ import annotations

from sglang_optimal.runtime.entrypoints import any_engine

_registered: set[str] = set()


def register() -> None:
    """Register the names that we give to SGLang's arguments; safe to call again.

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
    if any_engine.is_wanted():
        steps["launches"] = any_engine.install
    for name, step in steps.items():
        if name not in _registered:
            step()
            _registered.add(name)


def prepare() -> None:
    """What one of our own launches needs of SGLang's plugins: all of them, our names, and the hook of its processes."""
    from sglang.srt.plugins import load_plugins
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from sglang_optimal.platforms.cpu_processes import fork_server

    load_plugins()
    register()
    if "processes" not in _registered:
        HookRegistry.register(
            "sglang.srt.entrypoints.engine._set_envs_and_config", fork_server.choose_start_method, HookType.AFTER
        )
        _registered.add("processes")
    HookRegistry.apply_hooks()


def _sampler():
    from sglang_optimal.runtime.sampling.sampler import create_mixture_sampler

    return create_mixture_sampler()


def _radix_cache(ctx):
    from sglang_optimal.runtime.mem_cache.unified_radix_cache import create_mixed_unified_radix_cache

    return create_mixed_unified_radix_cache(ctx)
