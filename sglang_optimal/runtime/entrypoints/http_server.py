"""Our own HTTP routes on SGLang's application. Its api keys and metrics cover them as they cover SGLang's."""

from __future__ import annotations

from http import HTTPStatus
from typing import Annotated

from fastapi import Body, Request
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import BaseModel, Field
from sglang.srt.entrypoints import http_server
from sglang.srt.managers.io_struct import GenerateReqInput, UpdateWeightFromDiskReqInput
from sglang.srt.utils.auth import AuthLevel, auth_level

from sglang_optimal import token_view
from sglang_optimal.config import MixingConfig
from sglang_optimal.distill.verdict import Verdict, judged
from sglang_optimal.names import CARRIER
from sglang_optimal.runtime.entrypoints import body_guard
from sglang_optimal.runtime.entrypoints.openai import serving_chat as openai_api
from sglang_optimal.runtime.entrypoints.protocol import COMPLETION_FIELDS
from sglang_optimal.runtime.managers.tokenizer_control_mixin import RouteRefused


async def mixing_page() -> HTMLResponse:
    """A page to try mixing in a browser."""
    return HTMLResponse(token_view.page())


class Judged(BaseModel):
    """A text, and the answer that it should come to."""

    text: Annotated[str, Field(max_length=100_000)]
    answer: Annotated[str, Field(max_length=20_000)]


def verdict(obj: Judged) -> Verdict:
    """Whether a text comes to an answer, as a run's ``answer`` filter judges it. In a thread: it is no coroutine."""
    return judged(obj.text, obj.answer)


@auth_level(AuthLevel.ADMIN_OPTIONAL)
async def update_student_weights_from_disk(
    obj: Annotated[UpdateWeightFromDiskReqInput, Body()], request: Request
) -> JSONResponse:
    """New weights for the student; the body is that of SGLang's ``/update_weights_from_disk``."""
    manager = http_server._global_state.tokenizer_manager
    success, message, paused = await manager.update_student_weights_from_disk(obj, request)
    content = {"success": success, "message": message, "num_paused_requests": paused}
    return JSONResponse(content, status_code=HTTPStatus.OK if success else HTTPStatus.BAD_REQUEST)


async def score_mixture(obj: Annotated[GenerateReqInput, Body()], request: Request):
    """Both models' and the mixture's view of completions that are given; the body is that of ``/generate``, with
    ``completion_text`` or ``completion_input_ids`` beside the student's context."""
    if obj.sampling_params is None:
        obj.sampling_params = {}
    params = obj.sampling_params if isinstance(obj.sampling_params, list) else [obj.sampling_params]
    sessions = obj.session_params if isinstance(obj.session_params, list) else [obj.session_params] * len(params)
    for own, session in zip(params, sessions, strict=False):
        carried = session.get(CARRIER) if isinstance(session, dict) else None
        places = [own.get("custom_params") if isinstance(own, dict) else None, carried]
        if not any(isinstance(place, dict) and place.keys() & COMPLETION_FIELDS for place in places):
            message = f"{' or '.join(COMPLETION_FIELDS)}: give one; /score_mixture scores, /generate generates."
            return JSONResponse({"error": {"message": message}}, status_code=HTTPStatus.BAD_REQUEST)
        own.setdefault("max_new_tokens", 0)
    return await http_server.serve_generate_request(obj, request)


async def _refused(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"error": {"message": str(error)}}, status_code=HTTPStatus.BAD_REQUEST)


def install(config: MixingConfig) -> None:
    """Add the routes, the series in SGLang's own, and the guard of their bodies.

    Before the server starts, because it looks at the routes' access levels then.
    """
    app = http_server.app
    openai_api.install()
    app.add_api_route("/mixing", mixing_page, methods=["GET"], include_in_schema=False)
    app.add_api_route("/mixing/verdict", verdict, methods=["POST"])
    app.add_api_route("/score_mixture", score_mixture, methods=["POST"])
    app.add_api_route("/update_student_weights_from_disk", update_student_weights_from_disk, methods=["POST"])
    app.add_exception_handler(RouteRefused, _refused)
    body_guard.install(app, config)
