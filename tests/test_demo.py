"""The demo's first minute: something to read at once, and every few seconds."""

from __future__ import annotations

import io
import subprocess
import sys
import time
import types

import pytest
from rich.console import Console
from tiny_models import EOS, SMALL_SPECIAL_TOKENS, build_small_tokenizer, small_ids
from transformers import AutoTokenizer

from sglang_optimal.demo import __main__ as demo
from sglang_optimal.demo import progress
from sglang_optimal.demo.render import alpha_style, coloured


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


def test_each_token_has_the_colour_of_its_alpha(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(build_small_tokenizer(tmp_path))
    ids = [*small_ids("so 60 is it."), SMALL_SPECIAL_TOKENS.index(EOS)]
    alphas = [i / len(ids) for i in range(len(ids))]
    text = coloured(tokenizer, types.SimpleNamespace(token_ids=ids, alphas=alphas))
    assert text.plain == "so 60 is it."
    assert [span.style for span in text.spans] == [alpha_style(alpha) for alpha in alphas[:-1]]


class Talking:
    """A sampler whose texts end in reverse order; fails in one way, if any."""

    def __init__(self, failing: float | None = 2.0):
        self.failing = failing

    def generate(self, teacher, student, *, fixed_alpha, **settings):
        for index in reversed(range(len(teacher))):
            for finish in (None, "length"):
                yield types.SimpleNamespace(index=index, token_ids=[1] * 3, finish_reason=finish, alpha=fixed_alpha)
        if fixed_alpha == self.failing:
            raise ValueError("out of luck")


def test_problems_are_shown_in_order_with_every_way():
    problems = [types.SimpleNamespace(teacher_prompt=f"t{i}", student_prompt=f"s{i}") for i in range(4)]
    shown, told = [], []
    assert demo._generate(Talking(), problems, {}, shown.append, told.append) == 3 * 4 * 3
    assert [[result.index for result in results] for results in shown] == [[i] * 3 for i in range(4)]
    assert all([result.alpha for result in results] == [1.0, 0.0, None] for results in shown)
    assert told[-1] == "36 tokens, 12 of 12 texts"
    for alpha in demo.WAYS.values():
        if alpha is not None:
            with pytest.raises(ValueError, match="out of luck"):
                demo._generate(Talking(alpha), problems, {}, shown.append, told.append)
