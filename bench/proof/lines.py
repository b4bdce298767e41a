"""Results as JSON lines: one for each cell of the matrix, written as soon as it is there."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.proof.scales import Scale
from sglang_optimal import __version__
from sglang_optimal.distill.intervals import wilson

FOLDER = Path(__file__).parent / "lines"
"""Of the results that docs/proof.md shows."""
KEY = ("kind", "task", "arm", "level", "seed", "round")
"""What tells lines apart."""
Line = dict[str, Any]


def key_of(line: Line) -> tuple:
    return tuple(line[name] for name in KEY)


def read(path: Path) -> list[Line]:
    """The lines of a file, none if it is not there. A last line that a killed run left half written is no result.

    Raises:
        ValueError: another line is no result, or one cell is there twice.
    """
    lines: list[Line] = []
    if not path.exists():
        return lines
    text = path.read_text(encoding="utf-8")
    for number, raw in enumerate(text.splitlines(keepends=True), 1):
        if not raw.endswith("\n"):
            break
        try:
            line = json.loads(raw)
            key = key_of(line)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: is no result ({error}).") from None
        if any(key == key_of(other) for other in lines):
            raise ValueError(f"{path}, line {number}: {key} is there twice.")
        lines.append(line)
    return lines


class Results:
    """The lines of one experiment, and the file they are in.

    Raises:
        ValueError: the file has lines of other settings, or is damaged.
    """

    def __init__(self, path: Path, scale: Scale, model: str):
        self.path, self.scale, self.model = path, scale, model
        self.lines = read(path)
        for line in self.lines:
            if (line["scale"], line["settings"]) != (scale.name, scale.settings):
                raise ValueError(
                    f"--results: {path} has lines of other settings ({line['scale']}, {line['settings']}); give "
                    "another file."
                )
        self._mend()

    def _mend(self) -> None:
        """Cut a half line off, so that the next one does not stick to it."""
        if self.path.exists() and (data := self.path.read_bytes()) and not data.endswith(b"\n"):
            os.truncate(self.path, data.rfind(b"\n") + 1)

    def has(self, key: tuple) -> bool:
        return any(key_of(line) == key for line in self.lines)

    def find(self, **values: Any) -> Line | None:
        """The first line with these values."""
        return next((line for line in self.lines if all(line.get(k) == v for k, v in values.items())), None)

    def append(self, line: Line) -> None:
        """Write a line, and wait until the disk has it."""
        if "solved_problems" in line:
            solved, of = line["solved_problems"].count("1"), len(line["solved_problems"])
            line |= {"solved": solved, "held_out": of, "solved_interval": [round(v, 4) for v in wilson(solved, of)]}
        whole = {**line, "scale": self.scale.name, "settings": self.scale.settings, "model": self.model, **machine()}
        key_of(whole)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(whole, ensure_ascii=False, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.lines.append(whole)


def machine() -> dict[str, Any]:
    """What a line says of where it was made."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    packages = ("sglang", "torch", "transformers", "peft")
    versions = {name: importlib.metadata.version(name) for name in packages}
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S"), "cpu": cpu_name(), "cores": os.cpu_count(), "gpu": device,
        "versions": {"sglang_optimal": __version__, **versions},
    }  # fmt: skip


def cpu_name() -> str:
    """As Linux has it; elsewhere the architecture."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def seeds_of(lines: Sequence[Line]) -> list[int]:
    return sorted({line["seed"] for line in lines})
