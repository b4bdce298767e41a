"""A run as a dataset for others: the layout of a hub's folder, without anything of this machine."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import html
import itertools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from sglang_optimal.distill.card import public_settings, write_card
from sglang_optimal.distill.manifests import read_manifests
from sglang_optimal.distill.records import schema, sha256
from sglang_optimal.distill.store import KINDS, find_shards, optional_columns, read_rows, write_rows

HUB = "hf://datasets/"
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
"""An id on the hub."""
LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]{2,8})*|code|multilingual")
TASK = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
SIZES = (
    (10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"),
    (10**8, "10M<n<100M"), (10**9, "100M<n<1B"), (10**10, "1B<n<10B"), (10**11, "10B<n<100B"),
    (10**12, "100B<n<1T"),
)  # fmt: skip
"""(records below which, the hub's name for it)."""


@dataclasses.dataclass(frozen=True)
class Labels:
    """What the card says that a run does not know. Nothing of it is invented.

    Attributes:
        license: an id of the hub's list, such as ``apache-2.0``.
        languages: ISO 639 codes.
        tasks: task categories of the hub.
        title: by default the last part of where it goes.
        teacher, student: ids of the models, in place of the names that the server gave them.
    """

    license: str | None = None
    languages: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ("text-generation",)
    title: str | None = None
    teacher: str | None = None
    student: str | None = None

    def __post_init__(self) -> None:
        for flag, pattern, values, example in (
            ("--license", LICENSE, (self.license,), "apache-2.0"), ("--language", LANGUAGE, self.languages, "en"),
            ("--task", TASK, self.tasks, "text-generation"),
            ("--teacher", REPOSITORY, (self.teacher,), "Qwen/Qwen3-8B"),
            ("--student", REPOSITORY, (self.student,), "Qwen/Qwen3-0.6B"),
        ):  # fmt: skip
            for value in values:
                if value is not None and not pattern.fullmatch(value):
                    raise ValueError(f"{flag}: {value!r} is no id of the hub's; write it as {example}.")


@dataclasses.dataclass(frozen=True)
class Pushed:
    """where: folder, or id on the hub. hub: which. records: in the files. remarks: what its owner should know."""

    where: str
    hub: bool
    records: int
    remarks: tuple[str, ...]


def push(
    folder: Path,
    to: str,
    labels: Labels | None = None,
    *,
    rejected: bool = True,
    report: bool = False,
    public: bool = False,
    api: Any = None,
) -> Pushed:
    """Write a run as a dataset of the hub's layout to a folder, or to the hub.

    ``README.md`` with its YAML header, ``data/`` and ``rejected/`` in Parquet, and the runs' manifests. Models that are
    local folders are named by their last part, everywhere: in the card, the settings and the records.

    Args:
        folder: of the run; one that was stopped or killed too, but none that is being written.
        to: a folder that is new or has nothing in it but names with a dot before them, or ``user/name`` on the hub
            (``hf://datasets/user/name`` where there is a folder ``user`` here).
        labels: for the card.
        rejected: the rejected records too.
        report: ``report.html`` too, made anew.
        public: what is made on the hub is for everyone; by default it is private.
        api: a `huggingface_hub.HfApi`; by default a new one, with the user's own login.

    Raises:
        ValueError: no run, one that is being written, nothing in it, a wrong label, a folder that has something in it,
            or a public repository where ``public`` is not asked for.
        OSError: the folder cannot be written, or the hub refuses.
    """
    labels = labels or Labels()
    shards = {kind: find_shards(folder, kind) for kind in KINDS if rejected or kind == "accepted"}
    manifests = read_manifests(folder)
    if any(manifest.get("state") == "running" for manifest in manifests):
        raise ValueError(f"{folder}: the run is being written; wait until it ends, or stop it.")
    repository = hub_id(to)
    target = Path(to).expanduser() if repository is None else None
    if target is not None and target.exists():
        if not target.is_dir():
            raise ValueError(f"--to: {target} is a file.")
        if found := [path.name for path in target.iterdir() if not path.name.startswith(".")]:
            raise ValueError(f"--to: {target} has {sorted(found)[0]!r} in it; give a new folder.")
        if target.resolve() == folder.resolve():
            raise ValueError("--to: is the run's own folder.")
    name = labels.title or (repository.partition("/")[2] if repository else target.resolve().name)  # type: ignore[union-attr]
    beside = target.resolve().parent if target is not None else None
    if beside is not None:
        beside.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".push-", dir=beside) as scratch:
        made = Path(scratch) / "dataset"
        made.mkdir()
        tokenizer, models, records = _write_data(folder, shards, made, labels)
        if not records:
            raise ValueError(f"{folder}: the run has no {'' if rejected else 'accepted '}records.")
        for path, manifest in _manifests(folder):
            (made / path).write_text(json.dumps(_public(manifest), indent=2, ensure_ascii=False) + "\n", "utf-8")
        if report:
            _write_report(made, folder, tokenizer)
        _write_card(made, name, repository, labels, models, records)
        if target is not None:
            _move(made, target)
        else:
            assert repository is not None
            _upload(made, repository, public, api)
    remarks = []
    if labels.license is None:
        remarks.append("no license is given, and the card says so; without one nobody may use the data (--license)")
    if not labels.languages:
        remarks.append("no language is given (--language)")
    if any(manifest.get("state") != "complete" for manifest in manifests):
        remarks.append("the run is not complete")
    return Pushed(repository or str(target), repository is not None, records, tuple(remarks))


def hub_id(to: str) -> str | None:
    """The id on the hub that ``to`` means, or None for a folder of this machine.

    Raises:
        ValueError: it begins as an address of the hub and is none.
    """
    if to.startswith("hf://"):
        name = to.removeprefix(HUB)
        if not REPOSITORY.fullmatch(name):
            raise ValueError(f"--to: {to!r} is no dataset's address; write it as {HUB}user/name.")
        return name
    # What may be a path is one: written here by mistake is better than shown to others by mistake.
    is_id = REPOSITORY.fullmatch(to) is not None and not Path(to).exists() and not Path(to).parent.exists()
    return to if is_id else None


class _Models:
    """Names of models for everyone. Of a folder, wherever a relative path may begin, the last part."""

    def __init__(self, folder: Path):
        self._roots = [Path(), folder, *folder.resolve().parents]
        self._known: dict[str, str] = {}

    def public(self, name: str | None, given: str | None) -> str | None:
        """A name that the server gave; a refused request has none. ``given``: an id in its place."""
        if not name:
            return name
        if given is not None:
            return given
        if name not in self._known:
            parts = [part for part in re.split(r"[/\\]", name) if part]
            local = not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name)
            local |= any((root / name).exists() for root in self._roots)
            self._known[name] = parts[-1] if local and parts else name
        return self._known[name]


def _write_data(
    folder: Path, shards: dict[str, list[Path]], made: Path, labels: Labels
) -> tuple[str | None, list[tuple[str | None, str | None]], int]:
    """Returns a local tokenizer of the student's, (teacher, student) of the records, and the number of records."""
    # One set of columns for all files.
    optional = optional_columns([path for paths in shards.values() for path in paths])
    columns = schema(optional)
    tokenizer: str | None = None
    names, models = _Models(folder), dict[tuple[str | None, str | None], None]()
    records = 0

    def public(rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        nonlocal tokenizer, records
        for row in rows:
            student = row["student_model"]
            if tokenizer is None and student and Path(student).is_dir():
                tokenizer = student
            row["teacher_model"] = names.public(row["teacher_model"], labels.teacher)
            row["student_model"] = names.public(student, labels.student)
            if row["teacher_model"] or row["student_model"]:  # a refused request has no models
                models[row["teacher_model"], row["student_model"]] = None
            records += 1
            yield row

    for kind, paths in shards.items():
        for path in paths:
            rows = public(read_rows([path]))
            if (first := next(rows, None)) is None:  # no file of one without rows
                continue
            target = made / KINDS[kind] / f"{path.stem}.parquet"
            target.parent.mkdir(exist_ok=True)
            with target.open("wb") as file:
                write_rows(file, itertools.chain([first], rows), columns)
    return tokenizer, list(models), records


def _manifests(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    names = [path.name for path in sorted(folder.glob("run*.json"))]
    return list(zip(names, read_manifests(folder), strict=True))


def _public(manifest: dict[str, Any]) -> dict[str, Any]:
    """What a run says of itself, without this machine."""
    config = public_settings(manifest.get("config") or {})
    # What templates and sampling say is the run's own words: one may begin with a slash.
    config = {
        name: values if name in ("contexts", "sampling") else _without_paths(values) for name, values in config.items()
    }
    return {**manifest, "config": config}


FILES = r"\S*\.(jsonl|ndjson|json|csv|tsv|parquet)(\.gz)?"


def _without_paths(value: Any) -> Any:
    """Paths of this machine by their last part."""
    if isinstance(value, dict):
        return {key: _without_paths(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_paths(inner) for inner in value]
    if not isinstance(value, str) or "://" in value or "\n" in value:
        return value
    is_path = re.fullmatch(r"(/|~/|\.{1,2}/).+", value) or re.fullmatch(FILES, value)
    return re.split(r"[/\\]", value.rstrip("/"))[-1] if is_path else value


def _write_report(made: Path, folder: Path, tokenizer: str | None) -> None:
    from sglang_optimal.distill.report import write_report

    # Of what is pushed, which has the name of a temporary folder.
    named = made.parent / folder.resolve().name
    os.rename(made, named)
    try:
        fits = False
        if tokenizer is not None:
            with contextlib.suppress(ValueError):  # it is no tokenizer
                said = write_report(named, tokenizer=tokenizer).read_text(encoding="utf-8")
                fits = tokenizer not in html.unescape(said)  # where it is not that of the samples, the page names it
        if not fits:
            write_report(named)
    finally:
        os.rename(named, made)


def _write_card(
    made: Path,
    name: str,
    repository: str | None,
    labels: Labels,
    models: list[tuple[str | None, str | None]],
    records: int,
) -> None:
    """The run's own card, with what the hub wants to know."""
    path = write_card(made)
    header, _, body = path.read_text(encoding="utf-8").removeprefix("---\n").partition("\n---\n")
    content = yaml.safe_load(header)
    names = [name for pair in models for name in pair if name and REPOSITORY.fullmatch(name)]
    given: dict[str, Any] = {"pretty_name": name}
    if labels.license:
        given["license"] = labels.license
    if labels.languages:
        given["language"] = list(labels.languages)
    given |= {"task_categories": list(labels.tasks), "size_categories": [_size(records)]}
    if names:
        given["base_model"] = list(dict.fromkeys(names))
    content = given | {key: value for key, value in content.items() if key not in given}
    for entry in content["configs"]:  # datasets' cache goes by it, and the models' names are in the records
        entry["description"] = f"state {sha256(json.dumps([entry['description'], models]))[:12]}"
    body = body.lstrip("\n")
    first, _, rest = body.partition("\n")
    told = f"License: {labels.license or 'none given'}. Language: {', '.join(labels.languages) or 'none given'}."
    body = f"# {name}\n\n{told}\n{rest}" if first.startswith("# ") else f"{told}\n\n{body}"
    if repository is not None:
        body = body.replace('"path/to/this/folder"', json.dumps(repository))
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    path.write_text(f"---\n{text}---\n\n{body}", encoding="utf-8")


def _size(records: int) -> str:
    return next((name for below, name in SIZES if records < below), "n>1T")


def _move(made: Path, target: Path) -> None:
    target.mkdir(exist_ok=True)
    # The card last: with it the dataset is whole.
    for path in sorted(made.iterdir(), key=lambda path: path.name == "README.md"):
        shutil.move(path, target / path.name)


def _upload(made: Path, repository: str, public: bool, api: Any) -> None:
    if api is None:
        from huggingface_hub import HfApi

        api = HfApi()
    api.create_repo(repository, repo_type="dataset", private=not public, exist_ok=True)
    if not public and api.repo_info(repository, repo_type="dataset").private is False:
        raise ValueError(f"--to: {repository} is there, and public; nothing was sent. Give --public if it may be seen.")
    api.upload_folder(
        repo_id=repository, repo_type="dataset", folder_path=str(made), commit_message="A distillation run",
        delete_patterns=["data/*", "rejected/*", "run*.json", "report.html"],
    )  # fmt: skip


def add_parser(commands: Any) -> None:
    """Adds the command ``push``."""
    parser = commands.add_parser("push", help="a run as a dataset of the hub's layout, to a folder or to the hub")
    parser.add_argument("folder", help="Folder of the run.")
    parser.add_argument(
        "--to", required=True, metavar="PATH|user/name",
        help=f"A new folder, or a dataset on the hub ({HUB}user/name where there is a folder user here).",
    )  # fmt: skip
    parser.add_argument("--license", help="Id of the hub's list, such as apache-2.0. Without it the card says none.")
    parser.add_argument("--language", nargs="+", default=[], metavar="CODE", help="Such as en.")
    parser.add_argument("--task", nargs="+", default=["text-generation"], help="Task categories. Default: %(default)s.")
    parser.add_argument("--title", help="Of the card. Default: the last part of --to.")
    parser.add_argument("--teacher", metavar="ID", help="Of the teacher; of a local folder the card has the last part.")
    parser.add_argument("--student", metavar="ID", help="Of the student; likewise.")
    parser.add_argument("--no-rejected", action="store_true", help="The accepted records alone.")
    parser.add_argument("--report", action="store_true", help="report.html too.")
    parser.add_argument("--public", action="store_true", help="On the hub: for everyone. Default: private.")


def command(args: argparse.Namespace) -> int:
    """``distill push``."""
    labels = Labels(args.license, tuple(args.language), tuple(args.task), args.title, args.teacher, args.student)
    done = push(
        Path(args.folder), args.to, labels, rejected=not args.no_rejected, report=args.report, public=args.public
    )
    kind = ("public on the hub" if args.public else "private on the hub") if done.hub else "a folder of this machine"
    print(f"{done.where} ({kind}): {done.records} records")
    for remark in done.remarks:
        print(f"  {remark}")
    return 0
