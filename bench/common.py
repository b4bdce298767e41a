"""What the benchmarks share: prompts, records in JSONL, medians with spread, pictures."""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

RESULTS = Path("bench") / "results"


def add_output_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    """``--result-filename``, ``--plot`` and ``--run-name``, as SGLang's own benchmarks call them."""
    parser.add_argument("--run-name", default="default", help="Goes into every record. Default: %(default)s.")
    parser.add_argument(
        "--result-filename",
        type=Path,
        default=RESULTS / f"{name}.jsonl",
        help="Records are appended to this file. Default: %(default)s.",
    )
    parser.add_argument(
        "--plot", type=Path, default=RESULTS / f"{name}.png", help="Picture of this run. Default: %(default)s."
    )


def add_server_arguments(parser: argparse.ArgumentParser, whose: str) -> None:
    """``--server-args``, for `server_arguments`; the last on a command line."""
    parser.add_argument(
        "--server-args", nargs=argparse.REMAINDER, default=[], help=f"Everything after this is for {whose}."
    )


def positive_int(text: str) -> int:
    """Type of an argument that must be at least 1."""
    return _at_least(1, text)


def non_negative_int(text: str) -> int:
    """Type of an argument that must be at least 0."""
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    value = int(text)
    if value < least:
        raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
    return value


def server_arguments(flags: list[str], defaults: dict[str, Any]) -> dict[str, Any]:
    """Arguments of SGLang's ServerArgs: what the command line ``flags`` say, over ``defaults``."""
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser(prog="--server-args", add_help=False, argument_default=argparse.SUPPRESS)
    ServerArgs.add_cli_args(parser)
    for action in parser._actions:  # only what was given, not SGLang's defaults
        action.default = argparse.SUPPRESS
        action.required = False
    return {**defaults, **vars(parser.parse_args(flags))}


def device_name() -> str:
    """The accelerator's name, or the CPU with its number of threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU ({platform.machine()}), {torch.get_num_threads()} threads"


def append_record(args: argparse.Namespace, record: dict[str, Any]) -> None:
    """Append one line to ``--result-filename``, with what the machine and the run are."""
    about = {"run_name": args.run_name, "time": time.strftime("%Y-%m-%dT%H:%M:%S"), "device": device_name()}
    if taken := about.keys() & record.keys():
        raise ValueError(f"A record's own {', '.join(sorted(taken))} would hide what the machine and the run are.")
    args.result_filename.parent.mkdir(parents=True, exist_ok=True)
    with args.result_filename.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**about, **record}) + "\n")


def random_prompts(rng: random.Random, batch: int, length: int, vocab_size: int) -> list[list[int]]:
    """``batch`` fresh prompts of ``length`` random token ids, so that no cache has them."""
    return [[rng.randrange(100, vocab_size) for _ in range(length)] for _ in range(batch)]


def spread(values: Iterable[float]) -> dict[str, float]:
    """Median, minimum and maximum over repeats."""
    values = list(values)
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def with_spread(value: dict[str, float], digits: int = 2) -> str:
    """``median (min–max)``."""
    return f"{value['median']:.{digits}f} ({value['min']:.{digits}f}–{value['max']:.{digits}f})"


def timed(call: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds of each of ``repeats`` calls, after one that is not counted; waits for the device."""

    def once() -> float:
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start

    once()
    return [once() for _ in range(repeats)]


def save_figure(figure, path: Path) -> None:
    """Write a matplotlib figure as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, bbox_inches="tight")


def new_figure(columns: int, height: float = 3.4):
    """(figure, axes): ``columns`` plots side by side, without a display or pyplot, which looks for one."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * columns, height))
    return figure, figure.subplots(1, columns, squeeze=False)
