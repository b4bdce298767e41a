"""``python -m bench.proof``: the experiment of docs/proof.md, most worthy parts first; the same command goes on.

Each result is a JSON line as soon as it is there. Samples and checkpoints are kept in --out.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import signal
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from bench.proof.lines import FOLDER, Results
from bench.proof.plan import Cell, cells, estimate, to_run
from bench.proof.scales import SCALES, Scale
from sglang_optimal.demo.prepare_model import DEFAULT_TARGET


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench.proof", description=__doc__.splitlines()[0])
    parser.add_argument("--scale", choices=SCALES, default="cpu", help="Default: %(default)s.")
    parser.add_argument("--budget", type=float, metavar="MINUTES", help="End before a part that should go beyond it.")
    parser.add_argument("--model-path", default=str(DEFAULT_TARGET), help="The student. Default: %(default)s.")
    parser.add_argument("--out", type=Path, help="Samples and checkpoints. Default: runs/proof-SCALE.")
    parser.add_argument("--results", type=Path, help="JSON lines. Default: SCALE.jsonl in bench/proof/lines.")
    parser.add_argument("--plan", action="store_true", help="Print what is still to be run, and run nothing.")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0 done, or as far as the budget goes; 1 stopped on the way; 2 wrong input; 130
    interrupted."""
    parser = build_parser()
    args = parser.parse_args(argv)
    scale = SCALES[args.scale]
    if args.budget is not None and not args.budget > 0:
        parser.error(f"--budget: must be positive minutes, got {args.budget}")
    out = args.out or Path("runs") / f"proof-{scale.name}"
    console = Console(soft_wrap=True, highlight=False)
    try:
        results = Results(args.results or FOLDER / f"{scale.name}.jsonl", scale, Path(args.model_path).name)
        if args.plan:
            show_plan("to run", to_run(cells(scale), results, out), results, console)
            return 0
        if not (Path(args.model_path) / "config.json").exists():
            raise ValueError(f"--model-path: {args.model_path} has no config.json; `make model` prepares one.")
        return _run(args, scale, results, out, console)
    except ValueError as error:
        print(f"bench.proof: error: {error}", file=sys.stderr)
        return 2
    except (OSError, RuntimeError) as error:
        print(f"bench.proof: {error}; the same command goes on from here", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bench.proof: interrupted; the same command goes on from here", file=sys.stderr)
        return 130


def _run(args: argparse.Namespace, scale: Scale, results: Results, out: Path, console: Console) -> int:
    from bench.proof.engines import Engines
    from bench.proof.experiment import Experiment

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the server ends with us
    warnings.filterwarnings("ignore", module="peft|transformers")
    out.mkdir(parents=True, exist_ok=True)
    results.path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        for folder in {out.resolve(), results.path.parent.resolve()}:
            stack.enter_context(_alone(folder))
        engines = Engines(args.model_path, out / "teacher", scale, out)
        stack.callback(engines.close)
        experiment = Experiment(results, out, args.model_path, engines, console)
        left = experiment.run(cells(scale), args.budget and 60 * args.budget)
    if left:
        show_plan("not run for want of time; the same command goes on", left, results, console)
    else:
        console.print(f"all of it is in {results.path}")
    console.print("python -m bench.proof.page writes docs/proof.md anew")
    return 0


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Raises ValueError where another run writes to it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ValueError(f"{folder}: another run is writing here; wait for it, or give another folder.") from None
    else:
        yield
    finally:
        os.close(descriptor)


def show_plan(title: str, left: list[Cell], results: Results, console: Console) -> None:
    """What is left, in order, with how long it should take."""
    seconds = [estimate(cell, results.scale, results.lines) for cell in left]
    console.print(f"{title}: {len(left)} results, about {sum(seconds) / 60:.0f} minutes")
    groups: dict[tuple[str, str, str, str], float] = defaultdict(float)
    for cell, value in zip(left, seconds, strict=True):
        groups[cell.kind, cell.task, cell.arm, cell.level] += value
    for (kind, task, arm, level), value in groups.items():
        console.print(f"  {value / 60:5.1f} min  {kind} {task} {arm}{'' if level == 'all' else f' at equal {level}'}")


if __name__ == "__main__":
    sys.exit(main())
