"""Users, an operator, and moments of rest in which every slot must be back, for a given time."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Callable

import httpx
import psutil
from expectations import Expectations
from ledger import Ledger
from operations import Operator, Weights
from traffic import Traffic

USERS = 9
REST_EVERY = 15.0  # seconds of traffic
REST_DEADLINE = 60.0
PATIENCE = 4
POOL = 40
"""Known requests that are alive at a time."""


async def soak(
    base_url: str,
    headers: dict[str, str],
    processes: Callable[[], list[psutil.Process]],
    expectations: Expectations,
    weights: Weights,
    seconds: float,
    ledger: Ledger,
    missing: Callable[[], list[str]],
    seed: int = 23,
    sleeps: bool = False,
) -> None:
    """Random traffic and operations against a running server; whatever is wrong goes to ``ledger.violations``.

    Args:
        base_url, headers: of the server.
        processes: all processes of the server.
        expectations: greedy requests with known answers; new ones are added at every rest.
        weights: the versions of the student's weights.
        seconds: how long.
        ledger: for the counts and violations.
        missing: what the traffic has not met yet: while there is something, it goes on, up to ``PATIENCE`` times as
            long. Chance and a slow machine can keep a short run from what it is for.
        seed: of every choice.
        sleeps: whether the server can release its models' memory.
    """
    rng = random.Random(seed)
    deadline, latest = time.monotonic() + seconds, time.monotonic() + PATIENCE * seconds
    limits = httpx.Limits(max_connections=64, max_keepalive_connections=16)
    async with httpx.AsyncClient(base_url=base_url, headers=headers, timeout=120, limits=limits) as http:
        traffic = Traffic(http, expectations, weights.between, ledger, seed + 1)
        operator = Operator(http, weights, ledger, seed + 2, sleeps)
        while time.monotonic() < deadline and len(ledger.violations) < 20:
            until = min(time.monotonic() + min(REST_EVERY, seconds), deadline)

            async def user(until: float = until) -> None:
                while time.monotonic() < until:
                    await traffic.one()
                    await asyncio.sleep(rng.expovariate(8.0))

            async def operate(until: float = until) -> None:
                while time.monotonic() < until:
                    await asyncio.sleep(rng.expovariate(0.7))
                    await operator.one()

            await asyncio.gather(*[user() for _ in range(USERS)], operate())
            await _rest(http, ledger)
            with contextlib.suppress(psutil.NoSuchProcess):
                ledger.seen_memory(sum(process.memory_info().rss for process in processes()) / 2**20)
            expectations.grow(2, POOL)
            if missing():
                deadline = latest


async def _rest(http: httpx.AsyncClient, ledger: Ledger) -> None:
    """With nothing running every slot of both pools is free or in a radix cache, and free after a flush."""
    end = time.monotonic() + REST_DEADLINE
    while True:
        info = (await http.get("/get_server_info")).json()["internal_states"][0]["mixing"]
        pools = info["teacher_pool"], info["student_pool"]
        whole = all(p["free"] + p["evictable"] == p["size"] and p["protected"] == 0 for p in pools)
        if whole and info["student_pool"]["requests"] == 0:
            break
        if time.monotonic() > end:
            ledger.violation(f"slots are missing at rest: {info}")
            return
        await asyncio.sleep(0.2)
    ledger.counts["rests with all slots accounted for"] += 1
    ledger.counts["student prompt tokens cached"] = info["student_pool"]["cached_prompt_tokens_total"]
    if (await http.post("/flush_cache")).status_code != 200:
        ledger.violation("the caches could not be flushed at rest")
    info = (await http.get("/get_server_info")).json()["internal_states"][0]["mixing"]
    if any(info[name]["free"] != info[name]["size"] for name in ("teacher_pool", "student_pool")):
        ledger.violation(f"slots are missing after a flush: {info}")
