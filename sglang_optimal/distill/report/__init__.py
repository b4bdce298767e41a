"""The report of a run: one HTML file, without anything to load, to judge the data by."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sglang_optimal.distill.card import read_as
from sglang_optimal.distill.escalation import step_rows
from sglang_optimal.distill.intervals import wilson
from sglang_optimal.distill.records import MODEL_COLUMNS
from sglang_optimal.distill.report.samples import choose_tokenizer, sample_data
from sglang_optimal.distill.report.statistics import KLS, SEVERAL, Statistics, collect
from sglang_optimal.distill.report.verdicts import headline, judge, self_check
from sglang_optimal.distill.store import find_shards, replace_file
from sglang_optimal.distill.surprise import RARE
from sglang_optimal.distill.wording import minus, percent
from sglang_optimal.token_view import viewer

__all__ = ["write_report"]


def write_report(folder: Path, output: Path | None = None, *, tokenizer: str | None = None, samples: int = 200) -> Path:
    """Write the report of a run, finished or under way, of all machines that wrote to ``folder``.

    Args:
        folder: of the run.
        output: the file; by default ``report.html`` in the folder.
        tokenizer: folder or id, to show samples as coloured text. By default the student's or the teacher's, where
            it is on this machine. Nothing is downloaded, and no code of a model is run.
        samples: how many to choose for the browser: half of them accepted, the others spread over the reasons.

    Returns:
        Path of the file.

    Raises:
        ValueError: no run, no records, a damaged file, or a tokenizer that cannot be read.
    """
    from sglang_optimal.distill.report.figures import figures, self_check_figures  # matplotlib, which takes a second

    folder = Path(folder)
    if samples < 0:
        raise ValueError(f"samples: must not be negative, got {samples}.")
    find_shards(folder, "accepted")  # no run: say so before anything is read
    statistics = collect(folder, samples)
    rows = statistics.selection.rows()
    named = [dict(zip(MODEL_COLUMNS, values, strict=True)) for values, _ in statistics.models.most_common()]
    candidates = _distinct(models[key] for key in ("student_model", "teacher_model") for models in named)
    chosen, name, agrees = choose_tokenizer(tokenizer, candidates, rows)
    shown = sample_data(rows, chosen)
    page = _render(
        statistics=statistics,
        settings=_settings(statistics, named),
        numbers=_numbers(statistics),
        headline=headline(statistics),
        verdicts=judge(statistics),
        self_check=self_check(statistics),
        strategies=_strategies(statistics),
        steps=_steps(statistics),
        figures=figures(statistics),
        self_check_figures=self_check_figures(statistics),
        rare=RARE,
        throughput=_throughput(statistics),
        samples=shown,
        cut=max((len(s["ids"]) for s in shown if len(s["ids"]) < s["num_tokens"]), default=0),
        tokenizer=name,
        agrees=agrees,
        tokens_css=viewer("css"),
        tokens_js=viewer("js"),
    )
    output = folder / "report.html" if output is None else Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    replace_file(output, page)
    return output


def _render(**values: Any) -> str:
    import jinja2
    from markupsafe import Markup, escape

    def code(text: str) -> Markup:
        """Text between backticks as code."""
        parts = [escape(part) if i % 2 == 0 else Markup("<code>{}</code>").format(part)
                 for i, part in enumerate(text.split("`"))]  # fmt: skip
        return Markup("").join(parts)

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["code"] = code
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "allow_nan": False, "separators": (",", ":")}
    return environment.get_template("page.html.j2").render(**values)


def _distinct(values: Iterable[str | None]) -> list[str]:
    """Those that are not empty, once each, in their order."""
    return [value for value in dict.fromkeys(values) if value]


def _settings(statistics: Statistics, named: list[dict[str, str | None]]) -> list[tuple[str, str]]:
    """What the run was, as (name, value)."""
    run = statistics.run
    rows = []
    for side in ("teacher", "student"):
        models = _distinct(m[f"{side}_model"] for m in named)
        rows.append((side, ", ".join(models) or "not stored"))
    if reads := read_as(run.config):
        rows.append(("read as", reads))
    if run.method == SEVERAL:
        alpha = "differs between the steps" if run.steps else "differs between the runs that were merged"
    elif run.method == "fixed":
        alpha = "fixed" if run.fixed_alpha is None else f"fixed at {run.fixed_alpha:g}"
        alpha += f": the {run.alone} alone ran" if run.alone else ""
    else:
        method = run.method or "the server's own method (kl_symmetry, unless it was told otherwise)"
        budget = "" if run.kl_budget is None else f" of {run.kl_budget:g} nats"
        alpha = f"{method}{budget}, bounds {run.alpha_min:g} to {run.alpha_max:g}"
    rows.append(("α", alpha))
    sampling = run.config.get("sampling") or {}
    keys = ("temperature", "top_p", "top_k", "min_p", "max_new_tokens", "n", "seed")
    if any(key in sampling for key in keys):
        rows.append(("sampling", ", ".join(f"{key} {sampling[key]}" for key in keys if key in sampling)))
    if path := (run.config.get("data") or {}).get("path"):
        rows.append(("problems", path))
    state = ", ".join(sorted(run.states)) or "not known"
    if run.planned:
        state += f": {statistics.tally.total:,} of {run.planned:,} planned samples" + (" at most" if run.steps else "")
    if run.failed:
        state += f", {run.failed:,} failed (the same command tries them again)"
    rows.append(("state", state + (f"; started {run.started}" if run.started else "")))
    for name, key in (("SGLang", "sglang_version"), ("sglang_optimal", "sglang_optimal_version")):
        versions = _distinct(m[key] for m in named)
        if versions:
            rows.append((name, ", ".join(versions)))
    return rows


def _numbers(statistics: Statistics) -> list[tuple[str, str, str]]:
    """The row of big numbers: (number, what it is, more)."""
    tally = statistics.tally
    alpha, student, teacher = (_mean(statistics, name) for name in ("alpha", *KLS))
    group, problems = statistics.accepted, len(tally.problems)
    surprising = percent(group.surprising / group.judged) if group.judged else "–"
    leaps = f"; {group.leaps:,} of {group.answered:,} leap to the answer" if group.answered else ""
    return [
        (f"{tally.accepted:,} / {tally.total:,}", "accepted / all samples", percent(tally.accepted / tally.total)),
        (f"{tally.covered:,} / {problems:,}", "problems covered", "with an accepted sample"),
        (surprising, "have a surprise", f"of the accepted{leaps}"),
        (f"{tally.tokens:,}", "tokens", f"{tally.accepted_tokens:,} in accepted samples"),
        (alpha, "mean α", "the teacher's weight, over all tokens"),
        (f"{student} | {teacher}", "mean KL, nats", "to the student | to the teacher"),
    ]


def _strategies(statistics: Statistics) -> dict[str, Any]:
    """The table of strategies: its columns' names, and rows of texts, those with the most accepted first."""
    names = ["strategy", "samples", "accepted"]
    if statistics.equations is not None:
        names.append(f"passed {statistics.equations}")
    names += ["student logprob, nats", "with a surprise"]
    rows = []
    tally = statistics.tally.strategies
    for name, (accepted, total) in sorted(tally.items(), key=lambda item: -item[1][0] / item[1][1])[:20]:
        counts = statistics.strategies[name]
        low, high = wilson(accepted, total)
        cells = [name, f"{total:,}", f"{accepted:,} ({percent(accepted / total)}; {100 * low:.0f}–{100 * high:.0f} %)"]
        if statistics.equations is not None:
            cells.append(f"{counts.sound:,} of {counts.reached:,}")
        logprob = counts.logprob.value
        cells.append("–" if logprob is None else minus(logprob, ".3f"))
        share = f" ({percent(counts.surprising / counts.judged)})" if counts.judged else ""
        rows.append([*cells, f"{counts.surprising:,} of {counts.judged:,}{share}" if share else "–"])
    return {"names": names, "rows": rows}


def _steps(statistics: Statistics) -> list[list[str]]:
    """Rows of the table of an escalation's steps; none of any other run."""
    rows = []
    for row in step_rows(statistics.tally, statistics.run.steps):
        low, high = wilson(row["accepted"], row["samples"])
        share = f" ({percent(row['accepted'] / row['samples'])}; {100 * low:.0f}–{100 * high:.0f} %)"
        counts = [f"{row[name]:,}" for name in ("problems", "samples", "accepted", "covered_by_then", "passes")]
        counts[2] += share
        rows.append([f"{row['step']}: {row['alpha']}", *counts])
    return rows


def _mean(statistics: Statistics, name: str) -> str:
    value = statistics.means[name].value
    return "–" if value is None else minus(value, ".3f")


def _rate(statistics: Statistics) -> tuple[float | None, str]:
    run = statistics.run
    rate = statistics.tally.tokens / run.elapsed if run.elapsed else None
    return rate, "tokens/s" if run.machines < 2 else f"tokens/s on each of {run.machines} machines"


def _throughput(statistics: Statistics) -> list[tuple[str, str]]:
    """Rates and latencies that are known, as (name, value)."""
    rows = []
    run, histogram = statistics.run, statistics.latency
    rate, rate_of = _rate(statistics)
    if rate is not None:
        rows.append((rate_of, f"{rate:,.1f}"))
        rows.append(("samples/s", f"{statistics.tally.total / run.elapsed:,.2f}"))
        rows.append(("time sampling", f"{run.elapsed:,.1f} s" + (" over all machines" if run.machines > 1 else "")))
    if histogram.total:
        for name, q in (("median latency", 0.5), ("95 % of requests within", 0.95), ("99 % within", 0.99)):
            rows.append((name, f"{histogram.quantile(q):.3g} s"))
    return rows
