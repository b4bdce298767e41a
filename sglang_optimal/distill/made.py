"""run.json of a run that was made of others' records, by `distill filter` or `distill merge`."""

from __future__ import annotations

import datetime
import json
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sglang_optimal import __version__
from sglang_optimal.distill.config import DistillConfig
from sglang_optimal.distill.manifests import manifest_name, read_manifests
from sglang_optimal.distill.settings import fingerprint, stored_config
from sglang_optimal.distill.store import Tally, replace_file


class Sources:
    """The runs that records came from.

    Args:
        folders: of runs.

    Attributes:
        manifests: of every machine that wrote there.
        runs: what each said of itself, the parts of merged ones among them.
        one: the settings that all have; None where they differ.

    Raises:
        ValueError: a run.json is damaged.
    """

    def __init__(self, folders: Sequence[Path]):
        of_folder = [(folder, manifest) for folder in folders for manifest in read_manifests(folder)]
        self.manifests = [manifest for _, manifest in of_folder]
        self.runs: list[dict[str, Any]] = []
        for folder, manifest in of_folder:
            # Of a merged run its parts; and the name alone, since a folder's place is nobody's business.
            self.runs += manifest.get("sources") or [{"folder": folder.resolve().name, **_kept(manifest)}]
        self.one = self._one()

    def _one(self) -> DistillConfig | None:
        configs = [stored_config(manifest) for manifest in self.manifests]
        known = [config for config in configs if config is not None]
        of_one = len({fingerprint(config) for config in known}) == 1 and len(known) == len(configs)
        of_one &= len({manifest.get("models_run") or "both" for manifest in self.manifests}) == 1
        of_one &= len({tuple(manifest.get("steps_run") or ()) for manifest in self.manifests}) == 1
        whole = of_one and not any(manifest.get("sources") for manifest in self.manifests)
        # The machine with the most problems and samples: what another did is a part of it.
        return max(known, key=lambda c: (c.sampling.n, c.data.limit is None, c.data.limit or 0)) if whole else None

    def common(self) -> dict[str, Any]:
        """The settings that all have, in the form of run.json."""
        configs = [run.get("config") or {} for run in self.runs]
        return _common(configs, 2)

    def manifest(self, config: dict[str, Any], tally: Tally, planned: int) -> dict[str, Any]:
        """run.json of a run with these records.

        Args:
            config: its settings; those of `one`, with what is new, where all have the same.
            tally: over its records.
            planned: samples.
        """
        states = {manifest.get("state") for manifest in self.manifests}
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        complete = states <= {"complete"}
        content: dict[str, Any] = {
            "run_id": uuid.uuid4().hex,
            "fingerprint": None if self.one is None else fingerprint(DistillConfig.model_validate(config)),
            "started": min((m["started"] for m in self.manifests if m.get("started")), default=None),
            "state": "complete" if complete else "stopped",
            "finished": now if complete else None,
            "elapsed_seconds": round(sum(m.get("elapsed_seconds") or 0.0 for m in self.manifests), 1),
            "shard": "0/1",
            "planned": planned,
            "failed": sum(m.get("failed") or 0 for m in self.manifests),
            **tally.counts(),
            "filters": [f.get("name") or f.get("type") for f in config.get("filters") or []],
            "versions": {"sglang_optimal": __version__},
            "config": config,
        }
        if self.one is None:
            content["sources"] = self.runs
        else:
            content |= {name: value for name in _RAN if (value := self.manifests[0].get(name))}
        return content


_RAN = ("models_run", "steps_run")
"""What says which models ran."""


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n"
    replace_file(folder / manifest_name(""), text)


def _kept(manifest: dict[str, Any]) -> dict[str, Any]:
    names = ("run_id", "fingerprint", *_RAN, "state", "shard", "planned", "failed", "config")
    return {name: manifest[name] for name in names if name in manifest}


def _common(values: Sequence[Any], depth: int) -> Any:
    """What is the same in all, of mappings key by key down to ``depth``."""
    first = values[0] if values else {}
    return {
        key: value if all(other.get(key) == value for other in values) else _common([o[key] for o in values], depth - 1)
        for key, value in first.items()
        if all(key in other for other in values)
        and (
            all(other[key] == value for other in values)
            or (depth > 1 and all(isinstance(other[key], dict) for other in values))
        )
    }
