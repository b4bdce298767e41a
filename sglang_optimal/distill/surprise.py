"""How much of a sample the student would not have written: statistics of its per-token log-probabilities.

The mean over a sample hides one leap; these do not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

RARE = 1e-3
"""A token with a smaller probability under the student is a surprise to it."""
LEAP = 0.1
"""A sample leaps to its answer where the student gives the answer a smaller probability at its first mention."""


def finite_or_impossible(value: float | None) -> float:
    """A log-probability, nats; −inf for null, which is what JSON makes of it, and for NaN."""
    return -math.inf if value is None or math.isnan(value) else float(value)


def least_logprob(logprobs: Sequence[float | None]) -> float:
    """Log-probability of the token that surprises most, nats; NaN of nothing."""
    return min(map(finite_or_impossible, logprobs), default=math.nan)


def tokens_below(logprobs: Sequence[float | None], floor: float = RARE) -> int:
    """How many tokens have a probability below ``floor``."""
    least = math.log(floor)
    return sum(finite_or_impossible(value) < least for value in logprobs)


def token_spans(pieces: Sequence[str], text: str) -> list[tuple[int, int]] | None:
    """Where each token stands in a text.

    Args:
        pieces: what each token adds, see `sglang_optimal.token_view.token_pieces`; empty for one that is not shown.
        text: the sample's, which may lack blanks at its ends and what came with a stop string.

    Returns:
        Half-open ranges of characters of ``text``, one a token; None where the pieces are not the text.
    """
    whole, body = "".join(pieces), text.strip()
    start = len(whole) - len(whole.lstrip())
    if not whole[start:].startswith(body):
        return None
    place = len(text) - len(text.lstrip()) - start
    spans = []
    for piece in pieces:
        spans.append((place, place + len(piece)))
        place += len(piece)
    return spans


def span_probability(
    spans: Sequence[tuple[int, int]], logprobs: Sequence[float | None], part: tuple[int, int]
) -> float | None:
    """The probability of the tokens that write a part of a text: the product of theirs, each after those before it.

    A token that writes more than the part counts whole. One that shows nothing belongs to the character after it: it is
    the beginning of its bytes.

    Args:
        spans: see `token_spans`.
        logprobs: of each token, nats.
        part: half-open range of characters.

    Returns:
        In [0, 1]; None where no token writes it.
    """
    start, end = part
    of_part = [
        finite_or_impossible(logprob)
        for (low, high), logprob in zip(spans, logprobs, strict=True)
        if (low < end and high > start) or (low == high and start <= low < end)
    ]
    return min(1.0, math.exp(math.fsum(of_part))) if of_part else None
