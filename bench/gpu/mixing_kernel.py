"""The mixing kernel on a GPU: whether it stays within its memory, and how long the device takes for it.

    compute-sanitizer --tool memcheck --target-processes application-only --error-exitcode 9 \\
        python -m bench.gpu.mixing_kernel memory
    python -m bench.gpu.mixing_kernel time --result-filename bench.jsonl

memory: every method, type and special row of tests/mixing/test_kernels.py, each tensor an allocation of its own (the
variable PYTORCH_NO_CUDA_MEMORY_CACHING, which this sets), compared with plain PyTorch on the CPU, since PyTorch's own
kernels would take minutes under the sanitizer.

time: milliseconds of the device, without the host's: launches wait in the stream behind a kernel that only sleeps, and
go through more logits than the L2 cache holds, as a forward leaves none there. Beside it, both logits summed, which
reads them once. `bench.alpha` times the same calls one by one, with the host's time. With --shape for other ways of
going through a row (`fused_gpu.Shape`), to choose its default by.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

if sys.argv[1:2] == ["memory"]:  # before PyTorch looks whether the variable is there
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"

import torch

ROOT = next(path for path in Path(__file__).resolve().parents if (path / "pyproject.toml").is_file())
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "mixing")]

from bench.alpha import logits_pair  # noqa: E402 (the path is set above)
from bench.common import append_record, spread  # noqa: E402
from sglang_optimal.mixing import AlphaParams, Mixture, mix  # noqa: E402

BEYOND_CACHE = 200e6
"""Bytes of logits that the timed launches go through, as far as MOST_LAUNCHES lets them."""
MOST_LAUNCHES = 100
"""Of calls that wait in the stream: CUDA holds about a thousand kernels, then the host waits as well."""


# -- memory ------------------------------------------------------------------------------------------------------------


def moved(value, device: str):
    """A tensor, or a dataclass of tensors, on another device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, AlphaParams | Mixture):
        return type(value)(**{name: moved(one, device) for name, one in vars(value).items()})
    return value


def check_memory(device: str) -> int:
    """Run the kernel on every case and compare. Returns their number."""
    import test_kernels as kernels

    cases = dict(kernels.CASES)
    teacher, student, temperatures = (tensor[:4] for tensor in kernels.rows(width=151_936, dtype=torch.bfloat16))
    cases["a real vocabulary"] = (teacher, student, temperatures, AlphaParams.uniform(4)), {"ess_ratio": True}
    for name, (args, kwargs) in cases.items():
        arguments = [moved(value, device) for value in args]
        got = mix(*arguments, ess_ratio=kwargs.get("ess_ratio", False), implementation="triton")
        if len(args[0]) == kernels.ROWS:
            expected = mix(*args, ess_ratio=kwargs.get("ess_ratio", False), implementation="torch")
            kernels.assert_same(moved(got, "cpu"), expected, ess_ratio=kwargs.get("ess_ratio", False))
        print(f"{name}: the same", flush=True)
    if device == "cuda":
        torch.cuda.synchronize()
    return len(cases)


# -- time --------------------------------------------------------------------------------------------------------------


def device_ms(calls: list[Callable[[], object]]) -> float:
    """Milliseconds of the device for one of ``calls``, which go through it back to back."""
    for call in calls[:3]:
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for call in calls:
        call()
    seconds = time.perf_counter() - start
    torch.cuda.synchronize()
    for _ in range(4):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(int(2e9 * (2 * seconds + 0.002)))  # clock cycles, a little under 2e9 a second
        begin.record()
        for call in calls:
            call()
        end.record()
        all_were_waiting = not begin.query()
        end.synchronize()
        if all_were_waiting:
            return begin.elapsed_time(end) / len(calls)
        seconds *= 2
    raise RuntimeError("the device was always faster than the launches")


def measure(batch: int, vocab_size: int, dtype: torch.dtype, repeats: int) -> dict:
    size = 2 * batch * vocab_size * dtype.itemsize
    sets = min(MOST_LAUNCHES, max(2, math.ceil(BEYOND_CACHE / size)))
    teacher, student = logits_pair(batch, vocab_size, dtype, "cuda")
    pairs = [(teacher.clone(), student.clone()) for _ in range(sets)]
    outs = [torch.empty(batch, vocab_size, device="cuda") for _ in range(sets)]
    params = AlphaParams.uniform(batch, device="cuda")
    temperatures = torch.ones(batch, 1, device="cuda")

    def mixing(i: int) -> Callable[[], object]:
        return lambda: mix(*pairs[i], temperatures, params, out=outs[i])

    def reading(i: int) -> Callable[[], object]:
        return lambda: [logits.sum(dtype=torch.float32) for logits in pairs[i]]

    launches = [i % sets for i in range(max(sets, 20))]
    mixes = [device_ms([mixing(i) for i in launches]) for _ in range(repeats)]
    reads = [device_ms([reading(i) for i in launches]) for _ in range(repeats)]
    record = {"batch_size": batch, "vocab_size": vocab_size, "dtype": str(dtype).removeprefix("torch.")}
    record |= {"bytes_read": size, "mix_ms": spread(mixes), "read_ms": spread(reads)}
    return {**record, "mix_over_read": record["mix_ms"]["median"] / record["read_ms"]["median"]}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("memory", "time"))
    parser.add_argument("--device", default="cuda", help="Of memory; cpu with TRITON_INTERPRET=1. Default: cuda.")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 8, 32, 128, 256])
    parser.add_argument("--vocab-size", type=int, default=151_936, help="Default: %(default)s.")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16", help="Default: %(default)s.")
    parser.add_argument("--repeats", type=int, default=3, help="Default: %(default)s.")
    parser.add_argument("--shape", nargs="+", metavar="WARPS,LOADS,STAGES", help="Default: fused_gpu.SHAPE.")
    parser.add_argument("--run-name", default="default", help="Goes into every record. Default: %(default)s.")
    parser.add_argument("--result-filename", type=Path, default=Path("bench") / "results" / "mixing_kernel.jsonl")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.what == "memory":
        print(f"{check_memory(args.device)} cases, all as plain PyTorch has them")
        return
    from sglang_optimal.mixing import fused_gpu

    shapes = [fused_gpu.Shape(*map(int, shape.split(","))) for shape in args.shape or []] or [fused_gpu.SHAPE]
    for fused_gpu.SHAPE, batch in itertools.product(shapes, args.batch_size):
        record = measure(batch, args.vocab_size, getattr(torch, args.dtype), args.repeats)
        kind = "mixing-shapes" if args.shape else "mixing"
        append_record(args, {"bench": kind, "shape": fused_gpu.SHAPE._asdict(), **record})
        print(
            f"{tuple(fused_gpu.SHAPE)} batch {batch}: mixing {record['mix_ms']['median']:.4f} ms, both logits read "
            f"{record['read_ms']['median']:.4f} ms, ratio {record['mix_over_read']:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
