"""A tree: several mixed attempts at a problem in parallel forks, and at the end the model selects among their answers.

The forks share the prompt in both radix caches. Every attempt is sampled from the mixture (the teacher sees the
solution), the selection is the teacher's own over the problem and the attempts' numbers.
"""

from __future__ import annotations

import sglang as sgl
from common import connect, console, finished, parser, print_table, statistics

import sglang_optimal as so
from sglang_optimal.demo.problems import Problem, load_problems, numbers


@sgl.function
def solve(s, problem: Problem, width: int, max_tokens: int):
    s += f"Question: {problem.problem}\nAnswer:"
    forks = s.fork(width)
    for fork in forks:
        fork += so.mixed_gen(
            "attempt",
            teacher_ctx=f"Question: {problem.problem}\nSolution: {problem.answer}\nAnswer:",
            temperature=0.8,
            max_tokens=max_tokens,
            stop="\n",
        )
    attempts = [fork["attempt"] for fork in forks]
    s["attempts"] = attempts
    s["statistics"] = [statistics(fork.get_meta_info("attempt")) for fork in forks]
    forks.join()
    answers = sorted({f"{numbers(attempt)[-1]:g}" for attempt in attempts if numbers(attempt)}) or ["none"]
    s += " So the answer is " + sgl.select("choice", answers)


def main(argv: list[str] | None = None) -> list[dict]:
    arguments = parser(__doc__, max_tokens=48)
    arguments.add_argument("--problems", type=int, default=3, help="how many of the demo's problems")
    arguments.add_argument("--width", type=int, default=4, help="attempts at each")
    args = arguments.parse_args(argv)
    backend = connect(args)
    problems = load_problems()[: args.problems]
    batch = [{"problem": p, "width": args.width, "max_tokens": args.max_tokens} for p in problems]
    results = []
    for problem, state in zip(problems, solve.run_batch(batch, backend=backend), strict=True):
        finished(state, "choice")
        console.print(f"\n[bold]{problem.problem}[/bold]")
        rows = [
            {"attempt": text.strip(), "right": "yes" if problem.solved_by(text) else "no", "alpha": found["alpha"]}
            for text, found in zip(state["attempts"], state["statistics"], strict=True)
        ]
        right = problem.solved_by(state["choice"])
        print_table(f"selected: {state['choice']} ({'right' if right else 'wrong'})", rows)
        results.append({"attempts": rows, "choice": state["choice"], "right": right})
    return results


if __name__ == "__main__":
    main()
