"""New student weights in a running engine: in memory, by SGLang's own tensors, and from disk.

    python -m bench.weights --model-path T [--student-model-path S] [--server-args …]

    memory      OptimalSampler.update_student_weights with tensors
    no rollback the same, with --weight-rollback off: the old weights are not kept
    sglang      SGLang's Engine.update_weights_from_tensor between begin and end: pickled handles of shared memory
    disk        save_file to a folder (in memory where --folder is), then update_student_weights with it
    load        the last one without the writing

A round goes through all in random order with other weights each time; seconds a gigabyte of weights, medians.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

from bench.common import (
    add_output_arguments,
    add_server_arguments,
    append_record,
    positive_int,
    server_arguments,
    spread,
    with_spread,
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.weights", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model-path", required=True, help="Teacher.")
    parser.add_argument("--student-model-path", help="Default: a copy of the teacher.")
    parser.add_argument("--repeats", type=positive_int, default=5, help="Rounds. Default: %(default)s.")
    parser.add_argument("--folder", help="Where checkpoints are written. Default: the system's folder for such.")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--seed", type=int, default=1, help="Default: %(default)s.")
    add_output_arguments(parser, "weights")
    add_server_arguments(parser, "the engine")
    args = parser.parse_args()
    args.student_model_path = args.student_model_path or args.model_path
    return args


def main() -> None:
    from sglang_optimal import OptimalSampler

    args = parse_args()
    files = sorted(Path(args.student_model_path).glob("*.safetensors"))
    weights = {name: tensor for file in files for name, tensor in load_file(file).items()}
    size = sum(tensor.nbytes for tensor in weights.values()) / 1e9
    defaults = {"dtype": args.dtype, "max_total_tokens": 2048, "mem_fraction_static": 0.3, "sleep_on_idle": True}
    own = {"student_weights": "separate", **server_arguments(args.server_args, defaults)}
    with (
        OptimalSampler(args.model_path, args.student_model_path, **own) as keeping,
        OptimalSampler(args.model_path, args.student_model_path, weight_rollback="off", **own) as careless,
        tempfile.TemporaryDirectory(dir=args.folder) as folder,
    ):
        seconds = measure(ways(keeping, careless, Path(folder)), weights, args.repeats, random.Random(args.seed))
    table = Table("way", "seconds", "seconds/GB", title=f"{size:.2f} GB of {args.dtype} student weights")
    for name, taken in seconds.items():
        append_record(args, {"way": name, "gigabytes": size, "seconds": taken})
        table.add_row(name, with_spread(spread(taken)), with_spread(spread(value / size for value in taken)))
    Console().print(table)


def ways(keeping, careless, folder: Path) -> dict[str, Callable[[dict[str, torch.Tensor]], float]]:
    """{name: an update with these weights; returns its seconds}"""

    def timed(update: Callable[[], object]) -> float:
        begin = time.perf_counter()
        update()
        return time.perf_counter() - begin

    def sglang(weights: dict[str, torch.Tensor]) -> None:
        for success, message in (
            keeping.engine.begin_weight_update(),
            keeping.engine.update_weights_from_tensor(list(weights.items())),
            keeping.engine.end_weight_update(),
        ):
            assert success, message

    def disk(weights: dict[str, torch.Tensor]) -> None:
        save_file(weights, folder / "model.safetensors")
        keeping.update_student_weights(folder)

    def load(weights: dict[str, torch.Tensor]) -> float:
        save_file(weights, folder / "model.safetensors")
        return timed(lambda: keeping.update_student_weights(folder))

    return {
        "memory": lambda weights: timed(lambda: keeping.update_student_weights(weights)),
        "no rollback": lambda weights: timed(lambda: careless.update_student_weights(weights)),
        "sglang": lambda weights: timed(lambda: sglang(weights)),
        "disk": lambda weights: timed(lambda: disk(weights)),
        "load": load,
    }


def measure(
    updates: dict[str, Callable[[dict[str, torch.Tensor]], float]],
    weights: dict[str, torch.Tensor],
    repeats: int,
    rng: random.Random,
) -> dict[str, list[float]]:
    """{name: seconds of each round}, after a warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in updates}
    for number in range(repeats + 1):
        other = {name: tensor * (1 + 0.001 * number) for name, tensor in weights.items()}
        for name in rng.sample(list(updates), len(updates)):
            taken = updates[name](other)
            if number:
                seconds[name].append(taken)
    return seconds


if __name__ == "__main__":
    main()
