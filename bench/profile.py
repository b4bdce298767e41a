"""One decode step, divided into its parts.

    python -m bench.profile --model-path T [--student-model-path S] --batch-size 1 8 32 \\
        --input-len 96 --student-input-len 64 --output-len 64 [--server-args --load-format dummy]

Modes, each with full batches of random prompts:

    two-model  mixed requests, student and teacher each with weights of their own
    shared     mixed requests, both contexts rows of one forward (only where both models are one)
    plain      plain requests on an engine with a student: the teacher alone

A step lasts from one ``run_batch`` of the scheduler to the next; bench/step_timer.py says how it is timed. All figures
are medians over the steady decode steps: shares are medians of each step's own shares, so a column of them adds up to
about 100 %. On CUDA the shares are of the device's time, the critical path; the host's time, most of which hides behind
it, stands beside. What no timer covers is "unaccounted".
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import random
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from rich.console import Console
from rich.table import Table

from bench import step_timer
from bench.common import (
    add_output_arguments,
    add_server_arguments,
    append_record,
    new_figure,
    positive_int,
    random_prompts,
    save_figure,
    server_arguments,
    spread,
)
from sglang_optimal import OptimalSampler
from sglang_optimal.config import NUMBERLESS_METHODS
from sglang_optimal.runtime.entrypoints.engine import MixedEngine

MODES = ("two-model", "shared", "plain")

Step = dict[str, Any]
"""What `step_timer.StepLog` gives: {"batch", "mixed", "graph", clock: {part: ms}}."""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.profile", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model-path", required=True, help="Teacher.")
    parser.add_argument("--student-model-path", help="Default: the teacher.")
    parser.add_argument("--modes", nargs="+", choices=MODES, help="Default: all that the models allow.")
    parser.add_argument("--batch-size", type=positive_int, nargs="+", default=[1, 8, 32], help="Default: 1 8 32.")
    parser.add_argument("--input-len", type=positive_int, default=96, help="Teacher's prompt. Default: %(default)s.")
    parser.add_argument("--student-input-len", type=positive_int, default=64, help="Default: %(default)s.")
    parser.add_argument(
        "--output-len", type=positive_int, default=64, help="New tokens a request. Default: %(default)s."
    )
    parser.add_argument("--repeats", type=positive_int, default=3, help="Calls, after a warm-up. Default: %(default)s.")
    parser.add_argument("--temperature", type=float, default=1.0, help="Default: %(default)s.")
    parser.add_argument(
        "--alpha-method", choices=NUMBERLESS_METHODS, default=NUMBERLESS_METHODS[0], help="Default: %(default)s."
    )
    parser.add_argument("--seed", type=int, default=1, help="Default: %(default)s.")
    add_output_arguments(parser, "profile")
    add_server_arguments(parser, "SGLang's engine")
    args = parser.parse_args()
    one_model = args.student_model_path in (None, args.model_path)
    if args.modes is None:
        args.modes = [mode for mode in MODES if mode != "shared" or one_model]
    if "shared" in args.modes and not one_model:
        parser.error("--modes shared: both models must be one; leave out --student-model-path")
    return args


def engine_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of SGLang's ServerArgs: room for the largest batch, and what ``--server-args`` says, over them."""
    largest = max(args.batch_size)
    # Twice what the requests hold: SGLang admits a request only with room for all that it may still generate.
    tokens = 2 * largest * (args.input_len + args.student_input_len + 2 * args.output_len) + 1024
    # With shared weights a forward has two rows a request, and SGLang's buffers as many as there may be requests.
    defaults = {"max_total_tokens": tokens, "max_running_requests": 2 * largest, "sleep_on_idle": True}
    return server_arguments(args.server_args, defaults)


@contextlib.contextmanager
def timed_sampler(args: argparse.Namespace, weights: str) -> Iterator[tuple[OptimalSampler, step_timer.StepLog]]:
    """A sampler whose scheduler process times its steps, and the log that it writes."""
    with tempfile.TemporaryDirectory(prefix="sglang-optimal-profile-") as folder:
        path = Path(folder) / "steps.jsonl"
        process = functools.partial(step_timer.scheduler_process, path)
        replaced = mock.patch.object(MixedEngine, "scheduler_process", staticmethod(process))
        student = args.student_model_path or args.model_path
        with replaced:
            sampler = OptimalSampler(args.model_path, student, student_weights=weights, **engine_arguments(args))
        with sampler:
            yield sampler, step_timer.StepLog(path)


class Profile:
    """Full batches of one mode at a time on one engine.

    Args:
        args: the command line. sampler, log: of `timed_sampler`.
    """

    def __init__(self, args: argparse.Namespace, sampler: OptimalSampler, log: step_timer.StepLog):
        self.args = args
        self.log = log
        self.engine = sampler.engine
        self.rng = random.Random(args.seed)
        self.vocab_size = len(self.engine.tokenizer_manager.tokenizer)

    def call(self, mode: str, batch: int) -> list[Step]:
        """The steady decode steps of one call."""
        args = self.args
        params = {"temperature": args.temperature, "max_new_tokens": args.output_len, "ignore_eos": True}
        each = [dict(params) for _ in range(batch)]
        if mode != "plain":
            students = random_prompts(self.rng, batch, args.student_input_len, self.vocab_size)
            for one, ids in zip(each, students, strict=True):
                one["custom_params"] = {"student_input_ids": ids, "alpha_method": args.alpha_method}
        prompts = random_prompts(self.rng, batch, args.input_len, self.vocab_size)
        self.engine.generate(input_ids=prompts, sampling_params=each)
        return self.log.wait(batch, 0 if mode == "plain" else batch)

    def steps(self, modes: list[str], batch: int) -> dict[str, list[Step]]:
        """All repeats of some modes, in random order, so that a machine's drift hits them alike."""
        found: dict[str, list[Step]] = {mode: [] for mode in modes}
        for repeat in range(1 + self.args.repeats):
            for mode in self.rng.sample(modes, len(modes)):
                steps = self.call(mode, batch)
                if repeat:  # the first is the warm-up
                    found[mode] += steps
        return found


def split(steps: list[Step], clock: str) -> dict[str, Any]:
    """Medians by one clock.

    Returns:
        {"step_ms": spread, "parts": {part: {"ms", "share"}}, "groups": the same for `step_timer.GROUPS`,
        "mixing_percent", "mixing_and_extras_percent"}
    """
    totals = [sum(step[clock].values()) for step in steps]

    def median(parts: tuple[str, ...]) -> dict[str, float]:
        each = [sum(step[clock].get(part, 0.0) for part in parts) for step in steps]
        shares = [ms / total for ms, total in zip(each, totals, strict=True)]
        return {"ms": statistics.median(each), "share": statistics.median(shares)}

    occurring = {part for step in steps for part in step[clock]}
    return {
        "step_ms": spread(totals),
        "parts": {p: median((p,)) for parts in step_timer.GROUPS.values() for p in parts if p in occurring},
        "groups": {name: median(parts) for name, parts in step_timer.GROUPS.items() if occurring.intersection(parts)},
        "mixing_percent": 100 * median((step_timer.MIXING,))["share"],
        "mixing_and_extras_percent": 100 * median((step_timer.MIXING, step_timer.EXTRAS))["share"],
    }


def record(args: argparse.Namespace, mode: str, batch: int, steps: list[Step]) -> dict[str, Any]:
    """What goes into the JSONL file: a `split` for each of "clocks", the critical one named by "clock"."""
    clocks = [clock for clock in ("device", "host") if clock in steps[0]]
    return {
        "benchmark": "profile",
        "mode": mode,
        "batch_size": batch,
        "model_path": args.model_path,
        "student_model_path": args.student_model_path or args.model_path,
        "input_len": args.input_len,
        "student_input_len": args.student_input_len,
        "output_len": args.output_len,
        "temperature": args.temperature,
        "alpha_method": args.alpha_method,
        "server_args": args.server_args,
        "steps": len(steps),
        "cuda_graph": all(step["graph"] for step in steps),
        "clock": clocks[0],
        "clocks": {clock: split(steps, clock) for clock in clocks},
    }


def critical(record: dict[str, Any]) -> dict[str, Any]:
    """The `split` of the critical clock."""
    return record["clocks"][record["clock"]]


# -- report ------------------------------------------------------------------------------------------------------------


def show(console: Console, mode: str, records: list[dict[str, Any]]) -> None:
    """One table a mode: a row for each part, columns by batch size."""
    clock = records[0]["clock"]
    host_too = clock != "host"
    table = Table()
    table.add_column("part", no_wrap=True)
    for one in records:
        table.add_column(f"batch {one['batch_size']}", justify="right")
        table.add_column("share", justify="right")
        if host_too:
            table.add_column("host", justify="right")

    def add(label: str, section: str, name: str, style: str | None = None) -> None:
        cells = []
        for one in records:
            value = one["clocks"][clock][section].get(name)
            cells += ["–", "–"] if value is None else [f"{value['ms']:.3f}", f"{value['share']:.1%}"]
            if host_too:
                value = one["clocks"]["host"][section].get(name)
                cells.append("–" if value is None else f"{value['ms']:.3f}")
        if any(cell != "–" for cell in cells):
            table.add_row(label, *cells, style=style)

    for group, parts in step_timer.GROUPS.items():
        add(group, "groups", group)
        if len(parts) > 1:
            for part in parts:
                add(f"  {part}", "parts", part, style="dim")
    table.add_section()
    for label, value in (
        ("step", lambda split: f"{split['step_ms']['median']:.3f}"),
        ("mixing, % of the step", lambda split: f"{split['mixing_percent']:.2f}"),
        ("with the token's extras, %", lambda split: f"{split['mixing_and_extras_percent']:.2f}"),
    ):
        cells = []
        for one in records:
            cells += [value(one["clocks"][clock]), ""] + ([value(one["clocks"]["host"])] if host_too else [])
        if label == "step" or mode != "plain":
            table.add_row(label, *cells, style="bold")
    steps = ", ".join(str(one["steps"]) for one in records)
    graph = ", ".join("yes" if one["cuda_graph"] else "no" for one in records)
    table.caption = f"steps: {steps}" + (f"; CUDA graphs: {graph}" if host_too else "")
    console.print(f"\n{mode}: one decode step, ms and share of the {clock}'s time", table)


def plot(path: Path, by_mode: dict[str, list[dict[str, Any]]]) -> None:
    """Stacked shares of the step, one picture a mode, the step's milliseconds above each bar."""
    figure, axes = new_figure(len(by_mode))
    for axis, (mode, records) in zip(axes[0], by_mode.items(), strict=True):
        labels = [str(one["batch_size"]) for one in records]
        bottoms = [0.0] * len(records)
        for number, group in enumerate(step_timer.GROUPS):
            shares = [100 * critical(one)["groups"].get(group, {"share": 0.0})["share"] for one in records]
            axis.bar(labels, shares, bottom=bottoms, label=group, color=f"C{number}", width=0.7)
            bottoms = [bottom + share for bottom, share in zip(bottoms, shares, strict=True)]
        for x, (one, top) in enumerate(zip(records, bottoms, strict=True)):
            step = critical(one)["step_ms"]["median"]
            axis.text(x, top + 1, f"{step:.3g} ms", ha="center", va="bottom", fontsize=8)
        axis.set(title=mode, xlabel="batch size", ylabel="share of a decode step, %", ylim=(0, 110))
    handles, names = axes[0][0].get_legend_handles_labels()
    used = {group for records in by_mode.values() for one in records for group in critical(one)["groups"]}
    pairs = [(handle, name) for handle, name in zip(handles, names, strict=True) if name in used]
    figure.legend(*zip(*pairs, strict=True), loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)
    figure.tight_layout()
    save_figure(figure, path)


def main() -> None:
    args = parse_args()
    console = Console(width=max(Console().width, 140))
    # Plain requests are measured where a student is: beside the mixed ones, on the same engine.
    plain_on = "separate" if "two-model" in args.modes or args.student_model_path else "shared"
    home = {"two-model": "separate", "shared": "shared", "plain": plain_on}
    by_mode: dict[str, list[dict[str, Any]]] = {mode: [] for mode in MODES if mode in args.modes}
    for weights in ("separate", "shared"):  # one engine after the other
        modes = [mode for mode in by_mode if home[mode] == weights]
        if not modes:
            continue
        with timed_sampler(args, weights) as (sampler, log):
            profile = Profile(args, sampler, log)
            for batch in args.batch_size:
                for mode, steps in profile.steps(modes, batch).items():
                    by_mode[mode].append(record(args, mode, batch, steps))
                    append_record(args, by_mode[mode][-1])
        for mode in modes:
            show(console, mode, by_mode[mode])
    plot(args.plot, by_mode)
    console.print(f"records: {args.result_filename}, plot: {args.plot}")


if __name__ == "__main__":
    main()
