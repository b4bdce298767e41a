"""Takes the picture of a report in docs: ``python tests/distill/report_picture.py RUN docs/report.png``, such as after
``make distill-demo`` with ``runs/demo``. It leaves out what is folded, and all figures but the first two."""

from __future__ import annotations

import argparse
import base64
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "server"))
from browser import chromium

from sglang_optimal.distill.report import write_report

WIDTH = 1000
"""CSS pixels."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Take the picture of a report.")
    parser.add_argument("run", type=Path)
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    page = write_report(args.run)
    with chromium() as driver:
        screen = {"width": WIDTH, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        driver.get(page.resolve().as_uri())
        height = driver.execute_script(
            """for (const shown of [...document.querySelectorAll("section .figures > *")].slice(2)) shown.hidden = true;
            for (const folded of document.querySelectorAll("details.fold")) folded.hidden = true;
            document.getElementById("list").style.maxHeight = "420px";
            return Math.ceil(document.querySelector("main").getBoundingClientRect().height) - 110;"""
        )
        clip = {"x": 0, "y": 0, "width": WIDTH, "height": height, "scale": 1}
        shot = driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
        args.output.write_bytes(base64.b64decode(shot["data"]))


if __name__ == "__main__":
    main()
