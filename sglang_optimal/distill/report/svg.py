"""matplotlib figures as SVG that takes its colours from the page, so that it suits light and dark mode."""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Callable

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

# matplotlib knows no CSS variables, so each stands in for one of the page's until the SVG is written.
INK, SOFT, LINE, STUDENT, TEACHER, ACCEPTED, REJECTED, CARD = (f"#0102{i:02x}" for i in range(3, 11))
_VARIABLES = {
    INK: "--ink", SOFT: "--soft", LINE: "--line", STUDENT: "--student-line", TEACHER: "--teacher-line",
    ACCEPTED: "--accepted", REJECTED: "--rejected", CARD: "--card",
}  # fmt: skip

_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "text.parse_math": False,  # names of filters and strategies are no mathematics
    "font.size": 11,
    "text.color": INK,
    "axes.labelcolor": SOFT,
    "axes.edgecolor": LINE,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": SOFT,
    "ytick.labelcolor": SOFT,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.unicode_minus": True,
}


@dataclasses.dataclass(frozen=True)
class Picture:
    """svg: the figure. note: how to read it."""

    svg: str
    note: str


Draw = Callable[[Figure], None]


def svg(name: str, label: str, draw: Draw, size: tuple[float, float] = (6.4, 3.6)) -> str:
    """Draw a figure.

    Args:
        name: unique in the page; goes before every id.
        label: what a screen reader says of it.
        draw: puts axes on the figure it is given.
        size: inches, at 72 pixels each.

    Returns:
        An ``<svg>`` element, safe to put in a page: matplotlib escapes all text.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'(font: [^;"]*?px) [^;"]*', r"\1 system-ui, sans-serif", text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    # Figures of one page share its ids.
    text = re.sub(r' id="([^"]+)"', rf' id="{name}-\1"', text)
    text = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", text)
    width, height = (f"{72 * inches:g}" for inches in size)
    opening = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{_attribute(label)}">'
    return opening + text[text.index(">", text.index("<svg")) + 1 :]


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
