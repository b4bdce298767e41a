"""How many held-out problems the student solves by itself, asked on the running server."""

from __future__ import annotations

import dataclasses

import httpx

from sglang_optimal.demo.loop.problems import WordProblem
from sglang_optimal.distill.intervals import wilson
from sglang_optimal.distill.numbers import last_number

TIMEOUT = 1800.0


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """solved of total, with the 95 % Wilson interval."""

    solved: int
    total: int

    @property
    def share(self) -> float:
        return self.solved / self.total

    def interval(self) -> tuple[float, float]:
        return wilson(self.solved, self.total)

    def __str__(self) -> str:
        low, high = self.interval()
        return f"{self.share:.1%} ({low:.1%}–{high:.1%})"


def update_student(url: str, checkpoint: str, version: str) -> None:
    """New weights for the student of a running server; the teacher keeps its own."""
    body = {"model_path": checkpoint, "weight_version": version}
    response = httpx.post(f"{url}/update_student_weights_from_disk", json=body, timeout=TIMEOUT, trust_env=False)
    response.raise_for_status()


def student_accuracy(url: str, problems: list[WordProblem], prompt: str, max_new_tokens: int) -> Accuracy:
    """Greedy answers of the student alone: the mixture with alpha 0.

    Args:
        url: of the server.
        problems: held out.
        prompt: a template with ``{problem}``.
        max_new_tokens: of one answer.
    """
    params = []
    for problem in problems:
        messages = [{"role": "user", "content": prompt.format(problem=problem.problem)}]
        custom = {"student_messages": messages, "teacher_messages": messages, "fixed_alpha": 0.0}
        params.append({"temperature": 0.0, "max_new_tokens": max_new_tokens, "custom_params": custom})
    response = httpx.post(f"{url}/generate", json={"sampling_params": params}, timeout=TIMEOUT, trust_env=False)
    response.raise_for_status()
    answers = [answer["text"] for answer in response.json()]
    return Accuracy(sum(map(solves, answers, problems)), len(problems))


def solves(text: str, problem: WordProblem) -> bool:
    """Whether the last number of ``text`` is the answer."""
    return last_number(text) == float(problem.answer)
