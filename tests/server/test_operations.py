"""Running a server: what it says about itself, its metrics, and new weights for the student while it runs."""

from __future__ import annotations

import random
import shutil
import threading
import time
from pathlib import Path

import httpx
import pytest
from harness import SMALL, Case, check_greedy, random_ids
from oracle import MixedOracle
from prometheus_client.parser import text_string_to_metric_families
from safetensors.torch import load_file, save_file
from serving import as_argv, generate, serve, server_info, wait_until_free
from tiny_models import build_tiny_tokenizer_model

from sglang_optimal.config import AlphaSettings, MixingConfig

API_KEY = "a-key-for-this-test"


@pytest.fixture(scope="module")
def client(tiny_pair, tmp_path_factory):
    teacher, student = map(str, tiny_pair)
    # Metrics of alpha come once a second and after it; 2 decode steps a log line keep SGLang's own going.
    argv = ["--model-path", teacher, "--student-model-path", student, "--enable-metrics", *as_argv(SMALL)]
    log = tmp_path_factory.mktemp("operations") / "log"
    with serve("sglang_optimal.launch_server", argv, log, api_key=API_KEY) as ready:
        yield ready
        wait_until_free(ready)


@pytest.fixture(scope="module")
def new_student(tmp_path_factory) -> Path:
    """A student of the same shape with other weights."""
    folder = tmp_path_factory.mktemp("new-student")
    return build_tiny_tokenizer_model(folder / "student", seed=3, hidden_size=32, num_layers=1, vocab_size=80)


def ask(client, case: Case) -> dict:
    return generate(client, input_ids=case.teacher, sampling_params=case.params())


def pools(client) -> dict:
    return server_info(client)["internal_states"][0]["mixing"]


def update(client, path, **more) -> httpx.Response:
    return client.post("/update_student_weights_from_disk", json={"model_path": str(path), **more})


# -- information -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ["/get_server_info", "/server_info"])
def test_server_info(client, tiny_pair, route):
    mixing = client.get(route).json()["internal_states"][0]["mixing"]
    assert mixing["teacher_model_path"] == str(tiny_pair[0])
    assert mixing["student_model_path"] == str(tiny_pair[1])
    assert mixing["alpha"] == AlphaSettings().model_dump()
    assert mixing["alpha"].keys() >= {"alpha_method", "alpha_min", "alpha_max", "fixed_alpha", "kl_budget"}
    for side in ("teacher_pool", "student_pool"):
        assert mixing[side]["size"] == SMALL["max_total_tokens"]


@pytest.mark.parametrize(
    "method,route",
    [
        ("GET", "/mixing"),
        ("POST", "/update_student_weights_from_disk"),
        ("GET", "/get_server_info"),
        ("POST", "/mixing/verdict"),
    ],
)
def test_api_key_on_our_routes(client, method, route):
    for headers in ({}, {"Authorization": "Bearer another-key"}):
        response = httpx.request(method, client.base_url.join(route), json={"model_path": "x"}, headers=headers)
        assert response.status_code == 401
    assert client.get("/mixing").status_code == 200


def test_the_page_with_a_key(client, tmp_path):
    """As docs/api.md has it: fetched with the key, opened as a file, given the server's URL and the key."""
    pytest.importorskip("selenium", reason="selenium is not installed")
    from browser import CHROMEDRIVER, CHROMIUM, Page, chromium

    if CHROMIUM is None or CHROMEDRIVER is None:
        pytest.skip("chromium and chromedriver are not installed")
    (tmp_path / "mixing.html").write_text(client.get("/mixing").text, encoding="utf-8")
    with chromium() as driver:
        page = Page(driver, (tmp_path / "mixing.html").as_uri(), path="")
        assert driver.find_element("id", "status").text == "Choose an example, or press Sample."  # no first run
        page.compare("mixture")
        page.fill(server=str(client.base_url), tokens=8, problem="what is 12+30?", answer="42")
        page.sample()
        assert page.part("mixture", "error").text != "" and page.tokens("mixture") == []
        page.fill(key=API_KEY)
        page.sample()
        assert page.part("mixture", "error").text == "" and page.tokens("mixture")
        assert page.part("mixture", "verdict").text[0] in "✓✗–"
        words = [row.word for row in page.tip(page.tokens("mixture")[0]).rows]
        assert not any("#" in word for word in words), words


def test_api_key_on_every_route(client):
    """SGLang's and ours alike, but for what it leaves open on purpose."""
    from sglang.srt.entrypoints.http_server import app

    from sglang_optimal.runtime.entrypoints import http_server as routes

    routes.install(MixingConfig())
    paths = [
        (method, route.path.replace("{", "").replace("}", "").replace(":path", ""))
        for route in app.routes
        for method in getattr(route, "methods", None) or ()
        if method not in ("HEAD", "OPTIONS")
    ]
    assert len(paths) > 60 and ("POST", "/update_student_weights_from_disk") in paths and ("GET", "/mixing") in paths
    open_paths = set()
    for method, path in paths:
        response = httpx.request(method, client.base_url.join(path), json={}, timeout=60)
        if response.status_code not in (401, 403):  # 403: not without an admin key
            assert response.status_code < 500, (method, path, response.status_code)
            open_paths.add(path)
    assert all(path.startswith(("/health", "/ready", "/metrics")) for path in open_paths), open_paths


def test_flush_cache_clears_both(client):
    rng = random.Random(1)
    ask(client, Case(random_ids(rng, 40), random_ids(rng, 30), 4))
    before = pools(client)
    assert before["teacher_pool"]["evictable"] > 0 and before["student_pool"]["evictable"] > 0
    wait_until_free(client)


# -- metrics ---------------------------------------------------------------------------------------------------------


def metrics(client) -> dict[tuple, float]:
    """{(sample name, side or None, le or None): value} of our own metrics."""
    response = client.get("/metrics/")
    assert response.status_code == 200
    return {
        (sample.name, sample.labels.get("side"), sample.labels.get("le")): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
        if sample.name.startswith("sglang_optimal:")
    }


def test_metrics(client):
    def settled(tokens: float) -> dict[tuple, float]:
        """Once all tokens are counted; gauges follow within a second."""
        deadline = time.monotonic() + 20
        while True:
            now = metrics(client)
            counted = now.get(("sglang_optimal:mixed_tokens_total", None, None), 0) >= tokens
            if counted and now["sglang_optimal:student_cache_hit_rate", None, None] > 0:
                return now
            assert time.monotonic() < deadline, now
            time.sleep(0.3)

    rng = random.Random(2)
    teacher, student = random_ids(rng, 30), random_ids(rng, 50)
    ask(client, Case(teacher, None, 5))  # not counted
    time.sleep(1.5)
    before = metrics(client)

    def change(now, name, side=None, le=None):
        return now[name, side, le] - before.get((name, side, le), 0)

    outputs = [ask(client, Case(teacher, student, 20)) for _ in range(3)]
    now = settled(before.get(("sglang_optimal:mixed_tokens_total", None, None), 0) + 60)
    alphas = [alpha for output in outputs for alpha in output["meta_info"]["alpha"]]
    kls = [kl for output in outputs for kl in output["meta_info"]["kl_to_student"]]
    assert change(now, "sglang_optimal:mixed_requests_total") == 3
    assert change(now, "sglang_optimal:mixed_tokens_total") == 60
    assert change(now, "sglang_optimal:alpha_count") == 60
    assert change(now, "sglang_optimal:alpha_sum") == pytest.approx(sum(alphas), rel=1e-4)
    assert change(now, "sglang_optimal:alpha_bucket", None, "0.5") == sum(alpha <= 0.5 for alpha in alphas)
    assert change(now, "sglang_optimal:kl_sum", "student") == pytest.approx(sum(kls), rel=1e-4)
    assert change(now, "sglang_optimal:kl_bucket", "student", "0.3") == sum(kl <= 0.3 for kl in kls)
    assert change(now, "sglang_optimal:kl_count", "teacher") == 60
    assert min(alphas) <= now["sglang_optimal:mean_alpha", None, None] <= max(alphas)
    assert change(now, "sglang_optimal:student_prompt_tokens_total") == 150
    assert change(now, "sglang_optimal:student_cached_tokens_total") == 98  # all but the last token, twice
    assert 0 < now["sglang_optimal:student_cache_hit_rate", None, None] < 1
    assert now["sglang_optimal:student_pool_usage", None, None] == 0


# -- student weights -------------------------------------------------------------------------------------------------


@pytest.fixture
def old_student_back(client, tiny_pair):
    yield
    assert update(client, tiny_pair[1]).status_code == 200


def test_new_student_weights(client, tiny_pair, tiny_oracle, new_student, old_student_back):
    rng = random.Random(3)
    mixed, plain = Case(random_ids(rng, 30), random_ids(rng, 40), 16), Case(random_ids(rng, 30), None, 16)
    for case in (mixed, plain):
        assert check_greedy(tiny_oracle, case, ask(client, case)) == 16
    cached = pools(client)

    response = update(client, new_student, weight_version="step-1")
    assert response.status_code == 200, response.text
    assert response.json()["success"] is True
    now = pools(client)
    assert now["student_model_path"] == str(new_student)
    assert now["student_weight_version"] == "step-1"
    assert now["teacher_model_path"] == str(tiny_pair[0])
    assert client.get("/get_model_info").json()["model_path"] == str(tiny_pair[0])
    assert now["student_pool"]["free"] == now["student_pool"]["size"]  # computed with the old weights
    assert now["teacher_pool"] == cached["teacher_pool"]  # untouched
    oracle = MixedOracle(tiny_pair[0], new_student)
    for case in (mixed, plain):
        output = ask(client, case)
        assert check_greedy(oracle, case, output) == 16
        assert output["meta_info"]["cached_tokens"] >= 29  # the teacher's prompt is still cached


def test_update_waits_for_running_requests(client, tiny_pair, tiny_oracle, new_student, old_student_back):
    case = Case(random_ids(random.Random(4), 30), random_ids(random.Random(5), 30), 300)
    answers = []
    thread = threading.Thread(target=lambda: answers.append(ask(client, case)))
    thread.start()
    deadline = time.monotonic() + 20
    while pools(client)["student_pool"]["requests"] == 0:
        assert time.monotonic() < deadline
    assert update(client, new_student).status_code == 200
    thread.join()
    # Every token of it came from the old weights.
    assert check_greedy(tiny_oracle, case, answers[0]) == 300
    case = Case(case.teacher, case.student, 8)
    assert check_greedy(MixedOracle(tiny_pair[0], new_student), case, ask(client, case)) == 8


def broken(kind: str, good: Path, folder: Path) -> Path:
    copy = folder / kind
    shutil.copytree(good, copy)
    file = copy / "model.safetensors"
    if kind == "truncated":
        file.write_bytes(file.read_bytes()[:-1000])
    elif kind == "no-safetensors":
        file.unlink()
    else:
        tensors = load_file(file)
        name = "model.layers.0.mlp.up_proj.weight"
        if kind == "missing-tensor":
            del tensors[name]
        elif kind == "nan":
            tensors[name][0, 0] = float("nan")
        else:
            tensors[name] = tensors[name][:-1].clone()
        save_file(tensors, file)
    return copy


@pytest.mark.parametrize(
    "kind,message",
    [
        ("truncated", "model.safetensors cannot be read"),
        ("nan", "has NaN or infinity"),
        ("no-safetensors", "model_path: no *.safetensors in"),
        ("missing-tensor", "tensor 'model.layers.0.mlp.up_proj.weight' has shape None"),
        ("other-shape", "tensor 'model.layers.0.mlp.up_proj.weight' has shape [63, 32]"),
    ],
)
def test_a_bad_checkpoint_leaves_the_old_weights(client, tiny_oracle, new_student, tmp_path, kind, message):
    response = update(client, broken(kind, new_student, tmp_path))
    assert response.status_code == 400
    assert message in response.json()["message"]
    case = Case(random_ids(random.Random(6), 20), random_ids(random.Random(7), 20), 12)
    assert check_greedy(tiny_oracle, case, ask(client, case)) == 12


@pytest.mark.parametrize(
    "body,message",
    [
        ({"model_path": "/no/such/folder"}, "model_path: no folder at /no/such/folder"),
        ({"model_path": ""}, "model_path: must be a folder"),
        ({}, "model_path"),
        ({"model_path": 7}, "model_path"),
        ({"model_path": "/", "load_format": "pt"}, "load_format: only safetensors are read"),
    ],
)
def test_bad_update_requests(client, body, message):
    response = client.post("/update_student_weights_from_disk", json=body)
    assert response.status_code == 400, response.text
    assert message in response.text


def test_sglang_s_own_route_updates_the_policy(client, tiny_pair, tiny_oracle, new_student, old_student_back):
    """Which is the student; the teacher's weights do not fit it, and are refused."""
    case = Case(random_ids(random.Random(8), 20), random_ids(random.Random(9), 20), 12)
    response = client.post("/update_weights_from_disk", json={"model_path": str(tiny_pair[0])})
    assert response.status_code == 400 and "The student's old weights are in place" in response.json()["message"]
    assert check_greedy(tiny_oracle, case, ask(client, case)) == 12
    body = {"model_path": str(new_student), "weight_version": "step-2"}
    response = client.post("/update_weights_from_disk", json=body)
    assert response.status_code == 200, response.text
    output = ask(client, case)
    assert check_greedy(MixedOracle(tiny_pair[0], new_student), case, output) == 12
    assert output["meta_info"]["student_weight_version"] == output["meta_info"]["weight_version"] == "step-2"
    assert client.get("/get_model_info").json()["model_path"] == str(tiny_pair[0])
