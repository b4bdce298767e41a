"""What the user sees while a run goes on: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import time
from collections import deque

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from sglang_optimal.distill.store import Tally

WINDOW = 60.0
"""Seconds that rates are taken over."""
LOG_EVERY = 15.0
"""Seconds between lines in a log."""


class RunProgress:
    """Shows a run's tally until the block ends.

    Args:
        total: samples of the whole run.
        at_most: whether fewer may come.
        tally: counted by the store; what was there before this process began is done already.
        console: where to; a terminal gets a live display.
    """

    def __init__(self, total: int, tally: Tally, console: Console, *, at_most: bool = False):
        self._total, self._tally, self._console = total, tally, console
        self._at_most = "at most " if at_most else ""
        self._began = time.monotonic()
        self._tokens_before = tally.tokens
        self._recent: deque[tuple[float, int]] = deque([(self._began, tally.tokens)])
        self._bar = Progress(
            TextColumn("[bold]samples" + (", of at most" if at_most else "")), BarColumn(None), MofNCompleteColumn(),
            TimeElapsedColumn(), TextColumn(f"ETA {self._at_most}".strip()),
            TimeRemainingColumn(elapsed_when_finished=False), console=console,
        )  # fmt: skip
        self._task = self._bar.add_task("", total=total, completed=tally.total)
        self._live = Live(self, console=console, refresh_per_second=2) if console.is_terminal else None
        self._logged = 0.0
        self.failed = 0

    def __enter__(self) -> RunProgress:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *exc_info) -> None:
        if self._live is not None:
            self.update()
            self._live.stop()
        else:
            self._console.print(self._line(), highlight=False, soft_wrap=True)

    def update(self) -> None:
        """Call it now and then; cheap."""
        now = time.monotonic()
        self._recent.append((now, self._tally.tokens))
        while len(self._recent) > 2 and now - self._recent[0][0] > WINDOW:
            self._recent.popleft()
        if self._live is not None:
            self._bar.update(self._task, completed=self._tally.total)
        elif now - self._logged >= LOG_EVERY:
            self._logged = now
            self._console.print(self._line(), highlight=False, soft_wrap=True)

    def rate(self) -> float:
        """Generated tokens a second, of late."""
        (then, before), (now, tokens) = self._recent[0], self._recent[-1]
        return (tokens - before) / (now - then) if now > then else 0.0

    def __rich__(self) -> Group:
        return Group(self._bar, self._figures(), self._problems(), self._reasons())

    def _figures(self) -> Table:
        tally = self._tally
        figures = Table.grid(padding=(0, 3))
        alpha = tally.mean_alpha
        share = f"{tally.accepted / tally.total:.1%}" if tally.total else "–"
        figures.add_row(
            f"[green]accepted[/] {tally.accepted} ({share})",
            f"[yellow]rejected[/] {tally.rejected}",
            f"[green]covered[/] {tally.covered} of {len(tally.problems)} problems",
            *([f"[red]failed[/] {self.failed}"] if self.failed else []),
            f"{self.rate():.0f} tok/s",
            f"{tally.tokens:,} tokens",
            f"mean α {alpha:.3f}" if alpha is not None else "mean α –",
        )
        return figures

    def _problems(self) -> str:
        return f"  [dim]accepted samples: problems — {k_of_n(self._tally)}[/]" if self._tally.problems else ""

    def _reasons(self) -> Table:
        table = Table.grid(padding=(0, 2))
        for (name, reason), count in self._tally.reasons.most_common(6):
            table.add_row(f"  [dim]{count:>7}[/]", f"[dim]{name}: {_short(reason)}[/]")
        return table

    def _line(self) -> str:
        tally = self._tally
        alpha = f"{tally.mean_alpha:.3f}" if tally.mean_alpha is not None else "-"
        seconds = time.monotonic() - self._began
        done = tally.tokens - self._tokens_before
        overall = done / seconds if seconds else 0.0
        failed = f", failed {self.failed}" if self.failed else ""
        return (
            f"{tally.total}/{self._at_most}{self._total} samples: accepted {tally.accepted}, "
            f"rejected {tally.rejected}{failed}; {coverage(tally)}; "
            f"{tally.tokens} tokens, {self.rate():.0f} tok/s (average {overall:.0f}); mean alpha {alpha}; "
            f"ETA {self._at_most}{self._eta()}"
        )

    def _eta(self) -> str:
        tally, rate = self._tally, self.rate()
        if not rate or not tally.total:
            return "-"
        left = (self._total - tally.total) * tally.tokens / tally.total / rate
        return f"{left:.0f} s" if left < 600 else f"{left / 60:.0f} min"


def coverage(tally: Tally) -> str:
    """Such as ``2 of 4 problems covered (accepted samples: problems — 0: 2, 1: 1, 3: 1)``."""
    detail = f" (accepted samples: problems — {k_of_n(tally)})" if tally.problems else ""
    return f"{tally.covered} of {len(tally.problems)} problems covered{detail}"


SHOWN = 8
"""Numbers of accepted samples that stand alone in a line."""


def k_of_n(tally: Tally) -> str:
    """How many problems have no accepted sample, one, two and so on."""
    found = list(tally.k_of_n.items())
    shown, more = found[:SHOWN], found[SHOWN:]
    parts = [f"{accepted}: {problems}" for accepted, problems in shown]
    if more:
        parts.append(f"{more[0][0]} or more: {sum(problems for _, problems in more)}")
    return ", ".join(parts)


def _short(text: str, characters: int = 90) -> str:
    text = " ".join(text.split())
    return text if len(text) <= characters else text[: characters - 1] + "…"
