"""The page at /mixing in a headless Chromium."""

from __future__ import annotations

import pytest
from serving import events

pytest.importorskip("selenium", reason="selenium is not installed")
from browser import CHROMEDRIVER, CHROMIUM, Page, chromium
from selenium.webdriver import Keys

pytestmark = pytest.mark.skipif(
    CHROMIUM is None or CHROMEDRIVER is None, reason="chromium and chromedriver are not installed"
)

TOKENS = 12


@pytest.fixture(scope="module")
def driver():
    with chromium() as running:
        yield running


@pytest.fixture
def page(client, driver):
    page = Page(driver, str(client.base_url).rstrip("/"))
    # The tiny models' texts end anywhere; a temperature of 0 makes them the same every time.
    page.fill(problem="what is 12+30?", answer="it is 42.", tokens=TOKENS)
    page.fill(teacher_template="{problem} {answer}", student_template="{problem}")
    yield page
    severe = [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
    assert [entry for entry in severe if "400 (Bad Request)" not in entry["message"]] == []


def ask(client, **alpha) -> dict:
    """The last event of the request that the page makes."""
    custom = {
        "teacher_messages": [{"role": "user", "content": "what is 12+30? it is 42."}],
        "student_messages": [{"role": "user", "content": "what is 12+30?"}],
        "return_mixing_info": True,
        **alpha,
    }
    params = {"temperature": 0, "max_new_tokens": TOKENS, "custom_params": custom}
    body = {"sampling_params": params, "return_logprob": True, "return_text_in_logprobs": True, "stream": True}
    return events(client, "/generate", body)[-1]


def text_of(column: list) -> str:
    return "".join(token.get_property("textContent") for token in column)


def test_it_is_one_self_contained_file(client):
    response = client.get("/mixing")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/html")
    assert "src=" not in response.text and "https://" not in response.text and "innerHTML" not in response.text


def test_three_columns_and_the_numbers_behind_a_token(client, page):
    page.sample()
    for column, alpha in (("teacher", {"fixed_alpha": 1}), ("mixture", {}), ("student", {"fixed_alpha": 0})):
        meta = ask(client, **alpha)["meta_info"]
        assert text_of(page.tokens(column)) == "".join(piece[2] for piece in meta["output_token_logprobs"])
        assert f"{len(meta['alpha'])} tokens" in page.part(column, "figures").text
        assert page.part(column, "error").text == ""
    meta = ask(client)["meta_info"]
    tokens = page.tokens("mixture")
    assert f"mean α {sum(meta['alpha']) / len(tokens):.3f}" in page.part("mixture", "figures").text
    labels = {"α": "alpha", "log p, teacher": "teacher_logprob", "log p, student": "student_logprob",
              "log p, mixture": "mixture_logprob", "KL to student": "kl_to_student", "KL to teacher": "kl_to_teacher",
              "ESS ratio": "ess_ratio"}  # fmt: skip
    for i, token in enumerate(tokens):
        shown = page.tip(token, hover=i == 0)
        assert shown.keys() == labels.keys()
        for label, name in labels.items():
            assert float(shown[label]) == pytest.approx(meta[name][i], abs=2e-3), (label, i)
    # One stop for Tab, and the arrow keys inside.
    page.tip(tokens[0])
    page.driver.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    assert page.driver.switch_to.active_element == tokens[1]
    assert [token.get_property("tabIndex") for token in tokens].count(0) == 1
    colours = [token.value_of_css_property("background-color") for token in tokens]
    assert len(set(colours)) > len(colours) / 2
    # Students' tokens are blue, teachers' orange.
    for colour, alpha in zip(colours, meta["alpha"], strict=True):
        red, _, blue = (float(part) for part in colour.split("(")[1].split(",")[:3])
        assert (red > blue) == (alpha >= 0.5)


def test_settings(client, page):
    page.fill(method="fixed", fixed="1.5")
    assert not page.driver.find_element("id", "alpha-min").is_enabled()
    page.sample()
    meta = ask(client, fixed_alpha=1.5)["meta_info"]
    assert text_of(page.tokens("mixture")) == "".join(piece[2] for piece in meta["output_token_logprobs"])
    page.fill(method="kl_budget", budget="0.05")
    assert page.driver.find_element("id", "alpha-min").is_enabled()
    assert not page.driver.find_element("id", "fixed").is_enabled()
    page.sample()
    meta = ask(client, kl_budget=0.05)["meta_info"]
    assert text_of(page.tokens("mixture")) == "".join(piece[2] for piece in meta["output_token_logprobs"])
    assert f"mean α {sum(meta['alpha']) / len(meta['alpha']):.3f}" in page.part("mixture", "figures").text
    page.driver.find_element("css selector", "summary").click()
    page.fill(student_template="{problem} {answer}")
    assert page.driver.find_element("id", "leak").text == "The student sees the answer."


def test_a_refusal_is_shown_where_it_belongs(page):
    page.fill(alpha_min="0.8", alpha_max="0.2")
    page.sample()
    assert "alpha_min: 0.8 is greater than alpha_max 0.2" in page.part("mixture", "error").text
    assert page.part("teacher", "error").text == "" and page.tokens("teacher")
    page.fill(server="http://127.0.0.1:1", alpha_min="0", alpha_max="1")
    page.sample()
    assert page.part("mixture", "error").text != ""
    page.driver.get_log("browser")  # the refused connection, which Chromium logs


def test_stop(page):
    page.fill(tokens=900)
    # A tiny model may end its text by itself; none of these three has an end in reach when it is not allowed one.
    page.driver.execute_script(
        """const body = requestBody;
        requestBody = (alpha) => { const b = body(alpha); b.sampling_params.ignore_eos = true; return b; };"""
    )
    page.sample(wait=0)
    page.driver.find_element("id", "stop").click()
    page.wait_for_end(20)
    assert len(page.tokens("mixture")) < 900
    assert page.part("mixture", "error").text == ""


def test_markup_is_text(page):
    hostile = "<img src=x onerror=window.broken=1>"
    page.fill(problem=hostile)
    page.sample()
    # As a model's words would come.
    page.driver.execute_script(
        """const meta = {alpha: [0.5], output_token_logprobs: [[0, 1, arguments[0]]]};
        for (const [name] of SERIES) meta[name] = [0.5];
        document.querySelector("#mixture .text").replaceChildren();
        addTokens(document.querySelector("#mixture .text"), meta, true);""",
        hostile,
    )
    assert text_of(page.tokens("mixture")) == hostile
    assert page.driver.execute_script("return window.broken") is None
    assert page.driver.find_elements("css selector", "main img") == []


def test_a_server_that_sends_pieces(page):
    """--incremental-streaming-output; and an end before the first token."""
    join = """let meta = {};
        for (const [alpha, tokens] of arguments[0]) {
          const event = {completion_tokens: tokens};
          if (alpha) event.alpha = event.output_token_logprobs = alpha;
          meta = joined(meta, event);
        }
        return [meta.alpha, meta.output_token_logprobs, meta.kl_to_student];"""
    for events_ in (
        [([0.1], 1), ([0.2, 0.3], 3), ([0.4], 4), (None, 4)],
        [([0.1], 1), ([0.1, 0.2, 0.3], 3), ([0.1, 0.2, 0.3, 0.4], 4)],
    ):
        alphas = [0.1, 0.2, 0.3, 0.4]
        assert page.driver.execute_script(join, events_) == [alphas, alphas, []]
    assert page.driver.execute_script(join, [(None, 0)]) == [[], [], []]
