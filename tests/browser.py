"""A headless Chromium for the tests of the report: the system's own, driven by playwright, which fetches nothing.

Without one the tests that need it are skipped, and say what to install.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
INSTALL = "`pip install playwright` and a Chromium: `apt-get install chromium`, or LOWBIT_CHROMIUM=/path/to/it"
WAIT_S = 60
DESKTOP, PHONE = {"width": 1440, "height": 900}, {"width": 390, "height": 844}


def find() -> str | None:
    return os.environ.get("LOWBIT_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def launch() -> Iterator[Any]:
    """A running browser. Skips the test that asks where there is none."""
    sync_api = pytest.importorskip("playwright.sync_api", reason=f"needs {INSTALL}")
    executable = find()
    if executable is None:
        pytest.skip(f"no Chromium here: needs {INSTALL}")
    # Root has no sandbox of its own to give; the page is ours.
    options = ["--disable-gpu", "--disable-dev-shm-usage", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=options)
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Opened:
    """A page with all that it said and asked for: console messages, uncaught errors, dialogs, addresses."""

    page: Any
    messages: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def text(self, selector: str) -> str:
        return str(self.page.locator(selector).inner_text())

    def style(self, selector: str, name: str) -> str:
        return str(self.page.eval_on_selector(selector, f"element => getComputedStyle(element)['{name}']"))

    def wait_until(self, expression: str) -> None:
        """Ask the page until it says true. Not ``page.wait_for_function``: after its first look it evaluates inside
        the page, which its content security policy forbids."""
        deadline = time.monotonic() + WAIT_S
        while not self.page.evaluate(expression):
            assert time.monotonic() < deadline, f"never true within {WAIT_S} s: {expression}"
            time.sleep(0.02)

    def cases(self) -> list[str]:
        """Full names of the rows that the table shows, from the top."""
        return list(self.page.eval_on_selector_all("#table tbody button.case", "found => found.map(one => one.title)"))


@contextmanager
def opened(
    browser: Any, file: Path, *, screen: dict[str, int] = DESKTOP, scheme: str = "light", at: str = ""
) -> Iterator[Opened]:
    """``file`` in a window of its own, when its scripts have drawn everything."""
    context = browser.new_context(viewport=screen, color_scheme=scheme)
    context.set_default_timeout(20_000)
    try:
        page = context.new_page()
        found = Opened(page)
        page.on("console", lambda message: found.messages.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: found.messages.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (found.messages.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: found.requests.append(request.url))
        page.goto(file.as_uri() + at)
        page.wait_for_selector("html[data-ready]")
        yield found
    finally:
        context.close()
