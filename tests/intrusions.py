"""What this package touches of SGLang, found in the code itself: by a walk over imports, classes and assignments."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path

import sglang_optimal

PACKAGE = Path(sglang_optimal.__file__).parent
HOST = "sglang."


@functools.cache
def modules() -> dict[str, ast.Module]:
    """{dotted name: syntax tree} of every module of the package."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = ("sglang_optimal", *path.relative_to(PACKAGE).with_suffix("").parts)
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def _chain(node: ast.expr) -> list[str] | None:
    """``a.b.c`` as its names; None for anything else."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return [node.id, *reversed(names)] if isinstance(node, ast.Name) else None


def imported() -> set[str]:
    """Dotted paths of everything that is imported from SGLang, with the attributes that are read of it by name."""
    found = set()
    for tree in modules().values():
        names: dict[str, str] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(HOST):
                names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names if alias.name.startswith(HOST)}
        found |= set(names.values())
        for node in ast.walk(tree):
            chain = _chain(node) if isinstance(node, ast.Attribute) else None
            if chain and chain[0] in names:
                found.add(".".join([names[chain[0]], *chain[1:]]))
    return found


def hooked() -> set[str]:
    """Targets of SGLang's hook registry."""
    found = set()
    for tree in modules().values():
        constants = {
            target.id: node.value.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and _chain(node.func) == ["HookRegistry", "register"]:
                found.add(_text(node.args[0], constants))
    return found


def _text(node: ast.expr, constants: dict[str, str]) -> str:
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.BinOp):
        return _text(node.left, constants) + _text(node.right, constants)
    assert isinstance(node, ast.Name), ast.dump(node)
    return constants[node.id]


def subclasses() -> Iterator[tuple[type, type]]:
    """(class of ours, the class of SGLang's that it extends)."""
    for name in modules():
        if name.endswith("__main__"):
            continue
        module = importlib.import_module(name)
        for cls in vars(module).values():
            if inspect.isclass(cls) and cls.__module__ == name:
                base = next((base for base in cls.__mro__[1:] if base.__module__.startswith(HOST)), None)
                if base is not None:
                    yield cls, base


def overridden() -> dict[str, set[str]]:
    """{class of ours: the members of SGLang's class that it defines anew}."""
    return {
        cls.__name__: {name for name in vars(cls) if hasattr(base, name) and not _is_everywhere(name)}
        for cls, base in subclasses()
    }


def _is_everywhere(name: str) -> bool:
    """What Python gives every class, and dataclasses, protocols, ABCs and pydantic theirs."""
    return name in ("_is_protocol", "model_config") or name.startswith(("__", "_abc_")) and name != "__init__"


def attached() -> set[str]:
    """``name.attribute`` of every assignment to an attribute of something else than ``self`` in the modules that touch
    SGLang's inside."""
    found = set()
    for name, tree in modules().items():
        if not name.startswith(("sglang_optimal.runtime", "sglang_optimal.platforms", "sglang_optimal.lang")):
            continue
        for node in ast.walk(tree):
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            for target in targets:
                for part in target.elts if isinstance(target, ast.Tuple) else [target]:
                    chain = _chain(part) if isinstance(part, ast.Attribute) else None
                    if chain and not (chain[0] == "self" and len(chain) == 2):
                        found.add(f"{name.removeprefix('sglang_optimal.')}: {'.'.join(chain)}")
    return found


def settings_replaced() -> set[str]:
    """Names of SGLang's settings of the process that are replaced for a time or for good."""
    found = set()
    for tree in modules().values():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "override":
                found |= {keyword.arg for keyword in node.keywords if keyword.arg}
    return found


REGISTERING = ("register_", "set_global_")


def registered() -> set[str]:
    """Functions of SGLang that are called to register something or to replace a global of the process, and methods that
    add to SGLang's HTTP application."""
    found = set()
    for tree in modules().values():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            chain = _chain(node.func) or [""]
            registers = chain[-1].startswith(REGISTERING) or chain == ["SpeculativeAlgorithm", "register"]
            if registers or (chain[0] == "app" and chain[-1] in ("add_api_route", "add_exception_handler", "append")):
                found.add(".".join(chain))
    return found


def imports_among_ours() -> dict[str, set[str]]:
    """{module of the package: modules of it that it imports, anywhere in it}."""
    return {
        name: {
            full if (full := f"{node.module}.{alias.name}") in modules() else str(node.module)
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sglang_optimal.")
            for alias in node.names
        }
        & set(modules())
        for name, tree in modules().items()
    }
