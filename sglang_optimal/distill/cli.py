"""``python -m sglang_optimal.distill``: run, probe, filter, merge, compare, preview, report, export, push, schema."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from sglang_optimal.distill.store import Tally

PROGRAM = "sglang_optimal.distill"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="From problems to training data, sampled from the optimal mixture of teacher and student.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    run = commands.add_parser("run", help="sample, filter and store; the same command again resumes")
    _add_settings(run)
    run.add_argument("--out", help="Folder of the run; over output.dir.")
    run.add_argument("--endpoint", action="append", metavar="URL", help="A running server; may be given again.")
    run.add_argument("--concurrency", type=int, help="Requests in flight; over client.concurrency.")
    run.add_argument("--n", type=int, help="Samples a problem; over sampling.n.")
    run.add_argument("--shard", default="0/1", metavar="i/n", help="This machine's part of the problems. Default: 0/1.")
    run.add_argument("--no-report", action="store_true", help="Do not write report.html at the end.")

    from sglang_optimal.distill.probe_settings import DEFAULT

    probe = commands.add_parser(
        "probe", help="few problems at several settings of alpha, side by side, and which to take; again: goes on"
    )
    probe.add_argument("config", help="YAML file of a run; see configs/distillation.yaml.")
    probe.add_argument("--data", help="Problems: a file, folder or dataset id; over data.path.")
    probe.add_argument("--problems", type=int, default=50, help="The first N. Default: %(default)s.")
    probe.add_argument("--n", type=int, default=2, help="Samples a problem. Default: %(default)s.")
    probe.add_argument("--out", required=True, help="Folder; each setting's run is in one of its own there.")
    probe.add_argument("--endpoint", action="append", metavar="URL", help="A running server; may be given again.")
    probe.add_argument("--concurrency", type=int, help="Requests in flight; over client.concurrency.")
    probe.add_argument(
        "--settings",
        default=DEFAULT,
        help="student, teacher, a method, or keys of alpha (kl_budget=0.1, alpha_max=0.3; several with +), with commas "
        "between them; with a + in front they are added to the default. Default: %(default)s.",
    )
    probe.add_argument("--strategies", action="store_true", help="Each strategy by itself, as with select: cross.")
    probe.add_argument("--seed", type=int, default=0, help="Of the bootstrap. Default: %(default)s.")
    probe.add_argument("--json", metavar="FILE", help="Another file for what is in probe.json.")

    from sglang_optimal.distill.selection import BY

    refilter = commands.add_parser(
        "filter", help="judge a run's samples anew, into another folder; samples nothing, asks no server"
    )
    refilter.add_argument("folder", help="Folder of the run; nothing is written there.")
    refilter.add_argument(
        "--config",
        help="YAML file: a run's, or one with filters, select, and output's format and shard_records alone. Without "
        "filters the verdicts stay.",
    )
    refilter.add_argument("--out", required=True, help="Folder of the new run; not there yet, or empty.")
    refilter.add_argument("--best", type=int, metavar="K", help="Keep K samples of a problem; over select.best.")
    refilter.add_argument("--by", metavar="WHAT", help=f"{', '.join(BY)}; over select.by.")
    refilter.add_argument(
        "--reward", metavar="NAME", help="A column, a field or module:function, for --by reward; over select.reward."
    )
    refilter.add_argument("--no-report", action="store_true", help="Do not write report.html.")

    merge = commands.add_parser("merge", help="the records of several runs in one, in another folder")
    merge.add_argument("folders", nargs="+", metavar="folder", help="Folders of runs; nothing is written there.")
    merge.add_argument("--out", required=True, help="Folder of the new run; not there yet, or empty.")
    merge.add_argument("--no-report", action="store_true", help="Do not write report.html.")

    compare = commands.add_parser("compare", help="runs side by side on the problems that they have in common")
    compare.add_argument("folders", nargs="+", metavar="folder", help="Folders of runs; two or more.")
    compare.add_argument("--output", help="A .json file, with every figure.")
    compare.add_argument("--seed", type=int, default=0, help="Of the bootstrap. Default: %(default)s.")

    preview = commands.add_parser("preview", help="check the file and print what both sides read; samples nothing")
    _add_settings(preview)
    preview.add_argument("--problems", type=int, default=2, help="How many problems to print. Default: %(default)s.")
    preview.add_argument(
        "--tokenizer",
        help="Folder or id of both sides', whose chat template is applied. Default: the models' folders in the file.",
    )
    preview.add_argument("--student-tokenizer", help="The same for the student alone.")
    preview.add_argument(
        "--judge",
        type=int,
        default=1000,
        metavar="N",
        help="Ask the answer filters about the references of so many problems. Default: %(default)s.",
    )
    preview.add_argument("--json", action="store_true", help="Print JSON.")

    report = commands.add_parser("report", help="one HTML file about a run")
    report.add_argument("folder", help="Folder of the run.")
    report.add_argument("--output", help="Default: report.html in the folder.")
    report.add_argument(
        "--tokenizer", help="Folder or id; splits samples into tokens. Default: the student's, if here."
    )
    report.add_argument("--samples", type=int, default=200, help="Samples to browse. Default: %(default)s.")

    from sglang_optimal.distill.export import FORMATS, ON_MISMATCH, PROBLEMS
    from sglang_optimal.distill.export_pairs import JUDGED, PAIRS, PICKS
    from sglang_optimal.distill.export_weights import TOWARDS, WEIGHTED

    export = commands.add_parser(
        "export",
        help="the accepted records, or their problems, for a trainer",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="formats:\n" + "\n".join(f"  {name:9} {meaning}" for name, meaning in FORMATS.items()),
    )
    export.add_argument("folder", help="Folder of the run.")
    export.add_argument("--output", required=True, help="A .jsonl or .parquet file.")
    export.add_argument("--format", default="trl-sft", help=f"{', '.join(FORMATS)}. Default: %(default)s.")
    export.add_argument("--columns", nargs="+", default=[], help="Columns of the run to keep beside the format's.")
    export.add_argument(
        "--rejected",
        action="store_true",
        help=f"The rejected records instead; with {', '.join(PROBLEMS)}: the problems of both.",
    )
    export.add_argument(
        "--tokenizer",
        help="Folder or id of the trainer's: what it makes of each row is compared with what was sampled, and its chat "
        "template makes the text of --format text. Default: the student's, if here.",
    )
    export.add_argument(
        "--on-mismatch",
        choices=ON_MISMATCH,
        default="skip",
        help="A sample with other tokens than were sampled, or that would end where it was cut: leave it out, write "
        "it, or write nothing. Another prompt is refused, unless kept. Default: %(default)s.",
    )
    export.add_argument("--no-check", action="store_true", help="Do not compare.")
    export.add_argument(
        "--answer-field",
        metavar="NAME",
        help=f"The problem's field with the expected answer, for {', '.join(PROBLEMS)}. Default: answer.",
    )
    export.add_argument(
        "--pairs", type=_pairs, metavar="N|all", help=f"Most pairs of a problem, for {PAIRS}. Default: 1."
    )
    picks = "; ".join(f"{name}: {meaning}" for name, meaning in PICKS.items())
    export.add_argument("--pick", choices=PICKS, help=f"Which pairs come first, for {PAIRS}. {picks}. Default: order.")
    export.add_argument(
        "--rejected-by",
        nargs="+",
        metavar="FILTER",
        help=f"For {', '.join(JUDGED)}: only what these filters rejected. Default: what any did but deduplicate.",
    )
    export.add_argument(
        "--weights",
        choices=TOWARDS,
        help=f"For {', '.join(WEIGHTED)}: a column of each token's importance weight towards this model.",
    )
    export.add_argument("--max-weight", type=float, metavar="W", help="Cut larger weights down to it.")
    export.add_argument(
        "--mask-below",
        type=float,
        metavar="P",
        help=f"For {', '.join(WEIGHTED)}: a column mask, 0 at tokens that the student gave a smaller probability.",
    )

    from sglang_optimal.distill import push

    push.add_parser(commands)

    schema = commands.add_parser("schema", help="JSON schema of the run's file, for editors")
    schema.add_argument("--output", help="Default: stdout.")
    return parser


def _add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="YAML file; see configs/distillation.yaml.")
    parser.add_argument("--data", help="Problems: a file, folder or dataset id; over data.path.")
    parser.add_argument("--limit", type=int, help="Only so many problems; over data.limit.")


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0 done, 1 stopped on the way (run it again), 2 wrong input, 128 and the signal's number
    when interrupted (Ctrl-C 130, SIGTERM 143, SIGHUP 129)."""
    args = build_parser().parse_args(argv)
    with _stops() as stops:
        return _status(args, stops)


def _status(args: argparse.Namespace, stops: list[int]) -> int:
    commands: dict[str, Callable[[argparse.Namespace], int]] = {
        "run": _run,
        "probe": _probe,
        "filter": _filter,
        "merge": _merge,
        "compare": _compare,
        "preview": _preview,
        "report": _report,
        "export": _export,
        "push": _push,
        "schema": _schema,
    }
    try:
        return commands[args.command](args)
    except ValueError as error:
        return _say(f"error: {error}", 2)
    except ModuleNotFoundError as error:
        return _say(f"error: {error}; run pip install '.[distill]' in sglang_optimal's folder", 2)
    except OSError as error:
        return _say(f"error: {error}; what was sampled is kept.", 1)
    except KeyboardInterrupt:
        return _say("interrupted; the same command goes on from here.", 128 + (stops or [signal.SIGINT])[0])


@contextlib.contextmanager
def _stops() -> Iterator[list[int]]:
    """Within, SIGTERM and SIGHUP stop a run as Ctrl-C does: what was sampled is kept. Gives those that came."""
    came: list[int] = []

    def stop(number: int, frame: object) -> None:
        came.append(number)
        if len(came) == 1:  # one stop is enough, and another would break into it
            os.kill(os.getpid(), signal.SIGINT)

    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    # nohup ignores SIGHUP, so that the end of a terminal stops nothing.
    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in numbers}
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # As in what a script starts with "&" (a Slurm job): the stop, which is a SIGINT, would be lost.
        before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run(args: argparse.Namespace) -> int:
    from sglang_optimal.distill.client import NoServerAvailable
    from sglang_optimal.distill.pipeline import run

    config = _config(args)
    try:
        result = run(config, shard=_shard(args.shard))
    except NoServerAvailable as error:
        return _say(f"stopped: {error} The same command goes on from here.", 1)
    _print_tally(result.folder, result.tally, report=not args.no_report)
    if not result.complete:
        return _say(f"{result.failed} samples failed; the same command tries them again.", 1)
    return 0


def _probe(args: argparse.Namespace) -> int:
    import asyncio

    from rich.console import Console

    from sglang_optimal.distill.client import NoServerAvailable
    from sglang_optimal.distill.compare import write_comparison
    from sglang_optimal.distill.probe import arms_of, assessed, run_arms
    from sglang_optimal.distill.probe_table import draw, show

    if args.seed < 0:
        raise ValueError(f"--seed: must not be negative, got {args.seed}.")
    config, out = _config(args), Path(args.out)
    arms = arms_of(config, out, settings=args.settings, strategies=args.strategies, problems=args.problems)
    if config.escalate is not None:
        _say("escalate: is left out; every setting is sampled for every problem.", 0)
    try:
        results = asyncio.run(run_arms(arms, out, Console(stderr=True)))
    except NoServerAvailable as error:
        return _say(f"stopped: {error} The same command goes on from here.", 1)
    if failed := sum(result.failed for result in results):
        return _say(f"{failed} samples failed; the same command tries them again.", 1)
    found = assessed(arms, seed=args.seed)
    for path in (out / "probe.json", *([Path(args.json)] if args.json else [])):
        write_comparison(found, path)
    left_out = draw(found, out / "probe.svg")
    console = Console(highlight=False)
    show(found, console if console.is_terminal else Console(highlight=False, width=200))
    print(f"{out / 'probe.json'}, {out / 'probe.svg'}")
    if left_out:
        print(f"  no point, for want of accepted samples with a student logprob: {', '.join(left_out)}")
    return 0


def _print_tally(folder: Path, tally: Tally, *, report: bool) -> None:
    from sglang_optimal.distill.progress import coverage

    print(f"{folder}: {tally.accepted} accepted, {tally.rejected} rejected, {tally.tokens} tokens")
    print(f"  {coverage(tally)}")
    if tally.steps:
        from sglang_optimal.distill.comparison_table import step_line
        from sglang_optimal.distill.escalation import step_rows, stored_steps
        from sglang_optimal.distill.manifests import read_manifests

        for row in step_rows(tally, stored_steps(read_manifests(folder))):
            print(f"  {step_line(row)}")
    for (name, reason), count in tally.reasons.most_common(10):
        print(f"  {count:>7}  {name}: {reason}")
    if report and tally.total:
        from sglang_optimal.distill.report import write_report

        print(f"report: {write_report(folder)}")


def _filter(args: argparse.Namespace) -> int:
    from sglang_optimal.distill.config import parse_select
    from sglang_optimal.distill.refilter import filter_run

    given = {"best": args.best, "by": args.by, "reward": args.reward}
    given = {name: value for name, value in given.items() if value is not None}
    config, out = Path(args.config) if args.config else None, Path(args.out)
    select = parse_select(config, given) if given else None
    done = filter_run(Path(args.folder), out, config, select=select)
    _print_tally(out, done.tally, report=not args.no_report)
    print(f"newly accepted: {done.newly_accepted}; newly rejected: {done.newly_rejected}")
    return 0


def _merge(args: argparse.Namespace) -> int:
    from sglang_optimal.distill.merge import merge_runs

    out = Path(args.out)
    done = merge_runs([Path(folder) for folder in args.folders], out)
    _print_tally(out, done.tally, report=not args.no_report)
    if done.doubled:
        print(f"{done.doubled} records were in several runs, and are there once")
    return 0


def _compare(args: argparse.Namespace) -> int:
    from rich.console import Console

    from sglang_optimal.distill.compare import compare, write_comparison
    from sglang_optimal.distill.comparison_table import show

    if args.seed < 0:
        raise ValueError(f"--seed: must not be negative, got {args.seed}.")
    result = compare([Path(folder) for folder in args.folders], seed=args.seed)
    console = Console(highlight=False)
    show(result, console if console.is_terminal else Console(highlight=False, width=200))
    if args.output:
        write_comparison(result, Path(args.output))
    return 0


def _preview(args: argparse.Namespace) -> int:
    from sglang_optimal.distill.pipeline import Plan
    from sglang_optimal.distill.preview import as_json, preview, show

    done = preview(
        Plan(_config(args)), problems=args.problems, judged=args.judge,
        tokenizer=args.tokenizer, student_tokenizer=args.student_tokenizer,
    )  # fmt: skip
    if args.json:
        print(json.dumps(as_json(done), indent=2, ensure_ascii=False))
        return 0
    from rich.console import Console

    show(done, Console(highlight=False))
    return 0


def _report(args: argparse.Namespace) -> int:
    from sglang_optimal.distill.report import write_report

    output = Path(args.output) if args.output else None
    print(write_report(Path(args.folder), output, tokenizer=args.tokenizer, samples=args.samples))
    return 0


def _pairs(text: str) -> int | str:
    return text if text == "all" else int(text)


def _export(args: argparse.Namespace) -> int:
    from sglang_optimal.distill.export import ALIASES, PROBLEMS, described, export
    from sglang_optimal.distill.export_pairs import PAIRS

    done = export(
        Path(args.folder), Path(args.output), args.format,
        columns=args.columns, rejected=args.rejected, tokenizer=args.tokenizer,
        check=not args.no_check, on_mismatch=args.on_mismatch, answer_field=args.answer_field,
        pairs=args.pairs, pick=args.pick, rejected_by=args.rejected_by,
        weights=args.weights, max_weight=args.max_weight, mask_below=args.mask_below,
    )  # fmt: skip
    format = ALIASES.get(args.format, args.format)
    unit = "problems" if format in PROBLEMS else "pairs" if format == PAIRS else "records"
    print(f"{args.output}: {done.written} {unit}{', compared with what was sampled' if done.checked else ''}")
    if done.differing:
        print(f"  {'kept' if args.on_mismatch == 'keep' else 'left out'}: {described(done.differing)}")
    if done.other_ends:
        print(
            f"  {done.other_ends} records end with the trainer's own end token, where another was sampled (such as the "
            "one of a teacher that reads a chat)"
        )
    if done.left_out:
        print(f"  left out: {described(done.left_out)}")
    if done.with_others:
        print(f"  {done.with_others} problems were sampled with other contexts too; these are of the first sample")
    return 0


def _push(args: argparse.Namespace) -> int:
    from sglang_optimal.distill.push import command

    return command(args)


def _schema(args: argparse.Namespace) -> int:
    from sglang_optimal.distill.config import json_schema

    text = json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"
    if args.output:
        Path(args.output).write_text(text, encoding="utf-8")
    else:
        sys.stdout.write(text)
    return 0


def _config(args: argparse.Namespace):
    """The file with the command line's values on top."""
    from sglang_optimal.distill.config import load_config, parse_config

    values = load_config(args.config).model_dump()
    for section, key, flag in (
        ("data", "path", "data"), ("data", "limit", "limit"), ("output", "dir", "out"),
        ("client", "endpoints", "endpoint"), ("client", "concurrency", "concurrency"), ("sampling", "n", "n"),
    ):  # fmt: skip
        value = getattr(args, flag, None)
        if value is not None:
            values[section][key] = value
    return parse_config(values, f"{args.config} and the command line")


def _shard(text: str) -> tuple[int, int]:
    try:
        index, count = (int(part) for part in text.split("/"))
    except ValueError:
        raise ValueError(f"--shard: must be i/n, such as 0/4; got {text!r}.") from None
    if not 0 <= index < count:
        raise ValueError(f"--shard: i must be 0 to n − 1; got {text!r}.")
    return index, count


def _say(message: str, status: int) -> int:
    print(f"{PROGRAM}: {message}", file=sys.stderr)
    return status


def entry_point() -> NoReturn:
    """The console script."""
    sys.exit(main())


if __name__ == "__main__":
    entry_point()
