"""Every message that docs/troubleshooting.md and docs/install.md quote is one that the code has."""

from __future__ import annotations

import ast
import importlib.util
import re
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
GAP = "\0"
PAGE = " ".join((REPOSITORY / "docs" / "troubleshooting.md").read_text(encoding="utf-8").split())
INSTALL = " ".join((REPOSITORY / "docs" / "install.md").read_text(encoding="utf-8").split())
QUOTED = re.findall(r'\*"(.+?)"\*( \(SGLang\'s\))?', PAGE) + re.findall(r'\*"(.+?)"\*( \(SGLang\'s\))?', INSTALL)
THEIRS = {
    "Not enough memory": "sglang/srt/model_executor/pool_configurator.py",
    "Triton is not supported": "sglang/kernels/ops/attention/fla/utils.py",
    "Only CUDA, HIP": "sglang/srt/layers/quantization/awq/awq.py",
    "Only CUDA, MUSA": "sglang/srt/layers/quantization/gguf.py",
}
"""Where SGLang has it: the message's first words, the file."""


def texts(source: str) -> set[str]:
    """All strings of a module; `GAP` where an f-string or a log message has a value."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else GAP for part in node.values]
            found.add("".join(map(str, parts)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(re.sub(r"%(?:\.\d+)?[dsrf]", GAP, node.value.replace("%%", "%")))
    return {" ".join(text.split()) for text in found}


@cache
def ours() -> frozenset[str]:
    return frozenset().union(*(texts(path.read_text()) for path in (REPOSITORY / "sglang_optimal").rglob("*.py")))


def says(text: str, quoted: str) -> bool:
    """Whether a string has the quoted one's fixed parts, in order, with values (or nothing that matters) between."""
    parts = [part.strip(" ,:;()'") for part in quoted.split("…")]
    parts = [part for part in parts if part]
    assert sum(map(len, parts)) >= 12, f"too little to be told by: {quoted}"
    return re.search(".*?".join(map(re.escape, parts)), text) is not None


@pytest.mark.parametrize(("quoted", "whose"), QUOTED, ids=[quoted[:50] for quoted, _ in QUOTED])
def test_the_message_is_in_the_code(quoted, whose):
    if not whose:
        assert any(says(text, quoted) for text in ours()), quoted
        return
    (file,) = [path for start, path in THEIRS.items() if quoted.startswith(start)]
    root = Path(importlib.util.find_spec("sglang").submodule_search_locations[0]).parent
    assert any(says(text, quoted) for text in texts((root / file).read_text())), quoted


def test_there_are_messages():
    assert len(QUOTED) > 25 and sum(bool(whose) for _, whose in QUOTED) == len(THEIRS)


@pytest.mark.parametrize("quoted", ["holds a run with other colours (…)", "…: runs no teacher; start it with …"])
def test_what_the_code_does_not_say_is_noticed(quoted):
    assert not any(says(text, quoted) for text in ours())


def test_numbers():
    from sglang_optimal.distill import pipeline
    from sglang_optimal.distill.report import verdicts
    from sglang_optimal.runtime.configs.vocabularies import LEAST_COMMON

    assert pipeline.REFUSALS == 8 and "the first eight problems were refused with the same words" in PAGE
    assert verdicts.BOUND_SHARE == 0.1 and "amber above 10 %" in PAGE
    assert LEAST_COMMON == 0.9 and "fewer than 90 % of the ids" in PAGE
