"""The page of the API's description in a browser; skipped without Chromium."""

from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, expect

from tests.e2e.browser import chromium, find_chromium

pytestmark = pytest.mark.skipif(find_chromium() is None, reason="Chromium is not installed")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A browser."""
    with chromium() as browser:
        yield browser


def test_the_page_works_under_its_strict_policy(browser: Browser, generator_url: str) -> None:
    """It lists the routes, sends a request, and asks for a key, without an error or a request to another host."""
    page = browser.new_page()
    hosts, errors = set[str](), list[str]()
    page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(f"{generator_url}/docs")
    expect(page.locator(".opblock").first).to_be_visible()
    assert page.locator(".opblock").count() > 10
    live = page.locator("#operations-health-live_health_live_get")
    live.locator("button").first.click()
    live.get_by_role("button", name="Try it out").click()
    live.get_by_role("button", name="Execute").click()
    expect(live.locator(".live-responses-table tbody .response-col_status")).to_contain_text("200")
    page.get_by_role("button", name="Authorize").first.click()
    expect(page.locator(".modal-ux input")).to_be_visible()
    page.close()
    assert errors == []
    assert hosts - {""} == {urlsplit(generator_url).netloc}
