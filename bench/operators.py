"""Where a decode step of one model goes on a CPU, by kind of layer, against reading weights and KV once.

    python -m bench.operators --model-path MODEL --dtype bfloat16 float32 --batch-size 1 8 32

Stock SGLang on this platform, plain requests; every module's call is timed in the scheduler's process, without the time
of the modules within it. Meant for a machine with nothing else running.
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.common import add_output_arguments, add_server_arguments, append_record, positive_int, server_arguments
from bench.gpu.scheduler_hooks import stock_engine

KINDS = {
    "Linear": "linear layers",
    "RadixAttention": "attention, with the writing of KV",
    "RMSNorm": "norms",
    "RotaryEmbedding": "rotations",
    "SiluAndMul": "activation",
    "LogitsProcessor": "head",
    "VocabParallelEmbedding": "embedding",
    "Sampler": "sampler",
}
"""End of a module's class name: what it is in the table; others are "the model's own code"."""
OTHER = "the model's own code"
REST = "the scheduler, and all else"
STEADY = 8
READ_BYTES = 1 << 29


def kind_of(name: str) -> str:
    return next((kind for end, kind in KINDS.items() if name.endswith(end)), OTHER)


class Timer:
    """Times the modules of full decode batches, from one scheduler's step to the next.

    Args:
        folder: for ``<batch size>.json``. steps: how many are timed of each batch size.
    """

    def __init__(self, folder: Path, steps: int):
        self.folder, self.steps = folder, steps
        self._spent: dict[str, float] = {}
        self._within: list[float] = []
        self._in_a_row = 0
        self._size = 0
        self._start = 0.0

    def install(self) -> None:
        import torch
        from sglang.srt.plugins.hook_registry import HookRegistry, HookType

        HookRegistry.register("sglang.srt.managers.scheduler.Scheduler.run_batch", self.run_batch, HookType.AROUND)
        call = torch.nn.Module.__call__
        timer = self

        def timed(module, *args, **kwargs):
            timer._within.append(0.0)
            start = time.perf_counter()
            try:
                return call(module, *args, **kwargs)
            finally:
                took = time.perf_counter() - start
                own = took - timer._within.pop()
                kind = kind_of(type(module).__name__)
                timer._spent[kind] = timer._spent.get(kind, 0.0) + own
                if timer._within:
                    timer._within[-1] += took

        torch.nn.Module.__call__ = timed

    def run_batch(self, original, scheduler, batch, *args, **kwargs):
        size = len(batch.reqs)
        steady = batch.forward_mode.is_decode() and size == self._size
        self._in_a_row = self._in_a_row + 1 if steady else 0
        self._size = size
        if self._in_a_row == STEADY:
            self._spent, self._start = {}, time.perf_counter()
        if self._in_a_row == STEADY + self.steps:
            self._write(scheduler, batch, time.perf_counter() - self._start)
        return original(scheduler, batch, *args, **kwargs)

    def _write(self, scheduler, batch, seconds: float) -> None:
        spent = {kind: value / self.steps * 1e3 for kind, value in self._spent.items()}
        step = seconds / self.steps * 1e3
        runner = scheduler.tp_worker.model_runner
        weights = sum(one.nbytes for one in {id(p): p for p in runner.model.parameters()}.values())
        pool = runner.token_to_kv_pool
        token = (pool.get_kv_size_bytes()[0] + pool.get_kv_size_bytes()[1]) / pool.size
        record = {
            "batch_size": len(batch.reqs),
            "step_ms": step,
            "ms": {**spent, REST: step - sum(spent.values())},
            "weights_bytes": weights,
            "kv_bytes": token * int(batch.seq_lens_cpu.sum()),
            "read_bytes_per_s": read_rate(),
        }
        unfinished = self.folder / f"{len(batch.reqs)}.part"
        unfinished.write_text(json.dumps(record))
        unfinished.rename(self.folder / f"{len(batch.reqs)}.json")


def read_rate() -> float:
    """Bytes a second that this process's threads read of memory: the best of some sums of half a gigabyte."""
    import torch

    numbers = torch.ones(READ_BYTES // 8, dtype=torch.int64)
    rates = []
    for _ in range(5):
        start = time.perf_counter()
        numbers.sum()
        rates.append(READ_BYTES / (time.perf_counter() - start))
    return max(rates)


def time_layers(folder: Path, steps: int) -> None:
    """`Timer` in this process, to be pickled with `functools.partial`."""
    Timer(folder, steps).install()


def measure(args: argparse.Namespace, dtype: str) -> list[dict[str, Any]]:
    """A record of each batch size: the median round's."""
    rng = random.Random(1)
    own = {
        "dtype": dtype,
        "max_running_requests": max(args.batch_size),
        "max_total_tokens": 2 * max(args.batch_size) * (args.input_len + args.output_len),
        "disable_radix_cache": True,
        "log_level": "error",
    }
    records = []
    with tempfile.TemporaryDirectory(prefix="sglang-optimal-operators-") as scratch:
        folder = Path(scratch)
        setup = functools.partial(time_layers, folder, args.output_len - STEADY - 4)
        arguments = server_arguments(args.server_args, own)
        engine = stock_engine(setup, model_path=args.model_path, **arguments)
        try:
            for size in args.batch_size:
                rounds = []
                for _ in range(1 + args.repeats):
                    prompts = [[rng.randrange(1000, 20000) for _ in range(args.input_len)] for _ in range(size)]
                    params = {"temperature": 1.0, "max_new_tokens": args.output_len, "ignore_eos": True}
                    engine.generate(input_ids=prompts, sampling_params=params)
                    rounds.append(json.loads((folder / f"{size}.json").read_text()))
                warm = sorted(rounds[1:], key=lambda one: one["step_ms"])
                records.append({"dtype": dtype, **warm[len(warm) // 2]})
        finally:
            engine.shutdown()
    return records


def show(records: list[dict[str, Any]]) -> None:
    names = sorted({name for one in records for name in one["ms"]}, key=lambda name: -statistics.mean(
        one["ms"].get(name, 0.0) for one in records
    ))  # fmt: skip
    print("| ms | " + " | ".join(f"{one['dtype']}, {one['batch_size']}" for one in records) + " |")
    print("|---" * (len(records) + 1) + "|")
    print("| a step | " + " | ".join(f"{one['step_ms']:.1f}" for one in records) + " |")
    for name in names:
        print(f"| {name} | " + " | ".join(f"{one['ms'].get(name, 0.0):.1f}" for one in records) + " |")
    floors = [(one["weights_bytes"] + one["kv_bytes"]) / one["read_bytes_per_s"] * 1e3 for one in records]
    print("| reading weights and KV once | " + " | ".join(f"{floor:.1f}" for floor in floors) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--batch-size", type=positive_int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--input-len", type=positive_int, default=96, help="Default: %(default)s.")
    parser.add_argument("--output-len", type=positive_int, default=48, help="Default: %(default)s.")
    parser.add_argument(
        "--repeats", type=positive_int, default=3, help="Rounds, after a warm-up. Default: %(default)s."
    )
    add_output_arguments(parser, "operators")
    add_server_arguments(parser, "the engine")
    args = parser.parse_args()
    records = [record for dtype in args.dtype for record in measure(args, dtype)]
    for record in records:
        append_record(args, {"model_path": args.model_path, "input_len": args.input_len, **record})
    show(records)


if __name__ == "__main__":
    main()
