"""The page at ``/mixing``: one self-contained HTML file that talks to ``/generate``."""

from __future__ import annotations

from importlib import resources

from sglang_optimal.page.tokens import viewer


def html() -> str:
    """The page's source."""
    text = resources.files(__package__).joinpath("mixing.html").read_text(encoding="utf-8")
    for suffix in ("css", "js"):
        text = text.replace(f"/* tokens.{suffix} */", viewer(suffix))
    return text
