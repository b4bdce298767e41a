"""The report's figures."""

from __future__ import annotations

import colorsys
import dataclasses
from collections.abc import Callable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from sglang_optimal.distill.report.histogram import ALPHA_EDGES, POSITION_EDGES, Histogram, quantiles
from sglang_optimal.distill.report.statistics import RARE, Statistics
from sglang_optimal.distill.report.svg import ACCEPTED, CARD, INK, LINE, REJECTED, SOFT, STUDENT, TEACHER, svg
from sglang_optimal.distill.report.verdicts import rejections, shortened, wilson


@dataclasses.dataclass(frozen=True)
class Picture:
    """svg: the figure. note: how to read it."""

    svg: str
    note: str


def figures(statistics: Statistics) -> list[Picture]:
    """Every figure that the run has data for."""
    kinds: tuple[Callable[[Statistics], Picture | None], ...] = (
        alpha_distribution, alpha_by_position, kl_by_position, kl_distribution, ess_distribution,
        student_logprobs, lengths, funnel, acceptance, latency,
    )  # fmt: skip
    return [picture for kind in kinds if (picture := kind(statistics)) is not None]


def alpha_distribution(statistics: Statistics) -> Picture | None:
    histogram = statistics.alpha_histogram
    if not histogram.total:
        return None

    def draw(figure: Figure) -> None:
        axes = _axes(figure, "Distribution of α", "α, the teacher's weight", "share of tokens")
        edges, counts = _coarse(histogram.edges, histogram.counts, histogram)
        shares = counts / histogram.total
        colours = [alpha_colour((a + b) / 2) for a, b in zip(edges, edges[1:], strict=False)]
        axes.bar(edges[:-1], shares, np.diff(edges), align="edge", color=colours, edgecolor=CARD, linewidth=0.4)
        for group, colour, label in _groups(statistics):
            part = group.alpha_histogram
            if part.total and statistics.rejected.alpha_histogram.total and statistics.accepted.alpha_histogram.total:
                _, part_counts = _coarse(part.edges, part.counts, histogram)
                axes.stairs(part_counts / part.total, edges, color=colour, linewidth=1.6, label=label)
        run = statistics.run
        if run.method != "fixed":
            for i, bound in enumerate((run.alpha_min, run.alpha_max)):
                axes.axvline(bound, color=SOFT, linewidth=1, linestyle="--", label=None if i else "bounds of α")
        axes.axvline(histogram_mean(statistics), color=INK, linewidth=1.4, label="mean")
        axes.set_xlim(min(-0.02, histogram.low - 0.1 * (histogram.low < 0)), max(1.02, histogram.high + 0.1 * (histogram.high > 1)))
        _percent(axes.yaxis)
        _legend(axes)

    return Picture(
        svg("alpha", "Histogram of alpha over all tokens", draw),
        "Bars: all tokens, blue where the student has the greater weight, orange where the teacher has it.",
    )


def histogram_mean(statistics: Statistics) -> float:
    return statistics.mean("alpha")


def alpha_by_position(statistics: Statistics) -> Picture | None:
    series = statistics.alpha_by_position
    if not series.count.sum():
        return None
    x, alive, used = _positions(series.count)
    histogram = statistics.alpha_histogram
    low, middle, high = quantiles(series.values[used], ALPHA_EDGES, [0.1, 0.5, 0.9], histogram.low, histogram.high)

    def draw(figure: Figure) -> None:
        axes, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        axes.set_title("α by position in the sample")
        axes.set_ylabel("α, the teacher's weight")
        axes.fill_between(x, low, high, color=INK, alpha=0.13, linewidth=0, label="10–90 % of tokens")
        axes.plot(x, middle, color=INK, linewidth=1.6, label="median")
        axes.plot(x, series.mean[used], color=TEACHER, linewidth=1.4, linestyle="--", label="mean")
        axes.set_ylim(min(0, histogram.low) - 0.02, max(1, histogram.high) + 0.02)
        _legend(axes, columns=3)
        below.fill_between(x, alive, color=SOFT, alpha=0.35, linewidth=0)
        below.set_ylim(0)
        below.set_ylabel("samples\nalive")
        below.yaxis.set_major_locator(MaxNLocator(2, integer=True))
        below.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
        below.set_xlabel("position, tokens from the start")
        _extent(below, x)

    return Picture(
        svg("alpha-position", "Alpha by position in the sample, and samples still alive", draw, (6.4, 4.2)),
        "Bins grow with the position, 5 % wide. Where few samples are alive the lines are noise.",
    )


def kl_by_position(statistics: Statistics) -> Picture | None:
    both = statistics.kl_by_position
    if not any(series.count.sum() for series in both.values()):
        return None

    def draw(figure: Figure) -> None:
        axes = _axes(figure, "KL by position in the sample", "position, tokens from the start", "mean KL, nats")
        for name, colour, label, style in _kl_lines():
            x, _, used = _positions(both[name].count)
            axes.plot(x, both[name].mean[used], color=colour, linewidth=1.7, linestyle=style, label=label)
            _extent(axes, x)
        axes.set_ylim(0)
        _legend(axes)

    return Picture(
        svg("kl-position", "Mean KL to student and teacher by position", draw),
        "How far the mixture q is from each model. With kl_symmetry both lines lie on each other between the bounds of α.",
    )


def kl_distribution(statistics: Statistics) -> Picture | None:
    histograms = {name: _both(statistics, lambda g, n=name: g.kl_histograms[n]) for name, *_ in _kl_lines()}
    if not any(h.total for h in histograms.values()):
        return None

    def draw(figure: Figure) -> None:
        axes = _axes(figure, "Distribution of KL", "KL of a token, nats (log scale)", "share of tokens")
        for name, colour, label, style in _kl_lines():
            _stairs(axes, histograms[name], colour, label, style)
        axes.set_xscale("log")
        _log_extent(axes, list(histograms.values()))
        _percent(axes.yaxis)
        _legend(axes)

    edges = next(iter(histograms.values())).edges
    return Picture(
        svg("kl", "Histograms of KL to student and teacher", draw),
        f"Tokens with less than {edges[0]:g} nats, where both models agree, are in the leftmost bin.",
    )


def ess_distribution(statistics: Statistics) -> Picture | None:
    histogram = _both(statistics, lambda g: g.ess_histogram)
    if not histogram.total:
        return None

    def draw(figure: Figure) -> None:
        axes = _axes(figure, "ESS ratio, student to teacher", "ESS ratio of a token (log scale)", "share of tokens")
        edges = histogram.edges
        colours = [STUDENT if high <= 1.0000001 else TEACHER for high in edges[1:]]
        axes.bar(edges[:-1], histogram.counts / histogram.total, np.diff(edges), align="edge", color=colours)
        axes.axvline(1, color=INK, linewidth=1.2, linestyle="--", label="balanced")
        axes.set_xscale("log")
        _log_extent(axes, [histogram], include=1.0)
        _percent(axes.yaxis)
        _legend(axes)

    return Picture(
        svg("ess", "Histogram of the ESS ratio", draw),
        "Σ p_student²/q over Σ p_teacher²/q. Below 1 q is the better proposal for the student, above 1 for the teacher.",
    )


def student_logprobs(statistics: Statistics) -> Picture | None:
    if not any(group.logprob_histogram.total for group in statistics.groups):
        return None

    def draw(figure: Figure) -> None:
        title = "Coverage: log-probability under the student"
        axes = _axes(figure, title, "student's log-probability of a token, nats", "share of tokens (log scale)")
        for group, colour, label in _groups(statistics):
            _stairs(axes, group.logprob_histogram, colour, label)
        axes.axvline(np.log(RARE), color=INK, linewidth=1.2, linestyle="--", label=f"probability {RARE:g}")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
        low = min(group.logprob_histogram.low for group in statistics.groups)
        axes.set_xlim(max(-20.2, min(np.floor(low), -8)), 0.2)
        _legend(axes, location="upper left")

    return Picture(
        svg("coverage", "Histogram of the student's log-probability", draw),
        "Left of the dashed line are tokens that the student would hardly write. The leftmost bin has all below −20 nats.",
    )


def lengths(statistics: Statistics) -> Picture | None:
    longest = max(len(group.lengths) for group in statistics.groups) - 1
    if longest < 1:
        return None

    def draw(figure: Figure) -> None:
        axes = _axes(figure, "Length of samples", "tokens", "samples")
        width = max(1, -(-(longest + 1) // 40))
        edges = np.arange(0, longest + width + 1, width)
        for group, colour, label in _groups(statistics):
            if group.records:
                counts, _ = np.histogram(np.arange(len(group.lengths)), edges, weights=group.lengths)
                axes.stairs(counts, edges, color=colour, fill=True, alpha=0.22)
                axes.stairs(counts, edges, color=colour, linewidth=1.7, label=f"{label} ({group.records:,})")
        axes.set_ylim(0)
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        _legend(axes)

    return Picture(
        svg("lengths", "Histogram of sample lengths, accepted and rejected", draw),
        "A peak at the right end is samples cut at max_new_tokens.",
    )


def funnel(statistics: Statistics) -> Picture | None:
    by_filter = rejections(statistics)
    if not by_filter:
        return None
    left, rows = statistics.tally.total, [("all samples", statistics.tally.total, 0)]
    for name, count in by_filter.items():
        left -= count
        rows.append((f"after {shortened(name, 24)}", left, count))
    rows[-1] = (f"{rows[-1][0]} = accepted", *rows[-1][1:])

    def draw(figure: Figure) -> None:
        axes = _axes(figure, "Filters, in their order", "samples left", "")
        y, total = np.arange(len(rows)), statistics.tally.total
        axes.barh(y, [row[1] for row in rows], color=ACCEPTED, height=0.62)
        axes.barh(y, [row[2] for row in rows], left=[row[1] for row in rows], color=REJECTED, alpha=0.6, height=0.62)
        for i, (_, count, lost) in enumerate(rows):
            text = f"{count:,}" + (f"  (−{lost:,})" if lost else "")
            axes.text(total * 1.015, i, text, va="center", color=INK, fontsize=10)
        axes.set_yticks(y, [row[0] for row in rows], color=INK)
        axes.invert_yaxis()
        axes.set_xlim(0, total * 1.22)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        _bar_grid(axes)

    return Picture(
        svg("funnel", "Samples left after each filter", draw, (6.4, 1.5 + 0.36 * len(rows))),
        "The first filter that a sample fails rejects it, so later filters see only what earlier ones passed.",
    )


def acceptance(statistics: Statistics) -> Picture | None:
    strategies = sorted(statistics.tally.strategies.items(), key=lambda item: -item[1][0] / item[1][1])[:20]
    if len(strategies) < 2:
        return None

    def draw(figure: Figure) -> None:
        axes = _axes(figure, "Acceptance by prefix strategy", "accepted share of samples", "")
        y = np.arange(len(strategies))
        rates = np.array([accepted / total for _, (accepted, total) in strategies])
        bounds = np.array([wilson(*counts) for _, counts in strategies])
        axes.barh(y, rates, color=ACCEPTED, height=0.62)
        axes.errorbar(
            rates, y, xerr=np.clip([rates - bounds[:, 0], bounds[:, 1] - rates], 0, None), fmt="none", ecolor=INK,
            capsize=3, linewidth=1.2,
        )  # fmt: skip
        for i, (_, (accepted, total)) in enumerate(strategies):
            axes.text(1.03, i, f"{100 * rates[i]:.0f} %  ({accepted:,} of {total:,})", va="center", color=INK, fontsize=10)
        axes.set_yticks(y, [shortened(name, 24) for name, _ in strategies], color=INK)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.45)
        axes.set_xticks(np.linspace(0, 1, 6))
        _percent(axes.xaxis)
        _bar_grid(axes)

    return Picture(
        svg("strategies", "Accepted share of samples by prefix strategy", draw, (6.4, 1.5 + 0.36 * len(strategies))),
        "Whiskers: 95 % interval.",
    )


def latency(statistics: Statistics) -> Picture | None:
    histogram = statistics.latency
    if not histogram.total:
        return None
    median, late = histogram.quantile(0.5), histogram.quantile(0.95)

    def draw(figure: Figure) -> None:
        axes = _axes(figure, "Latency of requests", "seconds from request to answer (log scale)", "requests")
        axes.stairs(histogram.counts, histogram.edges, color=ACCEPTED, fill=True, alpha=0.55)
        axes.axvline(median, color=INK, linewidth=1.4, label=f"median {median:.3g} s")
        axes.axvline(late, color=INK, linewidth=1.2, linestyle="--", label=f"95 % {late:.3g} s")
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        _log_extent(axes, [histogram])
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        _legend(axes)

    return Picture(
        svg("latency", "Histogram of request latency", draw),
        "Many requests share a server: latency grows with client.concurrency while tokens/s of the run grow too.",
    )
