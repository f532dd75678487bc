"""A real Chromium that may talk to this machine only; what it complains of is kept."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from playwright.sync_api import Browser, Page, Route, sync_playwright

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
LOCAL = ("127.0.0.1", "localhost", "")


class Watched:
    """A page with its complaints: console errors, exceptions, and requests that wanted to leave the machine."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.errors: list[str] = []
        self.left: list[str] = []
        page.on("console", lambda m: self.errors.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.route("**/*", self._route)

    def _route(self, route: Route) -> None:
        if urlsplit(route.request.url).hostname in (*LOCAL, None):
            route.continue_()
        else:
            self.left.append(route.request.url)
            route.abort()

    def assert_quiet(self) -> None:
        assert (self.errors, self.left) == ([], [])


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser."""
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        )
        yield running
        running.close()


@contextmanager
def page_in(running: Browser, width: int = 1400, height: int = 1000) -> Iterator[Watched]:
    """A page that knows nothing of others."""
    page = running.new_page(viewport={"width": width, "height": height})
    page.set_default_timeout(60_000)
    yield Watched(page)
    page.close()


@contextmanager
def browser(width: int = 1400, height: int = 1000) -> Iterator[Watched]:
    """A page in a browser of its own."""
    with chromium() as running, page_in(running, width, height) as watched:
        yield watched
