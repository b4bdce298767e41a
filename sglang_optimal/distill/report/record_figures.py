"""Figures of whole samples: lengths, filters, strategies and latency."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from sglang_optimal.distill.report.axes import (
    counts_axis,
    groups,
    horizontal_bars,
    legend,
    log_extent,
    percent_ticks,
    titled_axes,
)
from sglang_optimal.distill.report.statistics import Statistics
from sglang_optimal.distill.report.svg import ACCEPTED, INK, REJECTED, Picture, svg
from sglang_optimal.distill.report.verdicts import rejections, shortened, wilson


def lengths(statistics: Statistics) -> Picture | None:
    longest = len(statistics.lengths) - 1
    if longest < 1:
        return None

    def draw(figure: Figure) -> None:
        axes = titled_axes(figure, "Length of samples", "tokens", "samples")
        width = max(1, -(-(longest + 1) // 40))
        edges = np.arange(0, longest + width + 1, width)
        for group, colour, label in groups(statistics):
            if group.records:
                counts, _ = np.histogram(np.arange(len(group.lengths)), edges, weights=group.lengths)
                axes.stairs(counts, edges, color=colour, fill=True, alpha=0.22)
                axes.stairs(counts, edges, color=colour, linewidth=1.7, label=f"{label} ({group.records:,})")
        axes.set_ylim(0)
        counts_axis(axes.yaxis)
        legend(axes)

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
        axes = titled_axes(figure, "Filters, in their order", "samples left", "")
        y, total = np.arange(len(rows)), statistics.tally.total
        axes.barh(y, [row[1] for row in rows], color=ACCEPTED, height=0.62)
        axes.barh(y, [row[2] for row in rows], left=[row[1] for row in rows], color=REJECTED, alpha=0.6, height=0.62)
        for i, (_, count, lost) in enumerate(rows):
            text = f"{count:,}" + (f"  (−{lost:,})" if lost else "")
            axes.text(total * 1.015, i, text, va="center", color=INK, fontsize=10)
        horizontal_bars(axes, [row[0] for row in rows], INK)
        axes.set_xlim(0, total * 1.22)
        counts_axis(axes.xaxis)

    return Picture(
        svg("funnel", "Samples left after each filter", draw, (6.4, 1.5 + 0.36 * len(rows))),
        "The first filter that a sample fails rejects it, so later filters see only what earlier ones passed.",
    )


def acceptance(statistics: Statistics) -> Picture | None:
    strategies = sorted(statistics.tally.strategies.items(), key=lambda item: -item[1][0] / item[1][1])[:20]
    if len(strategies) < 2:
        return None

    def draw(figure: Figure) -> None:
        axes = titled_axes(figure, "Acceptance by prefix strategy", "accepted share of samples", "")
        y = np.arange(len(strategies))
        rates = np.array([accepted / total for _, (accepted, total) in strategies])
        bounds = np.array([wilson(*counts) for _, counts in strategies])
        axes.barh(y, rates, color=ACCEPTED, height=0.62)
        axes.errorbar(
            rates, y, xerr=np.clip([rates - bounds[:, 0], bounds[:, 1] - rates], 0, None), fmt="none", ecolor=INK,
            capsize=3, linewidth=1.2,
        )  # fmt: skip
        for i, (_, (accepted, total)) in enumerate(strategies):
            axes.text(
                1.03, i, f"{100 * rates[i]:.0f} %  ({accepted:,} of {total:,})", va="center", color=INK, fontsize=10
            )
        horizontal_bars(axes, [shortened(name, 24) for name, _ in strategies], INK)
        axes.set_xlim(0, 1.45)
        axes.set_xticks(np.linspace(0, 1, 6))
        percent_ticks(axes.xaxis)

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
        axes = titled_axes(figure, "Latency of requests", "seconds from request to answer (log scale)", "requests")
        axes.stairs(histogram.counts, histogram.edges, color=ACCEPTED, fill=True, alpha=0.55)
        axes.axvline(median, color=INK, linewidth=1.4, label=f"median {median:.3g} s")
        axes.axvline(late, color=INK, linewidth=1.2, linestyle="--", label=f"95 % {late:.3g} s")
        log_extent(axes, [histogram])
        counts_axis(axes.yaxis)
        legend(axes)

    return Picture(
        svg("latency", "Histogram of request latency", draw),
        "Many requests share a server: latency grows with client.concurrency while tokens/s of the run grow too.",
    )
