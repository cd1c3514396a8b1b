"""Sixty photos and everything odd that users keep beside them: the whole way, in one pass."""

from __future__ import annotations

import csv
import io
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image, ImageCms
from typer.testing import CliRunner

from launch.cli.main import app
from shards import open_dataset
from tests.prepare.pipelines import random_photo

NUM = 60
CONFIG = {
    "guide": {"name": "pixels"},
    "family": {"name": "guided"},
    "engine": {"name": "single"},
    "prepare": {
        "faces": {"detect": "none", "size": 32},
        "pyramids": {"shard_size": 16, "grids": [4, 8], "base_grid": 8},
        "pack": {"shard_size": 20, "val_fraction": 0.2},
    },
    "stages": [{"resolution": 8, "kimg": 0.032, "batch": 16, "lr": 1.0e-3}],
}
HIDDEN = [
    *("._000.jpg", ".DS_Store", ".git/a.jpg", ".ipynb_checkpoints/000-checkpoint.jpg"),
    *("@eaDir/000.jpg/SYNOPHOTO_THUMB_XL.jpg", "__MACOSX/000.jpg", "Thumbs.db", "desktop.ini"),
    *("#recycle/000.jpg", "$RECYCLE.BIN/000.jpg", "lost+found/000.jpg", ".Trash-0/files/0.jpg"),
]
# Names of photos that are used, and those that are not with the reason.
USED = [
    *("x" * 200 + ".jpg", "/".join(["a long name of a folder"] * 12) + "/a.jpg", "x.y.z.jpg"),
    *("A.jpg", "a.jpg", "é.jpg", "e\N{COMBINING ACUTE ACCENT}.jpg", os.fsdecode(b"caf\xe9.jpg")),
    *("写真 1.JPG", "-dash.jpg", "__x__.jpg", "summary.jpg", "a_1.jpg", "quote'\"$.jpg"),
    *("folder.jpg/in.jpg", "noext", "img.jpg_large", "pic.jpg!d", "x.jpg.1"),
    *("turned.jpg", "p3.jpg", "cmyk.jpg", "grey.jpg", "grey16.png", "alpha.png", "palette.png"),
    *("text.png", "exif.png", "no_end.jpg", "more.jpg", "a.webp", "b.tif", "c.bmp", "d.gif"),
    *("e.webp.jpg", "latin1.jpg", "empty_caption.jpg", "utf16.jpg", "long_caption.jpg"),
]
REJECTED = {
    "cut.jpg": "truncated",
    "dangling.jpg": "unreadable",
    "empty.png": "empty",
    "pipe.jpg": "unreadable",
    "words.jpg": "not_an_image",
}
LEFT_OUT = {".mov": 1, ".nef": 1, ".zip": 2, "no suffix": 1}
CAPTIONS = {
    "latin1.txt": b"gr\xf6\xdfer",
    "empty_caption.txt": b"",
    "utf16.txt": "a face".encode("utf-16"),
    "long_caption.txt": b"x" * 5000,
}
SIDECARS = {**CAPTIONS, "000.txt": b"a square", "000.json": b"{}", "000.xmp": b"<x/>", "0.AAE": b""}


def encoded(image, kind="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk_of_text(png):
    """A PNG with a text chunk that Pillow calls a bomb."""
    import struct
    import zlib

    body = b"zTXtComment\0\0" + zlib.compress(bytes(2_000_000))
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    return png[:33] + chunk + png[33:]


def odd_photo(name, seed):
    image = random_photo(seed)
    exif = Image.Exif()
    exif[0x0112] = 6
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    deep = (np.random.default_rng(seed).random((40, 48)) * 65535).astype(np.uint16)
    made = {
        "turned.jpg": lambda: encoded(image, exif=exif),
        "p3.jpg": lambda: encoded(image, icc_profile=profile),
        "cmyk.jpg": lambda: encoded(image.convert("CMYK")),
        "grey.jpg": lambda: encoded(image.convert("L")),
        "grey16.png": lambda: encoded(Image.fromarray(deep), "PNG"),
        "alpha.png": lambda: encoded(image.convert("RGBA"), "PNG"),
        "palette.png": lambda: encoded(image.convert("P"), "PNG"),
        "text.png": lambda: chunk_of_text(encoded(image, "PNG")),
        "exif.png": lambda: encoded(image, "PNG", exif=b"Exif\0\0garbage-"),
        "no_end.jpg": lambda: encoded(image)[:-2],
        "more.jpg": lambda: encoded(image) + b"more" * 100,
        "cut.jpg": lambda: encoded(image)[:-300],
        "empty.png": lambda: b"",
        "words.jpg": lambda: b"no image",
    }
    kinds = {".webp": "WEBP", ".tif": "TIFF", ".bmp": "BMP", ".gif": "GIF"}
    kind = "WEBP" if name == "e.webp.jpg" else kinds.get(Path(name).suffix, "JPEG")
    return made.get(name, lambda: encoded(image, kind))()


@pytest.fixture(scope="module")
def src(tmp_path_factory):
    src = tmp_path_factory.mktemp("all") / "photos"
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as file:
        file.writestr("a.jpg", odd_photo("a.jpg", 0))
    content = {f"{n:03d}.jpg": encoded(random_photo(1000 + n)) for n in range(NUM)}
    content |= {name: odd_photo(name, seed) for seed, name in enumerate([*USED, "cut.jpg"])}
    content |= {name: odd_photo(name, 0) for name in ("empty.png", "words.jpg")}
    content |= dict.fromkeys(HIDDEN, encoded(random_photo(0))) | SIDECARS
    content |= {"film.MOV": b"\0\0\0\x14ftypqt  ", "raw.NEF": b"II*\0", "words": b"none"}
    content |= {"a.zip": packed.getvalue(), "album/b.zip": packed.getvalue()}
    for name, data in content.items():
        (src / name).parent.mkdir(parents=True, exist_ok=True)
        (src / name).write_bytes(data)
    (src / "dangling.jpg").symlink_to("nowhere")
    (src / "loop").symlink_to(src)
    os.mkfifo(src / "pipe.jpg")
    return src


def dinogen(*words):
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def check_account(summary, num_crops):
    """Every file is in it once, counted by other means."""
    num_used, num_left_out = NUM + len(USED), sum(LEFT_OUT.values())
    assert summary["num_used"] == num_crops == num_used
    assert summary["num_rejected"] == len(REJECTED)
    assert summary["left_out"] == LEFT_OUT
    assert summary["num_sidecars"] == len(SIDECARS)
    assert summary["num_files"] == num_used + len(REJECTED) + num_left_out + len(SIDECARS)
    # Of each hidden folder only itself is counted.
    assert summary["num_hidden"] == len({name.partition("/")[0] for name in HIDDEN})


def test_the_whole_way(src, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump({"run": "run", "data": {"path": "data"}, **CONFIG}))
    told = dinogen("faces", src, "faces", "-c", config)
    check_account(json.loads(Path("faces/summary.json").read_text()), len(USED) + NUM)
    assert "5 files left out: 2 .zip, 1 .mov, 1 .nef, 1 no suffix" in told
    assert "5 captions not read" in told
    with Path("faces/rejected.csv").open(encoding="utf-8") as file:
        assert {r["source"]: r["reason"] for r in csv.DictReader(file)} == REJECTED
    sources = {json.loads(p.read_text())["source"] for p in Path("faces").glob("*-*.json")}
    assert {"caf\\xe9.jpg", "folder.jpg/in.jpg", "x" * 200 + ".jpg"} <= sources

    dinogen("pyramids", "faces", "pyramids", "-c", config)
    dinogen("pack", "faces", "pyramids", "data", "-c", config)
    assert "sound" in dinogen("shards", "verify", "data")
    data = open_dataset("data")
    assert sum(map(data.num_samples, data.manifest.splits)) == NUM + len(USED)
    dinogen("prepare", src, "once", "-c", config)
    check_account(json.loads(Path("once/summary.json").read_text()), NUM + len(USED))
    for path in Path("data").glob("*.tar"):
        assert path.read_bytes() == (Path("once") / path.name).read_bytes()

    dinogen("train", config)
    told = dinogen("evaluate", "run", "--metrics", "spectrum", "--num-samples", "8")
    assert "spectrum" in told
    # and again: nothing is lost, nothing made again
    dinogen("faces", src, "faces", "-c", config)
    summary = json.loads(Path("faces/summary.json").read_text())
    assert (summary["num_new"], summary["num_skipped"]) == (0, NUM + len(USED))


def test_packed_as_they_are_what_does_not_fit_is_listed(tmp_path):
    """A plain folder of aligned images with some that cannot be used."""
    plain = tmp_path / "plain"
    plain.mkdir()
    for number in range(8):
        random_photo(number).resize((32, 32)).save(plain / f"{number}.jpg")
    whole = (plain / "0.jpg").read_bytes()
    (plain / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (plain / "._0.jpg").write_bytes(whole[:50])
    (plain / "empty.jpg").touch()
    random_photo(50).resize((32, 40)).save(plain / "tall.jpg")
    random_photo(51).resize((16, 16)).save(plain / "small.png")
    told = []
    for _ in range(2):
        told.append(dinogen("pack", plain, tmp_path / "data"))
        assert open_dataset(tmp_path / "data").keys() == [str(number) for number in range(8)]
        with (tmp_path / "data" / "rejected.csv").open(encoding="utf-8") as file:
            reasons = {row["source"]: row["reason"] for row in csv.DictReader(file)}
        assert reasons == {
            "cut.jpg": "truncated",
            "empty.jpg": "empty",
            "small.png": "other_size",
            "tall.jpg": "not_square",
        }
    assert "4 of 12 images NOT PACKED" in told[0] and "already finished" in told[1]
    assert "sound" in dinogen("shards", "verify", tmp_path / "data")
