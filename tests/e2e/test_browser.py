"""A person in a browser: sign in to Open WebUI of gpu-large, ask, and watch the answer being streamed.

Needs the deployed lab (`make lab`). With FLEETFIT_UPDATE_SCREENSHOT=1 the picture in
docs/images, which README shows, is taken anew; otherwise the test leaves the checkout as it is.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Error, Page, sync_playwright

from fleetfit.lab.machine import install_packages
from fleetfit.lab.paths import lab_paths
from fleetfit.lab.state import read_state

REPO = Path(__file__).resolve().parents[2]
HOST = "gpu-large"
ADMIN = "admin@fleetfit.internal"
QUESTION = "What is the capital of France? Answer with its name."
EXPECTED = "Paris"
PICTURE = REPO / "docs/images/chat.png"
# Nothing that calls out, and no sandbox of its own since tests run as root.
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
# Chromium drops its connections when a network interface appears, as one does with every container.
PAGE_ATTEMPTS = 6


@pytest.fixture(scope="module")
def address() -> str:
    """Return the loopback address of the lab's supervised ``ssh -L``."""
    port = read_state(lab_paths()).forwards.get(f"{HOST} open-webui")
    assert port is not None, "the lab has no forward to Open WebUI: run `make lab`"
    return f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def password() -> str:
    """Return the administrator's password from the store where the deployment keeps it."""
    return (REPO / f".lab/secrets/{HOST}/open-webui.admin-password").read_text().strip()


@pytest.fixture(scope="module")
def chromium() -> str:
    """Return the path of Debian's chromium, installed where it is missing."""
    if shutil.which("chromium") is None:
        install_packages(["chromium"])
    found = shutil.which("chromium")
    assert found is not None
    return found


@pytest.fixture
def page(chromium: str) -> Iterator[Page]:
    """Return an empty page of a headless Chromium."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, headless=True, args=ARGUMENTS)
        yield browser.new_page(viewport={"width": 1280, "height": 640}, device_scale_factor=1)
        browser.close()


def open_sign_in(page: Page, address: str) -> None:
    """Open the page until its sign-in form is there."""
    for attempt in range(1, PAGE_ATTEMPTS + 1):
        try:
            page.goto(f"{address}/auth", timeout=30_000)
            page.wait_for_selector("input[type=password]", timeout=20_000)
            return
        except Error:
            if attempt == PAGE_ATTEMPTS:
                raise


def answer(page: Page) -> str:
    """Return the assistant's text so far."""
    found = page.query_selector(".chat-assistant")
    return found.inner_text().strip() if found else ""


def watch_answer(page: Page, *, timeout_s: float = 300, still_s: float = 4) -> list[str]:
    """Return the different texts that the answer went through until it stood still."""
    seen: list[str] = []
    changed = begun = time.monotonic()
    while time.monotonic() - begun < timeout_s:
        text = answer(page)
        if text and (not seen or text != seen[-1]):
            seen.append(text)
            changed = time.monotonic()
        elif seen and time.monotonic() - changed > still_s:
            break
        page.wait_for_timeout(50)
    return seen


def test_a_person_signs_in_asks_and_sees_the_answer_being_streamed(
    page: Page, address: str, password: str
) -> None:
    open_sign_in(page, address)
    assert page.get_by_text("Sign up", exact=True).count() == 0
    page.fill("input[type=email]", ADMIN)
    page.fill("input[type=password]", password)
    page.press("input[type=password]", "Enter")
    page.wait_for_selector("#chat-input", timeout=60_000)
    news = page.get_by_text("Okay, Let's Go!")
    try:
        news.wait_for(timeout=5_000)
        news.click()
    except Error:
        pass  # what is new is shown once to each user

    page.click("#chat-input")
    page.keyboard.type(QUESTION)
    page.keyboard.press("Enter")
    seen = watch_answer(page)
    assert seen, "no answer appeared"
    assert EXPECTED in seen[-1]
    assert len(seen) > 1, "the answer appeared at once: it was not streamed"
    assert seen[-1].startswith(seen[0][:4])

    if os.environ.get("FLEETFIT_UPDATE_SCREENSHOT") == "1":
        PICTURE.parent.mkdir(parents=True, exist_ok=True)
        page.mouse.move(0, 0)
        page.screenshot(path=PICTURE)


def test_a_wrong_password_is_refused(page: Page, address: str) -> None:
    open_sign_in(page, address)
    page.fill("input[type=email]", ADMIN)
    page.fill("input[type=password]", "not-the-password")
    page.press("input[type=password]", "Enter")
    page.wait_for_timeout(3_000)
    assert page.query_selector("#chat-input") is None
