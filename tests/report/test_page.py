"""The page of a run: complete in itself, loud where a run failed, safe with any text."""

import base64
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from dinogen.errors import UserError
from dinogen.report.images import save_grid
from dinogen.report.run_page import write_page

GUIDE = {"name": "dinov2", "path": "facebook/dinov2-small", "weights_sha256": "ab12"}


def make_run(run, resolutions=(4, 8), mark="", **changes):
    """A run's files as the trainer leaves them."""
    rng = np.random.default_rng(0)
    for resolution in resolutions:
        name = f"{resolution}x{resolution}"
        files = {
            "final": f"final_{name}{mark}.png",
            "real": f"real_{name}.png",
            "loss_curve": f"loss_curve_{name}{mark}.png",
        }
        for file in files.values():
            shape = (4, resolution, resolution, 3)
            save_grid(rng.integers(0, 256, shape, dtype=np.uint8), run / name / file)
        result = {
            "stage": resolution,
            "resolution": resolution,
            "status": "finished",
            "nimg": 12800 * resolution,
            "loss": 2.5,
            "floor": 2.0,
            "loss_over_floor": 1.25,
            "diversity": 0.731,
            "health": "ok",
            "warnings": [],
            "guide": GUIDE,
            "guide_label": "dinov2 (facebook/dinov2-small)",
            "random_guide": False,
            "images_per_s": 123.4,
            "data_wait": 0.014,
            "seconds": 3725.0,
            "peak_memory_mb": None,
            "num_parameters": 2_345_678,
            "device": "cpu",
            "precision": "fp32",
            "world_size": 2,
            "versions": {"torch": "2.13.0"},
            "files": files,
        }
        (run / name / "result.json").write_text(json.dumps(result | changes))
    (run / "config.yaml").write_text("run: runs/x\nseed: 7\n")
    return run


class Page(HTMLParser):
    """What a browser would load and show."""

    def __init__(self, text):
        super().__init__()
        self.sources, self.tags, self.words, self.open = [], [], [], []
        self.feed(text)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.open.append(tag)
        self.sources += [value for key, value in attrs if key in ("src", "href") and value]

    def handle_endtag(self, tag):
        assert tag in self.open, f"</{tag}> closes nothing"
        while self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if self.open[-1:] not in (["style"], ["script"]):
            self.words.append(data)


def load(run):
    return Page(write_page(run).read_text(encoding="utf-8"))


def test_every_image_is_inside_the_page_byte_for_byte(tmp_path):
    run = make_run(tmp_path / "run")
    page = load(run)
    inside = [base64.b64decode(source.partition(";base64,")[2]) for source in page.sources]
    on_disk = [
        (run / name / f"{kind}_{name}.png").read_bytes()
        for name in ("4x4", "8x8")
        for kind in ("final", "real", "loss_curve")
    ]
    assert inside == on_disk
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert not {"script", "link", "iframe"} & set(page.tags)


def test_numbers_of_the_result_stand_in_the_table(tmp_path):
    page = load(make_run(tmp_path / "run"))
    for text in ("51,200", "102,400", "1.250", "73.1%", "123.4", "1.4%", "1:02:05", "2.35"):
        assert text in page.text, text
    assert "seed: 7" in page.text
    assert "torch 2.13.0" in page.text
    assert "facebook/dinov2-small" in page.text


def test_a_sound_run_has_no_alarm(tmp_path):
    page = load(make_run(tmp_path / "run"))
    assert "RANDOM GUIDE" not in page.text
    assert "COLLAPS" not in page.text


def test_stages_stand_in_order_of_resolution(tmp_path):
    page = load(make_run(tmp_path / "run", resolutions=(16, 4, 128, 8)))
    table = page.text[page.text.index("Numbers") :]
    names = re.findall(r"\b\d+x\d+\b", table)
    assert names == ["4x4", "8x8", "16x16", "128x128"]


def test_a_random_guide_is_said_loudly(tmp_path):
    run = make_run(
        tmp_path / "run",
        mark=".random-guide",
        random_guide=True,
        guide_label="RANDOM guide (dinov2)",
    )
    page = load(run)
    assert "RANDOM GUIDE" in page.text
    assert "RANDOM guide (dinov2)" in page.text
    assert len(page.sources) == 6


@pytest.mark.parametrize("health", ["COLLAPSING", "COLLAPSED"])
def test_a_collapse_is_said_loudly_with_its_warning(tmp_path, health):
    run = make_run(tmp_path / "run", health=health, warnings=[f"{health}: samples differ 8 %"])
    page = load(run)
    assert f"{health}: 4x4, 8x8" in page.text
    assert f"{health}: samples differ 8 %" in page.text


def test_an_image_that_is_missing_is_named(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "8x8" / "final_8x8.png").unlink()
    assert "missing: final_8x8.png" in load(run).text


def test_text_cannot_become_markup(tmp_path):
    evil = "<script>alert(1)</script>"
    run = make_run(tmp_path / evil.replace("/", "_"), warnings=[evil], guide_label=evil)
    (run / "config.yaml").write_text(f"run: '{evil}'\n")
    page = load(run)
    assert "script" not in page.tags
    assert page.text.count(evil) >= 3


def test_values_that_a_run_lacks_are_dashes(tmp_path):
    page = load(make_run(tmp_path / "run", floor=None, diversity=None, loss=float("nan")))
    for label in ("collapse floor", "diversity / real", "loss"):
        assert f" {label} – –" in page.text


def test_a_run_without_results_is_refused(tmp_path):
    with pytest.raises(UserError, match="no stage is finished"):
        write_page(tmp_path)
    assert not (tmp_path / "index.html").exists()


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_a_broken_result_costs_its_stage_alone_and_is_named(tmp_path, text):
    run = make_run(tmp_path / "run", (8,))
    (run / "16x16").mkdir()
    (run / "16x16" / "result.json").write_text(text)
    page = load(run)
    assert "8x8" in page.text
    assert "DAMAGED FILES" in page.text and "16x16/result.json" in page.text
    (run / "8x8" / "result.json").write_text("{")
    (run / "16x16" / "result.json").write_text("{")
    with pytest.raises(UserError, match="no stage is finished"):
        write_page(run)
