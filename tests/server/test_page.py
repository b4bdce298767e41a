"""The page at /mixing in a headless Chromium."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from serving import events, message_of

from sglang_optimal.distill.config import load_config
from sglang_optimal.distill.contexts import ContextBuilder
from sglang_optimal.distill.problems import Problem

pytest.importorskip("selenium", reason="selenium is not installed")
from browser import CHROMEDRIVER, CHROMIUM, Page, chromium
from selenium.webdriver import Keys

pytestmark = pytest.mark.skipif(
    CHROMIUM is None or CHROMEDRIVER is None, reason="chromium and chromedriver are not installed"
)

TOKENS = 12
SETTINGS = {
    "student": {"fixed_alpha": 0}, "alpha-25": {"fixed_alpha": 0.25}, "alpha-50": {"fixed_alpha": 0.5},
    "mixture": {"alpha_method": "kl_symmetry"}, "alpha-75": {"fixed_alpha": 0.75}, "teacher": {"fixed_alpha": 1},
    "budget-002": {"kl_budget": 0.02}, "budget-01": {"kl_budget": 0.1}, "budget-05": {"kl_budget": 0.5},
}  # fmt: skip
PROBLEM, ANSWER = "what is 12+30?", "it is 42."


@pytest.fixture(scope="module")
def driver():
    with chromium() as running:
        yield running


def errors(driver) -> list[dict]:
    severe = [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
    return [entry for entry in severe if "400 (Bad Request)" not in entry["message"]]


def url_of(client) -> str:
    return str(client.base_url).rstrip("/")


@pytest.fixture
def page(client, driver):
    page = Page(driver, url_of(client))
    # The tiny models' texts end anywhere; a temperature of 0 makes them the same every time.
    page.fill(problem=PROBLEM, answer=ANSWER, tokens=TOKENS)
    page.fill(teacher_template="{problem} {answer}", student_template="{problem}")
    yield page
    assert errors(driver) == []


def ask(client, **alpha) -> dict:
    """The last event of the request that the page makes."""
    custom = {
        "teacher_messages": [{"role": "user", "content": f"{PROBLEM} {ANSWER}"}],
        "student_messages": [{"role": "user", "content": PROBLEM}],
        "return_mixing_info": True,
        "return_top_k": 5,
        "top_k_of": ["teacher", "student", "mixture"],
        **alpha,
    }
    params = {"temperature": 0, "max_new_tokens": TOKENS, "custom_params": custom}
    body = {"sampling_params": params, "return_logprob": True, "return_text_in_logprobs": True, "stream": True}
    return events(client, "/generate", body)[-1]


def text_of(tokens: list) -> str:
    return "".join(token.get_property("textContent") for token in tokens)


def pieces(meta: dict) -> str:
    return "".join(piece[2] for piece in meta["output_token_logprobs"])


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def words_of(driver) -> str:
    return driver.find_element("id", "status").text


def wait_for(condition, seconds: float = 10):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# -- opening it -------------------------------------------------------------------------------------------------------


def test_it_is_one_self_contained_file(client):
    response = client.get("/mixing")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/html")
    assert "src=" not in response.text and "https://" not in response.text and "innerHTML" not in response.text
    assert "default-src 'none'" in response.text  # nothing can be loaded, whatever a model writes
    assert not re.search(r"/\* \w+\.(css|js) \*/", response.text)  # every part is in its place


def test_the_first_example_runs_once(client):
    with chromium() as driver:
        page = Page(driver, url_of(client))
        chips = driver.find_elements("css selector", "#examples .chip")
        assert 4 <= len(chips) <= 5
        assert [chip.get_attribute("aria-pressed") for chip in chips] == ["true"] + ["false"] * (len(chips) - 1)
        assert driver.find_element("id", "look").text.startswith("What to look at: ")
        for card in ("student", "mixture", "teacher"):
            assert page.tokens(card) and page.part(card, "error").text == ""
        Page(driver, url_of(client))  # loaded again
        assert driver.find_elements("css selector", ".sample") == []
        assert words_of(driver) == "Choose an example, or press Sample."
        driver.find_elements("css selector", "#examples .chip")[-1].click()
        page.wait_for_end()
        assert page.tokens("mixture")
        assert driver.find_element("css selector", "[name=strategy]:checked").get_attribute("value") == "system"
        assert driver.find_element("id", "problem").get_property("value") == "What is the capital of Australia?"
        assert errors(driver) == []


def test_a_first_run_that_fails(client):
    """A server that is not ready, and one that refuses."""
    before = """const real = fetch;
        window.fetch = (url, options) =>
            STATUS(String(url)) ? Promise.resolve(new Response(BODY, {status: CODE})) : real(url, options);"""
    for path, code, body in (
        ("/health", 503, ""),
        ("/generate", 400, '{"error": {"message": "this server has no student"}}'),
    ):
        script = before.replace("STATUS(String(url))", f"String(url).endsWith('{path}')")
        script = script.replace("CODE", str(code)).replace("BODY", json.dumps(body))
        with chromium() as driver:
            driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": script})
            page = Page(driver, url_of(client))
            if path == "/health":
                assert words_of(driver) == "The server is not ready (503). Press Sample when it is."
                assert driver.find_elements("css selector", ".sample") == []
            else:
                assert page.part("mixture", "error").text == "this server has no student"
                Page(driver, url_of(client))
                assert driver.find_elements("css selector", ".sample") == []  # not again


# -- samples ----------------------------------------------------------------------------------------------------------


def test_settings_side_by_side(client, page):
    page.compare(*SETTINGS)
    page.sample()
    cards = [card.get_attribute("id") for card in page.driver.find_elements("css selector", ".sample")]
    assert cards == list(SETTINGS)
    for card, alpha in SETTINGS.items():
        answer = ask(client, **alpha)
        meta = answer["meta_info"]
        assert text_of(page.tokens(card)) == pieces(meta)
        assert page.part(card, "error").text == ""
        figures = page.figures(card)
        assert figures["tokens"] == str(len(meta["alpha"]))
        assert float(figures["KL to student"]) == pytest.approx(mean(meta["kl_to_student"]), abs=2e-3)
        assert float(figures["student log p"]) == pytest.approx(mean(meta["student_logprob"]), abs=2e-2)
        assert float(figures["mean α"]) == pytest.approx(mean(meta["alpha"]), abs=2e-3)
        ending = {"length": "stopped at the token limit", "stop": "ended by itself"}[meta["finish_reason"]["type"]]
        assert page.part(card, "ending").text == ending
        verdict = client.post("/mixing/verdict", json={"text": answer["text"], "answer": ANSWER}).json()
        shown = page.part(card, "verdict").text
        assert shown.startswith(
            {"right": "✓ right", "wrong": "✗ wrong", "none": "– no answer found"}[verdict["verdict"]]
        )
        if verdict["verdict"] == "wrong":
            assert shown.endswith(f"{verdict['said']}, not 42")
    assert "match: numeric" in page.driver.find_element("id", "compared").text


def test_no_setting_chosen(page):
    page.compare()
    page.sample()
    assert words_of(page.driver) == "Choose at least one mixture to sample."


def test_right_answers_and_those_in_words(client, page):
    meta = ask(client, fixed_alpha=0)
    page.compare("student")
    page.fill(answer=meta["text"].strip()[:20] or "x", teacher_template="{problem}")
    page.sample()
    verdict = client.post("/mixing/verdict", json={"text": meta["text"], "answer": meta["text"].strip()[:20]}).json()
    assert (
        page.part("student", "verdict").text[0]
        == {"right": "✓", "wrong": "✗", "none": "–", "unjudged": "–"}[verdict["verdict"]]
    )
    page.fill(answer="first\nsecond")
    page.sample()
    assert page.part("student", "verdict").text.startswith("– not judged")


def test_verdict_route(client):
    body = {"text": "12+30=42", "answer": "it is 42."}
    answer = client.post("/mixing/verdict", json=body)
    assert answer.json() == {"verdict": "right", "match": "numeric", "said": "42", "expected": "42"}
    assert "text" in client.post("/mixing/verdict", json={"answer": "42"}).text
    assert client.post("/mixing/verdict", json={"answer": "42"}).status_code == 400
    assert client.post("/mixing/verdict", json={**body, "text": "x" * 100_001}).status_code == 400
    assert "fixed_alpha" in message_of(client.post("/mixing/verdict", json={**body, "fixed_alpha": 1}))


def test_own_mixture(client, page):
    page.fill(method="fixed", fixed="1.5")
    assert page.driver.find_element("css selector", "[value=own][name=setting]").is_selected()
    assert not page.driver.find_element("id", "alpha-min").is_enabled()
    page.compare("own")
    page.sample()
    assert text_of(page.tokens("own")) == pieces(ask(client, fixed_alpha=1.5)["meta_info"])
    page.fill(method="kl_budget", budget="0.05")
    assert page.driver.find_element("id", "alpha-min").is_enabled()
    assert not page.driver.find_element("id", "fixed").is_enabled()
    page.sample()
    meta = ask(client, kl_budget=0.05)["meta_info"]
    assert text_of(page.tokens("own")) == pieces(meta)
    assert float(page.figures("own")["mean α"]) == pytest.approx(mean(meta["alpha"]), abs=2e-3)


def test_strategies_write_the_teachers_prompt(page):
    script = "return [orderOf(SETTINGS[0]).teacher, orderOf(SETTINGS[0]).student];"
    page.fill(answer="12+30 = 42. The answer is 1,042.", student_template="{problem}")
    asked = f"Answer this question: {PROBLEM}"
    for strategy, told in {
        "copy": "Copy this answer: 12+30 = 42. The answer is 1,042.",
        "hint": "Hint: 12+30 = 42. The answer is 1,042.",
        "final": "The answer is 1,042.",
    }.items():
        page.tell(strategy)
        assert page.driver.execute_script(script) == [
            [{"role": "user", "content": f"{asked}\n\n{told}"}],
            [{"role": "user", "content": PROBLEM}],
        ]
    page.tell("system")
    teacher, student = page.driver.execute_script(script)
    assert teacher[0]["role"] == "system" and "12+30 = 42. The answer is 1,042." in teacher[0]["content"]
    assert teacher[1] == {"role": "user", "content": asked} and student == [{"role": "user", "content": PROBLEM}]
    page.fill(teacher_template="{problem}! {answer}")
    assert page.driver.find_element("css selector", "[name=strategy]:checked").get_attribute("value") == "own"
    # Values are not templates.
    page.fill(
        problem="say {answer} and $&", teacher_template="{problem} {answer} {other} \\boxed{final}", teacher_system=""
    )
    (teacher,), _ = page.driver.execute_script(script)
    assert teacher["content"] == "say {answer} and $& 12+30 = 42. The answer is 1,042. {other} \\boxed{1,042}"
    page.driver.find_element("css selector", "summary").click()
    for template, leaks in (("{problem}", False), ("{problem} {answer}", True), ("{final}", True)):
        page.fill(student_template=template)
        assert (page.driver.find_element("id", "leak").text == "The student sees the answer.") == leaks


# -- a token ----------------------------------------------------------------------------------------------------------


def shares(text: str) -> float:
    """The probability that a page writes as a percentage."""
    return float(text.strip("<> %")) / 100


def close_to(text: str, p: float) -> bool:
    return abs(shares(text) - p) <= max(0.006, 0.06 * p)


def test_the_picture_of_a_token(client, page):
    page.compare("mixture")
    page.sample()
    meta = ask(client)["meta_info"]
    tokens = page.tokens("mixture")
    sides = ("teacher", "student", "mixture")
    for i, token in enumerate(tokens):
        tip = page.tip(token, hover=i == 0, tap=i == 1)
        own = [math.exp(meta[f"{side}_logprob"][i]) for side in sides]
        said = re.search(
            r"The teacher wanted it: (.*? %), the student (.*? %); the mixture drew it with (.*? %)\.", tip.words
        )
        assert all(close_to(text, p) for text, p in zip(said.groups(), own, strict=True)), (tip.words, own)
        assert (
            f"α {meta['alpha'][i]:.3f}" in tip.note and f"KL to the student {meta['kl_to_student'][i]:.3f}" in tip.note
        )
        *rows, others = tip.rows
        assert others.word.strip() == "others"
        # The five of each side, and what was drawn.
        expected: dict[int, tuple] = {}
        for side in sides:
            top = meta["top_k"][side]
            for rank, id in enumerate(top["ids"][i]):
                expected[id] = tuple(math.exp(top[f"{other}_logprobs"][i][rank]) for other in sides)
        expected[meta["output_token_logprobs"][i][1]] = tuple(own)
        assert len(rows) == len(expected)
        assert [row.kind for row in rows].count("drawn") == 1
        by_mixture = sorted(expected.values(), key=lambda row: -row[2])
        for row, probabilities in zip(rows, by_mixture, strict=True):
            for side, p in zip(sides, probabilities, strict=True):
                text, width = getattr(row, side)
                assert close_to(text, p), (row, probabilities)
                assert float(width.rstrip("%")) == pytest.approx(50 * p, abs=0.2)
        (drawn,) = [row for row in rows if row.kind == "drawn"]
        assert drawn.word.startswith("▸") and close_to(drawn.mixture[0], own[2])
        for side, index in zip(sides, range(3), strict=True):
            rest = 1 - sum(row[index] for row in expected.values())
            assert close_to(getattr(others, side)[0], max(rest, 0))
    # The words of the other tokens are the server's.
    names = {row.word.strip(" ▸") for token in tokens for row in page.tip(token).rows}
    assert not any(name.startswith("#") for name in names), names


def test_keyboard(page):
    page.compare("mixture", "student")
    page.sample()
    tokens = page.tokens("mixture")
    page.tip(tokens[0])
    page.driver.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    assert page.driver.switch_to.active_element == tokens[1]
    assert page.driver.find_element("id", "tip").is_displayed()
    # One stop for Tab in every text.
    assert [token.get_property("tabIndex") for token in tokens].count(0) == 1
    assert [token.get_property("tabIndex") for token in page.tokens("student")].count(0) == 1
    assert re.search(r"teacher .* %, student .* %", tokens[0].get_attribute("aria-label"))
    page.driver.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert not page.driver.find_element("id", "tip").is_displayed()


COLOUR = """return [...document.querySelectorAll(`#${arguments[0]} .token`)].map((token) =>
    getComputedStyle(token).backgroundColor);"""


def parsed(colour: str) -> tuple[float, float, float]:
    """(red, blue, opacity)"""
    red, _, blue, *alpha = (float(part) for part in re.findall(r"[\d.]+", colour))
    return red, blue, alpha[0] if alpha else 1.0


def test_colours(client, page):
    page.compare("mixture", "student")
    page.sample()
    meta = ask(client)["meta_info"]
    pulls = [t - s for t, s in zip(meta["teacher_logprob"], meta["student_logprob"], strict=True)]
    amounts = {
        "kl": (meta["kl_to_student"], 1, pulls),
        "surprise": ([-s for s in meta["student_logprob"]], 5, pulls),
        "pull": ([abs(pull) for pull in pulls], 3, pulls),
        "alpha": ([abs(alpha - 0.5) for alpha in meta["alpha"]], 0.5, [alpha - 0.5 for alpha in meta["alpha"]]),
    }
    assert page.driver.find_element("id", "colour").get_property("value") == "kl"
    for name, (values, full, side) in amounts.items():
        page.fill(colour=name)
        colours = page.driver.execute_script(COLOUR, "mixture")
        for colour, value, to in zip(colours, values, side, strict=True):
            red, blue, opacity = parsed(colour)
            assert opacity == pytest.approx(min(1, value / full) * 0.62, abs=0.01)
            if opacity > 0.02:
                assert (red > blue) == (to >= 0)  # orange for the teacher, blue for the student
    # Where nothing pulls, nothing is coloured.
    page.fill(colour="kl")
    assert all(parsed(colour)[2] < 0.01 for colour in page.driver.execute_script(COLOUR, "student"))


def test_scale_in_nats(page):
    strength = """const facts = {kl: arguments[0], alpha: 0.55, teacher: -1, student: -1};
        return [colourOf(facts, "kl"), colourOf({...facts, student: null, kl: null}, "kl")];"""
    for kl, expected in ((0, "transparent"), (0.015, "0.009"), (0.5, "0.310"), (1, "0.620"), (7, "0.620")):
        colour, missing = page.driver.execute_script(strength, kl)
        assert expected in colour
        assert missing == "transparent"


# -- faults -----------------------------------------------------------------------------------------------------------


def test_a_refusal_is_shown_where_it_belongs(page):
    page.fill(alpha_min="0.8", alpha_max="0.2")
    page.compare("teacher", "own")
    page.sample()
    assert "alpha_min: 0.8 is greater than alpha_max 0.2" in page.part("own", "error").text
    assert page.part("teacher", "error").text == "" and page.tokens("teacher")
    page.fill(server="http://127.0.0.1:1", alpha_min="0", alpha_max="1")
    page.sample()
    assert page.part("own", "error").text != ""
    page.driver.get_log("browser")  # the refused connection, which Chromium logs


def test_stop(page):
    page.fill(tokens=900)
    page.compare(*SETTINGS)
    # A tiny model may end its text by itself; none of these has an end in reach when it is not allowed one.
    page.driver.execute_script(
        """const body = requestBody;
        requestBody = (order) => { const b = body(order); b.sampling_params.ignore_eos = true; return b; };"""
    )
    page.sample(wait=0)
    wait_for(lambda: page.tokens("student"))
    page.driver.find_element("id", "stop").click()
    page.wait_for_end(20)
    for card in SETTINGS:
        assert len(page.tokens(card)) < 900
        assert page.part(card, "error").text == ""
        assert page.part(card, "ending").text == "stopped by you"


def test_markup_is_text(page):
    hostile = "<img src=x onerror=window.broken=1>"
    page.fill(problem=hostile, answer=hostile)
    page.compare("mixture")
    page.sample()
    # As a model's words would come.
    page.driver.execute_script(
        """const hostile = arguments[0];
        const card = cards[0];
        const top = {ids: [[1, 2]]};
        for (const side of SIDES) Object.assign(top, {[`${side}_logprobs`]: [[-0.5, -1]], [`${side}_tail`]: [0.1]});
        const top_k = {teacher: top, student: top, mixture: top};
        const finish_reason = {type: hostile, message: hostile};
        const meta = {alpha: [0.5], output_token_logprobs: [[0, 1, hostile]], top_k, finish_reason};
        meta.completion_tokens = 1;
        for (const [name] of SERIES) meta[name] = [-0.5];
        for (const id of [1, 2]) words.set(`${card.order.server} ${id}`, hostile);
        card.text.replaceChildren();
        take(card, {text: hostile, meta_info: meta});
        end(card, hostile);
        card.text.firstChild.focus();
        showCopy("yaml", card);""",
        hostile,
    )
    assert text_of(page.tokens("mixture")) == hostile
    assert hostile in page.driver.find_element("id", "tip").get_property("textContent").replace("␣", " ")
    assert hostile in page.driver.find_element("id", "copy-text").get_property("textContent")
    assert page.driver.execute_script("return window.broken") is None
    assert page.driver.find_elements("css selector", "main img") == []


def test_a_server_that_sends_pieces(page):
    """--incremental-streaming-output; and an end before the first token."""
    join = """let meta = {};
        for (const [alpha, tokens] of arguments[0]) {
          const event = {completion_tokens: tokens};
          if (alpha) {
            event.alpha = event.output_token_logprobs = alpha;
            event.top_k = {teacher: {ids: alpha.map((a) => [a])}};
          }
          meta = joined(meta, event);
        }
        return [meta.alpha, meta.output_token_logprobs, meta.kl_to_student, meta.top_k.teacher.ids || []];"""
    for events_ in (
        [([0.1], 1), ([0.2, 0.3], 3), ([0.4], 4), (None, 4)],
        [([0.1], 1), ([0.1, 0.2, 0.3], 3), ([0.1, 0.2, 0.3, 0.4], 4)],
    ):
        alphas = [0.1, 0.2, 0.3, 0.4]
        assert page.driver.execute_script(join, events_) == [alphas, alphas, [], [[a] for a in alphas]]
    assert page.driver.execute_script(join, [(None, 0)]) == [[], [], [], []]


# -- what is taken along ----------------------------------------------------------------------------------------------

# Everything that shells, Python, YAML and Jinja have a meaning for; and what a line of YAML would end at.
TRICKY = 'it\'s "12" + $HOME `x` \\n {{ 1 }} {% x %} {# c #} {{{problem}}} #: é 🙂 \u0085\u2028 %d'


def test_copied_requests_run(client, page, tmp_path):
    page.compare("mixture", "budget-01")
    for problem in (PROBLEM, TRICKY):
        page.fill(problem=problem, teacher_template="{problem}' {answer} \\boxed{answer}")
        page.sample()
        for card in ("mixture", "budget-01"):
            shown = page.driver.execute_script("return document.getElementById(arguments[0]).innerText", card)
            assert shown
            text = page.driver.execute_script("return cards.find((card) => card.box.id === arguments[0]).said", card)
            curl = subprocess.run(
                ["bash", "-c", page.copied(card, "curl")], capture_output=True, text=True, timeout=60, check=True
            )
            answer = json.loads(curl.stdout)
            assert answer["text"] == text
            script = tmp_path / "example.py"
            script.write_text(page.copied(card, "python"), encoding="utf-8")
            python = subprocess.run(
                [sys.executable, str(script)], capture_output=True, text=True, timeout=100, check=True,
                env={**os.environ, "PYTHONIOENCODING": "utf-8"},
            )  # fmt: skip
            assert python.stdout.startswith(text)
            assert f"\nalpha {mean(answer['meta_info']['alpha']):.4f}"[:-1] in python.stdout


@pytest.mark.parametrize("strategy", ["copy", "hint", "final", "system", "own"])
def test_copied_run_files_are_valid(page, tmp_path, strategy):
    """The run's contexts are what the page sent, and its mixture too."""
    page.compare("mixture", "budget-01", "teacher", "own")
    page.fill(problem=TRICKY, answer="it is 42.", alpha_min="0.25")
    page.tell(strategy)
    if strategy == "own":
        page.fill(teacher_template=TRICKY + " {problem} {answer} \\boxed{final}", student_template=TRICKY + "{problem}")
        page.fill(teacher_system="")
    page.sample()
    for card in ("mixture", "budget-01", "teacher", "own"):
        text = page.copied(card, "yaml")
        path = tmp_path / f"{card}.yaml"
        path.write_text(text, encoding="utf-8")
        config = load_config(path)
        row = json.loads(re.search("^# ({.*)$", text, re.MULTILINE)[1])
        assert row["problem"] == TRICKY and row["answer"] == "it is 42."
        builder = ContextBuilder(config.contexts, list(row), config.data.privileged)
        (task,) = builder.tasks(Problem("0", row), 1)
        order = page.driver.execute_script("return cards.find((card) => card.box.id === arguments[0]).order", card)
        assert task.strategy == strategy
        assert builder.render(task) == (order["teacher"], order["student"])
        assert config.mixing.request_fields() == order["alpha"]
        assert (config.sampling.temperature, config.sampling.max_new_tokens, config.sampling.n) == (0, TOKENS, 1)
        assert [filter_.type for filter_ in config.filters] == ["finish", "answer"]
        assert config.client.endpoints == [order["server"]]
    page.fill(answer="forty", temperature="0.7")
    page.compare("student")
    page.sample()
    config = load_config(_written(tmp_path / "words.yaml", page.copied("student", "yaml")))
    assert config.filters[1].match == "contains" and config.sampling.n == 4
    assert config.mixing.request_fields() == {"alpha_method": "fixed", "fixed_alpha": 0}


def _written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_a_key_is_in_nothing_that_is_copied(page, tmp_path):
    page.fill(key="a-secret")
    page.compare("mixture")
    page.sample()
    assert page.tokens("mixture")  # this server has none, and takes any
    for kind in ("curl", "python", "yaml"):
        text = page.copied("mixture", kind)
        assert "a-secret" not in text and "SGLANG_API_KEY" in text
    path = _written(tmp_path / "run.yaml", page.copied("mixture", "yaml"))
    assert load_config(path).client.api_key_env == "SGLANG_API_KEY"


# -- on screens -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [390, 768, 1600])
def test_nothing_is_wider_than_the_screen(page, width):
    page.compare(*SETTINGS)
    page.fill(problem="x" * 300)
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        page.sample()
        page.driver.find_element("css selector", "summary").click()
        page.tip(page.tokens("mixture")[3])
        inside = """const wide = document.documentElement;
            const tip = document.getElementById("tip").getBoundingClientRect();
            return [wide.scrollWidth - wide.clientWidth, tip.left >= 0 && tip.right <= innerWidth];"""
        assert page.driver.execute_script(inside) == [0, True]
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
