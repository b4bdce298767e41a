"""A headless Chromium, and the page at /mixing in it.

Run as a program it takes the picture in docs/, of a running server: ``python tests/server/browser.py docs/mixing.png``
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import shutil
import tempfile
import time
from collections.abc import Iterator

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

CHROMIUM, CHROMEDRIVER = shutil.which("chromium"), shutil.which("chromedriver")


@contextlib.contextmanager
def chromium() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with tempfile.TemporaryDirectory() as profile:
        for flag in (
            "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
            "--disable-background-networking", "--disable-component-update", "--window-size=1320,860",
            f"--user-data-dir={profile}",
        ):  # fmt: skip
            options.add_argument(flag)
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(CHROMEDRIVER))
        try:
            # Two browsers beside each other: only one has the focus, and the other's pages get no event of it.
            driver.execute_cdp_cmd("Emulation.setFocusEmulationEnabled", {"enabled": True})
            yield driver
        finally:
            driver.quit()


class Page:
    """The page, and what a user does on it.

    The first page of a tab samples by itself; here it has come to its end.
    """

    def __init__(self, driver: webdriver.Chrome, url: str, path: str = "/mixing"):
        self.driver = driver
        driver.get(url + path)
        self.wait_for_end(120)

    def fill(self, **fields: object) -> None:
        """Set fields by their id (underscores for dashes), as typing does."""
        script = """
            const field = document.getElementById(arguments[0]);
            field.value = arguments[1];
            field.dispatchEvent(new Event("input", {bubbles: true}));
            field.dispatchEvent(new Event("change", {bubbles: true}));"""
        for name, value in fields.items():
            self.driver.execute_script(script, name.replace("_", "-"), str(value))

    def compare(self, *settings: str) -> None:
        """Tick these boxes and no others."""
        for box in self.driver.find_elements(By.CSS_SELECTOR, "[name=setting]"):
            if box.is_selected() != (box.get_attribute("value") in settings):
                self.driver.execute_script("arguments[0].click()", box)

    def tell(self, strategy: str) -> None:
        """Pick a way to tell the teacher the answer."""
        box = self.driver.find_element(By.CSS_SELECTOR, f"[name=strategy][value={strategy}]")
        self.driver.execute_script("arguments[0].click()", box)

    def sample(self, *, wait: float = 60) -> None:
        """Press the button; with ``wait`` until the streams have ended."""
        self.driver.find_element(By.ID, "go").click()
        if wait:
            self.wait_for_end(wait)

    def wait_for_end(self, seconds: float = 60) -> None:
        WebDriverWait(self.driver, seconds, 0.05).until(lambda d: d.find_element(By.ID, "go").is_enabled())

    def part(self, card: str, name: str):
        return self.driver.find_element(By.CSS_SELECTOR, f"#{card} .{name}")

    def tokens(self, card: str) -> list:
        return self.driver.find_elements(By.CSS_SELECTOR, f"#{card} .token")

    def figures(self, card: str) -> dict[str, str]:
        """A card's figures by their labels."""
        script = """return [...document.querySelectorAll(`#${arguments[0]} .figures div`)].map((figure) =>
            [figure.querySelector("dt").textContent, figure.querySelector("dd").textContent]);"""
        return {label: value.replace("−", "-") for label, value in self.driver.execute_script(script, card)}

    def tip(self, token, *, hover: bool = False, tap: bool = False) -> Tip:
        """What is shown of a token that has the keyboard's focus, the mouse's, or was tapped."""
        if hover:
            webdriver.ActionChains(self.driver).move_to_element(token).perform()
        elif tap:
            self.driver.execute_script("arguments[0].dispatchEvent(new Event('click', {bubbles: true}))", token)
        else:
            self.driver.execute_script("arguments[0].focus()", token)
        words, note, rows = self.driver.execute_script(
            """const tip = document.getElementById("tip");
            const [words, note] = [...tip.querySelectorAll("p")].map((p) => p.textContent);
            const cells = (row) => [...row.querySelectorAll(".cell")];
            const rows = [...tip.querySelectorAll("tbody tr")].map((row) => [
                row.className, row.querySelector("th").textContent,
                ...cells(row).map((cell) => [cell.textContent, cell.querySelector("b").style.width])]);
            return [words, note, tip.hidden ? null : rows];"""
        )
        return Tip(words, note, [Bars(*row) for row in rows])

    def copied(self, card: str, kind: str) -> str:
        """What is offered to copy: ``curl``, ``python`` or ``yaml``."""
        self.part(card, kind).click()
        text = self.driver.find_element(By.ID, "copy-text").get_property("textContent")
        self.driver.find_element(By.ID, "copy-close").click()
        return text


@dataclasses.dataclass(frozen=True)
class Bars:
    """A row of the picture; of each side (text, width of its bar)."""

    kind: str
    word: str
    teacher: list[str]
    student: list[str]
    mixture: list[str]


@dataclasses.dataclass(frozen=True)
class Tip:
    """The picture of a token."""

    words: str
    note: str
    rows: list[Bars]


def main() -> None:
    parser = argparse.ArgumentParser(description="Take the picture of the page at /mixing.")
    parser.add_argument("output")
    parser.add_argument("--url", default="http://127.0.0.1:30000")
    args = parser.parse_args()
    with chromium() as driver:
        page = Page(driver, args.url)
        page.compare("student", "alpha-50", "mixture", "teacher")
        page.sample(wait=300)
        driver.set_window_size(1320, 1300)  # room for the picture below the token
        tokens = page.tokens("alpha-50")[:12]
        page.tip(max(tokens, key=lambda token: driver.execute_script("return arguments[0].facts.kl", token)))
        time.sleep(1)  # words of the other tokens come from the server
        driver.save_screenshot(args.output)


if __name__ == "__main__":
    main()
