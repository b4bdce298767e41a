"""Tokens as people see them: the page at /mixing, the report of a run and the demo share this."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from importlib import resources

Decode = Callable[[tuple[int, ...]], str]
"""Text of some tokens in a row."""


def viewer(suffix: str) -> str:
    """What pages with coloured tokens have in common: ``css`` or ``js``."""
    return _static(f"tokens.{suffix}")


def page() -> str:
    """The page at ``/mixing``: one self-contained HTML file that talks to the server that it came from."""
    return re.sub(r"/\* (\w+\.(?:css|js)) \*/", lambda match: _static(match[1]), _static("mixing.html"))


def _static(name: str) -> str:
    return resources.files("sglang_optimal").joinpath("static", name).read_text(encoding="utf-8")


def decoder(tokenizer, *, skip_special_tokens: bool) -> Decode:
    """Decodes as ``tokenizer`` does, and remembers."""

    @functools.cache
    def decode(ids: tuple[int, ...]) -> str:
        # No blank goes: a text is the sum of its tokens' texts.
        return tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)

    return decode


def token_pieces(decode: Decode, ids: Sequence[int]) -> list[str]:
    """The text that each token adds. A character split over several tokens belongs to its last one.

    Unlike decoding every prefix, the time is linear in the number of tokens: one token of context is enough for the
    blanks between words.
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
