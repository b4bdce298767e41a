"""The programs of frontend/, each run to its end against one server of tiny models."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

FRONTEND = Path(__file__).parents[2] / "frontend"
FAST = ("--max-tokens", "8")
# The tiny models read one token a character, and 1024 of them.
PROGRAMS = {
    "semi_on_policy": (*FAST, "--problems", "2"),
    "prefix_strategies": (*FAST, "--problems", "2"),
    "self_distillation": (*FAST, "--problems", "2", "--examples", "1"),
    "classifier_free_guidance": FAST,
    "contrastive_decoding": (*FAST, "--samples", "2"),
    "tree_of_forks": (*FAST, "--problems", "2", "--width", "3"),
}


def test_every_program_is_tried():
    assert {path.stem for path in FRONTEND.glob("*.py")} == {"common", *PROGRAMS}


@pytest.mark.parametrize("name", PROGRAMS)
def test_program(client, name):
    url = str(client.base_url).rstrip("/")
    rows = importlib.import_module(name).main(["--url", url, *PROGRAMS[name]])
    assert len(rows) >= 2
    if name == "semi_on_policy":
        assert [row["alpha"] for row in rows] == [1.0, pytest.approx(0.5, abs=0.4), 0.0]
        assert rows[2]["kl"] == pytest.approx(0, abs=1e-5)  # the student itself
    if name == "classifier_free_guidance":
        assert [row["alpha"] for row in rows] == [0.0, 0.5, 1.0, 1.5, 2.0, 4.0]
        assert len({row["text"] for row in rows}) > 1
    if name == "tree_of_forks":
        assert all(len(row["attempts"]) == 3 for row in rows)


def test_a_program_from_the_command_line():
    command = [sys.executable, str(FRONTEND / "tree_of_forks.py"), "--url", "http://127.0.0.1:1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    assert "no server at http://127.0.0.1:1" in done.stderr and "make serve-demo" in done.stderr
