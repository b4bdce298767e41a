"""Semi on-policy distillation data: the teacher sees the worked answer, the student only the problem.

The mixture follows the answer and stays likely under the student. Expect more solved problems than the student alone,
and a mean student logprob between that of the teacher's text and that of the student's own.
"""

from __future__ import annotations

import sglang as sgl
from common import connect, finished, means, parser, print_table, solved, user

import sglang_optimal as so
from sglang_optimal.demo.problems import Problem, load_problems


@sgl.function
def solve(s, problem: Problem, max_tokens: int, fixed_alpha: float | None):
    s += so.mixed_gen(
        "text",
        teacher_ctx=user(problem.teacher_prompt),
        student_ctx=user(problem.student_prompt),
        fixed_alpha=fixed_alpha,  # None: solved for every token
        max_tokens=max_tokens,
        temperature=0,
    )


def main(argv: list[str] | None = None) -> list[dict]:
    arguments = parser(__doc__, max_tokens=96)
    arguments.add_argument("--problems", type=int, default=12, help="how many of the demo's problems")
    args = arguments.parse_args(argv)
    backend = connect(args)
    problems = load_problems()[: args.problems]
    rows = []
    # At alpha 1 and 0 the mixture is the teacher and the student themselves.
    for sampler, fixed_alpha in (("teacher", 1.0), ("mixture", None), ("student", 0.0)):
        batch = [{"problem": p, "max_tokens": args.max_tokens, "fixed_alpha": fixed_alpha} for p in problems]
        states = [finished(s, "text") for s in solve.run_batch(batch, backend=backend, progress_bar=True)]
        rows.append(
            {
                "sampler": sampler,
                "solved": solved(problems, states),
                **means(states),
                "first_answer": states[0]["text"],
            }
        )
    print_table(f"{len(problems)} problems", rows)
    return rows


if __name__ == "__main__":
    main()
