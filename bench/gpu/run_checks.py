"""All checks of a one-GPU machine in order of worth, each with a limit, none started that the budget cannot hold.

    python -m bench.gpu.run_checks --stage first|second|third|all|NAME ... --budget SECONDS

README.md beside this says what each passes on. Results go to ``--output`` ($OUT where that is set): results.jsonl (a
line a check), environment.json, identity.jsonl, host_waits.json, bench.jsonl (the benchmarks' own records), summary.md,
written anew after every check, and logs.tar.gz. The exit status is 1 if a check or a bar failed.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import shutil
import signal
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = next(path for path in HERE.parents if (path / "pyproject.toml").is_file())
sys.path.insert(0, str(ROOT))  # also where only this file was copied to another folder of the repository

from bench.gpu import make_models, processes, summary  # noqa: E402

SCRATCH = Path(tempfile.gettempdir()) / "sglang-optimal-gpu"
BATCHES = [str(batch) for batch in summary.BATCHES]


@dataclasses.dataclass(frozen=True)
class Check:
    """limit: seconds it may take. least: seconds without which it is not started. beside: may run with others of its
    kind at once, since it times nothing. gpu: needs one. models: needs the dummies' folders."""

    stage: str
    limit: int
    least: int
    command: list[str]
    beside: bool = False
    gpu: bool = True
    models: bool = False


def graphs(decode: Iterable[int], longest_prefill: int = 8192) -> list[str]:
    """CUDA graphs of the sizes that the benchmarks run, in place of SGLang's 52 and 60: engines start sooner."""
    prefill = (64, 96, 128, 160, 512, 768, 1280, 2048, 3072, 4096, 5120, 8192)
    sizes = map(str, (size for size in prefill if size <= longest_prefill))
    return ["--cuda-graph-bs-decode", *map(str, decode), "--cuda-graph-bs-prefill", *sizes]


def sanitizer() -> str:
    """CUDA's compute-sanitizer, which seldom is on the PATH."""
    places = [os.environ.get("PATH", ""), f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin"]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(places)) or "compute-sanitizer"


def python(module: str, *arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", module, *map(str, arguments)]


def checks(args: argparse.Namespace) -> dict[str, Check]:
    """In order of worth: what is right, what it costs, where the time goes."""
    return {**correctness(args), **mixing(args), **rates(args), **steps(args)}


def correctness(args: argparse.Namespace) -> dict[str, Check]:
    out, scratch = args.output, args.scratch
    tiny = ["--logs", scratch / "logs", "--limit", "{limit}"]
    identity = ["--output", out / "identity.jsonl", "--models", scratch / "tiny", "--at-once", args.at_once, *tiny]
    host_waits = ["--output", out / "host_waits.json", "--models", scratch / "tiny-host-waits", *tiny]
    host_waits += ["--at-once", max(1, args.at_once // 2)]
    kernels = ["-q", "-x", "-p", "no:cacheprovider", "tests/mixing", "-k", "gpu"]
    memcheck = ["--tool", "memcheck", "--target-processes", "application-only", "--print-limit", "20"]
    memcheck += ["--error-exitcode", "9", *python("bench.gpu.mixing_kernel", "memory")]
    environment = python("bench.gpu.check_environment", "--output", out / "environment.json")
    return {
        "environment": Check("first", 80, 20, environment, gpu=False),
        "identity": Check("first", 210, 60, python("bench.gpu.check_identity", *identity), beside=True, gpu=False),
        "host-waits": Check(
            "first", 130, 50, python("bench.gpu.check_host_waits", *host_waits), beside=True, gpu=False
        ),
        "kernels": Check("first", 130, 30, python("pytest", *kernels), beside=True, gpu=False),
        "sanitizer": Check("first", 180, 40, [sanitizer(), *memcheck], beside=True),
    }


def records(args: argparse.Namespace, run_name: str) -> list[str | Path]:
    """Where a benchmark puts its records and its picture."""
    picture = args.scratch / f"{run_name}.png"
    return ["--run-name", run_name, "--result-filename", args.output / "bench.jsonl", "--plot", picture]


def mixing(args: argparse.Namespace) -> dict[str, Check]:
    kernel = ["time", "--run-name", "gpu", "--result-filename", args.output / "bench.jsonl"]
    logits = ["--alpha-method", "kl_symmetry", "--dtype", "bfloat16", "--vocab-size", 151936]
    alpha = [*logits, "--batch-size", *BATCHES, *records(args, "gpu")]
    return {
        "mixing": Check("first", 60, 20, python("bench.gpu.mixing_kernel", *kernel)),
        "alpha": Check("first", 75, 25, python("bench.alpha", *alpha)),
    }


# README.md works their memory out for a card of 80 GB.
DUMMY = ["--load-format", "dummy"]
SHAPES = ("16,1,1", "16,1,2", "16,1,3", "32,1,1", "32,1,2", "16,2,1", "8,2,1", "8,1,2")
SIZES = (1, 2, 8, 16, 32, 64, 128, 256)


def rates(args: argparse.Namespace) -> dict[str, Check]:
    common = [*DUMMY, "--batch-size", *BATCHES, "--output-len", 64, "--mem-fraction-static", 0.8]
    two_models = ["--model-path", args.teacher, "--student-model-path", args.student, *common]
    two_models += ["--rates", "stock", "t", "s", "m", "--repeats", 4, "--max-total-tokens", 66000]
    two_models += [*records(args, summary.TWO_MODELS), "--server-args", *graphs(SIZES)]
    # Both contexts of a request are rows of one forward there, as twice as many plain requests are.
    shared = ["--model-path", args.student, *common]
    shared += ["--rates", "t", "m", "2t", "shared", "--repeats", 3, "--max-total-tokens", 90000]
    shared += [*records(args, summary.SHARED), "--server-args", *graphs((*SIZES, 512))]
    sleep = ["--model-path", args.teacher, "--student-model-path", args.student]
    sleep += ["--server-args", *DUMMY, "--mem-fraction-static", 0.6, "--max-total-tokens", 66000, *graphs(SIZES)]
    return {
        "sleep": Check("second", 120, 60, python("bench.gpu.check_sleep", *sleep), models=True),
        "throughput": Check("second", 250, 120, python("bench.throughput", *two_models), models=True),
        "shared": Check("second", 200, 90, python("bench.throughput", *shared), models=True),
    }


def steps(args: argparse.Namespace) -> dict[str, Check]:
    profile = ["--model-path", args.teacher, "--student-model-path", args.student, "--batch-size", 1, 32, 256]
    profile += ["--repeats", 2, *records(args, summary.TWO_MODELS)]
    profile += ["--server-args", *DUMMY, "--mem-fraction-static", 0.85, *graphs(SIZES)]
    # Where a small model's step on shared weights goes: on an H200 they ran at half of 2t/2 at batch 1.
    shared = ["--model-path", args.student, "--modes", "shared", "plain", "--batch-size", 1, 8, 32]
    shared += ["--repeats", 2, *records(args, summary.SHARED)]
    shared += ["--server-args", *DUMMY, "--mem-fraction-static", 0.8, *graphs(SIZES)]
    shapes = ["time", "--shape", *SHAPES, "--batch-size", 1, 32, 256, "--repeats", 2]
    shapes += ["--run-name", "gpu", "--result-filename", args.output / "bench.jsonl"]
    drafts = ["--model-path", args.teacher, "--student-model-path", args.drafter, *DUMMY, "--batch-size", 1, 16]
    drafts += ["--draft-tokens", 0, 2, 4, "--output-len", 48, "--waves", 2, "--repeats", 2]
    # A verification has a row for each draft and one more. The pools hold fewer tokens than the longest prefills.
    rows = (1, 2, 3, 4, 5, 8, 16, 32, 48, 64, 80)
    drafts += [*records(args, "gpu-drafts"), "--server-args", *graphs(rows, longest_prefill=2048)]
    return {
        "profile": Check("third", 140, 70, python("bench.profile", *profile), models=True),
        "shared-profile": Check("third", 110, 50, python("bench.profile", *shared), models=True),
        "shapes": Check("third", 150, 60, python("bench.gpu.mixing_kernel", *shapes)),
        "drafts": Check("third", 330, 200, python("bench.speculative", *drafts), models=True),
    }


def chosen(every: dict[str, Check], stages: list[str]) -> dict[str, Check]:
    """Those of the stages or names."""
    known = {"all", *every, *(check.stage for check in every.values())}
    if unknown := set(stages) - known:
        raise SystemExit(f"--stage: unknown {', '.join(sorted(unknown))}; known: {', '.join(sorted(known))}")
    return {n: check for n, check in every.items() if {"all", check.stage, n} & set(stages)}


def together(names: dict[str, Check], at_once: int) -> Iterator[list[str]]:
    """Names that run at the same time: neighbours that may, where the machine has room for several."""
    if at_once == 1:
        yield from ([name] for name in names)
        return
    for beside, neighbours in itertools.groupby(names, key=lambda name: names[name].beside):
        group = list(neighbours)
        yield from [group] if beside else ([name] for name in group)


def reason_not_to(check: Check, left: float, args: argparse.Namespace) -> str | None:
    if check.gpu and not args.on_gpu:
        return "no GPU"
    if check.models and args.no_models:
        return args.no_models
    if check.command[0] != sys.executable and shutil.which(check.command[0]) is None:
        return f"no {check.command[0]} on the PATH"
    if left < check.least:
        return f"{left:.0f} s of the budget left, {check.least} needed"
    return None


def run(every: dict[str, Check], args: argparse.Namespace, end: float) -> Iterator[dict]:
    """The checks' records; "rc" is None where one was not run, for the reason "why"."""
    for group in together(every, args.at_once):
        left = end - time.monotonic()
        jobs = []
        for name in group:
            check = every[name]
            if why := reason_not_to(check, left, args):
                yield {"check": name, "rc": None, "why": why, "seconds": 0}
                continue
            limit = min(check.limit if args.on_gpu else args.budget, left)
            # A little less for what a check starts itself, so that it can still write what it has.
            command = [part.replace("{limit}", f"{max(15, limit - 8):.0f}") for part in check.command]
            log = args.scratch / "logs" / f"{name}.log"
            jobs.append(processes.Job(name, command, limit, log))
        for ended in processes.run_all(jobs, len(jobs), ROOT):
            about = {"check": ended.job.name, "on_gpu": args.on_gpu, "time": time.strftime("%Y-%m-%d %H:%M:%S")}
            yield {**about, "rc": ended.status, "seconds": ended.seconds, "tail": ended.text[-4000:]}


def report(record: dict) -> None:
    """A check's result for whoever watches, with the end of its output."""
    name, rc = record["check"], record["rc"]
    if rc is None:
        print(f"== {name}: not run: {record['why']}", flush=True)
        return
    print(f"== {name}: status {rc}, {record['seconds']} s", flush=True)
    tail = record["tail"][-2500 if rc == 0 else -1500 :].splitlines()[-14:]
    print("\n".join(f"   {line[:180]}" for line in tail), flush=True)


def parse_args() -> argparse.Namespace:
    cores = os.cpu_count() or 1
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", nargs="+", default=["first"], help="first, second, third, all, or names of checks.")
    parser.add_argument("--budget", type=float, default=600, help="Seconds for all of this. Default: %(default)s.")
    parser.add_argument(
        "--output", type=Path, default=Path(os.environ.get("OUT") or SCRATCH / "results"), help="Default: %(default)s."
    )
    parser.add_argument("--scratch", type=Path, default=SCRATCH, help="Models and logs. Default: %(default)s.")
    parser.add_argument("--teacher", help="Config folder or id. Default: a dummy of Qwen2.5-7B's dimensions.")
    parser.add_argument("--student", help="The same. Default: of Qwen2.5-1.5B's; drafts: of the 0.5B's.")
    parser.add_argument(
        "--at-once",
        type=int,
        default=max(1, cores // 3),
        help="Tiny engines at a time; 1: checks one after another as well. Default: a third of the cores, %(default)s.",
    )
    args = parser.parse_args()
    args.output, args.scratch = args.output.resolve(), args.scratch.resolve()
    return args


def prepare(args: argparse.Namespace) -> None:
    """Folders and models, those that were not given; ``on_gpu``; ``no_models``: why there are no dummies."""
    import torch

    for folder in (args.output, args.scratch / "logs"):
        folder.mkdir(parents=True, exist_ok=True)
    args.on_gpu, args.no_models = torch.cuda.is_available(), None
    models = args.scratch / "models"
    try:
        make_models.make(models, (HERE / "tokenizer", *make_models.TOKENIZERS))
    except FileNotFoundError as error:
        args.no_models = None if args.teacher and args.student else str(error)
    args.drafter = args.student or str(models / "qwen2.5-0.5b")
    args.teacher = args.teacher or str(models / "qwen2.5-7b")
    args.student = args.student or str(models / "qwen2.5-1.5b")


def main() -> int:
    args = parse_args()
    end = time.monotonic() + args.budget
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # what was started must not be left behind
    prepare(args)
    every = checks(args)
    failed = False
    for record in run(chosen(every, args.stage), args, end):
        failed |= record["rc"] not in (None, 0)
        with (args.output / "results.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
        report(record)
        found = summary.Findings.read([args.output])
        (args.output / "summary.md").write_text(summary.page(found, every))
        with tarfile.open(args.output / "logs.tar.gz", "w:gz") as packed:
            packed.add(args.scratch / "logs", "logs")
    missed = [bar for bar in summary.bars(summary.Findings.read([args.output])) if bar.verdict == summary.FAIL]
    for bar in missed:
        print(f"bar missed: {bar.name}, {bar.where}: {bar.measured}, asked {bar.limit}")
    print(f"results: {args.output}")
    return int(failed or bool(missed))


if __name__ == "__main__":
    sys.exit(main())
