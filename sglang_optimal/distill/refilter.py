"""A run's samples judged anew, by other filters, into a run of its own: nothing is sampled, and no server is asked."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sglang_optimal.distill.card import write_card
from sglang_optimal.distill.config import DistillConfig, parse_config, read_values
from sglang_optimal.distill.filters import FilterChain, FilterConfig, Rejection, first_unmet
from sglang_optimal.distill.made import Sources, write_manifest
from sglang_optimal.distill.mentions import AnswerField
from sglang_optimal.distill.passes import ALONE
from sglang_optimal.distill.records import SURPRISE_COLUMNS, NotStored, PartialRecord, Record
from sglang_optimal.distill.selection import SELECT, Chosen, Select
from sglang_optimal.distill.settings import changed
from sglang_optimal.distill.store import KINDS, Tally, find_shards, optional_columns
from sglang_optimal.distill.stored import ShardWriter, all_rows, held, new_folder, record_of
from sglang_optimal.distill.token_texts import AnswerProbabilities
from sglang_optimal.names import MORE_SERIES, SERIES

REFUSED = "refused"
"""``finish_reason`` of a request that a server refused: there is no sample to judge."""


@dataclasses.dataclass(frozen=True)
class Refiltered:
    """tally: over all records of the new run. newly_accepted, newly_rejected: records that were the contrary before."""

    tally: Tally
    newly_accepted: int
    newly_rejected: int


def filter_run(folder: Path, out: Path, config: Path | None = None, *, select: Select | None = None) -> Refiltered:
    """Judge every stored sample of a run anew, and write what comes of it as a run of its own.

    Accepted and rejected records are judged alike: first those that were accepted, in their order, then the others, so
    that the filters of before give the run of before. All columns are kept but the verdict's. What a server refused
    stays rejected.

    Args:
        folder: of the run; it is read, and nothing is written there.
        out: folder of the new run; not there yet, or empty.
        config: YAML file, of a run or with ``filters``, ``select``, and ``format`` and ``shard_records`` of ``output``
            alone. What else it says must be as it was in the run. Without ``filters``, or without a file, the verdicts
            stay what they are.
        select: in the place of the file's.

    Raises:
        ValueError: no run, or one that is written to now; a wrong file; filters that need what the run did not store;
            ``out`` is in the run or not empty. There is no ``out`` then.
    """
    folder, out = Path(folder), Path(out)
    with held([folder]), new_folder(out, [folder]) as target:
        sources = Sources([folder])
        settings = _settings(folder, sources, config, select)
        done = _write(folder, target, settings)
        planned = sum(manifest.get("planned") or 0 for manifest in sources.manifests)
        came_from = {"folder": folder.resolve().name, "run_ids": [m.get("run_id") for m in sources.manifests]}
        write_manifest(target, sources.manifest(settings.stored, done.tally, planned) | {"filtered": came_from})
        write_card(target)
    return done


@dataclasses.dataclass(frozen=True)
class _Settings:
    """filters: None: the verdicts stay. select, format, shard_records: of the new run. stored: as its run.json has
    it. tokenizer: that was named, for filters that need one."""

    filters: Sequence[FilterConfig] | None
    select: Select | None
    format: str
    shard_records: int
    stored: dict[str, Any]
    tokenizer: str | None


_OWN: dict[str, tuple[str, ...]] = {
    "filters": (), "select": (), "output": ("format", "shard_records"), "client": ("tokenizer",),
}  # fmt: skip
"""Sections in which the new run may differ; in whole, or in these keys."""


def _settings(folder: Path, sources: Sources, path: Path | None, select: Select | None) -> _Settings:
    where = "the command line" if path is None else str(path)
    values = {} if path is None else read_values(path)
    if path is not None and select is None and not any(name in values for name in ("filters", "select", "output")):
        raise ValueError(f"{path}: has neither filters nor select.")
    if path is None and select is None:
        raise ValueError("--config: give a file with the new filters, or say what to select (--best, --by).")
    if sources.one is not None:
        base = sources.one.model_dump(mode="json")
    else:
        _check_own(folder, path, values)
        # Whatever these are, they are not looked at.
        base = {"contexts": {"student": "-", "strategies": [{"teacher": "-"}]}}
        base["output"] = {
            key: value for key, value in sources.common().get("output", {}).items() if key in _OWN["output"]
        }
    base["select"] = None
    merged = dict(base)
    for name, section in values.items():
        of_both = isinstance(section, dict) and isinstance(base.get(name), dict)
        merged[name] = {**base[name], **section} if of_both else section
    new = parse_config(merged, where)
    if select is not None:
        new = new.model_copy(update={"select": select})
    tokenizer = new.client.tokenizer
    if sources.one is None:
        own = new.model_dump(mode="json", include={"filters": True, "select": True})
        stored = sources.common() | {name: own[name] for name in own if name in values or name == "select"}
    else:
        new = _with_the_run_s(sources.one, new)
        _check_same(folder, where, sources.one, new)
        stored = new.model_dump(mode="json", exclude={"server": {"api_key", "admin_api_key"}})
    filters = new.filters if "filters" in values else None
    return _Settings(filters, new.select, new.output.format, new.output.shard_records, stored, tokenizer)


def _check_own(folder: Path, path: Path | None, values: dict[str, Any]) -> None:
    """Raises ValueError: the file says more than a new run decides, and there is no one run to compare it with."""
    for name, section in values.items():
        more = [] if name in _OWN else [name]
        if keys := _OWN.get(name):
            more = [f"{name}.{key}" for key in section or () if key not in keys]
        if more:
            raise ValueError(
                f"{path}: {more[0]}: {folder} holds runs of different settings, which it cannot be compared with; give "
                "a file with filters, select, output.format and output.shard_records alone."
            )


def _with_the_run_s(old: DistillConfig, new: DistillConfig) -> DistillConfig:
    """What decides nothing here stays as it was, above all how many samples there are to be."""
    update = {
        "data": new.data.model_copy(update={"limit": old.data.limit}),
        "sampling": new.sampling.model_copy(update={"n": old.sampling.n}),
        "output": new.output.model_copy(update={"dir": None}),
        "client": old.client,
        "server": old.server,
    }
    return new.model_copy(update=update)


def _check_same(folder: Path, where: str, old: DistillConfig, new: DistillConfig) -> None:
    """Raises ValueError: the file changes what only new samples can change."""
    output = new.output.model_copy(update={key: getattr(old.output, key) for key in _OWN["output"]})
    same = new.model_copy(update={"filters": old.filters, "select": old.select, "output": output})
    names = changed(old.model_dump(mode="json"), same.model_dump(mode="json"))
    if names:
        raise ValueError(
            f"{where}: {', '.join(names[:4])}: other than in {folder}, whose samples were drawn with what it says; "
            "leave it out, or run the file with another --out."
        )


@dataclasses.dataclass(frozen=True)
class _Verdict:
    accepted: bool
    by: str | None
    reason: str | None

    @classmethod
    def of(cls, rejection: Rejection | None) -> _Verdict:
        return _ACCEPTED if rejection is None else cls(False, rejection.filter, rejection.reason)


_ACCEPTED = _Verdict(True, None, None)


class _Judge:
    """Asks the filters about stored rows.

    Args:
        folder: of the run, for messages.
        filters: None: the verdicts stay.
        tokenizer: folder or id, for filters that need one; None: that of the records' models, if here.

    Raises:
        ValueError: a filter cannot be set up, or ``tokenizer`` is not on this machine.
    """

    def __init__(self, folder: Path, filters: Sequence[FilterConfig] | None, tokenizer: str | None):
        self._folder, self._filters = folder, filters
        needed = any(f.needs_tokenizer for f in filters or ())
        self._answers = AnswerProbabilities(AnswerField.of(filters or ()), tokenizer) if needed else None
        self._chain = None if filters is None else FilterChain(filters)
        self._tried: set[tuple[str, ...]] = set()

    @property
    def works_out_answers(self) -> bool:
        return self._answers is not None

    def __call__(self, record: PartialRecord) -> _Verdict:
        if self._chain is None or record.finish_reason == REFUSED:
            return _Verdict(record.accepted, record.rejected_by, record.reject_reason)
        if record.missing and record.missing not in self._tried:
            self._try(record)
        try:
            self._find_answer(record)
            return _Verdict.of(self._chain(record))
        except NotStored as error:
            raise self._needs(record, error.filter or "filters", error.name) from None

    def _find_answer(self, record: PartialRecord) -> None:
        """What the expected answer is, the filters say: its probability is worked out anew.

        Raises:
            ValueError: there is no tokenizer.
        """
        if self._answers is None:
            return
        models = [record.models.get("student_model"), record.models.get("teacher_model")]
        self._answers.require(models, self._filters or (), "records")
        record.answer_probability = None
        self._answers(record)

    def _try(self, record: PartialRecord) -> None:
        """Ask every filter now what it needs, whether or not a record gets as far as it."""
        self._tried.add(record.missing)
        filters = self._filters or ()
        if found := first_unmet(filters, record):
            raise self._needs(record, filters[found[0]].label, found[1].name)

    def _needs(self, record: Record, label: str, name: str) -> ValueError:
        labels = [f.label for f in self._filters or ()]
        place = f"filters[{labels.index(label)}] ({label})" if label in labels else label
        if side := record.sampling.get(ALONE):
            return ValueError(
                f"{place}: needs {name} of every token, which {self._folder} has not got: the {side} alone ran; leave "
                "the filter out, or sample anew with sampling.one_model: never."
            )
        key = "output.series" if name in SERIES or name in MORE_SERIES else "output.return_top_k, output.top_k_of"
        return ValueError(
            f"{place}: needs {name} of every token, which {self._folder} did not store ({key} of that run); leave the "
            "filter out, or sample anew."
        )


def _judged(folder: Path, settings: _Settings) -> Iterator[tuple[dict[str, Any], Record, _Verdict]]:
    judge = _Judge(folder, settings.filters, settings.tokenizer)
    for row in all_rows(folder):
        record = record_of(row)
        verdict = judge(record)
        if row["rare_tokens"] is None and "student_logprob" not in record.missing:  # of an older version
            row |= record.surprises()
        if judge.works_out_answers:
            row["answer_probability"] = record.answer_probability
        yield row, record, verdict


def _write(folder: Path, target: Path, settings: _Settings) -> Refiltered:
    verdicts: Iterable[tuple[dict[str, Any], _Verdict]]
    if settings.select is None:
        verdicts = ((row, verdict) for row, _, verdict in _judged(folder, settings))
    else:
        verdicts = _selected(folder, settings, settings.select)
    paths = [path for kind in KINDS for path in find_shards(folder, kind)]
    writer = ShardWriter(target, settings.format, settings.shard_records, optional_columns(paths))
    tally, newly = Tally(), {True: 0, False: 0}
    for row, verdict in verdicts:
        if row["accepted"] != verdict.accepted:
            newly[verdict.accepted] += 1
        row |= {"accepted": verdict.accepted, "rejected_by": verdict.by, "reject_reason": verdict.reason}
        writer.write(row)
        tally.add(row)
    writer.close()
    return Refiltered(tally, newly[True], newly[False])


def _selected(folder: Path, settings: _Settings, select: Select) -> Iterator[tuple[dict[str, Any], _Verdict]]:
    """Reads the rows twice: which are a problem's best is known when all of them have been judged."""
    chosen, verdicts = Chosen(select), []
    for row, record, verdict in _judged(folder, settings):
        verdicts.append((verdict, {name: row[name] for name in SURPRISE_COLUMNS}))
        if verdict.accepted:
            chosen.offer(record, row)
    kept, other = chosen.ids(), _Verdict(False, SELECT, select.reason)
    for row, (verdict, surprises) in zip(all_rows(folder), verdicts, strict=True):
        row |= surprises
        yield row, other if verdict.accepted and row["id"] not in kept else verdict
