"""What the application answers: images, refusals, one at a time."""

from __future__ import annotations

import io
import json
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient

from dinogen.config import ConfigError
from dinogen.report.images import to_uint8
from dinogen.serve import app as module
from dinogen.serve.app import MAX_QUERY, make_app
from dinogen.serve.gallery import Gallery
from dinogen.training.checkpointing.snapshot import load_snapshot

from .conftest import HERE


def png(client, **query):
    answer = client.get("/image.png", params=query)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "image/png"
    return answer.content


def pixels(client, **query):
    return np.asarray(Image.open(io.BytesIO(png(client, **query))))


def refusal(client, query, status=400):
    answer = client.get(f"/image.png?{query}")
    assert answer.status_code == status, (query, answer.status_code)
    assert answer.headers["content-type"].startswith("text/plain")
    return answer.text


@pytest.mark.parametrize("name", ["truncates", "two_stages", "guided"])
def test_images_are_those_of_dinogen_sample(clients, runs, name):
    expected = to_uint8(load_snapshot(runs[name]).sample(3, 5).numpy())
    for number, image in enumerate(expected):
        assert np.array_equal(pixels(clients[name], seed=5, number=number), image)
    assert not np.array_equal(expected[0], expected[1])


def test_the_same_query_gives_the_same_bytes(clients):
    client = clients["truncates"]
    first = png(client, seed=3, number=1)
    others = [png(client, seed=4, number=1), png(client, seed=3), png(client, seed=3, psi=0.5)]
    assert first == png(client, seed=3, number=1, psi=1, stage=16)
    assert first not in others


def test_an_image_says_how_it_was_made(clients):
    image = Image.open(io.BytesIO(png(clients["guided"], seed=2, number=7)))
    made = json.loads(image.text["dinogen"])
    assert (made["seed"], made["number"], made["nimg"]) == (2, 7, 32)
    assert (made["run"], made["family"], made["resolution"]) == ("guided", "guided", 16)
    assert made["random_guide"] is True


def test_without_psi_left_all_images_are_the_mean(clients):
    client = clients["truncates"]
    mean = pixels(client, seed=1, psi=0)
    for number in (1, 2, 3):
        assert np.array_equal(pixels(client, seed=number, number=number, psi=0), mean)
    assert not np.array_equal(pixels(client, seed=1, psi=1), mean)


def test_an_image_address_that_is_wrong_is_answered_on_the_page(clients):
    """In a browser; a program gets the plain text."""
    query = "/image.png?psi=0.5"
    page = clients["guided"].get(query, headers={"accept": "text/html,*/*"})
    plain = clients["guided"].get(query)
    assert page.status_code == plain.status_code == 400
    assert "<form" in page.text and "does not truncate" in page.text
    assert plain.headers["content-type"].startswith("text/plain")
    hostile = "/image.png?%3Cscript%3E=1"
    answer = clients["guided"].get(hostile, headers={"accept": "text/html"})
    assert answer.status_code == 400 and answer.text.count("<script>") == 1


@torch.no_grad()
def test_a_walk_goes_from_seed_to_seed_along_the_great_circle(clients, runs):
    client = clients["guided"]
    walk = [pixels(client, seed=1, to=2, at=at) for at in (0, 0.25, 1)]
    assert np.array_equal(walk[0], pixels(client, seed=1))
    assert np.array_equal(walk[2], pixels(client, seed=2))
    snapshot, number = load_snapshot(runs["guided"]), torch.tensor([0])
    a, b = (snapshot.family.latents(number, seed).double().numpy()[0] for seed in (1, 2))
    angle = np.arccos(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    between = (np.sin(0.75 * angle) * a + np.sin(0.25 * angle) * b) / np.sin(angle)
    latents = torch.tensor(between[None], dtype=torch.float32)
    images = snapshot.family.decode(snapshot.ema.networks, latents, number, 1)
    assert np.abs(to_uint8(images.numpy())[0].astype(int) - walk[1]).max() <= 1


def test_each_stage_has_its_own_images(clients, galleries):
    client = clients["two_stages"]
    assert pixels(client, stage=8).shape == (8, 8, 3)
    assert pixels(client, stage=16).shape == pixels(client).shape == (16, 16, 3)
    stages = galleries["two_stages"].stages
    assert [(stage.resolution, stage.nimg) for stage in stages.values()] == [(16, 32), (8, 16)]


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("seed=-1", "seed: Input should be greater than or equal to 0, not '-1'"),
        (f"seed={2**53}", "seed: Input should be less than or equal to 9007199254740991"),
        ("seed=abc", "seed: "),
        ("seed=", "seed: "),
        ("seed=1.5", "seed: "),
        ("number=1000000", "number: Input should be less than or equal to 999999"),
        ("psi=1.01", "psi: Input should be less than or equal to 1"),
        ("psi=-0.1", "psi: "),
        ("psi=nan", "psi: Input should be a finite number"),
        ("to=-3&at=0.5", "to: "),
        ("to=3&at=inf", "at: "),
        ("to=3&at=1.5", "at: "),
        ("at=0.5", "there is no seed to walk to"),
        ("stage=8", "stage: 8 is not a stage of this run: choose one of 16"),
        ("stage=0", "stage: "),
        ("sed=3", "did you mean 'seed'"),
        ("count=5", "unknown key 'count'"),
        ("seed=1&seed=2", "given twice"),
    ],
)
def test_wrong_numbers_are_refused_with_a_reason(clients, query, words):
    assert words in refusal(clients["truncates"], query)


def test_psi_is_refused_where_nothing_truncates(clients):
    assert "guided does not truncate" in refusal(clients["guided"], "psi=0.5")
    png(clients["guided"], psi=1)


def test_great_requests_are_refused(clients):
    client = clients["truncates"]
    assert str(MAX_QUERY) in refusal(client, "seed=" + "1" * MAX_QUERY, 414)
    assert client.request("GET", "/image.png", content=b"x").status_code == 413
    assert client.post("/image.png", content=b"x" * 100_000).status_code == 413
    chunked = client.post("/", content=iter([b"x", b"y"]))
    assert chunked.status_code == 413
    assert client.post("/image.png").status_code == 405
    assert client.get("/elsewhere").status_code == 404


def test_only_names_of_this_machine_are_answered(galleries):
    app = make_app(galleries["guided"], ["127.0.0.1"])
    assert TestClient(app, base_url="http://elsewhere.example").get("/").status_code == 400
    assert TestClient(app, base_url=HERE).get("/").status_code == 200


def test_nothing_may_come_from_elsewhere(clients):
    client = clients["guided"]
    for answer in (client.get("/"), client.get("/image.png?sed=1"), client.get("/nowhere")):
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "http" not in policy and "*" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
    page = client.get("/").text
    links = [text for text in page.split('"') if "://" in text]
    assert all(text.startswith("data:") for text in links), links


def test_the_name_of_a_run_is_no_html(runs, tmp_path):
    odd = tmp_path / "<b>run&\"'"
    shutil.copytree(runs["guided"], odd)
    page = TestClient(make_app(Gallery(odd), ["*"]), base_url=HERE).get("/").text
    assert "<b>" not in page
    assert "&lt;b&gt;run&amp;" in page


def test_a_run_without_a_checkpoint_is_refused(runs, tmp_path):
    with pytest.raises(ConfigError, match="no run here"):
        Gallery(tmp_path)
    shutil.copy(runs["guided"] / "config.yaml", tmp_path)
    with pytest.raises(ConfigError, match="train it first"):
        Gallery(tmp_path)


def test_a_checkpoint_that_went_away_is_said(runs, tmp_path):
    shutil.copytree(runs["two_stages"], tmp_path / "run")
    client = TestClient(make_app(Gallery(tmp_path / "run"), ["*"]), base_url=HERE)
    shutil.rmtree(tmp_path / "run" / "8x8" / "checkpoints")
    assert "start serve again" in refusal(client, "stage=8", 409)
    png(client, stage=16)


class Slow:
    """A gallery that counts who draws at the same time, and waits to be let go."""

    def __init__(self, gallery):
        self.gallery = gallery
        self.gate = threading.Event()
        self.drawing = self.most = 0

    def __getattr__(self, name):
        return getattr(self.gallery, name)

    def draw(self, query):
        self.drawing += 1
        self.most = max(self.most, self.drawing)
        assert self.gate.wait(120)
        time.sleep(0.02)
        self.drawing -= 1
        return self.gallery.draw(query)


def test_images_are_drawn_one_after_the_other_and_few_wait(galleries, monkeypatch):
    monkeypatch.setattr(module, "MAX_WAITING", 3)
    slow = Slow(galleries["guided"])
    with (
        TestClient(make_app(slow, ["127.0.0.1"]), base_url=HERE) as client,
        ThreadPoolExecutor(4) as pool,
    ):
        asked = [pool.submit(client.get, f"/image.png?seed={seed}") for seed in range(4)]
        until = time.monotonic() + 120
        while not any(one.done() for one in asked) and time.monotonic() < until:
            time.sleep(0.01)
        slow.gate.set()
        answers = [one.result(120) for one in asked]
        codes = sorted(answer.status_code for answer in answers)
        assert codes == [200, 200, 200, 503]
        assert slow.most == 1
        (refused,) = (answer for answer in answers if answer.status_code == 503)
        assert "try again" in refused.text
        assert client.get("/image.png").status_code == 200  # the places are free again
