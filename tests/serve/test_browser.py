"""The page in a real browser: another seed, a click, other images; nothing goes elsewhere."""

from __future__ import annotations

import io
import re
import threading
from contextlib import contextmanager

import httpx
import numpy as np
import pytest
from PIL import Image

from dinogen.serve.server import open_site
from tests.browser import open_browser

PIXELS = """image => {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
  const context = canvas.getContext("2d");
  context.drawImage(image, 0, 0);
  return [...context.getImageData(0, 0, canvas.width, canvas.height).data];
}"""


@pytest.fixture(scope="module")
def browser():
    with open_browser() as opened:
        yield opened


@contextmanager
def served(run):
    """The run's address, while another thread serves it."""
    site = open_site(run, "127.0.0.1", 0)
    thread = threading.Thread(target=site.run)
    thread.start()
    try:
        yield site.url
    finally:
        site._server.should_exit = True
        thread.join(120)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def urls(runs):
    with (
        served(runs["truncates"]) as truncates,
        served(runs["two_stages"]) as two_stages,
        served(runs["guided"]) as guided,
    ):
        yield {"truncates": truncates, "two_stages": two_stages, "guided": guided}


@pytest.fixture
def visit(browser, urls):
    """Opens a run's page; afterwards nothing may have gone wrong, nor elsewhere."""
    asked, errors, pages = [], [], []

    def go(name, fragment="", **options):
        page = browser.new_page(**options)
        page.set_default_timeout(60_000)
        pages.append(page)
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text))
        page.goto(urls[name] + fragment)
        return page

    yield go
    for page in pages:
        page.close()
    assert errors == []
    assert any("image.png" in url for url in asked)
    own = tuple(urls.values())
    assert [url for url in asked if not url.startswith((*own, "blob:", "data:"))] == []


def drawn(page, words):
    """The images once the page says ``words``, each (R, R, 3)."""
    page.get_by_role("status").filter(has_text=words).wait_for()
    assert page.locator("#images .old").count() == 0
    found = []
    for image in page.locator("#images img").all():
        flat = np.array(image.evaluate(PIXELS), dtype=np.uint8).reshape(-1, 4)
        side = round(len(flat) ** 0.5)
        found.append(flat.reshape(side, side, 4)[..., :3])
    return found


def direct(url, **query):
    content = httpx.get(f"{url}image.png", params=query).content
    return np.asarray(Image.open(io.BytesIO(content)))


def test_another_seed_gives_other_images(visit, urls):
    page = visit("truncates")
    before = drawn(page, "16 images")
    assert [image.shape for image in before] == [(16, 16, 3)] * 16
    page.get_by_label("Seed", exact=True).fill("7")
    page.get_by_role("button", name="Draw").click()
    after = drawn(page, "--seed 7")
    assert len(after) == 16
    for number, (old, new) in enumerate(zip(before, after, strict=True)):
        assert np.array_equal(new, direct(urls["truncates"], seed=7, number=number))
        assert not np.array_equal(old, new)
    assert "stylegan2_ada" in page.locator("#about").inner_text()
    assert "32 images seen" in page.locator("#about").inner_text()
    assert page.get_by_text("RANDOM GUIDE").is_hidden()
    page.get_by_role("button", name="Another").click()
    done = page.get_by_role("status").filter(has_text="--seed")
    done.filter(has_not_text=re.compile(r"--seed 7$")).wait_for()


def test_psi_and_a_walk(visit, urls):
    page = visit("truncates", "#seed=3&count=4")
    drawn(page, "4 images")
    page.get_by_label("Truncation psi").focus()
    page.keyboard.press("Home")
    page.get_by_label("Images").fill("3")
    page.get_by_label("Images").press("Enter")
    alike = drawn(page, "3 images")
    assert all(np.array_equal(image, alike[0]) for image in alike)
    page.get_by_label("Truncation psi").focus()
    page.keyboard.press("End")
    drawn(page, "--num 3")
    page.get_by_label("Walk to seed").fill("9")
    page.get_by_role("button", name="Draw").click()
    page.locator("#images a[download*='to9_at1.000']").wait_for()
    walk = drawn(page, "3 images")
    assert np.array_equal(walk[0], direct(urls["truncates"], seed=3))
    assert np.array_equal(walk[2], direct(urls["truncates"], seed=9))
    assert not np.array_equal(walk[1], walk[0])


def test_stages_can_be_chosen(visit):
    page = visit("two_stages", "#count=2")
    assert [image.shape for image in drawn(page, "2 images")] == [(16, 16, 3)] * 2
    page.get_by_label("Stage").select_option("8")
    assert [image.shape for image in drawn(page, "--stage 8")] == [(8, 8, 3)] * 2
    assert "stage 8x8 · 16 images seen" in page.locator("#about").inner_text()
    assert page.get_by_label("Truncation psi").count() == 0


def test_a_random_guide_is_said_on_a_phone_too(visit):
    phone = {"width": 390, "height": 844}
    page = visit("guided", "#count=4", viewport=phone, color_scheme="dark")
    drawn(page, "4 images")
    assert page.get_by_role("alert").filter(has_text="RANDOM GUIDE").is_visible()
    assert page.locator("#images a").first.get_attribute("download").endswith("random-guide.png")
    assert page.evaluate("document.scrollingElement.scrollWidth") <= 390
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert sum(map(int, colour[4:-1].split(","))) < 150


def test_a_number_out_of_bounds_asks_for_no_image(visit):
    page = visit("guided", "#count=1")
    drawn(page, "1 image")
    page.get_by_label("Images").fill("65")
    page.get_by_role("button", name="Draw").click()
    assert page.locator("#images a").count() == 1
    assert page.evaluate("document.getElementById('form').checkValidity()") is False
