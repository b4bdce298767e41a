"""Filters that look at the text alone."""

from __future__ import annotations

import functools
import hashlib
from typing import Annotated, Literal

from pydantic import Field, model_validator

from sglang_optimal.distill.filters.base import Check, Filter
from sglang_optimal.distill.records import Record


class Length(Filter):
    """Tokens of the sample."""

    type: Literal["length"]
    min_tokens: Annotated[int, Field(ge=0)] = 0
    """Fewest tokens."""
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    """Most tokens."""

    @model_validator(mode="after")
    def _ordered(self) -> Length:
        if self.max_tokens is not None and self.max_tokens < self.min_tokens:
            raise ValueError(f"max_tokens: {self.max_tokens} is less than min_tokens {self.min_tokens}.")
        return self

    def check(self, record: Record) -> str | None:
        tokens = len(record.token_ids)
        if tokens < self.min_tokens:
            return "too short"
        if self.max_tokens is not None and tokens > self.max_tokens:
            return "too long"
        return None


class Finish(Filter):
    """How the sample ended."""

    type: Literal["finish"]
    reasons: list[Literal["stop", "length"]] = ["stop"]
    """``stop``: an end-of-text token or a stop string; ``length``: ``max_new_tokens``."""

    def check(self, record: Record) -> str | None:
        return None if record.finish_reason in self.reasons else f"ended by {record.finish_reason}"


class Repetition(Filter):
    """Samples that go round in circles."""

    type: Literal["repetition"]
    ngram: Annotated[int, Field(gt=0)] = 4
    """Length of the n-grams, in tokens."""
    max_share: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Largest share of n-grams that have occurred before in the sample."""
    max_line_repeats: Annotated[int, Field(gt=0)] | None = None
    """Most times that one line (not blank) may occur."""

    def check(self, record: Record) -> str | None:
        if repeated_share(record.token_ids, self.ngram) > self.max_share:
            return f"repeated {self.ngram}-grams"
        if self.max_line_repeats is not None:
            lines = [line.strip() for line in record.text.splitlines() if line.strip()]
            if any(lines.count(line) > self.max_line_repeats for line in set(lines)):
                return "repeated line"
        return None


def repeated_share(tokens: list[int], n: int) -> float:
    """Share of the n-grams of ``tokens`` that have occurred before in it; 0 for fewer than n tokens."""
    total = len(tokens) - n + 1
    if total <= 0:
        return 0.0
    return 1.0 - len({tuple(tokens[i : i + n]) for i in range(total)}) / total


class Language(Filter):
    """Language of the text, as py3langid identifies it."""

    type: Literal["language"]
    allowed: Annotated[list[str], Field(min_length=1)]
    """ISO 639-1 codes, such as ``en``."""
    min_probability: Annotated[float, Field(ge=0, le=1)] = 0.0
    """How sure the identification must be."""
    min_characters: Annotated[int, Field(ge=0)] = 20
    """Shorter texts pass: too little to tell."""

    def ready(self) -> Check:
        known = set(_identifier().labels)
        for code in self.allowed:
            if code not in known:
                raise ValueError(f"allowed: unknown language {code!r}; use ISO 639-1 codes such as 'en'.")
        return self.check

    def check(self, record: Record) -> str | None:
        if len(record.text) < self.min_characters:
            return None
        language, probability = _identifier().classify(record.text)
        if language not in self.allowed:
            return f"language {language}"
        return None if probability >= self.min_probability else "language uncertain"


@functools.cache
def _identifier():
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


class Deduplicate(Filter):
    """Texts that have been accepted before."""

    type: Literal["deduplicate"]
    scope: Literal["problem", "run"] = "problem"
    """Compare with samples of the same problem, or with every sample of the run."""
    normalize: bool = True
    """Ignore case and the amount of white space."""

    def check(self, record: Record) -> str | None:
        raise NotImplementedError("has the memory of one run; use ready()")

    def ready(self) -> Check:
        return _Seen(self)


class _Seen:
    """Put it last among the filters: a text counts as seen when it gets here."""

    def __init__(self, config: Deduplicate):
        self._config = config
        self._seen: set[bytes] = set()

    def remember(self, problem_id: str, text: str) -> None:
        self._seen.add(self._key(problem_id, text))

    def __call__(self, record: Record) -> str | None:
        key = self._key(record.problem_id, record.text)
        if key in self._seen:
            return "duplicate"
        self._seen.add(key)
        return None

    def _key(self, problem_id: str, text: str) -> bytes:
        if self._config.normalize:
            text = " ".join(text.lower().split())
        scope = problem_id if self._config.scope == "problem" else ""
        return hashlib.blake2b(f"{scope}\0{text}".encode(errors="surrogatepass"), digest_size=16).digest()
