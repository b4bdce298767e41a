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
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from rich.console import Console

from sglang_optimal.config import NUMBERLESS_METHODS
from sglang_optimal.demo.prepare_model import DEFAULT_TARGET
from sglang_optimal.demo.problems import Problem, load_problems
from sglang_optimal.demo.progress import step

if TYPE_CHECKING:
    from sglang_optimal import OptimalSampler
    from sglang_optimal.engine import GenerationResult

WAYS = {"teacher alone": 1.0, "student alone": 0.0, "mixture": None}
"""Titles, and what alpha is fixed at: 1 is the teacher alone and 0 the student alone, both with the other model's
opinion of every token."""
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
    parser.add_argument("--alpha-method", choices=NUMBERLESS_METHODS, default=NUMBERLESS_METHODS[0])
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
        "A minute on a CPU, the first problem after 20 seconds.",
        markup=False,
        highlight=False,
    )
    _only_errors()
    try:
        with step(console, "starting SGLang"):
            import torch

            from sglang_optimal import OptimalSampler

            sampler = OptimalSampler(
                args.model_path,
                args.student_model_path,
                enable_chat_template=True,
                alpha_method=args.alpha_method,
                # On a CPU, so that a text does not depend on what is beside it in the batch, as in bfloat16.
                dtype="auto" if torch.cuda.is_available() else "float32",
                max_running_requests=36,
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
    """Print each problem as soon as it and those before it are finished in every way, and then the summary."""
    from sglang_optimal.demo.render import Column, legend, problem_table, save_svg, summary_table

    sampling = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature}
    columns = [Column(title, []) for title in WAYS]
    tokenizer = sampler.engine.tokenizer_manager.tokenizer

    def show(results: Sequence[GenerationResult]) -> None:
        for column, result in zip(columns, results, strict=True):
            column.results.append(result)
        number = len(columns[0].results)
        console.print("", problem_table(tokenizer, number, problems[number - 1], columns))

    console.print(legend())
    with step(console, "the first problem") as tell:  # alone, so that there is soon something to read
        _generate(sampler, problems[:1], sampling, show, tell)
    if rest := problems[1:]:
        start = time.perf_counter()
        with step(console, f"{len(rest)} more problems") as tell:
            tokens = _generate(sampler, rest, sampling, show, tell)
        speed = tokens / (time.perf_counter() - start)
        console.print(f"{speed:.0f} tokens/s, for each of which both models ran.", highlight=False)
    summary = summary_table(problems, columns)
    console.print("", summary)
    console.print("[dim]Both models ran for every text: alpha is fixed at 1 and at 0, and solved for each token.[/]")
    if args.export_svg:
        first = [problem_table(tokenizer, i, p, columns) for i, p in enumerate(problems[:2], 1)]
        save_svg(args.export_svg, [legend(), *first, summary])


def _generate(
    sampler: OptimalSampler,
    problems: list[Problem],
    sampling: dict[str, Any],
    show: Callable[[Sequence[GenerationResult]], None],
    tell: Callable[[str], None],
) -> int:
    """Every problem in every way at the same time; ``show`` gets the results of one after the other.

    Returns:
        The number of tokens.
    """
    arrived: SimpleQueue[tuple[int, GenerationResult | None]] = SimpleQueue()

    def generate(way: int, alpha: float | None) -> None:
        prompts = [p.teacher_prompt for p in problems], [p.student_prompt for p in problems]
        settings = {**sampling, "fixed_alpha": alpha}
        try:
            texts: Any = sampler.generate(*prompts, return_mixing_info=True, stream=True, **settings)
            for result in texts:
                arrived.put((way, result))
        finally:
            arrived.put((way, None))

    results: list[dict[int, GenerationResult]] = [{} for _ in WAYS]
    shown = 0
    with ThreadPoolExecutor(len(WAYS)) as threads:
        ways = [threads.submit(generate, *way) for way in enumerate(WAYS.values())]
        running = len(ways)
        while running:
            way, result = arrived.get()
            if result is None:
                running -= 1
                continue
            results[way][result.index] = result
            known = [r for one in results for r in one.values()]
            finished = sum(r.finish_reason is not None for r in known)
            tell(f"{sum(len(r.token_ids) for r in known)} tokens, {finished} of {len(WAYS) * len(problems)} texts")
            while all(shown in one and one[shown].finish_reason is not None for one in results):
                show([one[shown] for one in results])
                shown += 1
    for future in ways:
        future.result()
    return sum(len(r.token_ids) for one in results for r in one.values())


if __name__ == "__main__":
    sys.exit(main())
