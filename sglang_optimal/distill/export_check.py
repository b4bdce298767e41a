"""Does an exported row train what was sampled? Rendered as TRL's trainers do, and compared token by token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

PROMPT, TOKENS, END, OTHER_END = "prompt", "tokens", "end", "other end"
KINDS = {
    PROMPT: "the trainer would read another prompt than the student did",
    TOKENS: "the sample's text has other tokens than were sampled",
    END: "the trainer would add an end where the sample was cut",
    OTHER_END: "the trainer would end the plain text with its own end token, where another was sampled",
}
"""How a row can differ: what it means."""


class ExportCheck:
    """Compares rows with the ids that were read and sampled.

    Args:
        tokenizer: folder or id; None: that of the records' student, where it is a folder here.

    Raises:
        ValueError: names ``--tokenizer``: it cannot be loaded.
    """

    def __init__(self, tokenizer: str | None):
        self._named = tokenizer
        self._tokenizer: Any = None if tokenizer is None else load_tokenizer(tokenizer)

    def difference(self, row: dict[str, Any], shaped: dict[str, Any]) -> str | None:
        """One of `KINDS`, or None.

        Args:
            row: as it is stored.
            shaped: as it is exported.

        Raises:
            ValueError: the row has no prompt ids, or there is no tokenizer for it.
        """
        prompt, sample = row.get("student_prompt_ids") or [], row["token_ids"]
        if not prompt:
            raise ValueError(
                "--no-check: is needed for records without student_prompt_ids, as those of older versions are."
            )
        tokenizer = self._tokenizer = self._tokenizer or self._of_student(row)
        rendered = _rendered(tokenizer, shaped)
        plain = row["student_messages"] is None
        if rendered[: len(prompt)] != prompt:
            # The last token of a text may join the sample's first; whether the tokenizer is another one, the text
            # alone says.
            return TOKENS if plain and list(tokenizer(row["student_text"])["input_ids"]) == prompt else PROMPT
        ended = row["finish_reason"] == "stop" and bool(sample) and sample[-1] in _special(tokenizer)
        if plain and ended and rendered[len(prompt) :] == [*sample[:-1], tokenizer.eos_token_id] != sample:
            return OTHER_END
        if rendered[len(prompt) : len(prompt) + len(sample)] != sample:
            return TOKENS
        after = rendered[len(prompt) + len(sample) :]
        return None if ended or not after else END

    def describe(self, row: dict[str, Any], shaped: dict[str, Any]) -> str:
        """Both texts, where they part."""
        expected, got = [*row["student_prompt_ids"], *row["token_ids"]], _rendered(self._tokenizer, shaped)
        same = next(
            (i for i, (a, b) in enumerate(zip(expected, got, strict=False)) if a != b), min(len(expected), len(got))
        )
        start = max(0, same - 8)
        ours, theirs = (self._tokenizer.decode(ids[start : same + 8]) for ids in (expected, got))
        return f"was {ours!r}, would be {theirs!r}"

    def _of_student(self, row: dict[str, Any]) -> Any:
        model = row.get("student_model")
        if not model or not Path(model).is_dir():
            raise ValueError(
                f"--tokenizer: give the student's (the records name {model!r}, which is no folder here), so that what "
                "is exported can be compared with what was sampled; or --no-check."
            )
        return load_tokenizer(model)


def load_tokenizer(name: str) -> Any:
    """Load a tokenizer by folder or id, without running code of the model's.

    Raises:
        ValueError: it cannot be loaded; the message names ``--tokenizer``.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"--tokenizer: cannot load {name}: {error}") from None


def _special(tokenizer: Any) -> set[int]:
    added = (token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special)
    return {*tokenizer.all_special_ids, *added}


def _rendered(tokenizer: Any, shaped: dict[str, Any]) -> list[int]:
    """Ids of the whole row, as TRL's SFTTrainer (and GKD's collator) make them; plain text gets an end token there."""
    variables = shaped.get("chat_template_kwargs", {})
    if "messages" in shaped or isinstance(shaped.get("prompt"), list):
        messages = shaped.get("messages") or [*shaped["prompt"], *shaped["completion"]]
        try:
            return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **variables))
        except Exception as error:  # whatever a template raises
            raise ValueError(f"--tokenizer: its chat template refuses the messages: {error}") from None
    text = shaped["text"] if "text" in shaped else shaped["prompt"] + shaped["completion"]
    end = tokenizer.eos_token or ""
    return list(tokenizer(text if text.endswith(end) else text + end)["input_ids"])
