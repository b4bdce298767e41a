"""Entry point of the group ``sglang.srt.plugins``: registers the names that server arguments refer to.

Nothing of SGLang is patched, unless ``SGLANG_OPTIMAL_CONFIG`` asks for it (entrypoints/any_engine.py).
"""

from __future__ import annotations

from sglang_optimal.runtime import registry
from sglang_optimal.runtime.entrypoints import any_engine

_hooked: set[str] = set()


def register() -> None:
    """The entry point; safe to call again."""
    registry.register()
    if any_engine.is_wanted() and "launches" not in _hooked:
        any_engine.install()
        _hooked.add("launches")


def prepare() -> None:
    """What one of our own launches needs of SGLang's plugins: all of them, our names, and the hook of its processes."""
    from sglang.srt.plugins import load_plugins
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from sglang_optimal.platforms.cpu_processes import fork_server

    load_plugins()
    register()
    if "processes" not in _hooked:
        HookRegistry.register(
            "sglang.srt.entrypoints.engine._set_envs_and_config", fork_server.choose_start_method, HookType.AFTER
        )
        _hooked.add("processes")
    HookRegistry.apply_hooks()
