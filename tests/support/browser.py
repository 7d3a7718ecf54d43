"""A page in a real browser: what is missing on it, what sticks out, which scripts fail.

Chromium is looked for in `EMLENS_BROWSER` (a path), among those that `playwright install chromium`
has fetched, and on the path. Where there is none, tests that need it are skipped with that said,
and fail where `CI` is set.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser

WIDTHS = (1280, 400)
"""CSS pixels: a laptop and a phone."""
NAMES = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
    "chrome",
    "msedge",
)
MISSING = (
    "no Chromium found, so no page was looked at; install one (`apt-get install chromium`, or "
    "`python -m playwright install chromium`), or set EMLENS_BROWSER to the path of Chrome, "
    "Chromium or Edge"
)
_FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
# an image that waits to be scrolled to has not been asked for yet
_SETTLE = """async () => {
    const images = [...document.images];
    for (const image of images) image.loading = "eager";
    await Promise.all(images.map(image => image.decode().catch(() => null)));
    await document.fonts.ready;
}"""
_IMAGES = """() => [...document.images].filter(image => !image.naturalWidth)
    .map(image => (image.currentSrc || image.src || image.outerHTML).slice(0, 120))"""
# What may be scrolled, or is cut off on purpose, is not sticking out of the page.
_WIDE = """() => {
    const width = document.documentElement.clientWidth, found = [];
    const held = element => {
        for (let up = element.parentElement; up && up !== document.body; up = up.parentElement)
            if (getComputedStyle(up).overflowX !== "visible") return true;
        return false;
    };
    for (const element of document.body.querySelectorAll("*")) {
        const box = element.getBoundingClientRect();
        if (box.width && box.height && box.right > width + 1 && !held(element))
            found.push(`<${element.tagName.toLowerCase()} class="${element.className}"> ends at `
                + `${Math.round(box.right)} of ${width} px: ${element.textContent.slice(0, 60)}`);
    }
    if (!found.length && document.documentElement.scrollWidth > width)
        found.push(`the page is ${document.documentElement.scrollWidth} of ${width} px wide`);
    return found.slice(0, 5);
}"""


@dataclass(frozen=True, slots=True)
class Seen:
    """A page at one width.

    Attributes:
        width: Width of the window, CSS pixels.
        images: Images that show nothing.
        wide: What sticks out of the window to the right.
        errors: Errors of scripts, and what else the browser complained of.
        outside: Addresses that are neither files nor data.
        text: The text that is shown.
        screenshot: PNG of the whole page.
    """

    width: int
    images: tuple[str, ...]
    wide: tuple[str, ...]
    errors: tuple[str, ...]
    outside: tuple[str, ...]
    text: str
    screenshot: bytes

    @property
    def complaints(self) -> list[str]:
        """All that is wrong, in words; empty where nothing is."""
        kinds = {
            "image missing": self.images,
            "sticks out": self.wide,
            "error": self.errors,
            "loads from outside": self.outside,
        }
        return [f"{self.width} px: {kind}: {what}" for kind in kinds for what in kinds[kind]]


def find_browser(own: str | None = None) -> str | None:
    """Path of a Chromium, or None.

    Args:
        own: Where the driver would keep the one that it fetched.

    Raises:
        FileNotFoundError: If `EMLENS_BROWSER` names no file.
    """
    if named := os.environ.get("EMLENS_BROWSER"):
        if not Path(named).is_file():
            raise FileNotFoundError(f"EMLENS_BROWSER is {named!r}, which is no file")
        return named
    if own and Path(own).is_file():
        return own
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@contextmanager
def browser() -> Iterator[Browser | None]:
    """A running Chromium that reaches nothing outside; None where there is none to run."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        path = find_browser(driver.chromium.executable_path)
        if path is None:
            yield None
            return
        running = driver.chromium.launch(executable_path=path, args=list(_FLAGS))
        try:
            yield running
        finally:
            running.close()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """A running Chromium. Where there is none, the test is skipped, and fails in CI.

    It lives no longer than a module: its driver keeps an event loop, beside which no other runs.
    """
    with browser() as running:
        if running is None:
            (pytest.fail if os.environ.get("CI") else pytest.skip)(MISSING)
        yield running


def look(running: Browser, where: Path | str, width: int, *, dark: bool = False) -> Seen:
    """Open a page at a width, wait until it has settled, and say what is seen.

    Args:
        running: The browser.
        where: A file, or an address; what is elsewhere than it is neither loaded nor let pass.
        width: Width of the window, CSS pixels.
        dark: For a reader who has asked for dark pages.
    """
    address = where.resolve().as_uri() if isinstance(where, Path) else where
    own = ("file:", "data:", "blob:", "about:", "/".join(address.split("/")[:3]) + "/")
    context = running.new_context(
        viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light"
    )
    context.route(lambda url: not url.startswith(own), lambda route: route.abort())
    page = context.new_page()
    errors: list[str] = []
    outside: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)[:300]))
    page.on(
        "console",
        lambda line: errors.append(line.text[:300]) if line.type == "error" else None,
    )
    page.on(
        "request",
        lambda request: None if request.url.startswith(own) else outside.append(request.url[:120]),
    )
    try:
        page.goto(address, wait_until="load")
        page.evaluate(_SETTLE)
        page.wait_for_timeout(200)
        return Seen(
            width=width,
            images=tuple(page.evaluate(_IMAGES)),
            wide=tuple(page.evaluate(_WIDE)),
            errors=tuple(errors),
            outside=tuple(outside),
            text=page.inner_text("body"),
            screenshot=page.screenshot(full_page=True),
        )
    finally:
        context.close()


def complaints(running: Browser, where: Path | str, widths: tuple[int, ...] = WIDTHS) -> list[str]:
    """What is wrong with a page at any of the widths."""
    return [what for width in widths for what in look(running, where, width).complaints]


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Address at which the files of a folder are served, on this machine alone."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder))) as server:
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass
