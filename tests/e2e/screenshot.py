"""Takes the README's screenshot of a page that is being served: ``python -m tests.e2e.screenshot URL FILE``."""

import sys

from playwright.sync_api import Page, expect

from tests.e2e.browser import chromium

PATIENCE_MS = 120_000
SIZE = {"width": 1200, "height": 960}
PROMPTS = (
    "a small green cross at the top on a black background",
    "a large blue square on the left on a beige background",
)
COMPARED = "a large red circle above a small blue square on a white background"


def take(page: Page, url: str, file: str) -> None:
    """Fill the gallery, compare two modes, and save the screenshot."""
    page.goto(url)
    expect(page.get_by_role("radio")).to_have_count(5)
    for number, prompt in enumerate(PROMPTS):
        generate(page, prompt, number)
    page.get_by_label("Compare with").select_option("ultra")
    generate(page, COMPARED, 7)
    page.evaluate("scrollTo(0, 0)")
    page.screenshot(path=file)


def generate(page: Page, prompt: str, seed: int) -> None:
    """Generate an image, and wait for it."""
    page.get_by_label("Prompt").fill(prompt)
    page.get_by_label("Seed").fill(str(seed))
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_role("status")).to_have_text("Done")
    expect(page.locator(".gallery .prompt", has_text=prompt).first).to_be_visible()


def main(url: str, file: str, scheme: str = "light") -> None:
    """Open a browser in the size of the README."""
    expect.set_options(timeout=PATIENCE_MS)
    with chromium() as browser:
        take(browser.new_page(viewport=SIZE, color_scheme=scheme), url, file)  # type: ignore[arg-type]


if __name__ == "__main__":
    main(*sys.argv[1:])
