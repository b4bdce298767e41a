"""Tokens as people see them: the page at /mixing, the report of a run and the demo share this."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import resources


def style() -> str:
    """CSS of the scale of alpha and of what a token's tip shows."""
    return _static("tokens.css")


def script() -> str:
    """JavaScript: a token's colour by its alpha, and its tip."""
    return _static("tokens.js")


def page() -> str:
    """The page at ``/mixing``: one self-contained HTML file that talks to ``/generate``."""
    html = _static("mixing.html")
    return html.replace("/* tokens.css */", style().strip()).replace("/* tokens.js */", script().strip())


def _static(name: str) -> str:
    return resources.files("sglang_optimal").joinpath("static", name).read_text(encoding="utf-8")


def token_pieces(decode: Callable[[tuple[int, ...]], str], ids: Sequence[int]) -> list[str]:
    """The text that each token adds. A character split over several tokens belongs to its last one.

    Unlike decoding every prefix, the time is linear in the number of tokens: one token of context is enough for the
    blanks between words.

    Args:
        decode: text of some tokens in a row.
    """
    pieces: list[str] = []
    start = done = 0
    for end in range(1, len(ids) + 1):
        text = decode(tuple(ids[start:end]))
        if text.endswith("\ufffd") and end < len(ids) and end - done < 8:
            pieces.append("")
            continue
        pieces.append(text[len(decode(tuple(ids[start:done]))) :])
        start, done = done, end
    return pieces
