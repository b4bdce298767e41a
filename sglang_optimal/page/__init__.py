"""The page at ``/mixing``: one self-contained HTML file that talks to ``/generate``."""

from __future__ import annotations

from importlib import resources


def html() -> str:
    """The page's source."""
    return resources.files(__package__).joinpath("mixing.html").read_text(encoding="utf-8")
