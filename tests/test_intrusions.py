"""docs/sglang.md is the whole index of what the package touches of SGLang, and nothing in it is gone."""

from __future__ import annotations

import re
from pathlib import Path

import intrusions
import pytest

PAGE = (Path(__file__).parents[1] / "docs" / "sglang.md").read_text(encoding="utf-8")
OURS = ("state.", "step.", "draft.", "costs.")
"""Variables that hold objects of our own classes."""
OTHERWISE_NAMED = {"SpecInput", "SglExpr", "CpuDeviceMixin", "BaseModel"}
"""Bases after which SGLang's own subclasses are not named either."""


def table(title: str) -> list[list[str]]:
    """The rows of a section's table."""
    section = PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    assert len(rows) > 2, title
    return [[cell.strip() for cell in row] for row in rows[2:]]


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_registered():
    assert {name for row in table("Registered") for name in names(row[0])} == intrusions.registered()


def test_extended():
    written = {names(row[0])[0]: (names(row[1])[0], names(row[2])) for row in table("Extended")}
    found = {cls.__name__: base.__name__ for cls, base in intrusions.subclasses()}
    assert {name: base for name, (base, _) in written.items()} == found
    members = {name: sorted(members) for name, (_, members) in written.items()}
    assert members == {name: sorted(overridden) for name, overridden in intrusions.overridden().items()}


@pytest.mark.parametrize("pair", list(intrusions.subclasses()), ids=lambda pair: pair[0].__name__)
def test_a_class_ends_in_the_name_of_what_it_extends(pair):
    """A developer of SGLang's finds it by analogy; SGLang's prefixes of a kind are left out (`Base`)."""
    cls, base = pair
    if base.__name__ not in OTHERWISE_NAMED:
        assert cls.__name__.endswith(base.__name__.removeprefix("Base"))


@pytest.mark.parametrize("pair", list(intrusions.subclasses()), ids=lambda pair: pair[0].__name__)
def test_overrides_say_what_they_add(pair):
    cls, _ = pair
    for name in intrusions.overridden()[cls.__name__]:
        member = vars(cls)[name]
        function = getattr(member, "fget", None) or getattr(member, "__func__", member)
        if name != "__init__" and callable(function):  # the class speaks for its constructor
            assert function.__doc__, f"{cls.__name__}.{name}"


def test_no_circles():
    """Modules can be put in an order in which each imports earlier ones alone."""
    waiting = intrusions.imports_among_ours()
    while waiting:
        free = {name for name, needed in waiting.items() if not needed & set(waiting) - {name}}
        assert free, f"these import each other: {sorted(waiting)}"
        waiting = {name: needed for name, needed in waiting.items() if name not in free}


def test_hooked():
    assert {names(row[0])[0] for row in table("Hooked")} == intrusions.hooked()


def test_settings_of_the_process():
    settings = {name for row in table("Settings of the process") for name in names(row[0])}
    assert settings == intrusions.settings_replaced()


def test_set_on_sglang_s_objects():
    rows = [(set(names(row[0])), row[1]) for row in table("Set on SGLang's objects")]
    found = [entry.split(": ") for entry in intrusions.attached()]
    unlisted, seen = [], set()
    for module, attribute in found:
        if attribute.startswith(OURS):
            continue
        file = module.replace(".", "/").removeprefix("runtime/") + ".py"
        wanted = {attribute, attribute.split(".")[0] + ".*"}
        here = [name for listed, where in rows if file in where for name in listed & wanted]
        if not here:
            unlisted.append(f"{file}: {attribute}")
        seen |= set(here)
    assert not unlisted
    assert {name for listed, _ in rows for name in listed} == seen
