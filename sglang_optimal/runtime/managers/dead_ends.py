"""Requests that leave themselves no token to sample: a grammar that no token of the vocabulary goes on with, or that is
at its end while ``min_new_tokens`` asks for more. SGLang calls that an internal error; the fields are the client's."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

NOTHING_LEFT = "no token is left to sample"
_OF_SGLANG = "Grammar accept_token failed"
_GRAMMARS = ("json_schema", "regex", "ebnf", "structural_tag")
_MASKS = (*_GRAMMARS, "logit_bias", "min_new_tokens")


def blame_request(finish_reason: dict[str, Any], params: Any) -> None:
    """Make the end of such a request an HTTP 400 that names its fields; other ends stay as they are.

    Args:
        finish_reason: of the request's last output; changed.
        params: the request's sampling parameters, as they came.
    """
    message = finish_reason.get("message") or ""
    if finish_reason.get("type") != "abort" or not message.startswith((NOTHING_LEFT, _OF_SGLANG)):
        return
    given = [name for name in _MASKS if isinstance(params, dict) and params.get(name)]
    if not given:
        return
    finish_reason["status_code"] = HTTPStatus.BAD_REQUEST
    finish_reason["err_type"] = "BadRequestError"
    finish_reason["message"] = (
        f"{', '.join(given)}: {NOTHING_LEFT}: the grammar allows none that the vocabulary has here, or ends before "
        "min_new_tokens, or logit_bias forbids all."
    )
