"""Our own HTTP routes on SGLang's application. Its api keys and metrics cover them as they cover SGLang's."""

from __future__ import annotations

from http import HTTPStatus
from typing import Annotated

from fastapi import Body, Request
from fastapi.responses import HTMLResponse, JSONResponse
from sglang.srt.entrypoints import http_server
from sglang.srt.managers.io_struct import UpdateWeightFromDiskReqInput
from sglang.srt.utils.auth import AuthLevel, auth_level

from sglang_optimal import token_view


async def mixing_page() -> HTMLResponse:
    """A page to try mixing in a browser."""
    return HTMLResponse(token_view.page())


@auth_level(AuthLevel.ADMIN_OPTIONAL)
async def update_student_weights_from_disk(
    obj: Annotated[UpdateWeightFromDiskReqInput, Body()], request: Request
) -> JSONResponse:
    """New weights for the student; the body is that of SGLang's ``/update_weights_from_disk``."""
    manager = http_server._global_state.tokenizer_manager
    success, message, paused = await manager.update_student_weights_from_disk(obj, request)
    content = {"success": success, "message": message, "num_paused_requests": paused}
    return JSONResponse(content, status_code=HTTPStatus.OK if success else HTTPStatus.BAD_REQUEST)


def install() -> None:
    """Add the routes; before the server starts, because it looks at their access levels then."""
    app = http_server.app
    app.add_api_route("/mixing", mixing_page, methods=["GET"], include_in_schema=False)
    app.add_api_route("/update_student_weights_from_disk", update_student_weights_from_disk, methods=["POST"])
