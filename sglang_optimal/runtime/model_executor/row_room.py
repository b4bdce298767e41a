"""Room for decode batches with more rows than requests."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def room_for_rows(runner, rows: int) -> Iterator[None]:
    """SGLang sizes static buffers and graphs by the number of requests; within, for up to ``rows`` rows of each.

    Args:
        runner: the model runner, whose buffers are made within.
    """
    pool = runner.req_to_token_pool
    requests, size = runner.max_running_requests, pool.size
    runner.max_running_requests, pool.size = rows * requests, rows * size
    try:
        yield
    finally:
        runner.max_running_requests, pool.size = requests, size
