"""What `distill probe --settings` means."""

from __future__ import annotations

from typing import Any

from sglang_optimal.config import ALPHA_KEYS, ALPHA_METHODS, METHOD_OF_NUMBER

DEFAULT = "student,kl_budget=0.02,kl_budget=0.1,kl_budget=0.5,kl_symmetry,fixed_alpha=0.75,fixed_alpha=0.9,teacher"
"""The settings of a probe that names none."""
ENDS = {"student": {"fixed_alpha": 0.0}, "teacher": {"fixed_alpha": 1.0}}


def settings_of(text: str) -> dict[str, dict[str, Any]]:
    """Alpha keys by name, of ``--settings``.

    Args:
        text: names with commas between them: ``student``, ``teacher``, a method (``kl_symmetry``) or a key of α with
            its value (``kl_budget=0.1``, ``alpha_max=0.3``); several for one setting with ``+`` between them. A ``+``
            in front of all adds them to `DEFAULT`.

    Raises:
        ValueError: names the one that is wrong.
    """
    if text.startswith("+"):
        text = f"{DEFAULT},{text[1:]}"
    found: dict[str, dict[str, Any]] = {}
    for name in text.replace(" ", "").split(","):
        keys: dict[str, Any] = {}
        for part in name.split("+"):
            key, given, value = part.partition("=")
            more = _value(name, key, value) if given else ENDS.get(key) or _method(name, key)
            if twice := keys.keys() & more.keys():
                raise ValueError(f"--settings: {name!r} gives {twice.pop()} twice.")
            keys |= more
        if name in found or keys in found.values():
            raise ValueError(f"--settings: {name!r} is there twice.")
        found[name] = keys
    return found


def _method(name: str, key: str) -> dict[str, Any]:
    if key in METHOD_OF_NUMBER:
        raise ValueError(f"--settings: {name!r}: {key} needs a number, such as {key}=0.1.")
    if key not in ALPHA_METHODS:
        known = ", ".join([*ENDS, *ALPHA_METHODS])
        raise ValueError(f"--settings: there is no setting {name!r}; give one of {known}, or a key with its number.")
    return {"alpha_method": key}


def _value(name: str, key: str, value: str) -> dict[str, Any]:
    if key not in ALPHA_KEYS:
        raise ValueError(f"--settings: {name!r}: {key!r} is none of {', '.join(ALPHA_KEYS)}.")
    if key == "alpha_method":
        return _method(name, value)
    try:
        return {key: float(value)}
    except ValueError:
        raise ValueError(f"--settings: {name!r}: {value!r} is no number.") from None
