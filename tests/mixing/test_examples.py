"""The examples in docstrings and in docs/mixing.md do what they show."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sglang_optimal import mixing

PAGE = (Path(__file__).parents[2] / "docs" / "mixing.md").read_text(encoding="utf-8")
MODULES = ["sglang_optimal.mixing", *(m.name for m in pkgutil.iter_modules(mixing.__path__, "sglang_optimal.mixing."))]


def examples() -> list[doctest.DocTest]:
    found = []
    for name in MODULES:
        if name.endswith("fused_gpu"):  # needs Triton to be imported
            continue
        module = importlib.import_module(name)
        names = {**vars(mixing), **vars(module), "torch": torch}
        found += [test for test in doctest.DocTestFinder().find(module, name, globs=names) if test.examples]
    return found


@pytest.mark.parametrize("example", examples(), ids=lambda example: example.name)
def test_docstring(example):
    assert doctest.DocTestRunner().run(example).failed == 0


def test_the_main_functions_have_one():
    named = {example.name.rpartition(".")[2] for example in examples()}
    assert {"mix", "AlphaParams", "verify", "verify_greedy", "draw", "SamplingFilters"} <= named


def test_page():
    """Its blocks of Python run one after the other, as one program, and print what the page says."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) >= 3
    names: dict = {}
    for block in blocks:
        parsed = doctest.DocTestParser().get_doctest(block, names, "mixing.md", None, None)
        assert parsed.examples
        assert doctest.DocTestRunner().run(parsed, clear_globs=False).failed == 0
        names = parsed.globs


def test_the_page_s_table_names_what_is_public():
    named = {name for row in re.findall(r"^\| (`[^|]+) \|", PAGE, re.MULTILINE) for name in re.findall("`(\\w+)`", row)}
    assert named == set(mixing.__all__)


def test_sglang_is_not_imported():
    code = "import sys, sglang_optimal.mixing; assert 'sglang' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
