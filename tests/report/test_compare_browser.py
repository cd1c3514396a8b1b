"""The comparison in a real browser: nothing is loaded, nothing sticks out, dark is dark."""

import io

import numpy as np
import pytest
from PIL import Image

from dinogen.report.compare import write_comparison
from tests.browser import open_browser

from .compare_runs import make_run, metric_value

NAMES = ("fid768", "kid768", "precision768", "recall768", "density768", "coverage768")


@pytest.fixture(scope="module")
def browser():
    with open_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared")
    measured = {name: metric_value(0.5, 0.01) for name in NAMES}
    runs = [
        make_run(folder / f"a_run_with_a_name_that_is_rather_long_{n}", measured=measured, seed=n)
        for n in range(3)
    ]
    return write_comparison(runs, folder / "out", "A comparison").page


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_and_loads_nothing(browser, page_file, width):
    page = browser.new_page(viewport={"width": width, "height": 800})
    asked, errors = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text))
    page.goto(page_file.as_uri())
    page.wait_for_load_state("networkidle")
    assert [url for url in asked if not url.startswith("data:")] == [page_file.as_uri()]
    assert errors == []
    assert page.evaluate("document.scrollingElement.scrollWidth") <= width
    # the table scrolls in its own box, and its first column stays
    box = page.locator(".scroll").first
    before = box.locator("tbody th").first.bounding_box()
    moved = box.evaluate("box => (box.scrollLeft = 300, box.scrollLeft)")
    after = box.locator("tbody th").first.bounding_box()
    if width == 390:
        assert moved > 200
    assert abs(after["x"] - before["x"]) < 2
    shown = page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    assert shown
    page.close()


def test_a_shade_says_that_a_table_goes_on(browser, page_file):
    page = browser.new_page(viewport={"width": 390, "height": 800}, color_scheme="light")
    page.goto(page_file.as_uri())
    box = page.locator(".scroll").first

    def brightness_at_the_right():
        image = Image.open(io.BytesIO(box.screenshot())).convert("L")
        edge = np.asarray(image)[:, -8:-2]
        return float(np.median(edge))  # of the ground, between the letters

    goes_on = brightness_at_the_right()
    box.evaluate("box => box.scrollLeft = box.scrollWidth")
    assert goes_on < brightness_at_the_right() - 10
    page.close()


def test_a_number_leads_to_its_origin(browser, page_file):
    page = browser.new_page()
    page.goto(page_file.as_uri())
    page.locator("td.best a, td a").first.click()
    target = page.evaluate("location.hash.slice(1)")
    assert page.locator(f"[id='{target}']").is_visible()
    page.close()


def test_dark_is_dark(browser, page_file):
    shades = {}
    for scheme in ("light", "dark"):
        page = browser.new_page(color_scheme=scheme)
        page.goto(page_file.as_uri())
        colours = page.evaluate(
            "['backgroundColor', 'color'].map(k => getComputedStyle(document.body)[k])"
        )
        shades[scheme] = [sum(map(int, text[4:-1].split(","))) / 765 for text in colours]
        page.close()
    assert shades["light"][0] > 0.9 and shades["light"][1] < 0.2
    assert shades["dark"][0] < 0.2 and shades["dark"][1] > 0.8
