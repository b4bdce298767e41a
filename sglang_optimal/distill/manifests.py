"""run.json of every machine that wrote to a run's folder."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path
from typing import Any


def manifest_name(tag: str) -> str:
    """``tag``: ``i-of-n-`` of a machine's shard, or nothing."""
    return f"run-{tag.rstrip('-')}.json" if tag else "run.json"


def lock_name(tag: str) -> str:
    """The file that a machine's process holds a lock on while it writes."""
    return f".{tag}lock"


def read_manifests(folder: Path) -> list[dict[str, Any]]:
    """Their contents, by name. The state "running" of a process that is gone (killed, or its machine) reads "stopped".

    Raises:
        ValueError: one is damaged.
    """
    return [_read(path) for path in sorted(folder.glob("run*.json"))]


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8") or "{}")
    except ValueError as error:
        raise ValueError(f"{path}: is damaged: {error}") from None
    if not isinstance(content, dict):
        return {}
    if content.get("state") == "running" and not _is_held(path):
        content["state"] = "stopped"
    return content


def _is_held(manifest: Path) -> bool:
    tag = manifest.stem.removeprefix("run").removeprefix("-")
    try:
        with (manifest.parent / lock_name(f"{tag}-" if tag else "")).open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False
