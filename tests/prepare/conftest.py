"""For tests of preparation: photos, some with a real face, a server of photos, a tiny guide."""

import os
import struct
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
from skimage import data

from dinogen.prepare.download.download import download
from tests.prepare.face_folders import FACE, save
from tests.prepare.wrong_server import Server

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def astronaut():
    """512x512 RGB with one face, about (181, 62) to (268, 172)."""
    return data.astronaut()


@pytest.fixture(scope="session")
def assets():
    folder = Path(os.environ.get("DINOGEN_ASSETS", ROOT.parent / "shared" / "assets"))
    if not folder.is_dir():
        pytest.skip(f"no real photos at {folder} (set DINOGEN_ASSETS)")
    return folder


@pytest.fixture(scope="module")
def one_torch_thread():
    """Small networks on shared cores: more threads only wait for each other."""
    if os.environ.get("DINOGEN_TESTS_WITHOUT_TORCH") == "1":  # see tests/conftest.py
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def photos(tmp_path, astronaut):
    """Six photos with a face, of three sizes, and one without."""
    src = tmp_path / "photos"
    face = astronaut[FACE]
    for number in range(3):
        save(src / f"{number}.jpg", np.roll(face, 3 * number, axis=1), quality=95)
    save(src / "album" / "0.jpg", face[:, ::-1], quality=95)
    save(src / "album" / "wide.png", np.pad(face, ((0, 0), (40, 60), (0, 0)), mode="edge"))
    save(src / "Zoë und Ann.png", face[5:, 5:])
    save(src / "wall.png", np.full((220, 220, 3), 90, np.uint8))
    return src


@pytest.fixture
def noise():
    """64x48 RGB in which every pixel is different."""
    return np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Of a tiny random DINOv2."""
    from dinogen.features.dinov2 import make_random_dinov2

    folder = tmp_path_factory.mktemp("guide") / "tiny"
    make_random_dinov2(folder, seed=3, hidden_size=16, num_layers=1, num_heads=2, image_size=56)
    return folder


def png_chunk(name, data):
    body = name + data
    return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))


@pytest.fixture(scope="session")
def encode_png():
    """A PNG from its raw rows, filter byte included; kinds that Pillow cannot write, too."""

    def encode(width, height, rows, bits, colours):
        packer = zlib.compressobj(1)
        data = b"".join(map(packer.compress, rows)) + packer.flush()
        header = struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0)
        chunks = ((b"IHDR", header), (b"IDAT", data), (b"IEND", b""))
        return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)

    return encode


@pytest.fixture(scope="session")
def write_bomb(encode_png):
    """A valid black PNG of 1 bit per pixel: kilobytes on disk, gigabytes as RGB."""

    def write(path, side=20000):
        rows = (bytes(1 + side // 8) for _ in range(side))
        path.write_bytes(encode_png(side, side, rows, bits=1, colours=0))

    return write


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def fetch(tmp_path):
    """Downloads the lines into a folder; waits are noted, not waited."""

    def run(*lines, suffix="txt", **options):
        listing = tmp_path / f"list.{suffix}"
        listing.write_text("\n".join(lines) + "\n", encoding="utf-8")
        options.setdefault("num_attempts", 3)
        return download(listing, tmp_path / "out", sleep=run.waits.append, **options)

    run.waits = []
    run.out = tmp_path / "out"
    return run
