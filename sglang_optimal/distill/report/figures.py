"""The report's figures."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from sglang_optimal.distill.report.axes import (
    KL_LINES,
    alpha_bins,
    alpha_colour,
    both,
    coarser,
    counts_axis,
    groups,
    legend,
    log_extent,
    percent_ticks,
    position_axis,
    power_of_ten,
    samples_alive,
    stairs,
    titled_axes,
)
from sglang_optimal.distill.report.record_figures import acceptance, funnel, latency, lengths
from sglang_optimal.distill.report.statistics import RARE, Statistics
from sglang_optimal.distill.report.svg import CARD, INK, SOFT, STUDENT, TEACHER, Picture, svg


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
        axes = titled_axes(figure, "Distribution of α", "α, the teacher's weight", "share of tokens")
        chosen = alpha_bins(histogram)
        edges, shares = histogram.edges[chosen], coarser(histogram.counts, chosen) / histogram.total
        colours = [alpha_colour((low + high) / 2) for low, high in zip(edges, edges[1:], strict=False)]
        axes.bar(edges[:-1], shares, np.diff(edges), align="edge", color=colours, edgecolor=CARD, linewidth=0.4)
        if all(group.alpha_histogram.total for group in statistics.groups):
            for group, colour, label in groups(statistics):
                part = group.alpha_histogram
                axes.stairs(coarser(part.counts, chosen) / part.total, edges, color=colour, linewidth=1.6, label=label)
        run = statistics.run
        if run.method != "fixed":
            for i, bound in enumerate((run.alpha_min, run.alpha_max)):
                axes.axvline(bound, color=SOFT, linewidth=1, linestyle="--", label=None if i else "bounds of α")
        mean = statistics.mean("alpha")
        if mean is not None:
            axes.axvline(mean, ymax=0.86, color=INK, linewidth=1.4, label="mean")
        low, high = histogram.low, histogram.high
        axes.set_xlim(low - 0.15 if low < 0 else -0.02, high + 0.15 if high > 1 else 1.02)
        axes.set_ylim(0, 1.2 * axes.get_ylim()[1])
        percent_ticks(axes.yaxis)
        legend(axes, location="upper center", columns=4)

    return Picture(
        svg("alpha", "Histogram of alpha over all tokens", draw),
        "Bars: all tokens, blue where the student has the greater weight, orange where the teacher has it.",
    )


def alpha_by_position(statistics: Statistics) -> Picture | None:
    series = statistics.alpha_by_position
    if not series.count.sum():
        return None
    starts = series.bins()
    x, mean = position_axis(series, starts), series.mean(starts)
    histogram = statistics.alpha_histogram
    low, middle, high = series.quantiles(starts, [0.1, 0.5, 0.9], histogram.low, histogram.high)
    alive = samples_alive(statistics.lengths)

    def draw(figure: Figure) -> None:
        axes, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        axes.set_title("α by position in the sample")
        axes.set_ylabel("α, the teacher's weight")
        axes.fill_between(x, low, high, color=INK, alpha=0.13, linewidth=0, label="10–90 % of tokens")
        axes.plot(x, middle, color=INK, linewidth=1.6, label="median")
        axes.plot(x, mean, color=SOFT, linewidth=1.4, linestyle="--", label="mean")
        axes.set_ylim(min(0, histogram.low) - 0.02, max(1, histogram.high) + 0.02)
        legend(axes, columns=3)
        below.fill_between(np.arange(len(alive)), alive, color=SOFT, alpha=0.35, linewidth=0)
        below.set_ylim(0)
        below.set_ylabel("samples\nalive")
        counts_axis(below.yaxis, 2)
        below.set_xlabel("position, tokens from the start")
        below.set_xlim(0, max(1, len(alive) - 1))

    return Picture(
        svg("alpha-position", "Alpha by position in the sample, and samples still alive", draw, (6.4, 4.2)),
        "Above: over all tokens near a position. Below: how many samples are so long.",
    )


def kl_by_position(statistics: Statistics) -> Picture | None:
    if not all(series.count.sum() for series in statistics.kl_by_position.values()):
        return None

    def draw(figure: Figure) -> None:
        axes = titled_axes(figure, "KL by position in the sample", "position, tokens from the start", "mean KL, nats")
        for name, colour, label, style in KL_LINES:
            series = statistics.kl_by_position[name]
            starts = series.bins()
            x = position_axis(series, starts)
            axes.plot(x, series.mean(starts), color=colour, linewidth=1.7, linestyle=style, label=label)
        axes.set_xlim(0)
        axes.set_ylim(0)
        legend(axes)

    return Picture(
        svg("kl-position", "Mean KL to student and teacher by position", draw),
        "How far the mixture q is from each model. With kl_symmetry both are equal between the bounds of α.",
    )


def kl_distribution(statistics: Statistics) -> Picture | None:
    histograms = {
        name: both(statistics, lambda group, n=name: group.kl_histograms[n])  # type: ignore[misc]
        for name, *_ in KL_LINES
    }
    if not any(h.total for h in histograms.values()):
        return None

    def draw(figure: Figure) -> None:
        axes = titled_axes(figure, "Distribution of KL", "KL of a token, nats (log scale)", "share of tokens")
        for name, colour, label, style in KL_LINES:
            stairs(axes, histograms[name], colour, label, style)
        log_extent(axes, list(histograms.values()))
        percent_ticks(axes.yaxis)
        legend(axes)

    edges = next(iter(histograms.values())).edges
    return Picture(
        svg("kl", "Histograms of KL to student and teacher", draw),
        f"Tokens with less than {power_of_ten(edges[0])} nats, where both models agree, are in the leftmost bin.",
    )


def ess_distribution(statistics: Statistics) -> Picture | None:
    histogram = both(statistics, lambda g: g.ess_histogram)
    if not histogram.total:
        return None

    def draw(figure: Figure) -> None:
        axes = titled_axes(
            figure, "ESS ratio, student to teacher", "ESS ratio of a token (log scale)", "share of tokens"
        )
        edges = histogram.edges
        colours = [STUDENT if high <= 1.0000001 else TEACHER for high in edges[1:]]
        axes.bar(edges[:-1], histogram.counts / histogram.total, np.diff(edges), align="edge", color=colours)
        axes.axvline(1, color=INK, linewidth=1.2, linestyle="--", label="balanced")
        log_extent(axes, [histogram], include=1.0)
        percent_ticks(axes.yaxis)
        legend(axes)

    return Picture(
        svg("ess", "Histogram of the ESS ratio", draw),
        "Σ p_student²/q over Σ p_teacher²/q: q is the better proposal for the student below 1, for the teacher above.",
    )


def student_logprobs(statistics: Statistics) -> Picture | None:
    if not any(group.logprob_histogram.total for group in statistics.groups):
        return None

    def draw(figure: Figure) -> None:
        title = "Coverage: log-probability under the student"
        axes = titled_axes(figure, title, "student's log-probability of a token, nats", "share of tokens (log scale)")
        for group, colour, label in groups(statistics):
            stairs(axes, group.logprob_histogram, colour, label)
        axes.axvline(np.log(RARE), color=INK, linewidth=1.2, linestyle="--", label=f"probability {RARE:g}")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
        low = min(group.logprob_histogram.low for group in statistics.groups)
        axes.set_xlim(max(-20.2, min(np.floor(low), -8)), 0.2)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]))
        legend(axes, location="upper left")

    return Picture(
        svg("coverage", "Histogram of the student's log-probability", draw),
        "Left of the dashed line: tokens that the student would hardly write. The leftmost bin has all below −20.",
    )
