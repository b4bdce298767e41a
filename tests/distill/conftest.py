"""What tests of runs share that ask a stub of a server."""

from __future__ import annotations

import pytest
from stub_server import stub_server

from sglang_optimal.distill import client


@pytest.fixture
def impatient(monkeypatch):
    """Clients that ask again at once."""
    monkeypatch.setattr(client, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(client, "LONGEST_PAUSE", 0.1)


@pytest.fixture
def stub():
    with stub_server() as server:
        yield server
