"""The system's Chromium, driven by Playwright's core, on pages that tests write."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from cpbench.publish import publish
from cpbench.report.html import page
from cpbench.report.sections import Source
from cpbench.results import ResultFile

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


@dataclass
class Opened:
    """A page in the browser, with all that it asked of the network and complained about."""

    page: Page
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def cells(self, column: int) -> list[str]:
        """What the rows of the table of all cells say in one column, as far as they are laid out."""
        return [text.strip() for text in self.page.locator(f"#cells tbody td:nth-child({column})").all_inner_texts()]

    def headers(self) -> list[str]:
        return [text.strip() for text in self.page.locator("#cells thead th").all_inner_texts()]


Open = Callable[..., Opened]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Skips, and says so loudly, where there is no browser to look with."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="THE PAGE WAS NOT LOOKED AT: playwright is not installed, the extra `dev` brings it")
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"THE PAGE WAS NOT LOOKED AT: none of {', '.join(BROWSERS)} is installed; on Debian: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])  # root has no sandbox
        yield launched
        launched.close()


@pytest.fixture
def open_page(browser: Browser, tmp_path: Path) -> Iterator[Open]:
    """Write the page of some results and open it. After the test it must have asked for nothing but itself, and complained of nothing."""
    opened: list[Opened] = []

    def write_and_open(*results: ResultFile, figures: bool = True, **context: Any) -> Opened:
        files = [tmp_path / f"{name}.json" for name, _ in zip(("old", "new"), results, strict=False)]
        for file, result in zip(files, results, strict=True):
            file.write_text(result.model_dump_json(by_alias=True))
        target = files[0].with_suffix(".html")
        if figures:
            publish(files, target, force=False)
        else:  # they take seconds where there are many cells
            target.write_text(page([Source(file.name, result) for file, result in zip(files, results, strict=True)]))
        one = Opened(browser.new_page(**{"viewport": {"width": 1400, "height": 900}, **context}))
        one.page.on("request", lambda request: one.requests.append(request.url))
        one.page.on("console", lambda message: one.complaints.append(message.text))
        one.page.on("pageerror", lambda error: one.complaints.append(str(error)))
        one.page.goto(target.as_uri())
        opened.append(one)
        return one

    yield write_and_open
    for one in opened:
        assert one.complaints == []
        assert [url for url in one.requests if not url.startswith("data:")] == [one.page.url.partition("#")[0]]
        one.page.close()
