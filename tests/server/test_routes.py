"""Every route of SGLang's has a row in docs/compatibility.md, and does what that says."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "compatibility.md").read_text()
SECTION = PAGE.partition("## SGLang's routes beside a student")[2].partition("\n## ")[0]
TABLE = {
    route: row.split("|")[2].strip()
    for row in SECTION.splitlines()
    if row.startswith("| `/")
    for route in re.findall("`(/[^`]*)`", row.split("|")[1])
}
OURS = {"/mixing", "/mixing/verdict", "/score_mixture", "/update_student_weights_from_disk"}
OF_FASTAPI = {"/openapi.json", "/docs", "/docs/oauth2-redirect", "/redoc"}


def _all(routes) -> Iterator[Any]:
    """Also those of routers that are part of an application."""
    for route in routes:
        inner = getattr(route, "original_router", None) or getattr(route, "router", None)
        if hasattr(route, "path") and inner is None:
            yield route
        elif inner is not None:
            yield from _all(inner.routes)


def test_every_route_has_a_row():
    from sglang.srt.entrypoints.http_server import app

    routes = {route.path for route in _all(app.routes)} - OURS - OF_FASTAPI
    assert TABLE.keys() == routes, TABLE.keys() ^ routes
    assert set(TABLE.values()) == {"mixes", "plain", "policy", "server", "refused"}


BODIES = {
    "/load_lora_adapter": {"lora_name": "x", "lora_path": "y"},
    "/load_lora_adapter_from_tensors": {"lora_name": "x", "config_dict": {}, "serialized_named_tensors": ["eA=="]},
    "/unload_lora_adapter": {"lora_name": "x"},
    "/set_internal_state": {"server_args": {"pp_max_micro_batch_size": 1}},
    "/init_weights_send_group_for_remote_instance": {
        "master_address": "127.0.0.1", "ports": "1", "group_rank": 0, "world_size": 2,
    },
    "/send_weights_to_remote_instance": {"master_address": "127.0.0.1", "ports": "1"},
    "/add_external_corpus": {"corpus_id": "x", "documents": ["y"]},
    "/remove_external_corpus": {"corpus_id": "x"},
    "/hicache/storage-backend": {"hicache_storage_backend": "file"},
    "/pd_role_switch": {"role": "decode"},
    "/scale_elastic_ep": {"new_ep_size": 2},
}  # fmt: skip
GETS = (
    "/list_external_corpora",
    "/get_hicache_l3_cache_layout",
    "/get_remote_instance_transfer_engine_info",
    "/remote_instance_transfer_engine_info",
)
REFUSED = sorted(route for route, kind in TABLE.items() if kind == "refused")


@pytest.mark.parametrize("route", REFUSED)
def test_what_is_refused(mixed_server, route):
    method = "PUT" if route == "/hicache/storage-backend" else "GET" if route in GETS else "POST"
    response = mixed_server.request(method, route, json=BODIES.get(route, {}))
    assert 400 <= response.status_code < 600, (response.status_code, response.text)
    assert mixed_server.get("/health_generate").status_code == 200
