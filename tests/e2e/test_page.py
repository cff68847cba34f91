"""The page at ``/`` in a real browser, with a real service."""

import io
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, ConsoleMessage, Page, Route, expect

from demo_model.services import WEIGHTS
from generator_service.app import create_app as create_generator
from generator_service.settings import GeneratorSettings
from tests.conftest import listening
from tests.e2e.browser import chromium, find_chromium

pytestmark = pytest.mark.skipif(find_chromium() is None, reason="chromium is not installed")

PROMPT = "a large red circle above a small blue square on a white background"
PATIENCE_MS = 60_000
LONG = {"width": "512", "height": "512", "num_inference_steps": "100"}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One browser for all tests; each test opens the page with a new profile."""
    expect.set_options(timeout=PATIENCE_MS)
    with chromium() as browser:
        yield browser


@dataclass
class Visit:
    """The open page, and the messages of the browser."""

    page: Page
    url: str
    errors: list[str] = field(default_factory=list)
    wanted: list[str] = field(default_factory=list)
    hosts: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.page.set_default_timeout(PATIENCE_MS)
        self.page.on("console", self._listen)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.hosts.add(urlsplit(request.url).netloc))
        self.page.goto(self.url)

    def _listen(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.errors.append(message.text)

    def expect_refusals(self, status: int) -> None:
        """Expect that the browser logs refused requests, at any time of the visit."""
        message = f"the server responded with a status of {status}"
        assert any(message in error for error in self.errors)
        self.wanted.append(message)

    def unwanted_errors(self) -> list[str]:
        """The logged errors except for expected refusals."""
        return [error for error in self.errors if not any(message in error for message in self.wanted)]

    def fill(self, **fields: str) -> None:
        """Fill in form fields once the modes are loaded."""
        expect(self.page.get_by_role("radio")).to_have_count(5)
        for name, text in fields.items():
            self.page.locator(f"#{name}").fill(text)

    def generate(self, **fields: str) -> None:
        """Fill in the form and press the button."""
        self.fill(**{"prompt": PROMPT} | fields)
        self.page.get_by_role("button", name="Generate").click()

    def wait_until_done(self) -> None:
        """Wait until the images are shown."""
        expect(self.page.get_by_role("status")).to_have_text("Done")

    def gallery(self) -> list[bytes]:
        """The images of the gallery as downloaded, newest first."""
        files = []
        for link in self.page.get_by_role("link", name="Download").all():
            with self.page.expect_download() as download:
                link.click()
            files.append(download.value.path().read_bytes())
        return files


@contextmanager
def visiting(browser: Browser, url: str) -> Iterator[Visit]:
    """The page in a new profile; at the end there must be no errors and no requests to other hosts."""
    context = browser.new_context()
    visit = Visit(context.new_page(), url)
    yield visit
    context.close()
    assert visit.unwanted_errors() == []
    assert visit.hosts - {""} == {urlsplit(url).netloc}  # data and blob URLs have no host


@pytest.fixture
def visit(browser: Browser, generator_url: str) -> Iterator[Visit]:
    """The page of a service without authentication."""
    with visiting(browser, generator_url) as visit:
        yield visit


def png_file(width: int = 96, height: int = 64) -> bytes:
    """An image as a PNG file."""
    buffer = io.BytesIO()
    ramp = np.add.outer(np.arange(height), np.arange(width)).astype(np.uint8)
    Image.fromarray(ramp).convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def test_a_prompt_becomes_an_image(visit: Visit) -> None:
    """Generate shows the image and its measurements; the timeline has each step, computed or reused."""
    visit.generate(seed="7")
    visit.wait_until_done()
    expect(visit.page.locator(".run .now")).to_have_text(re.compile(r"20 of 50 steps computed · .* s · seed 7"))
    expect(visit.page.locator(".run .timeline .computed")).to_have_count(20)
    expect(visit.page.locator(".run .timeline .reused")).to_have_count(30)
    image = visit.page.get_by_role("article").get_by_role("img", name=PROMPT)
    assert image.evaluate("image => [image.naturalWidth, image.naturalHeight]") == [128, 128]


def test_a_truncated_prompt_is_reported(visit: Visit) -> None:
    """The summary of the image, also in the gallery, says that the end of the prompt was ignored."""
    visit.generate(prompt="red " * 100, num_inference_steps="2")
    visit.wait_until_done()
    warning = re.compile("seed .* the end of the prompt was ignored: it is too long")
    expect(visit.page.locator(".run .now")).to_have_text(warning)
    expect(visit.page.locator("#gallery .parameters")).to_have_text(warning)


def test_a_transparent_reference_is_shown_on_white(visit: Visit) -> None:
    """The thumbnail has the background that the service blends transparent pixels with."""
    visit.page.locator("#images").set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": png_file()})
    expect(visit.page.locator("#thumbnails img")).to_have_css("background-color", "rgb(255, 255, 255)")


def test_the_modes_count_reference_images(visit: Visit) -> None:
    """Steps, times and default size are those of an edit of the chosen image; without it, those of before."""
    visit.fill()
    with visit.page.expect_response(lambda response: response.url.endswith("modes?images=96x64")):
        visit.page.locator("#images").set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": png_file()})
    expect(visit.page.locator("#width")).to_have_attribute("placeholder", "96")
    visit.page.get_by_role("button", name="Remove reference image 1").click()
    expect(visit.page.locator("#width")).to_have_attribute("placeholder", "128")


def test_the_page_works_below_a_path_prefix(browser: Browser, encoder_url: str) -> None:
    """Opened at its prefix, even without the slash, the page requests nothing outside it."""
    prefix = "/tools/flux2"
    settings = GeneratorSettings(model=str(WEIGHTS), text_encoder_url=encoder_url, root_path=prefix)
    with listening(create_generator(settings)) as url, visiting(browser, f"{url}{prefix}") as visit:
        visit.generate(width="64", height="64", num_inference_steps="4")
        visit.wait_until_done()
        requested = visit.page.evaluate("performance.getEntriesByType('resource').map(entry => entry.name)")
        paths = [urlsplit(address).path for address in requested if address.startswith("http")]
    assert {f"{prefix}/generate", f"{prefix}/modes", f"{prefix}/page/page.js"} <= set(paths)
    assert all(path.startswith(f"{prefix}/") for path in paths)


def test_progress_is_shown(visit: Visit) -> None:
    """While an image is generated the timeline fills, its two types of steps look different, and previews appear."""
    visit.fill(**LONG | {"prompt": PROMPT})
    visit.page.get_by_role("radio", name="ultra").check()
    visit.page.get_by_role("button", name="Generate").click()
    bar = visit.page.get_by_role("progressbar", name="Progress")
    expect(bar.locator(".reused").first).to_be_attached()
    expect(visit.page.locator(".run .now")).to_have_text(re.compile(r"Step \d+ of 100, (computed|reused) · .* s left"))
    expect(visit.page.get_by_role("img", name=re.compile("Preview 1 of"))).to_be_visible()
    assert 0 < int(bar.get_attribute("aria-valuenow") or 0) <= 100
    heights = [bar.locator(f".{kind}").first.bounding_box() for kind in ("computed", "reused")]
    visit.wait_until_done()
    assert heights[0] is not None
    assert heights[1] is not None
    assert heights[0]["height"] > 2 * heights[1]["height"]


def test_cancel_stops_the_service(visit: Visit) -> None:
    """Cancel stops the generation at the service, and the next image can be generated."""
    visit.generate(**LONG)
    expect(visit.page.locator(".run .timeline .computed").first).to_be_attached()
    assert queue_depth(visit.url) == 1
    visit.page.get_by_role("button", name="Cancel").click()
    expect(visit.page.get_by_role("status")).to_have_text("Cancelled")
    expect(visit.page.get_by_role("button", name="Cancel")).to_be_hidden()
    expect(visit.page.get_by_role("button", name="Generate")).to_be_focused()
    deadline = time.monotonic() + 10
    while queue_depth(visit.url) > 0:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    visit.generate(width="64", height="64", num_inference_steps="4")
    visit.wait_until_done()


def queue_depth(url: str) -> float:
    """The number of requests in the service."""
    match = re.search(r"^flux2_queue_depth (.*)$", httpx.get(f"{url}/metrics").text, re.MULTILINE)
    assert match is not None
    return float(match[1])


def test_the_queue_position_is_shown(visit: Visit) -> None:
    """While other images are generated, the page shows the number of requests ahead."""
    body = {"prompt": PROMPT, "cache": "none"} | {name: int(number) for name, number in LONG.items()}
    jobs = [httpx.post(f"{visit.url}/jobs", json=body).headers["location"] for _ in range(2)]
    visit.generate(num_inference_steps="4")
    expect(visit.page.locator(".run .now")).to_have_text(re.compile("Waiting in the queue: 2 ahead · .* s"))
    for job in jobs:
        httpx.delete(visit.url + job)
    visit.wait_until_done()


def test_two_modes_are_compared(visit: Visit) -> None:
    """One seed in two modes: both images with their measurements, a slider over them, and their PSNR."""
    visit.fill(prompt=PROMPT)
    visit.page.get_by_role("radio", name="none").check()
    visit.page.get_by_label("Compare with").select_option("ultra")
    visit.page.get_by_role("button", name="Generate").click()
    visit.wait_until_done()
    seeds = [re.findall(r"seed (\d+)", text) for text in visit.page.locator(".run .now").all_text_contents()]
    assert len(seeds) == 2
    assert seeds[0] == seeds[1]
    caption = visit.page.locator("figcaption", has_text="PSNR").text_content() or ""
    assert re.search(r"none: 50 of 50 steps, [\d.]+ s · ultra: 10 of 50 steps, [\d.]+ s", caption)
    shown = float(re.findall(r"PSNR ([\d.]+) dB", caption)[0])
    ultra, none = (np.asarray(Image.open(io.BytesIO(data))).astype(float) for data in visit.gallery())
    assert shown == pytest.approx(10 * np.log10(255**2 / np.mean((none - ultra) ** 2)), abs=0.06)
    slider = visit.page.get_by_role("slider", name="Border between none on the left and ultra on the right")
    before = visit.page.locator(".pair .left").evaluate("image => getComputedStyle(image).clipPath")
    slider.focus()
    for _ in range(10):
        slider.press("ArrowRight")
    assert slider.get_attribute("aria-valuetext") == "60 % none"
    assert visit.page.locator(".pair .left").evaluate("image => getComputedStyle(image).clipPath") != before


def test_equal_images_are_called_identical(visit: Visit) -> None:
    visit.fill(prompt=PROMPT, width="64", height="64", num_inference_steps="8")
    visit.page.get_by_label("Compare with").select_option("medium")
    visit.page.get_by_role("button", name="Generate").click()
    visit.wait_until_done()
    expect(visit.page.locator(".comparison figcaption")).to_have_text(re.compile("^identical · medium: 3 of 8 steps"))


def test_modes_follow_the_form(visit: Visit) -> None:
    """Each mode shows its computed steps and seconds for the size and the steps in the form."""
    visit.fill(num_inference_steps="28", width="256")
    expect(visit.page.get_by_role("radio", name="none 28 of 28")).to_be_attached()
    steps = visit.page.locator(".modes .steps").all_text_contents()
    assert steps == ["28 of 28", "15 of 28", "11 of 28", "8 of 28", "6 of 28"]
    seconds = visit.page.locator(".modes .estimate").all_text_contents()
    assert len(seconds) == 5
    assert all(re.fullmatch(r"[\d.]+ s", text) for text in seconds)


def test_reference_images_can_be_selected_dropped_and_removed(visit: Visit) -> None:
    """Each image has a thumbnail and can be removed; the request uses the size of the remaining one."""
    files = [
        {"name": f"{name}.png", "mimeType": "image/png", "buffer": png_file(width)}
        for name, width in (("a", 96), ("b", 64))
    ]
    visit.page.get_by_label("Drop images here").set_input_files(files)  # type: ignore[arg-type]
    expect(visit.page.get_by_role("img", name=re.compile("^Reference image"))).to_have_count(2)
    visit.page.get_by_role("button", name="Remove reference image 1").click()
    expect(visit.page.get_by_role("img", name=re.compile("^Reference image"))).to_have_count(1)
    expect(visit.page.get_by_role("button", name="Remove reference image 1")).to_be_focused()
    visit.page.locator("#drop").evaluate(
        """(drop, bytes) => {
            const dropped = new DataTransfer();
            dropped.items.add(new File([new Uint8Array(bytes)], "c.png", {type: "image/png"}));
            drop.dispatchEvent(new DragEvent("drop", {dataTransfer: dropped, bubbles: true, cancelable: true}));
        }""",
        list(png_file(80)),
    )
    expect(visit.page.get_by_role("img", name=re.compile("^Reference image"))).to_have_count(2)
    visit.generate(num_inference_steps="4")
    visit.wait_until_done()
    expect(visit.page.locator(".gallery .parameters")).to_have_text(re.compile("64 . 64 .* 2 reference images"))


def test_a_file_that_is_not_an_image_is_refused_at_once(visit: Visit) -> None:
    """The error names the file and is shown at the field."""
    file = {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"not an image"}
    visit.page.get_by_label("Drop images here").set_input_files(file)  # type: ignore[arg-type]
    expect(visit.page.locator("#images-error")).to_have_text("notes.txt is neither a PNG, a JPEG nor a WebP file.")


def test_errors_of_reference_images_are_shown_at_their_field(visit: Visit) -> None:
    """The service's error about one of the images is shown at their common field."""
    file = {"name": "flat.png", "mimeType": "image/png", "buffer": png_file(96, 32)}
    visit.page.get_by_label("Drop images here").set_input_files(file)  # type: ignore[arg-type]
    expect(visit.page.get_by_role("img", name="Reference image 1")).to_be_visible()
    visit.generate()
    expect(visit.page.locator("#images-error")).to_have_text(
        re.compile(r"images\[0\]: must have sides of at least 64 pixels")
    )
    expect(visit.page.get_by_label("Drop images here")).to_be_focused()
    visit.expect_refusals(422)


def test_modes_are_shown_although_a_reference_image_is_refused(visit: Visit) -> None:
    """If the first modes that the page asks for are those of a refused reference image, it shows the default ones."""
    requests: list[Route] = []

    def hold_first(route: Route) -> None:
        requests.append(route)
        if len(requests) > 1:
            route.continue_()

    visit.page.route("**/modes?*", hold_first)
    visit.page.reload()
    file = {"name": "flat.png", "mimeType": "image/png", "buffer": png_file(96, 32)}
    visit.page.get_by_label("Drop images here").set_input_files(file)  # type: ignore[arg-type]
    expect(visit.page.get_by_role("radio")).to_have_count(5)
    expect(visit.page.locator("#images-error")).to_have_text(re.compile(r"images\[0\]: must have sides of at least"))
    visit.expect_refusals(422)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("width", "100", "width: must be a multiple of 16 from 64 to 4096, not 100"),
        ("seed", "seven", "seed: Input should be a valid integer"),
        ("num_inference_steps", "101", "num_inference_steps: Input should be less than or equal to 100"),
    ],
)
def test_errors_are_shown_at_their_field(visit: Visit, name: str, text: str, message: str) -> None:
    """A refused field is marked, described by its error, and focused, and can then be corrected."""
    visit.generate(**{name: text})
    wrong = visit.page.locator(f"#{name}")
    expect(visit.page.locator(f"#{name}-error")).to_have_text(message)
    expect(wrong).to_have_attribute("aria-invalid", "true")
    expect(wrong).to_be_focused()
    expect(wrong).to_have_accessible_description(message)
    visit.generate(width="64", height="64", num_inference_steps="4", seed="9223372036854775807")
    visit.wait_until_done()
    expect(visit.page.locator(f"#{name}-error")).to_be_empty()
    expect(visit.page.locator(".run .now")).to_have_text(re.compile("seed 9223372036854775807"))
    visit.expect_refusals(422)


def test_a_prompt_is_required(visit: Visit) -> None:
    """Without a prompt nothing is sent."""
    visit.generate(prompt="")
    expect(visit.page.locator("#prompt-error")).to_have_text("Enter a prompt.")
    expect(visit.page.get_by_label("Prompt")).to_be_focused()


def test_the_gallery_persists_and_repeats(visit: Visit) -> None:
    """The gallery survives a reload; repeat fills in the form and gives the same file again."""
    visit.generate(num_inference_steps="8")
    visit.wait_until_done()
    visit.page.reload()
    expect(visit.page.locator(".gallery li")).to_have_count(1)
    expect(visit.page.locator(".gallery .parameters")).to_have_text(re.compile("medium · 128 . 128 · 3 of 8 steps"))
    visit.page.get_by_role("button", name="Repeat").click()
    visit.wait_until_done()
    expect(visit.page.get_by_label("Prompt")).to_have_value(PROMPT)
    expect(visit.page.get_by_label("Seed")).to_have_value(re.compile(r"\d+"))
    expect(visit.page.get_by_role("spinbutton", name="Steps")).to_have_value("8")
    again, first = visit.gallery()
    assert again == first
    visit.page.get_by_role("button", name="Delete").first.click()
    expect(visit.page.locator(".gallery li")).to_have_count(1)
    visit.page.reload()
    expect(visit.page.locator(".gallery li")).to_have_count(1)


@pytest.fixture(scope="module")
def keyed_url(encoder_url: str) -> Iterator[str]:
    """The address of a generator that requires a key."""
    settings = GeneratorSettings(model=str(WEIGHTS), token="open sesame", text_encoder_url=encoder_url)
    with listening(create_generator(settings)) as url:
        yield url


@pytest.fixture
def keyed_visit(browser: Browser, keyed_url: str) -> Iterator[Visit]:
    """The page of that generator."""
    with visiting(browser, keyed_url) as visit:
        yield visit


def test_the_page_asks_for_a_required_key(keyed_visit: Visit) -> None:
    """The page loads without a key; a wrong key is asked for again, and a valid one is kept for the tab."""
    page = keyed_visit.page
    key = page.get_by_label("API key")
    expect(key).to_be_focused()
    key.fill("mellon")
    key.press("Enter")
    expect(page.locator("#key-error")).to_have_text("The service rejected this key.")
    key.fill("open sesame")
    page.get_by_role("button", name="Use this key").click()
    keyed_visit.generate(num_inference_steps="4")
    keyed_visit.wait_until_done()
    page.reload()
    expect(page.get_by_role("radio")).to_have_count(5)
    expect(key).to_be_hidden()
    keyed_visit.expect_refusals(401)


def test_a_missing_key_is_reported(keyed_visit: Visit) -> None:
    """Closing the dialog shows the service's message; Generate opens it again."""
    page = keyed_visit.page
    closers: list[Callable[[], None]] = [lambda: page.keyboard.press("Escape"), page.locator("#key-cancel").click]
    for close_dialog in closers:
        expect(page.get_by_label("API key")).to_be_focused()
        close_dialog()
        expect(page.get_by_label("API key")).to_be_hidden()
        expect(page.get_by_role("alert")).to_have_text("a valid bearer token is required")
        page.get_by_label("Prompt").fill(PROMPT)
        page.get_by_role("button", name="Generate").click()
    keyed_visit.expect_refusals(401)


def test_every_control_has_a_name(visit: Visit) -> None:
    """Every input has a name for screen readers, also when there are images to compare."""
    visit.fill(prompt=PROMPT, num_inference_steps="4", width="64", height="64")
    visit.page.get_by_label("Compare with").select_option("none")
    visit.page.get_by_role("button", name="Generate").click()
    visit.wait_until_done()
    controls = visit.page.locator("input:visible, select:visible, textarea:visible, button:visible, a:visible").all()
    assert len(controls) > 20
    for control in controls:
        expect(control).to_have_accessible_name(re.compile(r"\S"))
    assert visit.page.locator("img:visible:not([alt])").count() == 0
    for name in ("Generation request", "Result", "Gallery"):
        assert re.search(rf'(form|region) "{name}"', visit.page.locator("main").aria_snapshot())


def test_the_page_works_with_the_keyboard(visit: Visit) -> None:
    """From the prompt Tab reaches each control in turn, the focus is visible, and Enter generates."""
    visit.fill(num_inference_steps="4", width="64", height="64", prompt=PROMPT)
    passed: list[str | None] = []
    while len(passed) < 30:
        visit.page.keyboard.press("Tab")
        focused = visit.page.locator(":focus")
        passed.append(focused.get_attribute("name") or focused.text_content())
        outlined = focused.evaluate("e => [e, e.parentElement].some(x => getComputedStyle(x).outlineStyle !== 'none')")
        assert outlined, passed
        if passed[-1] == "Generate":
            break
    assert passed == ["images", "cache", "compare_with", *LONG, "guidance_scale", "seed", "output_format", "Generate"]
    visit.page.keyboard.press("Enter")
    visit.wait_until_done()


def test_it_fits_a_phone_and_both_color_schemes(visit: Visit) -> None:
    """Nothing is cut off at a width of 360 pixels, and a dark scheme is dark."""
    visit.page.set_viewport_size({"width": 360, "height": 700})
    expect(visit.page.get_by_role("radio")).to_have_count(5)
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= 360
    brightness = {}
    for scheme in ("light", "dark"):
        visit.page.emulate_media(color_scheme=scheme)
        color = visit.page.evaluate("getComputedStyle(document.body).backgroundColor")
        brightness[scheme] = sum(map(int, re.findall(r"\d+", color)[:3]))
    assert brightness["dark"] < 150
    assert brightness["light"] > 600
