"""Requests of every kind, and what must be true of their answers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import random
from typing import Any

import httpx
from expectations import FIRST_LETTER, LETTERS, LONGEST, Expectations, Known, text_of
from harness import random_ids
from ledger import Ledger

from sglang_optimal.names import SERIES

ANSWER_DEADLINE = 90.0
"""Seconds. A request that has no answer by then is lost: nothing here takes more than a few."""

KINDS = {
    "greedy": 8,
    "greedy-stream": 6,
    "stop-string": 3,
    "sampled": 4,
    "sampled-n": 1,
    "logprobs": 2,
    "chat": 2,
    "chat-stream": 1,
    "batch": 1,
    "aborted": 3,
    "disconnect": 2,
    "disconnect-stream": 3,
    "bad": 1,
}


class Aborted(Exception):
    """SGLang refuses, with this message and HTTP 400, what is aborted while its grammar is being compiled."""


class Traffic:
    """Sends one random request after another.

    Args:
        http: client of the server.
        expectations: greedy requests with known answers.
        versions: which weights of the student a request between two times may have met; None: cannot be said.
        ledger: told of everything.
    """

    def __init__(self, http: httpx.AsyncClient, expectations: Expectations, versions, ledger: Ledger, seed: int):
        self._http = http
        self._expectations = expectations
        self._versions = versions
        self._ledger = ledger
        self._rng = random.Random(seed)
        self._number = 0

    async def one(self) -> None:
        """One request and everything that is to be checked about it."""
        kind = self._rng.choices(list(KINDS), list(KINDS.values()))[0]
        self._number += 1
        self._ledger.requests[kind] += 1
        rid = f"soak-{self._number}"
        try:
            async with asyncio.timeout(ANSWER_DEADLINE):
                await getattr(self, "_" + kind.replace("-", "_"))(rid)
        except Aborted:
            self._ledger.outcomes["abort"] += 1
        except TimeoutError:
            self._ledger.violation(f"{rid} ({kind}): no answer in {ANSWER_DEADLINE} s")
        except httpx.HTTPError as error:
            self._ledger.violation(f"{rid} ({kind}): {type(error).__name__}: {error}")
        except (AssertionError, LookupError, TypeError, ValueError) as error:  # an answer that is not what it should be
            self._ledger.violation(f"{rid} ({kind}): {type(error).__name__}: {error}")

    # -- kinds -----------------------------------------------------------------------------------------------------

    async def _greedy(self, rid: str) -> None:
        known, n, params = self._known()
        begin = self._now()
        answer = await self._generate(rid, known, params)
        self._check_known(known, n, answer, begin)

    async def _greedy_stream(self, rid: str) -> None:
        known, n, params = self._known()
        begin = self._now()
        answer = await self._stream(rid, known, params)
        if answer is not None:
            self._check_known(known, n, answer, begin)

    async def _stop_string(self, rid: str) -> None:
        known, n, params = self._known(grammar=False)
        version = next(iter(known.answers))
        text = text_of(known.answers[version].token_ids[:n])
        # SGLang finds stop strings in special tokens too ("s" in "<usr>"), which the text does not have.
        stop = self._rng.choice([c for c in text if c not in "<padboseunksyrt>"] or ["%"])
        begin = self._now()
        answer = await self._generate(rid, known, {**params, "stop": [stop]})
        if self._was_aborted(answer):
            return
        assert stop not in answer["text"], f"stop string {stop!r} in {answer['text']!r}"
        allowed = self._allowed(begin)
        if allowed is None or any(known.sure(v, n) < n for v in allowed):
            return
        expected = {text_of(known.answers[v].token_ids[:n]).split(stop)[0] for v in allowed}
        assert answer["text"] in expected, f"{answer['text']!r} is not one of {expected}"
        self._ledger.counts["answers equal to the oracle's"] += 1

    async def _sampled(self, rid: str) -> None:
        known = self._rng.choice(self._expectations.pool)
        answer = await self._generate(rid, known, self._sampling())
        self._check_shape(known, answer)

    async def _sampled_n(self, rid: str) -> None:
        known = self._rng.choice(self._expectations.pool)
        body = self._body(rid, known, {**self._sampling(), "n": 3})
        del body["rid"]  # SGLang gives each of the three its own
        answers = await self._post("/generate", body)
        assert len(answers) == 3, f"{len(answers)} answers for n=3"
        for answer in answers:
            self._check_shape(known, answer)

    async def _logprobs(self, rid: str) -> None:
        known, n, params = self._known()
        begin = self._now()
        options = {"return_logprob": True, "top_logprobs_num": 2, "logprob_start_len": self._rng.choice([-1, 0])}
        answer = await self._generate(rid, known, params, **options)
        self._check_known(known, n, answer, begin)
        if not self._was_aborted(answer):
            logprobs = answer["meta_info"]["output_token_logprobs"]
            assert [entry[1] for entry in logprobs] == answer["output_ids"], "logprobs of other tokens"

    async def _batch(self, rid: str) -> None:
        chosen = [self._known() for _ in range(3)]
        begin = self._now()
        params = [{**p, "custom_params": self._custom(k)} if k.student else p for k, _, p in chosen]
        body = {
            "rid": [f"{rid}-{i}" for i in range(3)],
            "input_ids": [list(known.teacher) for known, _, _ in chosen],
            "sampling_params": params,
        }
        answers = await self._post("/generate", body)
        assert [a["meta_info"]["id"] for a in answers] == body["rid"], "answers of other requests"
        for (known, n, _), answer in zip(chosen, answers, strict=True):
            self._check_known(known, n, answer, begin)

    def _chat_body(self, stream: bool) -> dict[str, Any]:
        question = {"role": "user", "content": "what is " + text_of(random_ids(self._rng, 12))}
        custom = {"teacher_system_prompt": "say " + text_of(random_ids(self._rng, 6)), "return_mixing_info": True}
        n = self._rng.randint(1, 40)
        return {
            "model": "tiny",
            "messages": [question],
            "max_tokens": n,
            "temperature": 1,
            "stream": stream,
            "custom_params": custom,
        }

    async def _chat(self, rid: str) -> None:
        body = self._chat_body(False)
        answer = await self._post("/v1/chat/completions", body)
        (choice,) = answer["choices"]
        self._ledger.outcomes[str(choice["finish_reason"])] += 1
        self._ledger.counts["tokens"] += answer["usage"]["completion_tokens"]
        if choice["finish_reason"] != "abort":
            series = answer["sglext"]["mixing"][0]
            assert len(series["alpha"]) == answer["usage"]["completion_tokens"], "series of another length"

    async def _chat_stream(self, rid: str) -> None:
        events, done = [], 0
        async with self._http.stream("POST", "/v1/chat/completions", json=self._chat_body(True)) as response:
            assert response.status_code == 200, f"status {response.status_code}"
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    done += 1
                elif line.startswith("data: "):
                    events.append(json.loads(line[6:]))
        assert done == 1, f"[DONE] came {done} times"
        ends = [c["finish_reason"] for e in events for c in e.get("choices", []) if c.get("finish_reason")]
        ends += ["abort"] * any("error" in event for event in events)
        assert len(ends) == 1, f"finished {len(ends)} times"
        self._ledger.outcomes[ends[0]] += 1

    async def _aborted(self, rid: str) -> None:
        known, n, params = self._known()
        begin = self._now()
        task = asyncio.ensure_future(self._generate(rid, known, params))
        try:
            await asyncio.sleep(self._rng.random() * 0.6)
            if not task.done():
                self._ledger.faults["abort"] += 1
                await self._http.post("/abort_request", json={"rid": rid})
            self._check_known(known, n, await task, begin)
        finally:
            task.cancel()

    async def _disconnect(self, rid: str) -> None:
        known, _, params = self._known()
        self._ledger.faults["disconnect"] += 1
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._rng.random() * 0.4):
                await self._http.post("/generate", json=self._body(rid, known, params))

    async def _disconnect_stream(self, rid: str) -> None:
        known, _, params = self._known()
        self._ledger.faults["disconnect"] += 1
        events = self._rng.randint(0, 12)
        async with self._http.stream("POST", "/generate", json=self._body(rid, known, params) | {"stream": True}) as r:
            async for line in r.aiter_lines():
                events -= line.startswith("data: ")
                if events < 0:
                    break

    async def _bad(self, rid: str) -> None:
        known, _, params = self._known()
        wrong = self._rng.choice(
            [{"student_input_ids": [-1]}, {"student_input_ids": [9] * 5000}, {"alpha_max": 2}, {"student_txt": "a"}]
        )
        body = self._body(rid, known, {**params, "custom_params": wrong})
        response = await self._http.post("/generate", json=body)
        assert response.status_code == 400, f"{wrong} gave {response.status_code}"
        self._ledger.outcomes["refused (400)"] += 1

    # -- asking ----------------------------------------------------------------------------------------------------

    def _known(self, grammar: bool | None = None) -> tuple[Known, int, dict[str, Any]]:
        pool = [k for k in self._expectations.pool if grammar is None or k.grammar == grammar]
        known = self._rng.choice(pool)
        n = self._rng.randint(1, LONGEST - 1)
        params: dict[str, Any] = {"temperature": 0.0, "max_new_tokens": n}
        if known.grammar:
            last = chr(ord("a") + LETTERS - 1)
            params["regex"] = f"[a-{last}]{{{LONGEST}}}"
        else:
            params["logit_bias"] = {str(token): value for token, value in known.bias.items()}
            # SGLang reserves the whole length of such a request, and never retracts it.
            params["ignore_eos"] = self._rng.random() < 0.2
        return known, n, params

    def _sampling(self) -> dict[str, Any]:
        rng = self._rng
        params: dict[str, Any] = {"temperature": rng.choice([0.3, 1.0, 1.7]), "max_new_tokens": rng.randint(1, 60)}
        optional = {
            "top_p": rng.uniform(0.3, 1.0),
            "top_k": rng.randint(1, 20),
            "min_p": rng.uniform(0.0, 0.3),
            "repetition_penalty": rng.uniform(0.8, 1.3),
            "frequency_penalty": rng.uniform(-0.5, 0.5),
            "presence_penalty": rng.uniform(-0.5, 0.5),
            "sampling_seed": rng.randrange(2**31),
            "min_new_tokens": rng.randint(0, min(params["max_new_tokens"], 3)),  # the grammar may not want more
            "regex": "[a-p ]{3,40}",
            "stop_token_ids": random_ids(rng, 2),
        }
        return params | {name: value for name, value in optional.items() if rng.random() < 0.25}

    @staticmethod
    def _custom(known: Known) -> dict[str, Any]:
        return {"student_input_ids": list(known.student), "return_mixing_info": True, **known.alpha}

    def _body(self, rid: str, known: Known, params: dict[str, Any], **more: Any) -> dict[str, Any]:
        if known.student is not None and "custom_params" not in params:
            if self._rng.random() < 0.3:  # the other way in
                more["session_params"] = {"mixing": self._custom(known)}
            else:
                params = {**params, "custom_params": self._custom(known)}
        return {"rid": rid, "input_ids": list(known.teacher), "sampling_params": params, **more}

    async def _generate(self, rid: str, known: Known, params: dict[str, Any], **more: Any) -> dict[str, Any]:
        answer = await self._post("/generate", self._body(rid, known, params, **more))
        assert answer["meta_info"]["id"] == rid, "the answer of another request"
        return answer

    async def _post(self, path: str, body: dict[str, Any]) -> Any:
        response = await self._http.post(path, json=body)
        if response.status_code == 400 and "Aborted by AbortReq." in response.text:
            raise Aborted
        assert response.status_code == 200, f"status {response.status_code}: {response.text[:300]}"
        return response.json()

    async def _stream(self, rid: str, known: Known, params: dict[str, Any]) -> dict[str, Any] | None:
        """The last event; every event must continue the one before, and the end must come once."""
        last: dict[str, Any] | None = None
        done = 0
        body = self._body(rid, known, params, stream=True)
        async with self._http.stream("POST", "/generate", json=body) as response:
            assert response.status_code == 200, f"status {response.status_code}"
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    done += 1
                elif line.startswith("data: "):
                    event = json.loads(line[6:])
                    assert "error" not in event, f"{event}"
                    assert event["meta_info"]["id"] == rid, "an event of another request"
                    if last is not None:
                        assert last["meta_info"]["finish_reason"] is None, "an event after the end"
                        before = last["output_ids"]
                        assert event["output_ids"][: len(before)] == before, "an event takes back tokens"
                    last = event
        assert done == 1 and last is not None, f"[DONE] came {done} times"
        assert last["meta_info"]["finish_reason"] is not None, "the stream ended without an end"
        return last

    # -- checking --------------------------------------------------------------------------------------------------

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()

    def _allowed(self, begin: float) -> set[str] | None:
        return self._versions(begin, self._now())

    def _was_aborted(self, answer: dict[str, Any]) -> bool:
        return answer["meta_info"]["finish_reason"]["type"] == "abort"

    def _check_shape(self, known: Known, answer: dict[str, Any]) -> None:
        meta, ids = answer["meta_info"], answer["output_ids"]
        reason = meta["finish_reason"]["type"]
        self._ledger.outcomes[reason] += 1
        self._ledger.counts["tokens"] += len(ids)
        self._ledger.counts["retractions"] += meta.get("num_retractions", 0)
        assert reason in ("stop", "length", "abort"), f"finish reason {reason}"
        assert meta["finish_reason"].get("status_code") is None, f"{meta['finish_reason']}"
        if known.student is None:
            assert "alpha" not in meta, "a plain request with alpha"
            return
        self._ledger.counts["mixed tokens"] += len(ids)
        if reason == "abort" and not ids:
            return
        for name in SERIES:
            values = meta[name]
            assert len(values) == len(ids), f"{len(values)} of {name} for {len(ids)} tokens"
            assert all(value is not None and math.isfinite(value) for value in values), f"{name} is not finite"

    def _check_known(self, known: Known, n: int, answer: dict[str, Any], begin: float) -> None:
        self._check_shape(known, answer)
        ids = answer["output_ids"]
        aborted = self._was_aborted(answer)
        assert aborted or len(ids) == n, f"{len(ids)} tokens, {n} were asked for"
        if not ids:  # aborted before its first token
            return
        if known.grammar:
            assert all(FIRST_LETTER <= token < FIRST_LETTER + LETTERS for token in ids), "outside the grammar"
        allowed = self._allowed(begin)
        if allowed is None:
            self._ledger.counts["answers across an update while paused"] += 1
            return
        if any(self._equals(known, version, ids, answer["meta_info"]) for version in allowed):
            self._ledger.counts["answers equal to the oracle's"] += 1
            return
        version = sorted(allowed)[0]
        expected = known.answers[version].token_ids[: len(ids)]
        differ = next((i for i, (a, b) in enumerate(zip(ids, expected, strict=False)) if a != b), None)
        raise AssertionError(f"not the oracle's answer from token {differ} on (weights {allowed}): {ids} {expected}")

    @staticmethod
    def _equals(known: Known, version: str, ids: list[int], meta: dict[str, Any]) -> bool:
        expected = known.answers[version]
        sure = known.sure(version, len(ids))
        if ids[:sure] != expected.token_ids[:sure]:
            return False
        if known.student is None:
            return True
        return all(abs(a - b) < 1e-3 for a, b in zip(meta["alpha"][:sure], expected.alphas[:sure], strict=True))
