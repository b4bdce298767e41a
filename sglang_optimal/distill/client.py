"""Asks one or many servers for samples, and goes on when some of them fail."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import tenacity

from sglang_optimal import __version__
from sglang_optimal.distill.one_model import series_of
from sglang_optimal.distill.records import Context
from sglang_optimal.names import CARRIER, OTHER_MODEL, TOP_K
from sglang_optimal.top_k import ARRAYS, decode_top_k
from sglang_optimal.wanted import Wanted, wanted_by

if TYPE_CHECKING:
    from sglang_optimal.distill.config import Client

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds before a request, or a server that failed, is tried again; doubled each time, with jitter."""

PROMPTS_KEPT = 4096
"""Prompts whose token ids are remembered."""


class BadRequestError(Exception):
    """The server will not take this request (HTTP 400): its message."""


class RetriesExhausted(Exception):
    """Servers failed on this request again and again while they answered others."""


class NoServerAvailable(Exception):
    """The run cannot go on: no server answers, or none lets us in."""


class _Failed(Exception):
    """A failure that may be over when it is tried again. reached: the server had the request when it failed."""

    def __init__(self, message: str, *, reached: bool = True):
        super().__init__(message)
        self.reached = reached


@dataclasses.dataclass(frozen=True)
class Sample:
    """What a server answered.

    Attributes:
        text, token_ids, finish_reason: the sample.
        series: the per-token lists, see `sglang_optimal.names.ALL_SERIES`.
        prompt_tokens: of the teacher's prompt.
        latency: seconds.
        endpoint: who answered.
        weight_version: of the teacher, as SGLang has it.
        teacher_prompt_ids, student_prompt_ids: what each model really read; empty where the server does not say.
        student_prompt_text: the latter decoded, special tokens too; None likewise.
        top_k: the most likely tokens of each side that was asked for, see `sglang_optimal.decode_top_k`.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    series: dict[str, list[float]]
    prompt_tokens: int
    latency: float
    endpoint: str
    weight_version: str | None
    teacher_prompt_ids: list[int] = dataclasses.field(default_factory=list)
    student_prompt_ids: list[int] = dataclasses.field(default_factory=list)
    student_prompt_text: str | None = None
    top_k: dict[str, dict[str, np.ndarray]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class _Endpoint:
    """url. failures: in a row. resting_until: when it may be asked again (monotonic). models: see `Servers.models`.
    mixes: whether it has a student. serves: sides that answer plain requests; none of a router, which does not tell."""

    url: str
    failures: int = 0
    resting_until: float = 0.0
    models: dict[str, str | None] = dataclasses.field(default_factory=dict)
    mixes: bool = True
    serves: tuple[str, ...] = ()


class Servers:
    """A round robin over servers; a server that fails rests for a while, and its requests go to the others.

    Args:
        endpoints: their URLs.
        settings: the section ``client`` of the run's file.
        api_key: in place of the one that ``api_key_env`` names.
        alone: ``student`` or ``teacher``, where requests are for that model and no other; see `generate_alone`.
    """

    def __init__(
        self, endpoints: Sequence[str], settings: Client, *, api_key: str | None = None, alone: str | None = None
    ):
        if api_key is None and settings.api_key_env is not None:
            api_key = os.environ.get(settings.api_key_env)
            if not api_key:
                raise ValueError(f"client.api_key_env: the environment has no {settings.api_key_env}.")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._settings, self._alone = settings, alone
        self._asked_alone = set() if alone is None else {alone}
        self._prompts: dict[str, tuple[list[int], str]] = {}
        self._rendering: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._endpoints = [_Endpoint(url) for url in endpoints]
        self._next = 0
        self._last_answer = time.monotonic()
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=settings.concurrency)
        timeout = httpx.Timeout(settings.timeout, connect=10.0)
        # No proxy from the environment for servers of one's own.
        self._http = httpx.AsyncClient(headers=headers, limits=limits, timeout=timeout, trust_env=False)

    async def __aenter__(self) -> Servers:
        return self

    async def __aexit__(self, *exc_info) -> None:
        await self._http.aclose()

    async def check(self) -> None:
        """Wait for a first server, and look what each one that answers runs.

        Raises:
            ValueError: a server has no student.
            NoServerAvailable: none answers within ``max_downtime``, or the key is wrong.
        """
        began = time.monotonic()
        while True:
            answers = await asyncio.gather(*(self._probe(endpoint) for endpoint in self._endpoints))
            if any(answers):
                self._last_answer = time.monotonic()
                return
            if time.monotonic() - began > self._settings.max_downtime:
                urls = ", ".join(endpoint.url for endpoint in self._endpoints)
                raise NoServerAvailable(f"no server answers at {urls}.")
            await asyncio.sleep(FIRST_PAUSE)

    def models(self, endpoint: str, alone: str | None = None) -> dict[str, str | None]:
        """Names of models and versions at an endpoint; empty for a router, which does not tell. Where one model was
        asked alone, of that one."""
        models = next(e.models for e in self._endpoints if e.url == endpoint)
        if alone is None:
            return models
        return {name: value for name, value in models.items() if not name.startswith(OTHER_MODEL[alone])}

    def not_serving_alone(self, side: str) -> list[str]:
        """Of the servers that have answered, those where a plain request is not for this model."""
        return [e.url for e in self._endpoints if e.models and side not in e.serves]

    def ask_alone(self, side: str) -> None:
        """From now on some requests are for this model alone, others for both."""
        self._asked_alone.add(side)

    def without_student(self) -> list[str]:
        """Of the servers that have answered, those that serve one model and cannot mix."""
        return [e.url for e in self._endpoints if not e.mixes]

    def ask_both(self) -> None:
        """From now on requests are for both models.

        Raises:
            ValueError: a server has no student.
        """
        self._alone = None
        self._asked_alone.clear()
        for url in self.without_student():
            raise _no_student(url)

    def model_names(self) -> list[str]:
        """Of the students that are known, then of the teachers."""
        named = (e.models.get(f"{side}_model") for side in ("student", "teacher") for e in self._endpoints)
        return [name for name in named if name]

    async def refresh(self) -> None:
        """Look again what the servers run: someone may put new weights into them. Servers that do not answer keep what
        was known of them."""
        await asyncio.gather(*(self._probe(endpoint) for endpoint in self._endpoints))

    async def generate(
        self, teacher: Context, student: Context, sampling: dict[str, Any], fields: dict[str, Any]
    ) -> Sample:
        """One sample of the mixture.

        Args:
            teacher, student: what each side reads.
            sampling: SGLang's sampling parameters.
            fields: more mixing fields, such as ``alpha_method`` or ``return_top_k``.

        Raises:
            BadRequestError: HTTP 400.
            RetriesExhausted: this request failed ``retries`` times while others succeeded.
            NoServerAvailable: see `check`; or an answer lacks what was asked for.
        """
        body = request_body(teacher, student, sampling, fields)
        wanted = wanted_by(body["session_params"][CARRIER])

        async def ask(endpoint: _Endpoint) -> Sample:
            began = time.monotonic()
            response = await self._post(endpoint, "/generate", body)
            return _sample(response, endpoint.url, time.monotonic() - began, wanted)

        return await self._tried(ask)

    async def generate_alone(
        self, side: str, context: Context, sampling: dict[str, Any], template_kwargs: dict[str, Any] | None = None
    ) -> Sample:
        """One sample of the one model that is asked, by a plain request: one forward pass a token.

        Its prompt is what the model reads in a mixed request, rendered and tokenized by SGLang's own code. Its
        log-probabilities are SGLang's: at the request's temperature (1 for a greedy one), after penalties and masks,
        before top-p and the like, which is what the series of a mixture are.

        Args:
            side: the model, that of `Servers` or one of `ask_alone`.
            context: what the model reads.
            sampling: SGLang's sampling parameters.
            template_kwargs: extra variables for its chat template.

        Raises:
            BadRequestError, RetriesExhausted, NoServerAvailable: as `generate`.
        """
        assert side in self._asked_alone, f"the {side} is not asked alone"

        async def ask(endpoint: _Endpoint) -> Sample:
            began = time.monotonic()
            ids, text = await self._prompt(endpoint, context, template_kwargs)
            body = {"input_ids": ids, "sampling_params": dict(sampling), "return_logprob": True}
            response = await self._post(endpoint, "/generate", body)
            sample = _sample_alone(response, endpoint.url, time.monotonic() - began, side)
            prompt: dict[str, Any] = {f"{side}_prompt_ids": ids, "prompt_tokens": len(ids) if side == "teacher" else 0}
            return dataclasses.replace(sample, **prompt, student_prompt_text=text if side == "student" else None)

        return await self._tried(ask)

    async def _prompt(
        self, endpoint: _Endpoint, context: Context, template_kwargs: dict[str, Any] | None
    ) -> tuple[list[int], str]:
        """(token ids, their text with special tokens); asked once for the samples of a problem."""
        key = json.dumps([context, template_kwargs], sort_keys=True)
        if key in self._prompts:
            return self._prompts[key]
        async with self._rendering[key]:  # its samples come together, and one asks for all
            if key in self._prompts:
                return self._prompts[key]
            if isinstance(context, str):
                body: dict[str, Any] = {"prompt": context}
            else:
                body = {"messages": context, "continue_final_message": context[-1]["role"] == "assistant"}
                body |= {"chat_template_kwargs": template_kwargs} if template_kwargs else {}
            ids = _json(await self._post(endpoint, "/v1/tokenize", body), endpoint.url)["tokens"]
            asked = {"tokens": ids, "skip_special_tokens": False}
            text = _json(await self._post(endpoint, "/v1/detokenize", asked), endpoint.url)["text"]
            while len(self._prompts) >= PROMPTS_KEPT:
                del self._prompts[next(iter(self._prompts))]
            self._prompts[key] = ids, text
            self._rendering.pop(key, None)
            return ids, text

    async def _post(self, endpoint: _Endpoint, path: str, body: dict[str, Any]) -> httpx.Response:
        with closed_at_once():
            return await self._http.post(f"{endpoint.url}{path}", json=body)

    async def _tried(self, ask: Callable[[_Endpoint], Awaitable[Sample]]) -> Sample:
        """Ask one server after the other, as long as there is hope; raises as `generate`."""
        began = time.monotonic()
        failures = 0  # of this request; that a server was away is not its fault

        def enough(state: tenacity.RetryCallState) -> bool:
            nonlocal failures
            error = state.outcome.exception() if state.outcome is not None else None
            failures += isinstance(error, _Failed) and error.reached
            if time.monotonic() - self._last_answer > self._settings.max_downtime:
                return True
            return failures > self._settings.retries and self._last_answer > began

        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(_Failed),
            wait=tenacity.wait_random_exponential(multiplier=FIRST_PAUSE, max=LONGEST_PAUSE),
            stop=enough,
            reraise=True,
        )
        try:
            return await retrying(self._once, ask)
        except _Failed as error:
            if failures > self._settings.retries and self._last_answer > began:
                raise RetriesExhausted(str(error)) from None
            raise NoServerAvailable(
                f"no server has answered for {self._settings.max_downtime:.0f} s: {error}"
            ) from None

    async def _once(self, ask: Callable[[_Endpoint], Awaitable[Sample]]) -> Sample:
        endpoint = await self._choose()
        try:
            sample = await ask(endpoint)
        except httpx.TransportError as error:
            self._back_off(endpoint)
            reached = not isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout)
            raise _Failed(f"{endpoint.url}: {type(error).__name__} {error}".rstrip(), reached=reached) from None
        except _Failed:
            self._back_off(endpoint)
            raise
        except BadRequestError:
            self._answered(endpoint)
            raise
        self._answered(endpoint)
        return sample

    async def _choose(self) -> _Endpoint:
        """The next server that is not resting; waits when all are."""
        while True:
            now = time.monotonic()
            for i in range(len(self._endpoints)):
                endpoint = self._endpoints[(self._next + i) % len(self._endpoints)]
                if endpoint.resting_until <= now:
                    self._next = (self._next + i + 1) % len(self._endpoints)
                    if not endpoint.models and await self._probe(endpoint):
                        for side in self._asked_alone:
                            for url in self.not_serving_alone(side):
                                raise ValueError(f"{url}: answers plain requests not as the {side}; leave it out.")
                    return endpoint
            await asyncio.sleep(max(0.01, min(e.resting_until for e in self._endpoints) - now))

    def _back_off(self, endpoint: _Endpoint) -> None:
        now = time.monotonic()
        if now >= endpoint.resting_until:  # many requests fail at once when a server dies: count that once
            endpoint.failures += 1
            endpoint.resting_until = now + min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (endpoint.failures - 1))

    def _answered(self, endpoint: _Endpoint) -> None:
        endpoint.failures, endpoint.resting_until = 0, 0.0
        self._last_answer = time.monotonic()

    async def _probe(self, endpoint: _Endpoint) -> bool:
        """Whether it answers; notes its models."""
        try:
            with closed_at_once():
                response = await self._http.get(f"{endpoint.url}/get_server_info", timeout=30)
        except httpx.TransportError:
            return False
        if response.status_code in (401, 403):
            raise NoServerAvailable(f"{endpoint.url}: wants an API key; set client.api_key_env.")
        if response.status_code >= 500:
            return False
        try:
            info = response.json()
            states = info["internal_states"]
        except (ValueError, KeyError, TypeError):
            endpoint.models = {"sglang_optimal_version": __version__}  # a router: it does not tell
            return True
        mixing = states[0].get("mixing") if states else None
        versions = {"sglang_version": info.get("version"), "sglang_optimal_version": __version__}
        endpoint.mixes = mixing is not None
        if mixing is None:
            if self._alone is None:
                raise _no_student(endpoint.url)
            # Whichever model it is, it is the one that is asked.
            endpoint.serves = (self._alone,)
            model = {"model": info.get("model_path"), "revision": info.get("revision")}
            endpoint.models = {f"{self._alone}_{name}": value for name, value in model.items()} | versions
            return True
        endpoint.serves = tuple(mixing.get("plain_requests_of", ()))  # older servers do not tell
        endpoint.models = {
            "teacher_model": mixing["teacher_model_path"],
            "teacher_revision": info.get("revision"),
            "student_model": mixing["student_model_path"],
            "student_revision": mixing.get("student_revision"),
            "student_weight_version": mixing.get("student_weight_version"),
            **versions,
        }
        return True


def _no_student(url: str) -> ValueError:
    return ValueError(f"{url}: runs no student; start it with python -m sglang_optimal.launch_server.")


@contextlib.contextmanager
def closed_at_once() -> Iterator[None]:
    """Ask within; a connection that the server closes at once is a ``httpx.ConnectError``.

    httpx looks at a new connection's socket, which uvloop no longer has by then.
    """
    try:
        yield
    except AttributeError as error:
        raise httpx.ConnectError(f"closed by the server: {error}") from error


def request_body(
    teacher: Context, student: Context, sampling: dict[str, Any], fields: dict[str, Any]
) -> dict[str, Any]:
    """The body of ``POST /generate``; the mixing fields travel where sglang-router lets them through."""
    custom = {"return_mixing_info": True, **fields, "return_prompts": True}
    if "return_top_k" in fields:
        custom["top_k_format"] = "base64"  # numbers in digits are slow to write and to read
    custom["student_text" if isinstance(student, str) else "student_messages"] = student
    body: dict[str, Any] = {"sampling_params": dict(sampling), "session_params": {CARRIER: custom}}
    if isinstance(teacher, str):
        body["text"] = teacher
    else:
        custom["teacher_messages"] = teacher
    return body


def _json(response: httpx.Response, endpoint: str) -> Any:
    """What a server answered. Raises `_Failed`, `BadRequestError` and `NoServerAvailable`."""
    if response.status_code in (401, 403):
        raise NoServerAvailable(f"{endpoint}: wants an API key; set client.api_key_env.")
    if response.status_code in (408, 429) or response.status_code >= 500:
        busy = response.status_code in (429, 503)
        raise _Failed(f"{endpoint}: HTTP {response.status_code}", reached=not busy)
    try:
        answer = response.json()
    except ValueError:
        raise _Failed(f"{endpoint}: the answer is no JSON (HTTP {response.status_code})") from None
    if response.status_code != 200:
        raise BadRequestError(_message(answer))
    return answer


def _finish_reason(meta: dict[str, Any], endpoint: str) -> str:
    reason = (meta.get("finish_reason") or {}).get("type", "abort")
    if reason == "abort":  # the server let go of it: shutting down, flushing, pausing
        raise _Failed(f"{endpoint}: aborted the request")
    return reason


def _sample_alone(response: httpx.Response, endpoint: str, latency: float, side: str) -> Sample:
    answer = _json(response, endpoint)
    meta, tokens = answer["meta_info"], answer["output_ids"]
    reason = _finish_reason(meta, endpoint)
    drawn = meta.get("output_token_logprobs") or []
    if [entry[1] for entry in drawn] != tokens:
        raise NoServerAvailable(f"{endpoint}: answers without the log-probability of every token; is it SGLang?")
    return Sample(
        text=answer["text"],
        token_ids=tokens,
        finish_reason=reason,
        series=series_of(side, [entry[0] for entry in drawn]),
        prompt_tokens=0,
        latency=latency,
        endpoint=endpoint,
        weight_version=meta.get("weight_version"),
    )


def _sample(response: httpx.Response, endpoint: str, latency: float, wanted: Wanted) -> Sample:
    answer = _json(response, endpoint)
    meta = answer["meta_info"]
    reason = _finish_reason(meta, endpoint)
    series = {name: _numbers(name, meta[name]) for name in wanted.series if meta.get(name) is not None}
    tokens = answer["output_ids"]
    top_k = _top_k(meta.get(TOP_K), wanted, len(tokens))
    short = [name for name in wanted.series if len(series.get(name, ())) != len(tokens)]
    short += [f"{TOP_K} of the {side}" for side in wanted.sides if side not in top_k]
    if short:
        raise NoServerAvailable(
            f"{endpoint}: answers without {short[0]} for every token; is it a server that mixes, of this version?"
        )
    return Sample(
        text=answer["text"],
        token_ids=tokens,
        finish_reason=reason,
        series=series,
        prompt_tokens=meta.get("prompt_tokens", 0),
        latency=latency,
        endpoint=endpoint,
        weight_version=meta.get("weight_version"),
        teacher_prompt_ids=meta.get("teacher_prompt_ids", []),
        student_prompt_ids=meta.get("student_prompt_ids", []),
        student_prompt_text=meta.get("student_prompt_text"),
        top_k=top_k,
    )


def _numbers(name: str, values: list[float | None]) -> list[float]:
    """A series without nulls, which is what JSON makes of −inf (a token without support) and NaN."""
    missing = -math.inf if name.endswith("logprob") else math.nan
    return [missing if value is None else value for value in values]


def _top_k(sent: Any, wanted: Wanted, tokens: int) -> dict[str, dict[str, np.ndarray]]:
    """The arrays of the sides that have all of them for every token."""
    if not tokens:
        return {side: {} for side in wanted.sides}
    try:
        sides = decode_top_k(sent or {})
    except (ValueError, KeyError, TypeError, AttributeError):  # no arrays, whatever is there instead
        return {}
    whole = {}
    for side in wanted.sides:
        arrays = sides.get(side, {})
        shape = arrays["ids"].shape if "ids" in arrays else ()
        shapes = {name: shape[:1] if name.endswith("_tail") else shape for name in ARRAYS}
        fits = len(shape) == 2 and shape[0] == tokens
        if fits and all(name in arrays and arrays[name].shape == shapes[name] for name in ARRAYS):
            whole[side] = {name: arrays[name] for name in ARRAYS}
    return whole


def _message(answer: Any) -> str:
    if isinstance(answer, dict):
        error = answer.get("error", answer)
        if isinstance(error, dict):
            return str(error.get("message", error))
        return str(error)
    return str(answer)
