"""A headless Chromium for tests of pages: what it wrote to its console, what it asked the network for, screenshots."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_ARGUMENTS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
              "--disable-component-update", "--disable-sync", "--disable-default-apps", "--disable-dev-shm-usage",
              "--hide-scrollbars")  # fmt: skip


def missing() -> str | None:
    """What is not on the PATH, or None."""
    if not any(map(shutil.which, _NAMES)):
        return f"none of {', '.join(_NAMES)} is on the PATH"
    return None if shutil.which("chromedriver") else "chromedriver is not on the PATH"


class Page:
    """A page in a browser, and what one does with it."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, path: Path) -> None:
        self.driver.get(path.resolve().as_uri())

    def run(self, script: str, *arguments: Any) -> Any:
        """What a function body in JavaScript returns."""
        return self.driver.execute_script(script, *arguments)

    def all(self, css: str) -> list[Any]:
        return self.driver.find_elements(By.CSS_SELECTOR, css)

    def one(self, css: str) -> Any:
        return self.driver.find_element(By.CSS_SELECTOR, css)

    def visible(self, css: str) -> int:
        """How many elements of a selector take room on the page."""
        shown = "[...document.querySelectorAll(arguments[0])].filter(e => e.getClientRects().length)"
        return self.run(f"return {shown}.length", css)

    def until(self, holds: Callable[[], object], seconds: float = 5.0) -> None:
        end = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < end, f"{holds} did not come to hold in {seconds} s"
            time.sleep(0.02)

    def screenshot(self, path: Path, css: str, height: int | None = None) -> None:
        """The page from the top of an element, as wide as the window and ``height`` (or the element's) high."""
        top, own = self.run(
            "const box = document.querySelector(arguments[0]).getBoundingClientRect();"
            "return [box.top + scrollY, box.height]",
            css,
        )
        width = self.run("return document.documentElement.clientWidth")
        clip = {"x": 0, "y": max(top, 0), "width": width, "height": height or own, "scale": 1}
        shot = self.driver.execute_cdp_cmd("Page.captureScreenshot", {"clip": clip, "captureBeyondViewport": True})
        path.write_bytes(base64.b64decode(shot["data"]))

    def media(self, **features: str) -> None:
        """Pretend a preference of the reader: ``prefers_color_scheme="dark"``."""
        told = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": told})

    def size(self, width: int, height: int) -> None:
        self.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {
                "width": width,
                "height": height,
                "deviceScaleFactor": 1,
                "mobile": False,
            },
        )

    def console(self) -> list[dict[str, Any]]:
        """What was written to the console since this was last asked."""
        return self.driver.get_log("browser")

    def requests(self) -> list[str]:
        """Addresses that were asked for since this was last asked, but for those of the browser's own first tab."""
        events = (json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance"))
        sent = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
        return [one["request"]["url"] for one in sent if not one["documentURL"].startswith("chrome")]


@contextlib.contextmanager
def browser(profile: Path, width: int = 1280, height: int = 900) -> Iterator[Page]:
    """A browser with a fresh profile."""
    options = webdriver.ChromeOptions()
    options.binary_location = next(filter(None, map(shutil.which, _NAMES)))
    for argument in (*_ARGUMENTS, f"--user-data-dir={profile}", f"--window-size={width},{height}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        page = Page(driver)
        page.size(width, height)
        driver.get("about:blank")
        yield page
    finally:
        driver.quit()
