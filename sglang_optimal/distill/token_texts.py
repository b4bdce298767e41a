"""What each token of a sample writes, by a tokenizer on this machine."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sglang_optimal.distill.filters.base import Filter
from sglang_optimal.distill.mentions import AnswerField
from sglang_optimal.distill.records import NotStored, Record
from sglang_optimal.distill.surprise import span_probability, token_spans
from sglang_optimal.token_view import Decode, decoder, token_pieces

NO_TOKENIZER = "no tokenizer says which tokens write the answer"
NO_LOGPROBS = "the student's log-probabilities are not known"
OTHER_TEXT = "the tokens do not spell the text"


def local_tokenizer(name: str) -> Any | None:
    """A tokenizer from this machine; None when there is none of that name. Nothing is downloaded, no code is run."""
    if not _is_here(name):
        return None
    from transformers import AutoTokenizer  # takes seconds

    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    except Exception:  # transformers and tokenizers raise whatever a broken file leads to
        return None


def _is_here(name: str) -> bool:
    """Whether it is a folder, or an id in the local Hugging Face cache."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if Path(name).is_dir():
        return True
    try:
        found = (try_to_load_from_cache(name, file) for file in ("tokenizer_config.json", "config.json"))
        return any(isinstance(path, str) for path in found)
    except HFValidationError:
        return False


class AnswerProbabilities:
    """Sets `Record.answer_probability`.

    Args:
        answer: where the expected answer is.
        tokenizer: folder or id that was asked for.

    Raises:
        ValueError: ``tokenizer`` is not on this machine.
    """

    def __init__(self, answer: AnswerField, tokenizer: str | None = None):
        self._answer = answer
        self._decode: Decode | None = None
        self._specials: frozenset[int] = frozenset()
        self._tried: set[str] = set()
        if tokenizer is not None and not self.find([tokenizer]):
            raise ValueError(
                f"client.tokenizer: {tokenizer!r} is no tokenizer in a folder or in the local Hugging Face cache."
            )

    def require(self, models: Iterable[str | None], filters: Iterable[Filter], whose: str) -> None:
        """`find` one, which filters may need.

        Args:
            models: folders or ids. filters: of the run. whose: the models are, for the message.

        Raises:
            ValueError: a filter needs one, and there is none.
        """
        found = self.find(models)
        needing = next((f.label for f in filters if f.needs_tokenizer), None)
        if needing is not None and not found:
            raise ValueError(
                f"filters: {needing}: min_answer_probability needs a tokenizer, and that of the {whose}' models is not "
                "on this machine; give its folder or id as client.tokenizer."
            )

    def find(self, models: Iterable[str | None]) -> bool:
        """Take the first of these models, folders or ids, whose tokenizer is on this machine, if none was found before;
        whether there is one."""
        for name in models:
            if self._decode is None and name and name not in self._tried:
                self._tried.add(name)
                tokenizer = local_tokenizer(name)
                if tokenizer is not None:
                    self._decode = decoder(tokenizer, skip_special_tokens=True)
                    self._specials = frozenset(tokenizer.all_special_ids)
        return self._decode is not None

    def __call__(self, record: Record) -> None:
        """Set the student's probability of the expected answer where the sample first writes it, or why it has none."""
        found = self._answer.mention(record.fields, record.text)
        if isinstance(found, str):
            record.answer_unknown = found
            return
        if self._decode is None:
            record.answer_unknown = NO_TOKENIZER
            return
        kept = [i for i, token in enumerate(record.token_ids) if token not in self._specials]
        try:
            pieces = token_pieces(self._decode, [record.token_ids[i] for i in kept])
        except Exception:  # ids beyond its vocabulary, in the words of any tokenizer
            pieces = []
        spans = token_spans(pieces, record.text)
        try:
            logprobs = record.student_logprob
        except NotStored:
            record.answer_unknown = NO_LOGPROBS
            return
        if spans is None or len(logprobs) != len(record.token_ids):
            record.answer_unknown = OTHER_TEXT
            return
        record.answer_probability = span_probability(spans, [logprobs[i] for i in kept], found)
        if record.answer_probability is None:
            record.answer_unknown = OTHER_TEXT
