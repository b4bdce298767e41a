"""What the programs share: their arguments, the connection, and statistics of a mixed generation."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import Any

import sglang as sgl
from rich.console import Console
from rich.table import Table

console = Console()


def parser(description: str | None, *, max_tokens: int) -> argparse.ArgumentParser:
    """Arguments of every program; ``description`` is its docstring."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument(
        "--url", default="http://127.0.0.1:30000", help="server started by sglang_optimal.launch_server"
    )
    result.add_argument("--api-key", help="the server's key, if it has one")
    result.add_argument("--max-tokens", type=int, default=max_tokens, help="longest answer (default: %(default)s)")
    return result


def connect(args: argparse.Namespace) -> sgl.RuntimeEndpoint:
    """The backend of the frontend language; leaves with a message when there is no server."""
    try:
        return sgl.RuntimeEndpoint(args.url, api_key=args.api_key)
    except (OSError, RuntimeError) as error:
        raise SystemExit(f"no server at {args.url}: {error}\nStart one with: make serve-demo") from None


def user(text: str) -> list[dict[str, str]]:
    """One message of the user; the server renders it with the reading model's own chat template."""
    return [{"role": "user", "content": text}]


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def finished(state: Any, name: str) -> Any:
    """The state, when the generation ``name`` has ended well; leaves with the server's message otherwise."""
    state.sync()
    if state.error() is not None:
        raise SystemExit(f"{name}: {state.error()}")
    return state


def statistics(meta: dict[str, Any]) -> dict[str, float]:
    """Means over the tokens of a mixed generation."""
    return {
        "tokens": len(meta["alpha"]),
        "alpha": mean(meta["alpha"]),
        "kl": mean(meta["kl_to_student"]),
        "student_logprob": mean(meta["student_logprob"]),
        "teacher_logprob": mean(meta["teacher_logprob"]),
    }


def solved(problems: Sequence[Any], states: Sequence[Any]) -> int:
    """How many of the problems the states' texts solve."""
    return sum(problem.solved_by(state["text"]) for problem, state in zip(problems, states, strict=True))


def means(states: Sequence[Any]) -> dict[str, float]:
    """Alpha, KL and student logprob of the states' texts, averaged over tokens and then over texts."""
    found = [statistics(state.get_meta_info("text")) for state in states]
    return {key: mean([f[key] for f in found]) for key in ("alpha", "kl", "student_logprob")}


def print_table(title: str, rows: Sequence[dict[str, Any]]) -> None:
    """One line a row; the keys of the first row are the columns."""
    table = Table(title=title)
    for name in rows[0]:
        table.add_column(name.replace("_", " "), overflow="fold")
    for row in rows:
        table.add_row(*(f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values()))
    console.print(table)
