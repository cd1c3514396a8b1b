"""All steps in one pass: against the three steps, interrupted, finished, and refused."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dinogen.config import GuideConfig
from dinogen.distributed import process_group
from dinogen.features import load_guide
from dinogen.features.dinov2 import make_random_dinov2
from dinogen.prepare import join, pipeline
from dinogen.prepare.faces.folder import write_faces
from dinogen.prepare.parts import write_pyramids
from dinogen.prepare.photos.read import PrepareError
from dinogen.prepare.pyramid import PyramidMaker
from shards import ShardsError, open_dataset
from tests.prepare.pipelines import (
    CPU,
    NAMES,
    SETTINGS,
    contents,
    dinogen,
    fill,
    random_photo,
    run,
    settings,
)

REPO = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def guide(checkpoint):
    return load_guide(GuideConfig(path=str(checkpoint)), CPU)


@pytest.fixture
def photos(tmp_path):
    return fill(tmp_path / "photos")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, guide):
    """An uninterrupted preparation of the same photos."""
    folder = tmp_path_factory.mktemp("whole")
    fill(folder / "photos")
    config = settings()
    maker = PyramidMaker(guide, config.pyramids, CPU)
    summary, _ = pipeline.prepare(folder / "photos", folder / "data", config, maker)
    return folder / "data", summary


def test_one_pass_gives_the_bytes_of_the_three_steps(photos, whole, guide, tmp_path):
    config = settings()
    faces, parts, data = (tmp_path / name for name in ("faces", "parts", "data"))
    write_faces(photos, faces, config.faces)
    write_pyramids(faces, parts, PyramidMaker(guide, config.pyramids, CPU))
    source = join.open_pyramids(parts)
    made_by = join.guide_of(source, None)
    seen = []
    join.pack_faces(
        faces, source, data, config.pack, made_by, progress=lambda *step: seen.append(step)
    )
    assert seen[-1] == (len(NAMES), len(NAMES))
    one_pass = contents(whole[0])
    assert (faces / "rejected.csv").read_bytes() == one_pass.pop("rejected.csv")
    assert contents(data) == one_pass
    assert len([name for name in one_pass if name.startswith("train")]) > 2
    assert any(name.startswith("val") for name in one_pass)


def test_what_lies_in_the_dataset(whole, guide):
    data, summary = whole
    dataset = open_dataset(data)
    assert dataset.manifest.guide == guide.info.to_dict()
    assert dataset.manifest.prepare["faces"]["size"] == 32
    assert dataset.manifest.prepare["pyramids"]["kinds"] == ["pooled", "native"]
    assert sorted(dataset.manifest.levels) == ["n16", "n4", "n8", "p16", "p4", "p8"]
    assert dataset.manifest.image_size == 32
    samples = [
        dataset.sample(number, split)
        for split in dataset.manifest.splits
        for number in range(dataset.num_samples(split))
    ]
    assert {sample.meta["source"] for sample in samples} == set(NAMES)
    for split in dataset.manifest.splits:
        order = [
            dataset.sample(number, split).meta["source"].encode()
            for number in range(dataset.num_samples(split))
        ]
        assert order == sorted(order)
    rows = list(csv.reader(io.StringIO((data / "rejected.csv").read_text(encoding="utf-8"))))
    assert rows[0] == ["source", "reason", "detail"]
    assert [row[:2] for row in rows[1:]] == [
        ["many/0-again.png", "duplicate"],
        ["many/5-empty.jpg", "empty"],
    ]
    assert summary.num_photos == len(NAMES) + 2 and summary.num_crops == len(NAMES)
    assert json.loads((data / "summary.json").read_text())["rejected"] == {
        "duplicate": 1,
        "empty": 1,
    }
    assert not (data / "prepare.jsonl").exists()


class Killed(BaseException):
    pass


@pytest.mark.parametrize("after", [0, 1, 4, 8, 13, 19])
def test_after_an_interruption_the_rest_gives_the_same_bytes(
    photos, whole, guide, tmp_path, after, monkeypatch
):
    def kill(done, total):
        if done > after:
            raise Killed

    data = tmp_path / "data"
    with pytest.raises(Killed):
        run(photos, data, guide, progress=kill)
    with (data / "prepare.jsonl").open("ab") as journal:
        journal.write(b'{"source": "torn')
    num_packed = len(list(data.glob("*.tar"))) * SETTINGS["pack"]["shard_size"]
    summary, _ = run(photos, data, guide)
    assert summary.num_new == len(NAMES) - num_packed
    # What is gone through again is what filled no shard: less than a shard of each split, and
    # what the guide and the reader had not handed on yet.
    assert after - summary.num_skipped <= 2 * 3 + 2 * SETTINGS["pyramids"]["batch"]
    assert contents(data) == contents(whole[0])


def test_a_second_interruption_is_no_worse(photos, whole, guide, tmp_path):
    data = tmp_path / "data"
    for after in (9, 11, 12, 16):

        def kill(done, total, after=after):
            if done > after:
                raise Killed

        with pytest.raises(Killed):
            run(photos, data, guide, progress=kill)
    run(photos, data, guide)
    assert contents(data) == contents(whole[0])


def test_killed_for_real(photos, whole, checkpoint, guide, tmp_path):
    data, config = tmp_path / "data", tmp_path / "c.yaml"
    config.write_text(json.dumps({"guide": {"path": str(checkpoint)}, "prepare": SETTINGS}))
    script = tmp_path / "command.py"
    script.write_text(
        "import sys, time, typer\nfrom pathlib import Path\n"
        "from launch.cli import prepare as data\n"
        "from shards import ShardWriter\n"
        "add = ShardWriter.add\n"
        # in the second tar it waits for its end, so that it cannot finish before
        "held = lambda: time.sleep(600 * bool(list(Path(sys.argv[3]).glob('train-00001.tar'))))\n"
        "ShardWriter.add = lambda *a: (add(*a), held())\n"
        "app = typer.Typer()\ndata.register(app)\napp()\n"
    )
    command = [sys.executable, str(script), "prepare", str(photos), str(data), "-c", str(config)]
    environment = os.environ | {"PYTHONPATH": str(REPO), "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 300
    # The second tar: the first is surely recorded by then.
    while not list(data.glob("train-00001.tar")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (data / "manifest.json").exists()
    summary, _ = run(photos, data, guide)
    assert summary.num_skipped >= 3
    assert contents(data) == contents(whole[0])


def test_a_photo_that_is_gone_is_not_kept_in_silence(photos, guide, tmp_path):
    def kill(done, total):
        if done > 12:
            raise Killed

    data = tmp_path / "data"
    with pytest.raises(Killed):
        run(photos, data, guide, progress=kill)
    (photos / "10.jpg").unlink()
    with pytest.raises(PrepareError, match=r"the photo of 10, .* is gone or changed"):
        run(photos, data, guide)
    random_photo(NAMES.index("10.jpg")).save(photos / "10.jpg")
    summary, _ = run(photos, data, guide)
    assert summary.num_crops == len(NAMES)


def test_other_photos_and_other_settings_are_refused(photos, guide, tmp_path):
    def kill(done, total):
        if done > 8:
            raise Killed

    data = tmp_path / "data"
    with pytest.raises(Killed):
        run(photos, data, guide, progress=kill)
    (tmp_path / "others").mkdir()
    random_photo(99).save(tmp_path / "others" / "x.png")
    with pytest.raises(PrepareError, match=r"prepare\.jsonl: .*other photos \(.*photos\)"):
        run(tmp_path / "others", data, guide)
    with pytest.raises(ShardsError, match="other settings"):
        run(photos, data, guide, settings(faces={"size": 64}))
    journal = data / "prepare.jsonl"
    text = journal.read_text()
    journal.write_text(text.replace('{"source"', '"source"', 1))
    with pytest.raises(PrepareError, match=r"prepare\.jsonl: damaged"):
        run(photos, data, guide)
    journal.write_text(text)
    run(photos, data, guide)


def files(data):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in data.rglob("*.*")}


def test_finished_work_is_skipped(photos, guide, checkpoint, tmp_path):
    data = tmp_path / "data"
    first, manifest = run(photos, data, guide)
    before = files(data)
    summary, again = run(photos, data, guide)
    assert again == manifest
    assert (summary.num_new, summary.num_crops) == (0, first.num_crops)
    assert (summary.num_photos, summary.rejected) == (first.num_photos, first.rejected)
    copied = tmp_path / "guide of the same weights"
    shutil.copytree(checkpoint, copied)
    run(photos, data, load_guide(GuideConfig(path=str(copied)), CPU))
    assert files(data) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"faces": {"size": 64}}, r"prepare\.faces\.size: 32, now 64"),
        ({"pyramids": {"kinds": ["pooled"]}}, r"pyramids\.kinds: \['pooled', 'native'\], now"),
        ({"pack": {"shard_size": 4}}, r"prepare\.pack\.shard_size: 3, now 4"),
        (
            {"pack": {"val_fraction": 0.1}},
            r"fraction of train: 0\.7, now 0\.9; fraction of val: 0\.3,",
        ),
    ],
    ids=str,
)
def test_a_finished_dataset_of_other_settings_is_named(whole, photos, guide, changes, message):
    data = whole[0]
    before = files(data)
    with pytest.raises(PrepareError, match=f"holds a finished dataset .*{message}"):
        run(photos, data, guide, settings(**changes))
    assert files(data) == before


def test_a_finished_dataset_of_another_guide_or_other_photos_is_named(
    whole, photos, guide, tmp_path
):
    data = whole[0]
    folder = tmp_path / "other"
    make_random_dinov2(folder, seed=4, hidden_size=16, num_layers=1, num_heads=2, image_size=56)
    with pytest.raises(
        PrepareError, match=r"finished dataset .*guide: dinov2 \(.*tiny\) layer 1, "
    ):
        run(photos, data, load_guide(GuideConfig(path=str(folder)), CPU))
    (photos / "10.jpg").rename(photos / "11.jpg")
    with pytest.raises(PrepareError, match=r"1 removed \(10\.jpg\), 1 added .*--repack"):
        run(photos, data, guide)
    random_photo(50).save(photos / "one more.png")
    with pytest.raises(PrepareError, match=r"2 added \(11\.jpg, one more\.png\)"):
        run(photos, data, guide)


def test_a_mistyped_folder_is_an_error_before_the_guide_is_loaded(tmp_path):
    done = dinogen("prepare", tmp_path / "fotos", tmp_path / "data", "guide.path=/nowhere")
    assert isinstance(done.exception, PrepareError)
    assert "fotos: does not exist" in str(done.exception)
    assert not (tmp_path / "data").exists()


def test_what_cannot_be_prepared_is_said_at_once(photos, guide, tmp_path, monkeypatch):
    with pytest.raises(PrepareError, match="is below the photos"):
        run(photos, photos / "data", guide)
    with pytest.raises(PrepareError, match=r"prepare\.faces\.size: 40"):
        run(photos, tmp_path / "data", guide, settings(faces={"size": 40}))
    with pytest.raises(PrepareError, match="does not exist"):
        run(tmp_path / "none", tmp_path / "data", guide)
    monkeypatch.setattr(process_group, "world_size", lambda: 4)
    with pytest.raises(
        PrepareError, match=r"one process, not 4: .* `dinogen pyramids` under torchrun"
    ):
        run(photos, tmp_path / "data", guide)
    assert not (tmp_path / "data").exists()


def test_without_one_face_the_reasons_are_there(guide, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "a.jpg").write_bytes(b"")
    with pytest.raises(
        PrepareError, match=r"none of 1 photo gave an image \(1 empty\): see .*rejected\.csv"
    ):
        run(photos, tmp_path / "data", guide)
    assert "a.jpg,empty" in (tmp_path / "data" / "rejected.csv").read_text()
