"""``python -m sglang_optimal.demo``: word problems by the teacher alone, the student alone and their mixture.

The teacher sees the solution, the student does not. The mixture is what semi on-policy distillation trains on: as good
as the teacher's text, and still likely under the student.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
import warnings

from rich.console import Console

from sglang_optimal.config import ALPHA_METHODS
from sglang_optimal.demo.prepare_model import DEFAULT_TARGET
from sglang_optimal.demo.problems import Problem, load_problems
from sglang_optimal.demo.progress import step

STREAM_INTERVAL = 4
"""Tokens between two looks at a text: often enough to see it grow, and seldom enough not to slow it down."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sglang_optimal.demo",
        description="Teacher alone (sees the solution), student alone (does not), and their mixture, side by side.",
    )
    parser.add_argument("--model-path", default=str(DEFAULT_TARGET), help="Teacher. Default: %(default)s.")
    parser.add_argument("--student-model-path", help="Student. Default: the teacher's weights, with its own prompt.")
    parser.add_argument("--problems", type=int, default=12, help="How many problems, 1 to 12. Default: %(default)s.")
    parser.add_argument("--max-new-tokens", type=int, default=96, help="Default: %(default)s.")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy. Default: %(default)s.")
    parser.add_argument("--alpha-method", choices=ALPHA_METHODS[:-1], default=ALPHA_METHODS[0])
    parser.add_argument(
        "--export-svg", metavar="FILE", help="Also save two problems and the summary as an SVG picture."
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    problems = load_problems()
    if not 1 <= args.problems <= len(problems):
        parser.error(f"--problems: must be 1 to {len(problems)}, got {args.problems}")
    if args.max_new_tokens < 1:
        parser.error(f"--max-new-tokens: must be at least 1, got {args.max_new_tokens}")
    if args.temperature < 0:
        parser.error(f"--temperature: must not be negative, got {args.temperature}")
    console = Console()
    console.print(
        f"{args.problems} word problems by the teacher, who sees the solution, by the student, who does not, and by "
        f"their mixture.\nTeacher: {args.model_path}. Student: {args.student_model_path or 'the same model'}. "
        "One to three minutes on a CPU, the first texts after half of it.",
        markup=False,
        highlight=False,
    )
    _only_errors()
    try:
        with step(console, "starting SGLang"):
            from sglang_optimal import OptimalSampler

            sampler = OptimalSampler(
                args.model_path,
                args.student_model_path,
                enable_chat_template=True,
                alpha_method=args.alpha_method,
                max_running_requests=32,
                context_length=2048,
                max_total_tokens=32768,
                stream_interval=STREAM_INTERVAL,
            )
    except ValueError as error:
        print(f"sglang_optimal.demo: error: {error}", file=sys.stderr)
        return 2
    with sampler:
        _run(console, sampler, problems[: args.problems], args)
    return 0


def _only_errors() -> None:
    """Of SGLang's start-up, here and in its processes: what it says of platforms and packages is not about this job."""
    logging.basicConfig(level=logging.ERROR)
    warnings.filterwarnings("ignore", category=UserWarning)
    os.environ.setdefault("PYTHONWARNINGS", "ignore::UserWarning")
    os.environ.setdefault("TQDM_DISABLE", "1")


def _run(console: Console, sampler, problems: list[Problem], args: argparse.Namespace) -> None:
    from sglang_optimal.demo.render import Column, legend, problem_table, save_svg, summary_table

    sampling = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature}
    columns, rates = [], []
    # alpha 1 is the teacher alone and alpha 0 the student alone, both with the other model's opinion of every token.
    for title, alpha in (("teacher alone", 1.0), ("student alone", 0.0), ("mixture", None)):
        start = time.perf_counter()
        results = _generated(console, sampler, title, problems, {**sampling, "fixed_alpha": alpha})
        columns.append(Column(title, results))
        rates.append(sum(len(r.token_ids) for r in results) / (time.perf_counter() - start))
    console.print(legend(), "")
    tokenizer = sampler.engine.tokenizer_manager.tokenizer
    for number, problem in enumerate(problems, 1):
        console.print(problem_table(tokenizer, number, problem, columns), "")
    summary = summary_table(problems, columns, rates)
    console.print(summary)
    console.print("[dim]Both models ran for every line: alpha is fixed at 1 and at 0, and solved for each token.[/]")
    if args.export_svg:
        first = [problem_table(tokenizer, i, p, columns) for i, p in enumerate(problems[:2], 1)]
        save_svg(args.export_svg, [legend(), *first, summary])


def _generated(console: Console, sampler, title: str, problems: list[Problem], sampling: dict) -> list:
    """The results of all problems; the first one's text is shown as soon as it is there."""
    teacher = [p.teacher_prompt for p in problems]
    student = [p.student_prompt for p in problems]
    results: list = [None] * len(problems)
    with step(console, f"{title}: {len(problems)} problems") as tell:
        for result in sampler.generate(teacher, student, return_mixing_info=True, stream=True, **sampling):
            results[result.index] = result
            finished = sum(r is not None and r.finish_reason is not None for r in results)
            tell(f"{sum(len(r.token_ids) for r in results if r)} tokens, {finished} texts finished")
            if result.index == 0 and result.finish_reason is not None:
                console.print(f"  1. {problems[0].problem}\n  {result.text.strip()}", style="dim", markup=False)
    return results


if __name__ == "__main__":
    sys.exit(main())
