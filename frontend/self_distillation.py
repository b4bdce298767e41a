"""Self-distillation: one model in both roles, two contexts. The teacher's has worked examples, the student's has none.

Training the student on such text moves what the examples teach into the weights (context distillation). Expect the
mixture to take on the form of the examples, a short sum with "The answer is", more often than the bare model does.
"""

from __future__ import annotations

import sglang as sgl
from common import connect, finished, parser, print_table, solved, statistics, user

import sglang_optimal as so
from sglang_optimal.demo.problems import Problem, load_problems


def with_examples(problem: Problem, examples: list[Problem]) -> list[dict]:
    turns = [turn for e in examples for turn in (*user(e.student_prompt), {"role": "assistant", "content": e.answer})]
    return [*turns, *user(problem.student_prompt)]


@sgl.function
def solve(s, problem: Problem, examples: list[Problem], fixed_alpha: float | None, max_tokens: int):
    s += so.mixed_gen(
        "text",
        teacher_ctx=with_examples(problem, examples),
        student_ctx=user(problem.student_prompt),
        fixed_alpha=fixed_alpha,
        max_tokens=max_tokens,
        temperature=0,
    )


def main(argv: list[str] | None = None) -> list[dict]:
    arguments = parser(__doc__, max_tokens=96)
    arguments.add_argument("--problems", type=int, default=6, help="how many of the demo's problems")
    arguments.add_argument("--examples", type=int, default=4, help="how many others the teacher sees solved")
    args = arguments.parse_args(argv)
    backend = connect(args)
    problems = load_problems()
    examples, problems = problems[-args.examples :], problems[: args.problems]
    rows = []
    for sampler, fixed_alpha in (("with examples", 1.0), ("mixture", None), ("bare", 0.0)):
        batch = [
            {"problem": p, "examples": examples, "fixed_alpha": fixed_alpha, "max_tokens": args.max_tokens}
            for p in problems
        ]
        states = [finished(s, "text") for s in solve.run_batch(batch, backend=backend)]
        rows.append(
            {
                "sampler": sampler,
                "solved": solved(problems, states),
                "in the examples' form": sum("The answer is" in s["text"] for s in states),
                "student_logprob": statistics(states[0].get_meta_info("text"))["student_logprob"],
                "first_answer": states[0]["text"],
            }
        )
    print_table(f"{len(problems)} problems, {len(examples)} examples", rows)
    return rows


if __name__ == "__main__":
    main()
