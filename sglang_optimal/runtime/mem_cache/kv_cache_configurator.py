"""How many requests SGLang runs, where both sides of each take a state of the one model's recurrent layers."""

from __future__ import annotations

from sglang.srt.mem_cache.kv_cache_configurator import KVCacheConfigurator
from sglang.srt.model_executor.model_runner import ModelRunner
from sglang.srt.runtime_context import get_context, get_memory, get_schedule


class MixedKVCacheConfigurator(KVCacheConfigurator):
    """Counts every request as a mixed one: which will come is not known when the pool is made."""

    __slots__ = ()

    def _calculate_mamba_ratio(self) -> int:
        """Slots of the pool a request: SGLang's, and the guest's one, of which no radix cache keeps any."""
        return super()._calculate_mamba_ratio() + 1


def count_guest_states(runner: ModelRunner) -> None:
    """Before the memory pools of a shared model with recurrent layers are made."""
    schedule = get_schedule()
    if get_memory().disable_radix_cache and schedule.max_mamba_cache_size is None and schedule.max_running_requests:
        # SGLang makes as many as requests run then.
        get_context().override("sglang_optimal.guest_states", max_mamba_cache_size=2 * schedule.max_running_requests)
    init = runner.init_kv_cache_configurator

    def init_kv_cache_configurator(*args, **kwargs) -> None:
        init(*args, **kwargs)
        runner.kv_cache_configurator.__class__ = MixedKVCacheConfigurator

    runner.init_kv_cache_configurator = init_kv_cache_configurator
