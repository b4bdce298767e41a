"""The report's figures: matplotlib's SVG, with the page's colours, so that they suit light and dark mode."""

from __future__ import annotations

import html
import io
import re
from collections import Counter
from collections.abc import Callable

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogFormatter, MaxNLocator, NullFormatter

from sglang_optimal.distill.report.histogram import POSITION_EDGES, Histogram, PositionSeries
from sglang_optimal.distill.report.statistics import Group, Statistics
from sglang_optimal.distill.report.verdicts import rejections, shortened
from sglang_optimal.distill.surprise import RARE

# matplotlib knows no CSS variables, so each has a colour of its own until the SVG is written.
_VARIABLES = {
    f"#0102{i:02x}": f"var(--{name})"
    for i, name in enumerate(("ink", "soft", "line", "student-line", "teacher-line", "accepted", "rejected", "card"))
}
INK, SOFT, LINE, STUDENT, TEACHER, ACCEPTED, REJECTED, CARD = _VARIABLES

_STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "report", "font.size": 11, "text.color": INK,
    "text.parse_math": False,  # names of filters and strategies are no mathematics
    "axes.titlesize": 13, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.titlepad": 10,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": LINE, "axes.facecolor": "none",
    "axes.labelcolor": SOFT, "xtick.color": SOFT, "ytick.color": SOFT,
    "axes.grid": True, "axes.axisbelow": True, "grid.color": LINE, "grid.linewidth": 0.7,
    "legend.frameon": False, "legend.fontsize": 10, "legend.handlelength": 1.8, "legend.columnspacing": 1.2,
    "figure.facecolor": "none", "figure.constrained_layout.use": True,
}  # fmt: skip
_KL_LINES = (
    ("kl_to_student", STUDENT, "KL(q‖student)", "-"),
    ("kl_to_teacher", TEACHER, "KL(q‖teacher)", "--"),
)
"""Series, colour, label and line style; the style keeps two lines that lie on each other apart."""
_DRAWN_ALPHA = np.r_[0:100, 100:200:2, 200:301]
"""Indices of the edges of `ALPHA_EDGES` to draw: bins 0.02 wide in [0, 1], and those outside."""


Drawn = tuple[Axes, str]
"""Axes of a figure, and how to read it."""


def figures(statistics: Statistics) -> list[tuple[str, str]]:
    """Every figure of the data that the run has data for: an ``<svg>`` element, and how to read it."""
    return _figures(
        statistics, "f", _accepted_of_problems, _surprises, _student_logprobs, _kl_by_position, _kl_distribution,
        _lengths, _funnel, _latency,
    )  # fmt: skip


def self_check_figures(statistics: Statistics) -> list[tuple[str, str]]:
    """Likewise, of what the method for alpha makes much the same in every run."""
    return _figures(statistics, "s", _alpha_distribution, _alpha_by_position, _ess_distribution)


def _figures(statistics: Statistics, name: str, *kinds: Callable[[Statistics], Drawn | None]) -> list[tuple[str, str]]:
    with matplotlib.rc_context(_STYLE):
        drawn = [found for kind in kinds if (found := kind(statistics)) is not None]
        return [(_svg(_root(axes), f"{name}{i}"), note) for i, (axes, note) in enumerate(drawn)]


MOST_BARS = 24


def _accepted_of_problems(statistics: Statistics) -> Drawn | None:
    counts = statistics.tally.k_of_n
    most = max(counts)
    if not most:
        return None
    step = most // MOST_BARS + 1  # none stands alone
    bars = [counts.get(0, 0)] + [
        sum(counts.get(k, 0) for k in range(low, low + step)) for low in range(1, most + 1, step)
    ]
    names = ["none"] + [f"{low}" if step == 1 else f"{low}–{low + step - 1}" for low in range(1, most + 1, step)]
    axes = _axes("Accepted samples of a problem", "accepted samples", "problems")
    drawn = axes.bar(range(len(bars)), bars, color=[REJECTED, *[ACCEPTED] * (len(bars) - 1)], width=0.72, alpha=0.85)
    if len(bars) <= 12:
        axes.bar_label(drawn, [f"{count:,}" for count in bars], fontsize=10, padding=2)
    ticks = range(0, len(bars), max(1, len(bars) // 10))
    axes.set_xticks(ticks, [names[i] for i in ticks])
    axes.grid(axis="x", visible=False)
    axes.set_ylim(0, 1.12 * max(bars))
    _whole_numbers(axes.yaxis)
    total, samples = len(statistics.tally.problems), Counter(total for _, total in statistics.tally.problems.values())
    each = f"{next(iter(samples)):,}" if len(samples) == 1 else f"{min(samples):,} to {max(samples):,}"
    return axes, f"Of {total:,} problems with {each} samples each. Training sees those that are not in the bar “none”."


def _surprises(statistics: Statistics) -> Drawn | None:
    if not any(group.least.total for group in statistics.groups):
        return None
    axes = _axes("The greatest surprise of each sample", "student's log-probability of its least likely token, nats",
                 "share of samples")  # fmt: skip
    for group, colour, label in _groups(statistics):
        if group.least.total:
            edges = group.least.edges[::4]
            shares = np.add.reduceat(group.least.counts, np.arange(0, len(edges) - 1) * 4) / group.least.total
            axes.stairs(shares, edges, color=colour, fill=True, alpha=0.16)
            axes.stairs(shares, edges, color=colour, linewidth=1.7, label=f"{label} ({group.least.total:,})")
    axes.axvline(np.log(RARE), color=INK, linewidth=1.2, linestyle="--", label=f"probability {RARE:g}")
    low = min(group.least.low for group in statistics.groups)
    axes.set_xlim(max(-20.2, min(np.floor(low), -12)), 0.2)
    axes.set_ylim(0)
    _percent(axes.yaxis)
    axes.legend(loc="upper left")
    return axes, "Samples left of the dashed line have a surprise. The leftmost bin has all below −20."


def _alpha_distribution(statistics: Statistics) -> Drawn | None:
    histogram = statistics.alpha_histogram
    if not histogram.total:
        return None
    axes = _axes("Distribution of α", "α, the teacher's weight", "share of tokens")
    edges, shares = histogram.edges[_DRAWN_ALPHA], _drawn_alpha(histogram)
    bars = [(low, high, share) for low, high, share in zip(edges, edges[1:], shares, strict=False) if share]
    low, high, share = np.array(bars).T
    axes.bar(low, share, high - low, align="edge", color=_alpha_colours((low + high) / 2), edgecolor=CARD, lw=0.4)
    if all(group.alpha.total for group in statistics.groups):
        for group, colour, label in _groups(statistics):
            axes.stairs(_drawn_alpha(group.alpha), edges, color=colour, linewidth=1.6, label=label)
    run = statistics.run
    if run.method != "fixed":
        for i, bound in enumerate((run.alpha_min, run.alpha_max)):
            axes.axvline(bound, color=SOFT, linewidth=1, linestyle="--", label=None if i else "bounds of α")
    mean = statistics.means["alpha"].value
    if mean is not None:
        axes.axvline(mean, ymax=0.86, color=INK, linewidth=1.4, label="mean")
    low, high = histogram.low, histogram.high
    axes.set_xlim(low - 0.15 if low < 0 else -0.02, high + 0.15 if high > 1 else 1.02)
    axes.set_ylim(0, 1.2 * axes.get_ylim()[1])
    _percent(axes.yaxis)
    axes.legend(loc="upper center", ncols=4)
    return axes, "Bars: all tokens, blue where the student has the greater weight, orange where the teacher has it."


def _alpha_by_position(statistics: Statistics) -> Drawn | None:
    series, histogram = statistics.by_position["alpha"], statistics.alpha_histogram
    if not series.count.sum():
        return None
    starts = series.bins()
    x = _middles(series, starts)
    low, middle, high = series.quantiles(starts, [0.1, 0.5, 0.9], histogram.low, histogram.high)
    alive = _samples_alive(statistics)
    axes, below = Figure((6.4, 4.2)).subplots(2, 1, sharex=True, height_ratios=[3, 1])
    axes.set(title="α by position in the sample", ylabel="α, the teacher's weight")
    axes.fill_between(x, low, high, color=INK, alpha=0.13, linewidth=0, label="10–90 % of tokens")
    axes.plot(x, middle, color=INK, linewidth=1.6, label="median")
    axes.plot(x, series.mean(starts), color=SOFT, linewidth=1.4, linestyle="--", label="mean")
    axes.set_ylim(min(0, histogram.low) - 0.02, max(1, histogram.high) + 0.02)
    axes.legend(ncols=3)
    below.fill_between(np.arange(len(alive)), alive, color=SOFT, alpha=0.35, linewidth=0)
    below.set(xlabel="position, tokens from the start", ylabel="samples\nalive", xlim=(0, max(1, len(alive) - 1)))
    below.set_ylim(0)
    _whole_numbers(below.yaxis, 2)
    return axes, "Above: over all tokens near a position. Below: how many samples are so long."


def _kl_by_position(statistics: Statistics) -> Drawn | None:
    if not all(statistics.by_position[name].count.sum() for name, *_ in _KL_LINES):
        return None
    axes = _axes("KL by position in the sample", "position, tokens from the start", "mean KL, nats")
    for name, colour, label, style in _KL_LINES:
        series = statistics.by_position[name]
        starts = series.bins()
        x = _middles(series, starts)
        axes.plot(x, series.mean(starts), color=colour, linewidth=1.7, linestyle=style, label=label)
    axes.set_xlim(0)
    axes.set_ylim(0)
    axes.legend()
    return axes, "How far the mixture q is from each model. With kl_symmetry both are equal between the bounds of α."


def _kl_distribution(statistics: Statistics) -> Drawn | None:
    histograms = [statistics.histograms[name] for name, *_ in _KL_LINES]
    if not any(histogram.total for histogram in histograms):
        return None
    axes = _axes("Distribution of KL", "KL of a token, nats (log scale)", "share of tokens")
    for histogram, (_, colour, label, style) in zip(histograms, _KL_LINES, strict=True):
        _shares(axes, histogram, colour, label, style)
    _log_x(axes, histograms[0] + histograms[1])
    _percent(axes.yaxis)
    axes.legend()
    least = _power_of_ten(histograms[0].edges[0])
    return axes, f"Tokens with less than {least} nats, where both models agree, are in the leftmost bin."


def _ess_distribution(statistics: Statistics) -> Drawn | None:
    histogram = statistics.histograms["ess_ratio"]
    if not histogram.total:
        return None
    axes = _axes("ESS ratio, student to teacher", "ESS ratio of a token (log scale)", "share of tokens")
    edges = histogram.edges
    colours = [STUDENT if high <= 1.0000001 else TEACHER for high in edges[1:]]
    axes.bar(edges[:-1], histogram.counts / histogram.total, np.diff(edges), align="edge", color=colours)
    axes.axvline(1, color=INK, linewidth=1.2, linestyle="--", label="balanced")
    _log_x(axes, histogram, include=1.0)
    _percent(axes.yaxis)
    axes.legend()
    note = (
        "Σ p_student²/q over Σ p_teacher²/q: q is the better proposal for the student below 1, for the teacher above."
    )
    return axes, note


def _student_logprobs(statistics: Statistics) -> Drawn | None:
    if not statistics.known:
        return None
    title, y = "Coverage: log-probability under the student", "share of tokens (log scale)"
    axes = _axes(title, "student's log-probability of a token, nats", y)
    for group, colour, label in _groups(statistics):
        _shares(axes, group.student_logprob, colour, label)
    axes.axvline(np.log(RARE), color=INK, linewidth=1.2, linestyle="--", label=f"probability {RARE:g}")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(_LogPercent())
    axes.yaxis.set_minor_formatter(_LogPercent(labelOnlyBase=False))
    low = min(group.student_logprob.low for group in statistics.groups)
    axes.set_xlim(max(-20.2, min(np.floor(low), -8)), 0.2)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]))
    axes.legend(loc="upper left")
    note = "Left of the dashed line: tokens that the student would hardly write. The leftmost bin has all below −20."
    return axes, note


def _lengths(statistics: Statistics) -> Drawn | None:
    longest = max(max(group.lengths, default=0) for group in statistics.groups)
    if longest < 1:
        return None
    axes = _axes("Length of samples", "tokens", "samples")
    width = max(1, -(-(longest + 1) // 40))
    edges = np.arange(0, longest + width + 1, width)
    for group, colour, label in _groups(statistics):
        if group.lengths:
            counts, _ = np.histogram([*group.lengths], edges, weights=[*group.lengths.values()])
            axes.stairs(counts, edges, color=colour, fill=True, alpha=0.22)
            label = f"{label} ({group.lengths.total():,})"
            axes.stairs(counts, edges, color=colour, linewidth=1.7, label=label)
    axes.set_ylim(0)
    _whole_numbers(axes.yaxis)
    axes.legend()
    return axes, "A peak at the right end is samples cut at max_new_tokens."


def _funnel(statistics: Statistics) -> Drawn | None:
    by_filter, total = rejections(statistics), statistics.tally.total
    if not by_filter:
        return None
    lost = np.array([0, *by_filter.values()])
    left = total - np.cumsum(lost)
    names = ["all samples", *(f"after {shortened(name, 24)}" for name in by_filter)]
    names[-1] += " = accepted"
    axes = _bars("Filters, in their order", "samples left", names, left)
    axes.barh(range(len(names)), lost, left=left, color=REJECTED, alpha=0.6, height=0.62)
    for i in range(len(names)):
        text = f"{left[i]:,}" + (f"  (−{lost[i]:,})" if lost[i] else "")
        axes.text(total * 1.015, i, text, va="center", fontsize=10)
    axes.set_xlim(0, total * 1.22)
    _whole_numbers(axes.xaxis)
    return axes, "The first filter that a sample fails rejects it, so later filters see only what earlier ones passed."


def _latency(statistics: Statistics) -> Drawn | None:
    histogram = statistics.latency
    if not histogram.total:
        return None
    median, late = histogram.quantile(0.5), histogram.quantile(0.95)
    axes = _axes("Latency of requests", "seconds from request to answer (log scale)", "requests")
    axes.stairs(histogram.counts, histogram.edges, color=ACCEPTED, fill=True, alpha=0.55)
    axes.axvline(median, color=INK, linewidth=1.4, label=f"median {median:.3g} s")
    axes.axvline(late, color=INK, linewidth=1.2, linestyle="--", label=f"95 % {late:.3g} s")
    _log_x(axes, histogram)
    _whole_numbers(axes.yaxis)
    axes.legend()
    note = "Many requests share a server: latency grows with client.concurrency while tokens/s of the run grow too."
    return axes, note


# -- what they have in common ------------------------------------------------------------------------------------------


def _axes(title: str, x: str, y: str, height: float = 3.6) -> Axes:
    """Axes of a figure of their own, 6.4 inches wide."""
    axes = Figure((6.4, height)).subplots()
    axes.set(title=title, xlabel=x, ylabel=y)
    return axes


def _bars(title: str, x: str, names: list[str], values: np.ndarray) -> Axes:
    """Horizontal bars with their names on the left, the first one on top."""
    axes = _axes(title, x, "", 1.5 + 0.36 * len(names))
    axes.barh(range(len(names)), values, color=ACCEPTED, height=0.62)
    axes.set_yticks(range(len(names)), names, color=INK)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    return axes


def _root(axes: Axes) -> Figure:
    figure = axes.get_figure(root=True)
    assert figure is not None, "axes outside of a figure"
    return figure


def _svg(figure: Figure, name: str) -> str:
    """A figure as an ``<svg>`` element, safe to put in a page: matplotlib escapes all text.

    A screen reader says its title and what its axes are. ``name`` goes before every id.
    """
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = out.getvalue().partition("<svg")[2].partition(">")[2]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'(font: [^;"]*?px) [^;"]*', r"\1 system-ui, sans-serif", text)
    text = re.sub("|".join(_VARIABLES), lambda found: _VARIABLES[found[0]], text)
    text = re.sub(r'( id="|href="#|url\(#)', rf"\g<0>{name}-", text)  # the figures of a page share its ids
    width, height = (f"{72 * inches:g}" for inches in figure.get_size_inches())
    said = [text for axes in figure.axes for text in (axes.get_title("left"), axes.get_ylabel(), axes.get_xlabel())]
    label = html.escape("; ".join(filter(None, said)).replace("\n", " "))
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{text}'


def _groups(statistics: Statistics) -> list[tuple[Group, str, str]]:
    """Both groups with their colours and labels."""
    return [(statistics.accepted, ACCEPTED, "accepted"), (statistics.rejected, REJECTED, "rejected")]


def _shares(axes: Axes, histogram: Histogram, colour: str, label: str, style: str = "-") -> None:
    """A histogram as shares of its own total."""
    if histogram.total:
        shares = histogram.counts / histogram.total
        axes.stairs(shares, histogram.edges, color=colour, fill=True, alpha=0.16)
        axes.stairs(shares, histogram.edges, color=colour, linewidth=1.7, linestyle=style, label=label)


def _drawn_alpha(histogram: Histogram) -> np.ndarray:
    """Shares of tokens between the edges `_DRAWN_ALPHA`."""
    return np.add.reduceat(histogram.counts, _DRAWN_ALPHA[:-1]) / histogram.total


def _alpha_colours(alphas: np.ndarray) -> list[tuple[str, float]]:
    """Colour and opacity, as on the page: blue for the student, orange for the teacher, the stronger the farther."""
    sides = np.clip(2 * alphas - 1, -1, 1)
    return [(STUDENT if side < 0 else TEACHER, 0.12 + 0.88 * abs(side) ** 0.5) for side in sides]


def _middles(series: PositionSeries, starts: np.ndarray) -> np.ndarray:
    """Mean position in each bin of `PositionSeries.bins`, tokens from the start."""
    end = int(np.flatnonzero(series.count)[-1]) + 1
    return (POSITION_EDGES[starts] + POSITION_EDGES[np.append(starts[1:], end)] - 1) / 2


def _samples_alive(statistics: Statistics) -> np.ndarray:
    """Samples that have a token at each position."""
    lengths = sum((group.lengths for group in statistics.groups), start=Counter())
    counts = np.bincount([*lengths], [*lengths.values()])
    return np.cumsum(counts[::-1])[::-1][1:]


def _percent(axis: Axis) -> None:
    axis.set_major_formatter(lambda value, _: _as_percent(value))


class _LogPercent(LogFormatter):
    """Matplotlib's choice of labels, which has some between powers of ten where there are few, in percent."""

    def __call__(self, value: float, position: int | None = None) -> str:
        """Of a tick."""
        return _as_percent(value) if super().__call__(value, position) else ""


def _as_percent(value: float) -> str:
    """Of a tick; one beyond 100 % has no label."""
    return f"{100 * value:g} %" if value < 1.001 else ""


def _whole_numbers(axis: Axis, ticks: int = 5) -> None:
    axis.set_major_locator(MaxNLocator(ticks, integer=True, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(EngFormatter(sep=""))


def _log_x(axes: Axes, histogram: Histogram, include: float = np.nan) -> None:
    """A logarithmic x axis over the filled bins and ``include``, with room around them."""
    filled = np.flatnonzero(histogram.counts)
    low, high = histogram.edges[filled[0]], histogram.edges[filled[-1] + 1]
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: _power_of_ten(value))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlim(np.fmin(low, include) / 1.3, np.fmax(high, include) * 1.3)


def _power_of_ten(value: float) -> str:
    """Such as ``10⁻⁴``, or ``0.1`` where that is short; matplotlib's own labels are TeX."""
    if 1e-3 <= value <= 1e4:
        return f"{value:g}"
    return "10" + f"{round(np.log10(value))}".translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
