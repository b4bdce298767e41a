"""Which ids mean the same token to two tokenizers."""

from __future__ import annotations

import dataclasses

LEAST_COMMON = 0.9
"""Of all ids that either tokenizer has, the share that both must have."""
_EXAMPLES = 3


@dataclasses.dataclass(frozen=True)
class Vocabularies:
    """Two vocabularies, of which either may have tokens that the other lacks.

    Attributes:
        common: number of ids that are the same token in both.
        of_one: {id: (``teacher`` or ``student``, token)} of those that one of them alone has, in order.
    """

    common: int
    of_one: dict[int, tuple[str, str]]

    @classmethod
    def compared(cls, teacher: dict[str, int], student: dict[str, int]) -> Vocabularies:
        """Of vocabularies {token: id}.

        Raises:
            ValueError: an id is another token to the student, or they have too few in common.
        """
        by_id = [{index: token for token, index in vocab.items()} for vocab in (teacher, student)]
        both = sorted(by_id[0].keys() & by_id[1].keys())
        others = [index for index in both if by_id[0][index] != by_id[1][index]]
        if others:
            examples = ", ".join(
                f"id {index} is {by_id[0][index]!r} for the teacher and {by_id[1][index]!r} for the student"
                for index in others[:_EXAMPLES]
            )
            raise ValueError(f"{len(others)} ids mean different tokens: {examples}.")
        of_one = {
            index: ("teacher", by_id[0][index]) if index in by_id[0] else ("student", by_id[1][index])
            for index in sorted(by_id[0].keys() ^ by_id[1].keys())
        }
        found = cls(len(both), of_one)
        if found.share < LEAST_COMMON:
            raise ValueError(
                f"only {len(both)} of {len(both) + len(of_one)} ids are in both, and at least {LEAST_COMMON:.0%} must "
                "be."
            )
        return found

    @property
    def share(self) -> float:
        """Of all ids that either has, those that both have."""
        return self.common / max(self.common + len(self.of_one), 1)
