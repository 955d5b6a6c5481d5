"""Take new pictures of the chat page for the README, into docs/pictures.

    llava-edge serve
    python scripts/page_pictures.py http://127.0.0.1:8080

Needs chromium, chromedriver and the packages selenium and pillow.
"""

from __future__ import annotations

import base64
import io
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from PIL import Image
from selenium import webdriver

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "pictures"
DESKTOP, PHONE = (1100, 880, 1.0), (390, 800, 1.5)  # width and height in CSS pixels, device pixels for each


def main(address: str) -> None:
    """A conversation in both schemes on a desktop and dark on a phone; the empty page light on a phone."""
    for name, size, dark in (
        ("desktop-light", DESKTOP, False),
        ("desktop-dark", DESKTOP, True),
        ("phone-light", PHONE, False),
        ("phone-dark", PHONE, True),
    ):
        browser = _browser(size, dark)
        browser.get(address)
        _wait(browser, "document.getElementById('dot').className === 'dot ok'")
        if name != "phone-light":
            _talk(browser)
        time.sleep(0.5)  # for transitions and pictures
        taken = browser.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})["data"]
        Image.open(io.BytesIO(base64.b64decode(taken))).convert("RGB").save(FOLDER / f"page-{name}.jpg", quality=85)
        browser.quit()


def _browser(size: tuple[int, int, float], dark: bool) -> Any:
    width, height, scale = size
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(argument)
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    metrics = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    return browser


def _talk(browser: Any) -> None:
    browser.execute_script("document.querySelector('.example').click()")
    _wait(browser, "document.querySelectorAll('.under').length === 1")
    browser.find_element("css selector", "#text").send_keys("Is it a fruit?\n")
    _wait(browser, "document.querySelectorAll('.under').length === 2")
    browser.execute_script("""
        [...document.querySelectorAll(".act[aria-label='Good answer']")].at(-1).click();
        [...document.querySelectorAll("details.times")].at(-1).open = true;
        document.getElementById("toast").classList.add("hidden");
        document.activeElement.blur();
        scrollToEnd();
    """)


def _wait(browser: Any, condition: str) -> None:
    end = time.monotonic() + 60
    while not browser.execute_script(f"return {condition}"):
        if time.monotonic() > end:
            sys.exit(f"The page did not get there: {condition}")
        time.sleep(0.1)


if __name__ == "__main__":
    main(sys.argv[1])
