"""What the demo is at, every few seconds: a live line on a terminal, plain lines in a pipe."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from rich.console import Console

EVERY = 5.0
"""Seconds between two lines in a pipe."""


@contextlib.contextmanager
def step(console: Console, title: str) -> Iterator[Callable[[str], None]]:
    """Show that ``title`` is under way, and in the end how long it took.

    Yields:
        A function that takes what is known of it meanwhile, such as "120 tokens".
    """
    began, news, done = time.monotonic(), [""], threading.Event()

    def now(text: str) -> str:
        return f"{title}: {time.monotonic() - began:.0f} s{text and ', '}{text}"

    def tell_terminal() -> None:
        with console.status(title) as status:
            while not done.wait(0.5):
                status.update(now(news[0]))

    def tell_pipe() -> None:
        while not done.wait(EVERY):
            console.print(f"  {now(news[0])}", markup=False, highlight=False)

    if not console.is_terminal:
        console.print(f"{title} …", markup=False, highlight=False)
    teller = threading.Thread(target=tell_terminal if console.is_terminal else tell_pipe, daemon=True)
    teller.start()
    try:
        yield lambda text: news.__setitem__(0, text)
    finally:
        done.set()
        teller.join()
    console.print(now(news[0]), markup=False, highlight=False)
