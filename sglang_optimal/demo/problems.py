"""The demo's word problems and the two prompts made of each."""

from __future__ import annotations

import dataclasses
import json
from importlib import resources

from sglang_optimal.distill.numbers import last_number, numbers


@dataclasses.dataclass(frozen=True)
class Problem:
    """A word problem and a worked solution that ends with its number."""

    problem: str
    answer: str

    @property
    def student_prompt(self) -> str:
        """What the student reads: the problem alone."""
        return f"Answer this question: {self.problem}"

    @property
    def teacher_prompt(self) -> str:
        """What the teacher reads: the same, and the solution."""
        return f"{self.student_prompt}\n\nCopy this answer: {self.answer}"

    def solved_by(self, text: str) -> bool:
        """Whether the last number in ``text`` is the solution's."""
        return last_number(text) == numbers(self.answer)[-1]


def load_problems() -> list[Problem]:
    """The problems shipped with the package."""
    lines = resources.files(__package__).joinpath("problems.jsonl").read_text().splitlines()
    return [Problem(**json.loads(line)) for line in lines]
