"""English prose that every machine with Python has: the docstrings of its standard library."""

from __future__ import annotations

import ast
import inspect
import random
import sysconfig
from pathlib import Path


def docstrings(least_chars: int = 200) -> list[str]:
    """All docstrings of at least ``least_chars`` characters, unindented, each once, always in the same order."""
    texts: dict[str, None] = {}
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")) + sorted(
        Path(sysconfig.get_path("stdlib")).glob("[a-z]*/*.py")
    ):
        if "site-packages" in path.parts or "test" in path.parts:
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (OSError, SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = inspect.cleandoc(ast.get_docstring(node, clean=False) or "")
                if len(text) >= least_chars:
                    texts[text] = None
    return list(texts)


def prompts(tokenizer, length: int, *, held_out: bool) -> list[list[int]]:
    """The first ``length`` tokens of every docstring that has as many; every tenth is held out for measurements."""
    ids = [tokenizer.encode(text, add_special_tokens=False)[:length] for text in docstrings()]
    chosen = [one for i, one in enumerate(ids) if len(one) == length and (i % 10 == 0) is held_out]
    random.Random(0).shuffle(chosen)
    return chosen
