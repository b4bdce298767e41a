"""What the checks found, as one page: the card, every bar with what was measured beside it, and what was not run.

    python -m bench.gpu.summary FOLDER [FOLDER ...] [--output summary.md]

Reads what `run_checks` writes into each folder (results.jsonl, environment.json, identity.jsonl, host_waits.json,
bench.jsonl); of several folders the later ones count where both have something.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

PASS, FAIL, NOT_RUN, NOT_JUDGED = "pass", "FAIL", "NOT RUN", "not judged"
BATCHES = (1, 8, 32, 128, 256)
READING_COUNTS_FROM = 32
"""Batch size from which on reading the logits takes longer than launching a kernel; mixing is judged from there on."""

ALPHA_ERROR = 1e-4

TWO_MODELS, SHARED = "gpu-two-models", "gpu-shared"
"""Run names in bench.jsonl."""

DUMMIES = (
    "Ratios are medians over rounds (smallest–largest). Dummy weights make both models' logits nearly equal, so that "
    "alpha is found sooner than with real ones: that concerns the share of a step, and not the lines on mixing alone, "
    f"whose logits differ as two models' do. Those are judged from batch {READING_COUNTS_FROM} on, where reading the "
    "logits takes longer than launching a kernel."
)

Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Bar:
    """One line of the table. limit: what is asked. where: batch size or engine. measured: None if it was not run."""

    name: str
    where: str
    limit: str
    measured: str | None
    verdict: str


@dataclasses.dataclass
class Findings:
    """What the files hold; empty where there is none."""

    results: dict[str, Record] = dataclasses.field(default_factory=dict)
    environment: Record = dataclasses.field(default_factory=dict)
    identity: dict[str, Record] = dataclasses.field(default_factory=dict)
    host_waits: dict[str, Record] = dataclasses.field(default_factory=dict)
    bench: list[Record] = dataclasses.field(default_factory=list)

    @classmethod
    def read(cls, folders: Iterable[Path]) -> Findings:
        found = cls()
        for folder in folders:
            for record in _lines(folder / "results.jsonl"):
                if record["rc"] is not None or record["check"] not in found.results:
                    found.results[record["check"]] = record
            found.identity |= {record["engine"]: record for record in _lines(folder / "identity.jsonl")}
            found.bench += _lines(folder / "bench.jsonl")
            found.environment |= _object(folder / "environment.json")
            found.host_waits |= _object(folder / "host_waits.json")
        return found

    def devices(self) -> list[str]:
        """Names of the cards that the figures come from."""
        records = [*self.bench, *self.identity.values(), *self.host_waits.values()]
        names = [record["device"] for record in records if "device" in record]
        if isinstance(self.environment.get("card"), dict):
            names.insert(0, self.environment["card"]["name"])
        return list(dict.fromkeys(names))


def _lines(path: Path) -> list[Record]:
    """Records of a file of JSON lines; the last may be cut off."""
    records = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else ():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def _object(path: Path) -> Record:
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


# -- bars --------------------------------------------------------------------------------------------------------------


def bars(found: Findings) -> list[Bar]:
    """All of them, also those that nothing was measured for."""
    return [
        *_ratio(found, TWO_MODELS, "m/L", "two models in lockstep beside their limit L", 0.95),
        *_ratio(found, SHARED, "shared/(2t/2)", "shared weights beside t(2B)/2", 0.95),
        *_ratio(found, TWO_MODELS, "t/stock", "plain requests beside stock SGLang", 0.99),
        *_shares(found),
        *_reading(found),
        *_errors(found),
        *_bandwidth(found),
        *_waits(found),
    ]


def _at_least(name: str, where: str, value: float | None, limit: float, spread: str = "") -> Bar:
    verdict = NOT_RUN if value is None else PASS if value >= limit else FAIL
    return Bar(name, where, f"≥ {limit}", None if value is None else f"{value:.3f}{spread}", verdict)


def _at_most(name: str, batch: int, value: float | None, limit: float, unit: str = "", judged: bool = True) -> Bar:
    verdict = NOT_RUN if value is None else NOT_JUDGED if not judged else PASS if value <= limit else FAIL
    measured = None if value is None else f"{value:.2f}{unit}"
    return Bar(name, f"batch {batch}", f"≤ {limit}{unit}" if judged else "", measured, verdict)


def _of(found: Findings, **values: Any) -> Record | None:
    """The last benchmark record with these values."""
    fitting = (r for r in reversed(found.bench) if all(r.get(key) == value for key, value in values.items()))
    return next(fitting, None)


def _ratio(found: Findings, run_name: str, ratio: str, name: str, limit: float) -> list[Bar]:
    lines = []
    for batch in BATCHES:
        record = _of(found, bench="throughput", run_name=run_name, batch_size=batch) or {}
        value = record.get("ratios", {}).get(ratio)
        spread = "" if value is None else f" ({value['min']:.3f}–{value['max']:.3f})"
        median = None if value is None else value["median"]
        lines.append(_at_least(f"{ratio}: {name}", f"batch {batch}", median, limit, spread))
    return lines


def _shares(found: Findings) -> list[Bar]:
    lines = []
    for batch in (1, 32, 256):
        record = _of(found, benchmark="profile", mode="two-model", batch_size=batch)
        share = None if record is None else record["clocks"][record["clock"]]["mixing_percent"]
        lines.append(_at_most("mixing, share of a step", batch, share, 3.0, " %"))
    return lines


def _reading(found: Findings) -> list[Bar]:
    """Mixing beside both logits summed, which reads them once: with the device's time alone, and with the host's."""
    lines = []
    for batch in BATCHES:
        record = _of(found, bench="mixing", batch_size=batch)
        value = None if record is None else record["mix_over_read"]
        judged = batch >= READING_COUNTS_FROM
        lines.append(_at_most("mixing over reading both logits, device", batch, value, 2.0, judged=judged))
    for batch in BATCHES:
        record = _of(found, bench="alpha", batch_size=batch)
        value = None if record is None else record["fused_over_read"]
        lines.append(_at_most("mixing over reading both logits, host included", batch, value, 2.0, judged=False))
    return lines


def _errors(found: Findings) -> list[Bar]:
    lines = []
    for batch in BATCHES:
        record = _of(found, bench="alpha", batch_size=batch)
        value = None if record is None else record.get("fused_alpha_error")
        verdict = NOT_RUN if value is None else PASS if value <= ALPHA_ERROR else FAIL
        measured = None if value is None else f"{value:.0e}"
        lines.append(
            Bar("alpha's error beside float64 bisection", f"batch {batch}", f"≤ {ALPHA_ERROR:.0e}", measured, verdict)
        )
    return lines


def _bandwidth(found: Findings) -> list[Bar]:
    """Mixing beside the time that the card's measured bandwidth gives for the bytes of both logits. Not judged: the
    float32 mixture that is written has as many bytes as both of them in bfloat16, so that 2 is what cannot be beaten.
    """
    lines = []
    copy = found.environment.get("copy")
    for batch in BATCHES:
        record = _of(found, bench="mixing", batch_size=batch)
        value = None
        if record is not None and isinstance(copy, dict):
            floor_ms = record["bytes_read"] / copy["gb_per_s_read_and_written"] / 1e6
            value = record["mix_ms"]["median"] / floor_ms
        name = "mixing over both logits' bytes at full bandwidth (2 is the floor)"
        lines.append(_at_most(name, batch, value, 2.0, judged=False))
    return lines


def _waits(found: Findings) -> list[Bar]:
    lines = []
    stock = found.host_waits.get("stock", {}).get("waits")
    for engine in ("lockstep", "shared", "drafts"):
        record = found.host_waits.get(engine, {})
        limit = "no more than stock SGLang" + ("" if stock is None else f": {stock:.2f}")
        if "waits" not in record:
            verdict, measured = (NOT_RUN, None) if not record else (FAIL, record.get("error"))
        else:
            measured = f"{record['waits']:.2f} a step"
            told = record["verdict"].partition(":")[0]
            verdict = {"pass": PASS, "fail": FAIL}.get(told, NOT_JUDGED)
        lines.append(Bar("host waits in a decode step", engine, limit, measured, verdict))
    return lines


# -- the page ----------------------------------------------------------------------------------------------------------


def page(found: Findings, checks: Iterable[str] = ()) -> str:
    """Markdown. ``checks``: names of all checks, so that those without a result are named."""
    return (
        "\n\n".join(
            part
            for part in (
                "# Checks on a GPU",
                _about(found),
                _table(("check", "result", "seconds", "ended"), _check_rows(found, checks)),
                "## Bars",
                DUMMIES,
                _table(("bar", "at", "asked", "measured", "verdict"), (_cells(bar) for bar in bars(found))),
                "## Identity",
                _identity(found),
            )
            if part
        )
        + "\n"
    )


def _about(found: Findings) -> str:
    devices = found.devices()
    lines = [f"Card: **{', '.join(devices) or 'unknown'}**."]
    if len(devices) > 1:
        lines.append("**These figures come from more than one device: do not compare them.**")
    versions = {name: version for name, version in found.environment.get("versions", {}).items() if version}
    if versions:
        lines.append("Versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()) + ".")
    if isinstance(found.environment.get("copy"), dict):
        rate = found.environment["copy"]["gb_per_s_read_and_written"]
        lines.append(f"Copying moves {rate:.0f} GB/s, read and written.")
    if isinstance(found.environment.get("product"), dict):
        lines.append(f"A bf16 product of 8192² runs at {found.environment['product']['tflop_per_s']:.0f} TFLOP/s.")
    return "\n".join(lines)


def _check_rows(found: Findings, checks: Iterable[str]) -> Iterable[tuple[str, ...]]:
    for name in dict.fromkeys([*checks, *found.results]):
        record = found.results.get(name)
        if record is None:
            yield name, NOT_RUN, "", ""
        elif record["rc"] is None:
            yield name, f"{NOT_RUN}: {record['why']}", "", ""
        else:
            result = PASS if record["rc"] == 0 else f"{FAIL} (status {record['rc']})"
            if not record.get("on_gpu", True):
                result += ", of what runs without a GPU"
            yield name, result, f"{record['seconds']:.0f}", record.get("time", "")


def _identity(found: Findings) -> str:
    if not found.identity:
        return NOT_RUN
    ran = [record for record in found.identity.values() if "skipped" not in record]
    judged = [record for record in ran if record.get("judged")]
    prefills = [r["engine"] for r in ran if any(k["graph"] for n, k in _forwards(r) if n.endswith("prefill"))]
    checks = {r["engine"]: r["self_check"] for r in ran if isinstance(r.get("self_check"), dict)}
    lines = [
        f"{sum(bool(r['ok']) for r in ran)} of {len(ran)} engines ok; {sum(bool(r['ok']) for r in judged)} of "
        f"{len(judged)} float32 engines token-identical.",
        f"Prefill graphs were replayed by: {', '.join(prefills) or 'none'}.",
        f"Start-up self-checks: {_self_checks(checks) or 'none reported'}.",
    ]
    rows = [_identity_row(record) for record in found.identity.values()]
    return " ".join(lines) + "\n\n" + _table(("engine", "result", "attention", "graphs", "start, s"), rows)


def _forwards(record: Record) -> Iterable[tuple[str, dict[str, int]]]:
    return record.get("forwards", {}).items()


def _self_checks(checks: dict[str, Record]) -> str:
    return ", ".join(
        f"{engine} {check['seconds']:.1f} s" if isinstance(check.get("seconds"), int | float) else engine
        for engine, check in checks.items()
    )


def _identity_row(record: Record) -> tuple[str, ...]:
    if "skipped" in record:
        return record["engine"], f"{NOT_RUN}: {record['skipped']}", "", "", ""
    runs = record.get("runs", [])
    same, total = (sum(run[key] for run in runs) for key in ("before_first_difference", "tokens"))
    result = f"{PASS if record['ok'] else FAIL}, {same} of {total} tokens before a difference"
    if "error" in record:
        result = f"{FAIL}: {record['error']}"
    return (
        record["engine"],
        result,
        str(record.get("attention_backend") or ""),
        str(record.get("graphs", "")),
        str(record.get("start_s", "")),
    )


def _cells(bar: Bar) -> tuple[str, ...]:
    return bar.name, bar.where, bar.limit, bar.measured or "", bar.verdict


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    clean: Callable[[str], str] = lambda cell: " ".join(cell.split()).replace("|", "\\|")  # noqa: E731
    return "\n".join("| " + " | ".join(map(clean, line)) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, help="Default: standard output.")
    args = parser.parse_args()
    text = page(Findings.read(args.folders))
    if args.output:
        args.output.write_text(text)
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
