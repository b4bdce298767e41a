"""What the report's figures have in common."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from sglang_optimal.distill.report.histogram import POSITION_EDGES, Histogram, PositionSeries
from sglang_optimal.distill.report.statistics import Group, Statistics
from sglang_optimal.distill.report.svg import ACCEPTED, LINE, REJECTED, STUDENT, TEACHER

KL_LINES = (
    ("kl_to_student", STUDENT, "KL(q‖student)", "-"),
    ("kl_to_teacher", TEACHER, "KL(q‖teacher)", "--"),
)
"""Series, colour, label and line style; the style keeps two lines that lie on each other apart."""


def titled_axes(figure: Figure, title: str, x: str, y: str) -> Axes:
    axes = figure.subplots()
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    return axes


def legend(axes: Axes, *, location: str = "best", columns: int = 1) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc=location, ncols=columns, fontsize=10, handlelength=1.8, columnspacing=1.2)


def percent_ticks(axis: Axis) -> None:
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %" if value < 1.001 else ""))


def short_number(value: float) -> str:
    """Such as ``12k``."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def power_of_ten(value: float) -> str:
    """Such as ``10⁻⁴``, or ``0.1`` where that is short; matplotlib's own labels are TeX."""
    if 1e-3 <= value <= 1e4:
        return f"{value:g}"
    return "10" + f"{round(np.log10(value))}".translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def counts_axis(axis: Axis, ticks: int = 5) -> None:
    """Whole numbers."""
    axis.set_major_locator(MaxNLocator(ticks, integer=True, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))


def groups(statistics: Statistics) -> list[tuple[Group, str, str]]:
    """Both groups with their colours and labels."""
    return [(statistics.accepted, ACCEPTED, "accepted"), (statistics.rejected, REJECTED, "rejected")]


def both(statistics: Statistics, histogram: Callable[[Group], Histogram]) -> Histogram:
    return histogram(statistics.accepted) + histogram(statistics.rejected)


def alpha_colour(alpha: float) -> tuple[str, float]:
    """Colour and opacity, as on the page: blue for the student, orange for the teacher, the stronger the farther."""
    side = min(1.0, max(-1.0, 2 * alpha - 1))
    return STUDENT if side < 0 else TEACHER, 0.12 + 0.88 * abs(side) ** 0.5


def alpha_bins(histogram: Histogram) -> np.ndarray:
    """Indices of the edges of `ALPHA_EDGES` to draw: bins 0.02 wide in [0, 1], and those outside."""
    edges = histogram.edges
    inside = (edges > -1e-9) & (edges < 1 + 1e-5)
    return np.flatnonzero(~inside | (np.cumsum(inside) % 2 == 1))


def coarser(counts: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Counts between the ``chosen`` edges."""
    return np.add.reduceat(counts, chosen[:-1])


def stairs(axes: Axes, histogram: Histogram, colour: str, label: str, style: str = "-") -> None:
    """A histogram as shares of its own total."""
    if histogram.total:
        shares = histogram.counts / histogram.total
        axes.stairs(shares, histogram.edges, color=colour, fill=True, alpha=0.16)
        axes.stairs(shares, histogram.edges, color=colour, linewidth=1.7, linestyle=style, label=label)


def log_extent(axes: Axes, histograms: list[Histogram], include: float | None = None) -> None:
    """Limit a logarithmic x axis to the filled bins, with room around them."""
    edges = histograms[0].edges
    filled = np.flatnonzero(sum(h.counts for h in histograms))
    low, high = edges[filled[0]], edges[filled[-1] + 1]
    if include is not None:
        low, high = min(low, include), max(high, include)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: power_of_ten(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlim(low / 1.3, high * 1.3)


def position_axis(series: PositionSeries, starts: np.ndarray) -> np.ndarray:
    """Mean position in each bin of `PositionSeries.bins`, tokens from the start."""
    end = int(np.flatnonzero(series.count)[-1]) + 1
    low, high = POSITION_EDGES[starts], POSITION_EDGES[np.append(starts[1:], end)]
    return (low + high - 1) / 2


def samples_alive(lengths: np.ndarray) -> np.ndarray:
    """Samples that have a token at each position, from the number of samples of each length."""
    return np.cumsum(lengths[::-1])[::-1][1:]


def horizontal_bars(axes: Axes, names: list[str], ink: str) -> None:
    """Names on the left, first one on top."""
    axes.set_yticks(range(len(names)), names, color=ink)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_color(LINE)
