"""Refuses, on every HTTP route, mixing fields that stand where nothing reads them.

SGLang drops what it does not know of a body, so that a field in the wrong place would give a plain answer with HTTP
200. Looked for are keys of mappings, wherever they are, and in JSON that stands in a string; not in the client's own
texts, schemas and calls of tools.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import parse_qsl

import orjson
from fastapi.responses import ORJSONResponse
from jinja2 import TemplateError
from starlette.middleware import Middleware

from sglang_optimal.config import MixingConfig
from sglang_optimal.names import CARRIER
from sglang_optimal.runtime.entrypoints.protocol import MIXING_FIELDS, is_typo

_GENERATE = ("/generate", "/score_mixture")
_VERTEX = (os.environ.get("AIP_PREDICT_ROUTE", "/vertex_generate"),)
_OPENAI = ("/v1/chat/completions", "/v1/completions", "/invocations")
_OLLAMA = (
    os.environ.get("SGLANG_OLLAMA_CHAT_ROUTE", "/api/chat"),
    os.environ.get("SGLANG_OLLAMA_GENERATE_ROUTE", "/api/generate"),
)
_DETOKENIZE = ("/v1/detokenize", "/detokenize")
_CANNOT_MIX = ("/v1/messages", "/v1/responses", *_OLLAMA)
"""Routes that generate and have no place for the fields."""

# The client's own words: mappings there have keys of the protocol (role, content, type), texts may say what they will.
_WORDS = frozenset(
    ("messages", "input", "prompt", "text", "input_ids", "tools", "functions", "tool_choice", "system", "instructions")
    + ("query", "queries", "items", "questions", "instances")
)
# What may have any key, and among the words also what a tool takes and is called with.
_FREE = frozenset(("json_schema", "schema", "format", "documents", "logit_bias"))
_FREE_AMONG_WORDS = frozenset(("parameters", "input_schema", "arguments", "input", "defs", "properties"))
# Fields of /generate that SGLang's own processes set for each other: a client's value would send the answer elsewhere,
# or end the scheduler.
_INTERNAL = (
    "http_worker_ipc",
    "need_wait_for_mm_inputs",
    "num_items_assigned",
    "encoder_urls",
    "positional_embed_overrides",
    "token_indices_to_pool",
    "multi_item_delimiter_indices",
    "decode_tp_size",
)
# A large body without any of these is not looked at: names as they are, or with letters escaped.
_SUSPICIOUS = re.compile(
    "|".join(
        (
            *("student", "teacher", "alpha", "kl_budget", "return_mixing", "return_prompts", "completion", "top_k"),
            *("response_format", "\\\\u00", *_INTERNAL),
        )
    ).encode(),
    re.IGNORECASE,
)
_LONGEST = max(map(len, MIXING_FIELDS))
# Where all keys are the server's, so that one which begins as ours do is meant for us, however it goes on.
_ARGUMENTS = re.compile(r"((parameters\.)?sampling_params(\[\d+\])?|parameters|extra_body|options)?")
_PREFIXES = ("student_", "teacher_", "alpha_", "fixed_alpha", "kl_budget", "return_mixing", "return_top_k", "top_k_")
_LARGE = 1 << 20
"""Bytes that are parsed in a few milliseconds."""


class MisplacedFields:
    """ASGI middleware, the innermost: after SGLang's api keys and its decompression of bodies.

    Args:
        app: what comes next.
        config: of the server.
    """

    def __init__(self, app: Callable, config: MixingConfig):
        self._app, self._config = app, config

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        body = None
        if scope["method"] in ("POST", "PUT"):
            body, messages = await _read(receive)
            receive = _replay(messages, receive)
        path = scope["path"].removeprefix(scope.get("root_path", "")).rstrip("/") or "/"
        message = self._refusal(path, scope.get("query_string", b""), body or b"")
        if message is None and path in _OLLAMA:
            message = await _refused_by(self._app, scope, receive, send)
        elif message is None:
            return await self._app(scope, receive, send)
        if message is not None:
            await ORJSONResponse(_error(path, message), status_code=400)(scope, receive, send)

    def _refusal(self, path: str, query: bytes, body: bytes) -> str | None:
        for name, _ in parse_qsl(query.decode("latin-1"), keep_blank_values=True):
            if name in MIXING_FIELDS:
                return f"{name}: is in the URL, where nothing reads it; {_places(path)}"
        if path in _OLLAMA and self._config.student_model_path and self._config.plain_requests == "refuse":
            return f"{path}: cannot mix, and this server takes no plain requests (--plain-requests refuse)."
        if path in _OPENAI and body.lstrip()[:1] not in (b"{", b""):
            return "the body must be a mapping."
        if len(body) > _LARGE and not _SUSPICIOUS.search(body):
            return None
        try:
            value = orjson.loads(body)
        except orjson.JSONDecodeError:
            return _of_form(path, body)  # what is meant as JSON, SGLang refuses
        found = next(misplaced(path, value), None)
        if found is None:
            return _internal(path, value) or _badly_formed(path, value)
        where, name = found
        return f"{name}: {where}, where nothing reads it; {_places(path)}"


def misplaced(path: str, body: Any) -> Iterator[tuple[str, str]]:
    """(where, name) of each mixing field in a body that the route does not read."""
    yield from _search(body, _read_places(path, body))


@functools.lru_cache(4096)
def _is_ours(key: str) -> bool:
    return key in MIXING_FIELDS or (len(key) < 2 * _LONGEST and is_typo(key))


def _read_places(path: str, body: Any) -> list[int]:
    """`id` of each mapping whose mixing fields the route reads."""
    places: list[Any] = []
    if path in _OPENAI:
        places = [_get(body, "custom_params"), _get(_get(body, "session_params"), CARRIER)]
    elif path in _GENERATE + _VERTEX:
        request = _get(body, "parameters") if path in _VERTEX else body
        places = [_get(params, "custom_params") for params in _each(_get(request, "sampling_params"))]
        places += [_get(session, CARRIER) for session in _each(_get(request, "session_params"))]
    return [id(place) for place in places if isinstance(place, dict)]


def _internal(path: str, body: Any) -> str | None:
    request = body if path in _GENERATE else _get(body, "parameters") if path in _VERTEX else None
    given = [name for name in _INTERNAL if _get(request, name) is not None]
    return f"{given[0]}: is SGLang's own to set; remove it." if given else None


def _badly_formed(path: str, body: Any) -> str | None:
    """What SGLang's own models of a request look into before they know that it is a mapping."""
    if path in _OLLAMA and _get(body, "messages") == []:
        return "messages: must be a non-empty list."
    if path in _DETOKENIZE:
        tokens = _get(body, "tokens")
        bad = [
            id for ids in _each(tokens) for id in _each(ids) if isinstance(id, int | float) and not 0 <= id < 1 << 31
        ]
        return f"tokens: {bad[0]} is no token id." if bad else None
    form = _get(body, "response_format")
    if form is not None and not isinstance(form, dict):
        return f"response_format: must be a mapping, got {type(form).__name__}."
    schema = _get(form, "schema")
    if schema is not None and not isinstance(schema, dict):
        return f"response_format.schema: must be a mapping, got {type(schema).__name__}."
    properties = _get(schema, "properties")
    if properties is not None and not isinstance(properties, dict):
        return f"response_format.schema.properties: must be a mapping, got {type(properties).__name__}."
    return None


def _get(value: Any, key: str) -> Any:
    return value.get(key) if isinstance(value, dict) else None


def _each(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _search(body: Any, read: list[int]) -> Iterator[tuple[str, str]]:
    """(where, name); without recursion, since a body may be as deep as its parser allows."""
    waiting = [(body, "", False)]
    while waiting:
        value, where, words = waiting.pop()
        if isinstance(value, dict):
            is_read = id(value) in read
            for key, inner in value.items():
                if not is_read and (_is_ours(key) or (key.startswith(_PREFIXES) and _ARGUMENTS.fullmatch(where))):
                    yield f"is in {where}" if where else "is at the top level", key
                if key in _FREE or (words and key in _FREE_AMONG_WORDS) or (is_read and key in MIXING_FIELDS):
                    continue
                waiting.append((inner, f"{where}.{key}" if where else key, words or key in _WORDS))
        elif isinstance(value, list):
            waiting += [
                (inner, f"{where}[{position}]", words)
                for position, inner in enumerate(value)
                if isinstance(inner, dict | list) or (isinstance(inner, str) and not words)  # of ids there are many
            ]
        elif isinstance(value, str) and not words and value.lstrip()[:1] in ("{", "["):
            with contextlib.suppress(orjson.JSONDecodeError):
                waiting.append((orjson.loads(value), f"{where} (text, not a mapping)", False))


def _of_form(path: str, body: bytes) -> str | None:
    """The same for a form, such as that of an audio file."""
    for match in re.finditer(rb'name="?([A-Za-z_]+)"?', body):
        name = match[1].decode()
        if name in MIXING_FIELDS:
            return f"{name}: is in a form, where nothing reads it; {_places(path)}"
    return None


def _places(path: str) -> str:
    if path in _OPENAI:
        return f"put it into custom_params (or session_params.{CARRIER}), a mapping at the top level."
    if path in _GENERATE + _VERTEX:
        return f"put it into sampling_params.custom_params (or session_params.{CARRIER}), a mapping."
    return f"{path} cannot mix: use /generate, /v1/completions or /v1/chat/completions."


def _error(path: str, message: str) -> dict[str, Any]:
    """A refusal in the form of the route's other errors."""
    if path in _OLLAMA:
        return {"error": message}
    if path.startswith("/v1/messages"):
        return {"type": "error", "error": {"type": "invalid_request_error", "message": message}}
    if path.startswith("/v1/") and not path.startswith("/v1/responses") or path == "/invocations":
        return {"object": "error", "message": message, "type": "BadRequest", "param": None, "code": 400}
    return {"error": {"message": message, "type": "invalid_request_error", "code": 400}}


async def _refused_by(app: Callable, scope, receive, send) -> str | None:
    """Let a route answer that does not look at its values; what it raises for them before its first piece.

    SGLang's Ollama routes give HTTP 500 there, and where a stream is asked for close the connection.
    """
    held: list[dict[str, Any]] = []
    answered = False

    async def hold(message: dict[str, Any]) -> None:
        nonlocal answered
        held.append(message)
        if message["type"] == "http.response.body" and (message.get("body") or not message.get("more_body")):
            answered = True
        while answered and held:
            await send(held.pop(0))

    try:
        await app(scope, receive, hold)
    except (ValueError, TypeError, LookupError, TemplateError) as error:
        if answered:
            raise
        return str(error) or type(error).__name__
    return None


async def _read(receive: Callable) -> tuple[bytes, list[dict[str, Any]]]:
    """The whole body, and the messages that brought it."""
    messages, parts = [], []
    while True:
        message = await receive()
        messages.append(message)
        if message["type"] != "http.request":
            break
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            break
    return b"".join(parts), messages


def _replay(messages: list[dict[str, Any]], receive: Callable) -> Callable:
    waiting = iter(messages)

    async def replayed() -> dict[str, Any]:
        message = next(waiting, None)
        return message if message is not None else await receive()

    return replayed


def install(app: Any, config: MixingConfig) -> None:
    """Put it around the routes of SGLang's application, inside of everything else that is around them."""
    app.user_middleware.append(Middleware(MisplacedFields, config=config))
