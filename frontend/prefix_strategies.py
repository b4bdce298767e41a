"""Ways to tell the teacher the answer, compared on the same problems.

What the teacher reads before the text decides how far it pulls the student: look at the KL (per token, in nats), and
whether more problems are solved for it.
"""

from __future__ import annotations

from collections.abc import Callable

import sglang as sgl
from common import connect, finished, means, parser, print_table, solved, user

import sglang_optimal as so
from sglang_optimal.demo.problems import Problem, load_problems, numbers

STRATEGIES: dict[str, Callable[[Problem], list[dict]]] = {
    "nothing": lambda p: user(p.student_prompt),
    "final number": lambda p: user(f"{p.student_prompt}\n\nThe answer is {numbers(p.answer)[-1]:g}."),
    "solution as a hint": lambda p: user(f"{p.student_prompt}\n\nHint: {p.answer}"),
    "solution to copy": lambda p: user(p.teacher_prompt),
    "solution in the system prompt": lambda p: [
        {"role": "system", "content": f"The solution of the next question: {p.answer}"},
        *user(p.student_prompt),
    ],
    "an earlier turn": lambda p: [
        *user(p.student_prompt),
        {"role": "assistant", "content": p.answer},
        *user(f"Good. Once more. {p.student_prompt}"),
    ],
}


@sgl.function
def solve(s, problem: Problem, teacher_ctx: list[dict], max_tokens: int):
    s += so.mixed_gen("text", teacher_ctx, user(problem.student_prompt), max_tokens=max_tokens, temperature=0)


def main(argv: list[str] | None = None) -> list[dict]:
    arguments = parser(__doc__, max_tokens=96)
    arguments.add_argument("--problems", type=int, default=12, help="how many of the demo's problems")
    args = arguments.parse_args(argv)
    backend = connect(args)
    problems = load_problems()[: args.problems]
    rows = []
    for name, strategy in STRATEGIES.items():
        batch = [{"problem": p, "teacher_ctx": strategy(p), "max_tokens": args.max_tokens} for p in problems]
        states = [finished(s, "text") for s in solve.run_batch(batch, backend=backend)]
        rows.append(
            {
                "the teacher is told": name,
                "solved": solved(problems, states),
                **means(states),
            }
        )
    print_table(f"{len(problems)} problems", rows)
    return rows


if __name__ == "__main__":
    main()
