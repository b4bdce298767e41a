"""The demo's first minute: something to read at once, and every few seconds."""

from __future__ import annotations

import io
import subprocess
import sys
import time

from rich.console import Console

from sglang_optimal.demo import progress


def test_it_speaks_before_it_imports_anything_slow():
    command = [sys.executable, "-m", "sglang_optimal.demo", "--model-path", "/no/such/model"]
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert "12 word problems by the teacher" in process.stdout.readline()
    spoke = time.monotonic() - start
    rest, said = process.communicate(timeout=120)
    assert spoke < (time.monotonic() - start) / 3  # however busy the machine is; most of the rest is imports
    assert process.returncode == 2
    assert "starting SGLang …" in rest and "sglang_optimal.demo: error: " in said and "/no/such/model" in said
    assert "Warning" not in said


def test_a_pipe_gets_plain_lines(monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.05)
    console = Console(file=io.StringIO(), force_terminal=False)
    with progress.step(console, "counting [bold]") as tell:
        tell("3 tokens")
        time.sleep(0.3)
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "counting [bold] …" and lines[-1] == "counting [bold]: 0 s, 3 tokens"
    assert len(lines) > 3 and set(lines[1:-1]) == {"  counting [bold]: 0 s, 3 tokens"}


def test_a_terminal_gets_one_line_that_changes():
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    with progress.step(console, "counting") as tell:
        tell("3 tokens")
        time.sleep(1.2)
    shown = console.file.getvalue()
    assert "counting: 1 s, 3 tokens" in shown and shown.endswith("counting: 1 s, 3 tokens\n")
