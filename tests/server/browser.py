"""A headless Chromium, and the page at /mixing in it.

Run as a program it takes the picture in docs/, of a running server: ``python tests/server/browser.py docs/mixing.png``
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import tempfile
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
            yield driver
        finally:
            driver.quit()


class Page:
    """The page, and what a user does on it."""

    def __init__(self, driver: webdriver.Chrome, url: str):
        self.driver = driver
        driver.get(f"{url}/mixing")

    def fill(self, **fields: object) -> None:
        """Set fields by their id (underscores for dashes), as typing does."""
        script = """
            const field = document.getElementById(arguments[0]);
            field.value = arguments[1];
            field.dispatchEvent(new Event("input", {bubbles: true}));
            field.dispatchEvent(new Event("change", {bubbles: true}));"""
        for name, value in fields.items():
            self.driver.execute_script(script, name.replace("_", "-"), str(value))

    def sample(self, *, wait: float = 60) -> None:
        """Press the button; with ``wait`` until the streams have ended."""
        self.driver.find_element(By.ID, "go").click()
        if wait:
            self.wait_for_end(wait)

    def wait_for_end(self, seconds: float = 60) -> None:
        WebDriverWait(self.driver, seconds, 0.05).until(lambda d: d.find_element(By.ID, "go").is_enabled())

    def part(self, column: str, name: str):
        return self.driver.find_element(By.CSS_SELECTOR, f"#{column} .{name}")

    def tokens(self, column: str) -> list:
        return self.driver.find_elements(By.CSS_SELECTOR, f"#{column} .token")

    def tip(self, token, *, hover: bool = False) -> dict[str, str]:
        """The rows shown about a token when it has the keyboard's focus, or the mouse's."""
        if hover:
            webdriver.ActionChains(self.driver).move_to_element(token).perform()
        else:
            self.driver.execute_script("arguments[0].focus()", token)
        rows = self.driver.find_elements(By.CSS_SELECTOR, "#tip tr")
        cells = [[row.find_element(By.TAG_NAME, name).text for name in ("th", "td")] for row in rows]
        return {label: value.replace("−", "-") for label, value in cells}


def main() -> None:
    parser = argparse.ArgumentParser(description="Take the picture of the page at /mixing.")
    parser.add_argument("output")
    parser.add_argument("--url", default="http://127.0.0.1:30000")
    args = parser.parse_args()
    with chromium() as driver:
        page = Page(driver, args.url)
        page.sample(wait=120)
        alphas = [float(row["α"]) for row in map(page.tip, page.tokens("mixture")[:24])]
        page.tip(page.tokens("mixture")[max(range(len(alphas)), key=lambda i: abs(alphas[i] - 0.5))])
        driver.save_screenshot(args.output)


if __name__ == "__main__":
    main()
