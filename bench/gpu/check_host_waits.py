"""How often the host waits for the device in a decode step: stock SGLang, lockstep, shared weights, drafts.

    python -m bench.gpu.check_host_waits --output FILE

Each engine has tiny random models and decodes a full batch; some steady steps are traced by torch.profiler, and the
calls of the scheduler's thread that wait (see `traces`) are counted. Ours must make no more of them than SGLang's own,
or, where a step of drafts waits more often, SGLang's own code must be what waits: as in its own speculative decoding.

Without a GPU the same engines run and no wait can be seen: that shows only that the check itself works.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = next(path for path in Path(__file__).resolve().parents if (path / "pyproject.toml").is_file())
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "engine")]

from bench.gpu import processes, scheduler_hooks, traces  # noqa: E402 (the path is set above)

BATCH, PROMPT, NEW = 8, 32, 600
STEADY, STEPS = 8, 18
TOLERANCE = 0.1
"""Waits a step: what a trace that begins or ends within a step may be off by."""

ENGINES: dict[str, dict[str, Any]] = {
    "stock": {},
    "lockstep": {"student": "student"},
    "shared": {"student": "teacher"},
    "drafts": {"student": "student", "mixing_mode": "speculative", "draft_tokens": 3},
}


def make_models(folder: Path) -> None:
    from tiny_models import build_tiny_tokenizer_model

    if not (folder / "student" / "config.json").is_file():
        build_tiny_tokenizer_model(folder / "teacher", seed=1)
        build_tiny_tokenizer_model(folder / "student", seed=2, hidden_size=32, num_layers=1)


@contextlib.contextmanager
def engine(name: str, models: Path, folder: Path, **arguments: Any) -> Iterator[Any]:
    """SGLang's engine, or ours, that traces its steps into ``folder``."""
    from harness import SMALL

    from sglang_optimal import OptimalSampler

    own = dict(ENGINES[name])
    student = own.pop("student", None)
    # Twice the batch's two contexts at their longest, and bfloat16: what SGLang's own kernels take.
    size = {"max_total_tokens": 4 * BATCH * (PROMPT + NEW), "dtype": "bfloat16"}
    arguments = {**SMALL, **size, **own, **arguments}
    setup = functools.partial(scheduler_hooks.trace_steps, folder, BATCH, STEADY, STEPS)
    if student is None:
        stock = scheduler_hooks.stock_engine(setup, model_path=str(models / "teacher"), **arguments)
        try:
            yield stock
        finally:
            stock.shutdown()
        return
    with scheduler_hooks.in_schedulers(setup):
        sampler = OptimalSampler(str(models / "teacher"), str(models / student), **arguments)
    with sampler:
        yield sampler.engine


def decode(engine: Any, mixed: bool, folder: Path) -> None:
    """Full batches until both traces are there."""
    rng = random.Random(0)
    deadline = time.monotonic() + 60
    while not (folder / "stacks.json").is_file():
        if time.monotonic() > deadline:
            raise RuntimeError("no steady decode steps were traced in 60 s")
        params: list[dict[str, Any]] = [
            {"temperature": 1.0, "max_new_tokens": NEW, "ignore_eos": True} for _ in range(BATCH)
        ]
        prompts = [[rng.randrange(7, 64) for _ in range(PROMPT)] for _ in range(BATCH)]
        if mixed:
            for one in params:
                one["custom_params"] = {"student_input_ids": [rng.randrange(7, 64) for _ in range(PROMPT)]}
        engine.generate(input_ids=prompts, sampling_params=params)


def one(name: str, models: Path, port: int) -> dict[str, Any]:
    """The record of one engine; ``counted`` of the plain trace, ``from`` and ``ours`` of that with stacks."""
    import torch

    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="sglang-optimal-traces-") as scratch:
        folder = Path(scratch)
        with engine(name, models, folder, port=port, nccl_port=port + 77, log_level="warning") as running:
            seconds = time.perf_counter() - start
            decode(running, name != "stock", folder)
        plain, stacks = (
            traces.waits(json.loads((folder / f"{kind}.json").read_text()), scheduler_hooks.STEP)
            for kind in scheduler_hooks.StepTracer.TRACES
        )
    return {
        "engine": name,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "start_s": round(seconds, 1),
        **{key: value for key, value in plain.items() if key not in ("from", "ours")},
        "from": stacks["from"],
        "ours": stacks["ours"],
    }


def judged(records: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The same records with a "verdict": "pass", "fail", or why there is none."""
    stock = records.get("stock", {})
    return {name: {**record, "verdict": _verdict(name, record, stock)} for name, record in records.items()}


def _verdict(name: str, record: dict[str, Any], stock: dict[str, Any]) -> str:
    if "error" in record:
        return f"not judged: {record['error']}"
    if record["device"] == "cpu":
        return "not judged: no GPU"
    if "waits" not in stock:
        return "not judged: there is nothing of stock SGLang's to compare with"
    if stock["waits"] == 0:  # it waits for each step's tokens: the trace has not seen the calls
        return "not judged: the trace has no waits of stock SGLang's"
    if name == "stock":
        return "the measure"
    kinds = ("waits", "pageable_to_host")
    if all(record[kind] <= stock[kind] + TOLERANCE for kind in kinds):
        return "pass"
    more_are_sglangs = name == "drafts" and record["ours"] == 0
    return "pass: what waits more often is SGLang's own code" if more_are_sglangs else "fail"


def every(names: list[str], models: Path, logs: Path, at_once: int, limit: float) -> dict[str, dict[str, Any]]:
    """Records by engine; ``limit``: seconds for all."""
    end = processes.end_of(limit)
    jobs = [
        processes.Job(
            name,
            [sys.executable, __file__, "--one", name, "--models", str(models), "--port", str(36000 + 200 * i)],
            limit,
            logs / f"host-waits-{name}.log",
        )
        for i, name in enumerate(names)
    ]
    records = {}
    for ended in processes.run_all(jobs, at_once, ROOT, end):
        records[ended.job.name] = {"engine": ended.job.name, **processes.result(ended)}
    return {name: records[name] for name in names}


def parse_args() -> argparse.Namespace:
    description = __doc__.splitlines()[0]
    return processes.engine_parser(
        description, ENGINES, output="host_waits.json", models="tiny-host-waits", port=36000, limit=600, cores=4
    ).parse_args()


def main() -> int:
    args = parse_args()
    make_models(args.models)
    if args.one:
        processes.give_result(lambda: one(args.one, args.models, args.port))
    records = judged(every(args.engines, args.models, args.logs, args.at_once, args.limit))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(records, indent=1) + "\n")
    for name, record in records.items():
        counted = f"{record['waits']:.2f} waits a step" if "waits" in record else "no trace"
        print(f"{name}: {counted}, {record['verdict']}")
    print(f"records: {args.output}")
    return int(any(r["verdict"] == "fail" or "error" in r for r in records.values()))


if __name__ == "__main__":
    sys.exit(main())
