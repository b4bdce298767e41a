"""The mixing alone: alpha, the mixture and the sampled token's extras, beside the time to read both logits once.

    python -m bench.alpha [--batch-size 1 8 32 256] [--vocab-size 49152 151936] [--alpha-method kl_symmetry kl_budget]

For each batch, vocabulary and method: milliseconds (median over repeats) of

    read       both logits summed, which reads every byte once
    fused      what runs on this device: numba on a CPU, Triton on a GPU
    torch      the same mathematics in plain PyTorch
    bisection  the naive solver (kl_symmetry alone): both softmaxes in float32, and one more normalised mixture per
               bisection step

and, for kl_symmetry and the budgets, the error of each alpha against bisection in float64 (for budgets of the first 16
rows), and how often Newton evaluates A' in plain PyTorch.
"""

from __future__ import annotations

import argparse
import time

import torch
from rich.console import Console
from rich.table import Table

from bench.common import add_output_arguments, append_record, device_name, new_figure, save_figure, spread, timed
from sglang_optimal.mixing import ALPHA_METHODS, AlphaParams, compile_kernels, mix, token_logprobs
from sglang_optimal.mixing.pair import LogPair

CHECKED = ("kl_symmetry", "kl_budget", "kl_budget_teacher")
ROWS = 16
"""Of which Newton's steps are counted, and a budget's error is taken."""
BISECTIONS = {torch.float32: 24, torch.float64: 50}
"""Enough to resolve alpha in each type."""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 8, 32, 128, 256])
    parser.add_argument("--vocab-size", type=int, nargs="+", default=[49152, 151936])
    parser.add_argument("--alpha-method", choices=ALPHA_METHODS, nargs="+", default=list(CHECKED))
    parser.add_argument("--kl-budget", type=float, default=0.1, help="Of either budget, nats. Default: %(default)s.")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="Of the logits.")
    parser.add_argument("--repeats", type=int, default=15, help="Default: %(default)s.")
    parser.add_argument("--no-bisection", action="store_true", help="Leave the naive solver out.")
    add_output_arguments(parser, "alpha")
    return parser.parse_args()


def logits_pair(batch: int, vocab_size: int, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Teacher and student logits [B, V] that agree and differ about as much as two models do."""
    generator = torch.Generator(device).manual_seed(0)
    common, own = (torch.randn(batch, vocab_size, generator=generator, device=device) for _ in range(2))
    return (3.0 * common).to(dtype), (2.0 * common + 1.5 * own).to(dtype)


def bisection(
    teacher: torch.Tensor,
    student: torch.Tensor,
    dtype: torch.dtype = torch.float32,
    method: str = "kl_symmetry",
    budget: float = 0.0,
) -> torch.Tensor:
    """Alpha [B] with KL(q‖p_s) = KL(q‖p_t), or where one of them is the budget, by bisection on whole distributions."""
    log_t, log_s = (torch.log_softmax(z.to(dtype), -1) for z in (teacher, student))
    low = torch.zeros(len(log_t), 1, dtype=dtype, device=log_t.device)
    high = torch.ones_like(low)
    for _ in range(BISECTIONS[dtype]):
        alpha = (low + high) / 2
        log_q = torch.log_softmax((1 - alpha) * log_s + alpha * log_t, -1)
        q = log_q.exp()
        if method == "kl_symmetry":
            below = (q * (log_t - log_s)).sum(-1, keepdim=True) < 0
        elif method == "kl_budget":
            below = (q * (log_q - log_s)).sum(-1, keepdim=True) <= budget
        else:
            below = (q * (log_q - log_t)).sum(-1, keepdim=True) > budget
        low, high = torch.where(below, alpha, low), torch.where(below, high, alpha)
    return ((low + high) / 2).squeeze(-1)


def newton_steps(teacher: torch.Tensor, student: torch.Tensor, params: AlphaParams) -> float:
    """Mean number of evaluations of A' that a row needs, the test for equal models at ½ and a budget's end included."""
    count = 0
    original = LogPair.derivatives

    def counting(pair, alpha, order=2):
        nonlocal count
        count += order == 2
        return original(pair, alpha, order)

    LogPair.derivatives = counting
    try:
        for t, s in list(zip(teacher, student, strict=True))[:ROWS]:
            mix(t[None].cpu(), s[None].cpu(), torch.ones(1), params, implementation="torch")
    finally:
        LogPair.derivatives = original
    return (count - 1) / min(ROWS, len(teacher))  # the evaluation at ½ serves twice in the fused kernels


def measure(args: argparse.Namespace, method: str, batch: int, vocab_size: int, device: str) -> dict:
    teacher, student = logits_pair(batch, vocab_size, getattr(torch, args.dtype), device)
    params = AlphaParams.uniform(batch, method, kl_budget=args.kl_budget, device=device)
    temperatures = torch.ones(batch, 1, device=device)
    tokens = torch.zeros(batch, dtype=torch.int64, device=device)
    out = torch.empty(batch, vocab_size, device=device)

    def mixing(implementation: str | None):
        mixture = mix(teacher, student, temperatures, params, out=out, implementation=implementation)
        token_logprobs(mixture, teacher, student, temperatures, tokens)
        return mixture

    calls = {
        "read": lambda: (teacher.sum(dtype=torch.float32), student.sum(dtype=torch.float32)),
        "fused": lambda: mixing(None),
        "torch": lambda: mixing("torch"),
    }
    naive = method == "kl_symmetry" and not args.no_bisection
    if naive:
        calls["bisection"] = lambda: bisection(teacher, student)
    record = {"batch_size": batch, "vocab_size": vocab_size, "dtype": args.dtype, "alpha_method": method}
    if "budget" in method:
        record["kl_budget"] = args.kl_budget
    for name, call in calls.items():
        repeats = args.repeats if name != "bisection" else 3
        record[f"{name}_ms"] = spread([1e3 * t for t in timed(call, repeats)])
    read = record["read_ms"]["median"]
    record["read_gb_per_s"] = 2 * teacher.numel() * teacher.element_size() / read / 1e6
    record["fused_over_read"] = record["fused_ms"]["median"] / read
    record["torch_over_fused"] = record["torch_ms"]["median"] / record["fused_ms"]["median"]
    if method in CHECKED and not args.no_bisection:
        rows = list(zip(teacher, student, strict=True))[: batch if naive else ROWS]
        exact = torch.cat([bisection(t[None], s[None], torch.float64, method, args.kl_budget) for t, s in rows])
        alphas = {"fused": mixing(None).alpha, "torch": mixing("torch").alpha}
        if naive:
            alphas["bisection"] = bisection(teacher, student)
        for name, alpha in alphas.items():
            record[f"{name}_alpha_error"] = float((alpha[: len(rows)].double() - exact).abs().max())
        one = AlphaParams.uniform(1, method, kl_budget=args.kl_budget)
        record["newton_steps"] = newton_steps(teacher, student, one)
    return record


def main() -> None:
    args = parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    start = time.perf_counter()
    compile_kernels(device)
    append_record(args, {"bench": "alpha", "compile_s": time.perf_counter() - start})
    records = []
    for vocab_size in args.vocab_size:
        for batch in args.batch_size:
            for method in args.alpha_method:
                records.append(measure(args, method, batch, vocab_size, device))
                append_record(args, {"bench": "alpha", **records[-1]})
    show(records)
    plot(args, records)


def show(records: list[dict]) -> None:
    table = Table(title=f"mixing, ms, {device_name()}", title_justify="left")
    names = [n for n in ("read", "fused", "torch", "bisection") if any(f"{n}_ms" in r for r in records)]
    table.add_column("method")
    for column in ("V", "B", *names, "GB/s read", "fused/read", "torch/fused", "error", "Newton steps"):
        table.add_column(column, justify="right")
    for r in records:
        table.add_row(
            *(r["alpha_method"], str(r["vocab_size"]), str(r["batch_size"])),
            *(f"{r[f'{n}_ms']['median']:.3f}" if f"{n}_ms" in r else "" for n in names),
            *(f"{r['read_gb_per_s']:.0f}", f"{r['fused_over_read']:.1f}", f"{r['torch_over_fused']:.1f}"),
            *(f"{r.get('fused_alpha_error', float('nan')):.0e}", f"{r.get('newton_steps', float('nan')):.1f}"),
        )
    Console(width=140).print(table)


def plot(args: argparse.Namespace, records: list[dict]) -> None:
    figure, axes = new_figure(len(args.vocab_size))
    for axis, vocab_size in zip(axes[0], args.vocab_size, strict=True):
        rows = [r for r in records if r["vocab_size"] == vocab_size and r["alpha_method"] == args.alpha_method[0]]
        for name in ("bisection", "torch", "fused", "read"):
            if f"{name}_ms" in rows[0]:
                values = [r[f"{name}_ms"]["median"] for r in rows]
                axis.plot([r["batch_size"] for r in rows], values, marker="o", label=name)
        axis.set(xscale="log", yscale="log", xlabel="batch size", ylabel="ms", title=f"V = {vocab_size}")
        axis.legend()
    figure.suptitle(f"Mixing beside reading both logits once ({device_name()})", y=1.02)
    save_figure(figure, args.plot)


if __name__ == "__main__":
    main()
