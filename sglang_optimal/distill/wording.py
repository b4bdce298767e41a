"""Numbers in words, for pages and terminals."""

from __future__ import annotations


def percent(share: float) -> str:
    """Such as ``12 %`` or ``0.3 %``."""
    value = 100 * share
    if value in (0, 100):
        return f"{value:.0f} %"
    if value < 0.1:
        return "under 0.1 %"
    return f"{value:.1f} %".replace(".0 ", " ") if value < 10 or value > 99 else f"{value:.0f} %"


def minus(value: float, form: str) -> str:
    """A number with a typographic minus."""
    return format(value, form).replace("-", "−")
