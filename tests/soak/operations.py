"""What an operator does to a server while it is busy, and which weights a request can have met meanwhile."""

from __future__ import annotations

import asyncio
import base64
import random
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
from ledger import Ledger
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes


class Weights:
    """The history of the student's weights.

    Args:
        folders: {version: checkpoint}; the first is what the server starts with.
    """

    def __init__(self, folders: dict[str, Path]):
        self.folders = folders
        self.current = next(iter(folders))
        self._changes: list[tuple[float, float, str, str, bool]] = []  # begin, end, from, to, while paused

    def changed(self, begin: float, end: float, version: str, paused: bool) -> None:
        self._changes.append((begin, end, self.current, version, paused))
        self.current = version

    def between(self, begin: float, end: float) -> set[str] | None:
        """Versions that were current at some time between the two; None: a change while requests were paused."""
        versions = {self.current}
        for change_begin, change_end, old, new, paused in reversed(self._changes):
            if change_end < begin:
                break
            if change_begin > end:
                versions = {old}
                continue
            if paused:
                return None
            versions |= {old, new}
        return versions


class Operator:
    """Disturbs the server at random.

    Args:
        http: client of the server.
        weights: the student's; with one version nothing is updated.
        sleeps: whether the server can release its models' memory.
        ledger: told of everything.
    """

    def __init__(self, http: httpx.AsyncClient, weights: Weights, ledger: Ledger, seed: int, sleeps: bool = False):
        self._http = http
        self._weights = weights
        self._ledger = ledger
        self._rng = random.Random(seed)
        self._sleeps = sleeps

    async def one(self) -> None:
        """One random operation."""
        choices: list[Callable[[], Awaitable[None]]] = [
            self._flush,
            self._pause_in_place,
            self._pause_retract,
            self._abort_everything,
            self._look,
        ]
        if len(self._weights.folders) > 1:
            choices += [self._update, self._update_while_paused, self._corrupt_update]
            choices += [
                self._update_in_memory,
                self._update_in_memory_while_paused,
                self._failed_session,
                self._left_session,
            ]
        if self._sleeps:
            choices += [self._sleep_while_retracted] * 4  # else requests are refused meanwhile
        action = self._rng.choice(choices)
        self._ledger.faults[action.__name__.lstrip("_").replace("_", " ")] += 1
        try:
            async with asyncio.timeout(120):
                await action()
        except TimeoutError:
            self._ledger.violation(f"{action.__name__}: not done in 120 s")
        except (httpx.HTTPError, AssertionError) as error:
            self._ledger.violation(f"{action.__name__}: {type(error).__name__}: {error}")

    async def _post(self, path: str, body: dict, expected: tuple[int, ...] = (200,)) -> httpx.Response:
        response = await self._http.post(path, json=body)
        assert response.status_code in expected, f"{path}: {response.status_code} {response.text[:200]}"
        return response

    async def _flush(self) -> None:
        await self._post("/flush_cache", {}, (200, 400))  # refused while something runs

    async def _look(self) -> None:
        for path in ("/get_server_info", "/health", "/v1/models", "/mixing"):
            assert (await self._http.get(path)).status_code == 200, path

    async def _pause_in_place(self) -> None:
        await self._paused("in_place")

    async def _pause_retract(self) -> None:
        await self._paused("retract")

    async def _paused(self, mode: str) -> None:
        await self._post("/pause_generation", {"mode": mode})
        await asyncio.sleep(self._rng.random() * 0.5)
        await self._post("/continue_generation", {})

    async def _abort_everything(self) -> None:
        await self._post("/abort_request", {"abort_all": True})

    def _other(self) -> str:
        return next(version for version in self._weights.folders if version != self._weights.current)

    async def _update(self, paused: bool = False, flush: bool = True) -> None:
        version = self._other()
        begin = asyncio.get_running_loop().time()
        body = {"model_path": str(self._weights.folders[version]), "flush_cache": flush}
        await self._post("/update_student_weights_from_disk", body)
        self._weights.changed(begin, asyncio.get_running_loop().time(), version, paused)

    async def _while_retracted(self, update: Callable[..., Awaitable[None]]) -> None:
        """As an RL trainer does it: requests are put back, and go on with the new weights."""
        await self._post("/pause_generation", {"mode": "retract"})
        try:
            await update(paused=True)
        finally:
            await self._post("/continue_generation", {})

    async def _sleep(self, paused: bool = False) -> None:
        """Some kinds of memory, or all, and awake in any order."""
        tags = self._rng.sample(["kv_cache", "weights", "cuda_graph"], self._rng.randrange(4))
        await self._post("/release_memory_occupation", {"tags": tags})
        await asyncio.sleep(self._rng.random() * 0.3)
        assert (await self._http.get("/health")).status_code == 200
        for one in self._rng.sample(tags, len(tags)) or [None]:
            await self._post("/resume_memory_occupation", {"tags": one and [one]})

    async def _sleep_while_retracted(self) -> None:
        await self._while_retracted(self._sleep)

    async def _update_while_paused(self) -> None:
        await self._while_retracted(self._update)

    def _parts(self, version: str) -> list[dict[str, Any]]:
        """The bodies of a session's parts."""
        tensors = sorted(load_file(self._weights.folders[version] / "model.safetensors").items())
        cut = self._rng.randrange(1, len(tensors))
        payloads = [safetensors_bytes(dict(part)) for part in (tensors[:cut], tensors[cut:])]
        return [
            {"serialized_named_tensors": [base64.b64encode(payload).decode()], "load_format": "safetensors"}
            for payload in payloads
        ]

    async def _update_in_memory(self, paused: bool = False) -> None:
        version = self._other()
        begin = asyncio.get_running_loop().time()
        await self._post("/begin_weight_update", {})
        for body in self._parts(version):
            await self._post("/update_weights_from_tensor", body)
        await self._post("/end_weight_update", {})
        self._weights.changed(begin, asyncio.get_running_loop().time(), version, paused)

    async def _update_in_memory_while_paused(self) -> None:
        await self._while_retracted(self._update_in_memory)

    async def _failed_session(self) -> None:
        """The first part is loaded, the second is refused: the weights stay what they were."""
        await self._post("/begin_weight_update", {})
        first, _ = self._parts(self._other())
        await self._post("/update_weights_from_tensor", first)
        wrong = {**first, "serialized_named_tensors": [base64.b64encode(b"no tensors").decode()]}
        await self._post("/update_weights_from_tensor", wrong, (400,))

    async def _left_session(self) -> None:
        """A trainer that died in the middle, and the next one, which sends nothing."""
        await self._post("/begin_weight_update", {})
        await self._post("/update_weights_from_tensor", self._parts(self._other())[0])
        await self._post("/begin_weight_update", {})
        await self._post("/end_weight_update", {})

    async def _corrupt_update(self) -> None:
        folder = self._weights.folders[self._weights.current]
        body = {"model_path": str(folder.parent / "no-such-checkpoint")}
        await self._post("/update_student_weights_from_disk", body, (400,))
