"""Greedy requests whose answers are known beforehand, from the oracle, for each version of the student's weights."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from harness import ALPHAS, TIE, oracle_settings, random_ids
from oracle import MixedOracle, OracleResult
from tiny_models import small_text

EOS = 2
LONGEST = 44
"""Tokens of a known answer; a request asks for some of them."""
LETTERS = 5
FIRST_LETTER = 19  # "a" in the 64-token tokenizer


@dataclass(frozen=True)
class Known:
    """One greedy request.

    Attributes:
        teacher, student: token ids; student None: a plain request.
        alpha: the request's alpha settings.
        bias: logit bias of the request.
        regex: of the request's grammar, for ``LONGEST`` letters, or None.
        answers: the oracle's answer for each version of the student's weights.
    """

    teacher: tuple[int, ...]
    student: tuple[int, ...] | None
    alpha: dict[str, Any]
    bias: dict[int, float]
    grammar: bool
    answers: dict[str, OracleResult]

    def sure(self, version: str, n: int) -> int:
        """How many of the first ``n`` tokens float32 cannot order otherwise."""
        margins = self.answers[version].margins[:n]
        return next((i for i, margin in enumerate(margins) if margin < TIE), len(margins))


class Expectations:
    """A pool of known requests that share prefixes on either side, slowly replaced.

    Args:
        oracles: {version of the student's weights: oracle}.
        seed: of every choice.
    """

    def __init__(self, oracles: dict[str, MixedOracle], seed: int):
        self._oracles = oracles
        self._rng = random.Random(seed)
        self._prefixes = [random_ids(self._rng, length) for length in (6, 20, 36, 50)]
        self.pool: list[Known] = []

    def grow(self, count: int, limit: int) -> None:
        """Add ``count`` new requests; beyond ``limit`` the oldest go."""
        self.pool += [self._new(len(self.pool) + i) for i in range(count)]
        del self.pool[: max(len(self.pool) - limit, 0)]

    def _context(self) -> tuple[int, ...]:
        prefix = self._rng.choice([[], *self._prefixes])
        return tuple(prefix + random_ids(self._rng, self._rng.randint(1, 40)))

    def _new(self, number: int) -> Known:
        mixed = number % 4 != 3
        grammar = number % 5 == 1
        letters = range(FIRST_LETTER, FIRST_LETTER + LETTERS)
        known = Known(
            teacher=self._context(),
            student=self._context() if mixed else None,
            alpha=ALPHAS[number % len(ALPHAS)] if mixed else {},
            bias={} if grammar else {EOS: -100.0},
            grammar=grammar,
            answers={},
        )
        forbidden = {token: float("-inf") for token in range(64) if token not in letters}
        bias = forbidden if grammar else known.bias
        settings = known.alpha
        if not mixed:
            settings = {"fixed_alpha": 1.0}  # the teacher alone, with margins
        settings = oracle_settings(settings)
        for version, oracle in self._oracles.items():
            if not mixed and known.answers:
                known.answers[version] = next(iter(known.answers.values()))  # no student reads it
                continue
            student = known.student if mixed else known.teacher
            known.answers[version] = oracle.generate_greedy(
                known.teacher, student, LONGEST, logit_bias=bias, **settings
            )
        return known


def text_of(tokens: list[int]) -> str:
    return small_text(tokens)
