"""The dataset card: what a run's folder says of itself, to people and to ``datasets.load_dataset``."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

from sglang_optimal.distill.escalation import step_rows, stored_steps
from sglang_optimal.distill.manifests import read_manifests
from sglang_optimal.distill.records import COLUMNS, MODEL_COLUMNS, OPTIONAL_COLUMNS, schema, sha256
from sglang_optimal.distill.store import (
    EMPTY_SHARD,
    TALLIED,
    Tally,
    find_shards,
    optional_columns,
    present_files,
    read_rows,
    replace_file,
    stored_columns,
    write_empty_shard,
)
from sglang_optimal.distill.surprise import RARE
from sglang_optimal.names import SIDES


def write_card(folder: Path) -> Path:
    """Write ``README.md`` of a run with finished shards, of all machines that wrote to ``folder``.

    Raises:
        ValueError: no run in it.
    """
    shards = _settled(folder)
    tally, models = Tally(), Counter[tuple]()
    for row in read_rows(shards["accepted"] + shards["rejected"], [*TALLIED, *MODEL_COLUMNS]):
        tally.add(row)
        models[tuple(row[name] for name in MODEL_COLUMNS)] += 1
    manifests = read_manifests(folder)
    path = folder / "README.md"
    state = _state(shards, manifests)
    optional = optional_columns(shards["accepted"] + shards["rejected"])
    body = _body(folder, tally, models, manifests, optional)
    replace_file(path, f"---\n{_front_matter(folder, shards, state)}---\n\n{body}")
    return path


def renew_card(folder: Path) -> None:
    """Have ``README.md`` tell ``load_dataset`` of the shards that came since, while a run goes on; cheap.

    Without it `datasets` takes every file of the folder for training data, the rejected records too. What the card says
    to people stays as it was until `write_card`.

    Raises:
        ValueError: no run in it.
    """
    path = folder / "README.md"
    _, marks, body = path.read_text(encoding="utf-8").partition("\n---\n") if path.exists() else ("", "", "")
    if not marks:
        write_card(folder)
        return
    shards = _settled(folder)
    replace_file(path, f"---\n{_front_matter(folder, shards, _state(shards, read_manifests(folder)))}---\n{body}")


def _settled(folder: Path) -> dict[str, list[Path]]:
    """Finished shards, among them one of accepted records, if of none.

    No journals: another machine may be writing them, and writes the card again when it is done.
    """
    shards = _finished(folder)
    whole = [path for path in shards["accepted"] if path.name != EMPTY_SHARD]
    empty = len(shards["accepted"]) > len(whole)
    if whole and empty:
        (folder / "data" / EMPTY_SHARD).unlink(missing_ok=True)  # of a time when there were none
    elif not whole:
        # Without a default configuration `load_dataset` would give the rejected records for it, where it says so now.
        optional = optional_columns(shards["rejected"])
        if not empty or optional_columns(shards["accepted"]) != optional:
            write_empty_shard(folder, optional)
    return _finished(folder)


def _finished(folder: Path) -> dict[str, list[Path]]:
    found = {kind: find_shards(folder, kind) for kind in ("accepted", "rejected")}
    return {kind: [path for path in paths if path.parent.name != "journal"] for kind, paths in found.items()}


def _state(shards: dict[str, list[Path]], manifests: list[dict[str, Any]]) -> str:
    """Another text for every run, and for every state of one."""
    files = [(path.name, path.stat().st_size) for paths in shards.values() for path in paths]
    return sha256(json.dumps([files, [manifest.get("run_id") for manifest in manifests]]))[:12]


def _front_matter(folder: Path, shards: dict[str, list[Path]], state: str) -> str:
    configs, infos = [], []
    for kind, name, split in (("accepted", "default", "train"), ("rejected", "rejected", "train")):
        suffixes = sorted({path.suffix for path in shards[kind]})
        if suffixes:
            files = [f"{'data' if kind == 'accepted' else kind}/*{suffix}" for suffix in suffixes]
            entry: dict[str, Any] = {"config_name": name, "data_files": [{"split": split, "path": files}]}
            # datasets finds its cache by what is written here, and knows neither the folder's place nor its files:
            # without this it would give the records of another run in a folder of the same name.
            entry["description"] = f"state {state}"
            configs.append(entry | ({"default": True} if name == "default" else {}))
            if features := _features(shards[kind]):
                infos.append({"config_name": name, "features": features})
    content: dict[str, Any] = {
        "pretty_name": folder.resolve().name,
        "tags": ["distillation", "semi-on-policy", "sglang-optimal", "synthetic"],
        "task_categories": ["text-generation"],
        "configs": configs,
        **({"dataset_info": infos} if infos else {}),
    }
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _features(paths: list[Path]) -> list[dict[str, Any]] | None:
    """The columns of parts that differ in them: datasets would take those of the first file for all."""
    if len({frozenset(names) for path in present_files(paths) if (names := stored_columns(path))}) < 2:
        return None
    from datasets import Features

    return Features.from_arrow_schema(schema(optional_columns(paths)))._to_yaml_list()


def _body(
    folder: Path, tally: Tally, models: Counter, manifests: list[dict[str, Any]], optional: Collection[str]
) -> str:
    config = manifests[0].get("config", {}) if manifests else {}
    lines = [
        f"# {folder.resolve().name}",
        "",
        *_of_what(manifests),
        "",
        "| | |",
        "|---|---|",
        f"| accepted records | {tally.accepted:,} |",
        f"| rejected records | {tally.rejected:,} |",
        f"| problems covered (with an accepted record) | {tally.covered:,} of {len(tally.problems):,} |",
        f"| tokens, of accepted records | {tally.accepted_tokens:,} |",
        *(
            [f"| accepted records with a surprise (a token below {RARE:g} under the student) | {_of(tally)} |"]
            if tally.judged
            else []
        ),
        f"| mean alpha | {'–' if tally.mean_alpha is None else f'{tally.mean_alpha:.3f}'} |",
    ]
    for names in models:
        named = dict(zip(MODEL_COLUMNS, names, strict=True))
        shown = {s: _cell(public_name(str(named[f"{s}_model"]))) for s in SIDES[:2] if named[f"{s}_model"]}
        if shown:
            lines.append(f"| {', '.join(shown)} | {', '.join(shown.values())} |")
    if reads := read_as(config):
        lines.append(f"| read as | {reads} |")
    states = {manifest.get("state") for manifest in manifests}
    if states != {"complete"}:
        lines.append("| state | not complete: run the same command again |")
    if tally.problems:
        lines += ["", "## Accepted records of a problem", "", "| accepted | problems |", "|---|---|"]
        lines += [f"| {accepted} | {problems:,} |" for accepted, problems in tally.k_of_n.items()]
    if tally.steps:
        lines += ["", "## Steps", "", "Each step took the problems that those before it had not solved.", ""]
        lines += [
            "| step | problems | samples | accepted | problems covered by then | passes |",
            "|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {row['step']}: {_cell(row['alpha'])} | {row['problems']:,} | {row['samples']:,} | "
            f"{row['accepted']:,} | {row['covered_by_then']:,} | {row['passes']:,} |"
            for row in step_rows(tally, stored_steps(manifests))
        ]
    if tally.reasons:
        lines += ["", "## Why records were rejected", "", "| filter | reason | records |", "|---|---|---|"]
        by_filter: Counter[tuple[str, str]] = Counter(tally.reasons)
        lines += [f"| {_cell(f)} | {_cell(reason)[:120]} | {n:,} |" for (f, reason), n in by_filter.most_common(20)]
    lines += ["", "## Reading it", "", "```python", "from datasets import load_dataset", ""]
    lines += ['accepted = load_dataset("path/to/this/folder", split="train")']
    if tally.rejected:
        lines += ['rejected = load_dataset("path/to/this/folder", "rejected", split="train")']
    lines += ["```", "", "## Columns", "", "| column | meaning |", "|---|---|"]
    meanings = COLUMNS | {name: OPTIONAL_COLUMNS[name] for name in optional}
    lines += [f"| `{name}` | {_cell(meaning)} |" for name, meaning in meanings.items()]
    if config:
        text = yaml.safe_dump(public_settings(config), sort_keys=False, allow_unicode=True)
        lines += ["", "## Settings", "", "```yaml", text.replace("```", "` ` `").rstrip(), "```"]
    return "\n".join(lines) + "\n"


def _of(tally: Tally) -> str:
    """Of records that older versions wrote it is not known."""
    known = "" if tally.judged == tally.accepted else f" of which it is known, of {tally.accepted:,}"
    return f"{tally.surprising:,} of {tally.judged:,}{known}"


def _of_what(manifests: list[dict[str, Any]]) -> list[str]:
    ran = {manifest.get("models_run") for manifest in manifests}
    if len(ran) == 1 and (side := ran.pop()) in SIDES[:2]:
        return [
            f"Samples of the {side} alone, made with `sglang_optimal.distill`: the other model did not run, and what",
            "only it could say of a token is null or empty.",
        ]
    return [
        "Samples of the optimal mixture of a teacher and a student, q* ∝ π_student^(1−α)·π_teacher^α with α solved for",
        "every token, made with `sglang_optimal.distill`. The teacher may have seen what the student has not",
        "(`data.privileged`).",
    ]


def public_settings(config: dict[str, Any]) -> dict[str, Any]:
    """The settings without this machine's: no addresses, and of paths the last name."""
    shown = {section: values for section, values in config.items() if values and section != "client"}
    for section in ("data", "server", "mixing"):
        if values := shown.get(section):
            shown[section] = {k: public_name(v) if isinstance(v, str) else v for k, v in values.items()}
    if output := shown.get("output"):
        shown["output"] = {key: value for key, value in output.items() if key != "dir"}
    return shown


def public_name(name: str) -> str:
    """A dataset's or model's id as it is; of a local path the last part, since a card is for everyone."""
    path = Path(name)
    local = path.is_absolute() or name.startswith((".", "~")) or ("/" in name and path.exists())
    return path.resolve().name if local and name.startswith(".") else path.name if local else name


def read_as(config: dict[str, Any]) -> str | None:
    """How both sides of a run read, in words.

    Args:
        config: the run's settings, as its manifest has them.

    Returns:
        Such as ``teacher: chat, student: plain text``; None where the settings are not known.
    """
    form = (config.get("contexts") or {}).get("format")
    if form is None:
        return None
    of = form if isinstance(form, dict) else dict.fromkeys(("teacher", "student"), form)
    words = {"text": "plain text"}
    return ", ".join(f"{side}: {words.get(of[side], of[side])}" for side in ("teacher", "student"))


def _cell(text: str) -> str:
    return " ".join(str(text).replace("|", "\\|").split())
