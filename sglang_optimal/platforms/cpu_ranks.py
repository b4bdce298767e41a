"""Several ranks (tensor or data parallel) on one CPU machine: which cores each of them runs on."""

from __future__ import annotations

import os

_VARIABLE = "SGLANG_CPU_OMP_THREADS_BIND"
_ours: str | None = None


def share_cores(ranks: int, machines: int) -> None:
    """Give each rank its part of the cores where SGLang would refuse to start: it binds one rank to each NUMA node.

    Args:
        ranks: processes with a model, on all machines. Where a machine has fewer cores, they are shared in turn.
        machines: how many there are.
    """
    global _ours
    import torch
    from sglang.srt.utils.numa_utils import get_cpu_ids_by_node

    if torch.accelerator.is_available():
        return
    if os.environ.get(_VARIABLE) not in (None, _ours):
        return  # the user's
    os.environ.pop(_VARIABLE, None)
    _ours = None
    if ranks > len(get_cpu_ids_by_node()):
        cores = sorted(os.sched_getaffinity(0))
        _ours = os.environ[_VARIABLE] = split(cores, max(ranks // machines, 1))


def split(cores: list[int], ranks: int) -> str:
    """SGLang's notation: the cores of each rank, ``|`` between ranks.

    >>> split([0, 1, 2, 3], 2)
    '0,1|2,3'
    """
    size = max(len(cores) // ranks, 1)
    parts = [[cores[(rank * size + i) % len(cores)] for i in range(size)] for rank in range(ranks)]
    return "|".join(",".join(map(str, part)) for part in parts)
