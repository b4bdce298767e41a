"""What tests of runs share that ask a stub of a server."""

from __future__ import annotations

import pytest
from stub_server import stub_server

from sglang_optimal.distill import client
from sglang_optimal.distill.report import figures


@pytest.fixture(autouse=True)
def figures_are_not_drawn(request, monkeypatch):
    """But in the report's own tests: drawing takes longer than all else of a run here, whose figures are still made."""
    if request.module.__name__ != "test_report":
        monkeypatch.setattr(figures, "_svg", lambda figure, name: "<svg></svg>")


@pytest.fixture
def impatient(monkeypatch):
    """Clients that ask again at once."""
    monkeypatch.setattr(client, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(client, "LONGEST_PAUSE", 0.1)


@pytest.fixture
def stub():
    with stub_server() as server:
        yield server
