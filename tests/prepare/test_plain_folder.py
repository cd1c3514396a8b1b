"""A folder of aligned images is packed as it lies; what others would show otherwise is not."""

import io
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from dinogen.prepare.faces.folder import PrepareError, read_faces
from shards import Sample, open_dataset, pack
from shards.check.verify import verify
from shards.image.decode import check_image
from tests.shards.odd_images import chunk, encode, photo, png

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
IMAGE = photo(32, 32)
ARRAY = np.asarray(IMAGE)


def adobe_exif():
    exif = Image.Exif()
    exif[0x8769] = {0xA001: 0xFFFF, 0xA005: {1: "R03"}}
    return exif


def turned_exif():
    exif = Image.Exif()
    exif[0x0112] = 3
    return exif


KEPT = {
    "a.jpg": encode(IMAGE, "JPEG"),
    "b.jpg": encode(IMAGE, "JPEG", progressive=True, icc_profile=SRGB),
    "c.png": encode(IMAGE, "PNG"),
    "d.png": png(ARRAY, [chunk(b"tEXt", b"Software\0paint")]),
    "e.jpg": encode(IMAGE, "JPEG") + b"a film behind it",
}
ENCODED_AGAIN = {
    "f.jpg": encode(IMAGE, "JPEG")[:-2],
    "g.jpg": encode(IMAGE.rotate(180), "JPEG", exif=turned_exif(), quality=95),
    "h.jpg": encode(IMAGE, "JPEG", exif=adobe_exif()),
    "i.png": png(ARRAY.astype(np.uint16) * 257),
    "j.png": png(ARRAY, [chunk(b"tEXt", b"x", checksum=1)]),
    "k.png": png(ARRAY, [chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(70 << 20)))]),
    "l.png": png(ARRAY, [chunk(b"eXIf", b"garbage")]),
    "m.png": encode(IMAGE.convert("RGBA"), "PNG"),
    "n.webp": encode(IMAGE, "WEBP"),
    "o.jpg": encode(IMAGE.convert("CMYK"), "JPEG"),
    "p.jpg": encode(IMAGE, "GIF"),
    "q.png": encode(IMAGE.convert("P"), "PNG"),
}


def test_what_is_stored_is_what_every_program_shows(tmp_path):
    files = KEPT | ENCODED_AGAIN
    folder = tmp_path / "plain"
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    crops = {crop.meta["source"]: crop for crop in read_faces(folder)}
    assert crops.keys() == files.keys()
    for name, data in KEPT.items():
        assert crops[name].image == data
        assert crops[name].image_format == name[-3:]
    for name in ENCODED_AGAIN:
        crop = crops[name]
        assert crop.image_format == "png"
        with Image.open(io.BytesIO(crop.image)) as stored:
            assert (stored.mode, stored.info, len(stored.getexif())) == ("RGB", {}, 0)
            difference = np.abs(np.asarray(stored).astype(int) - ARRAY).mean()
            assert difference < (40 if name in ("h.jpg", "p.jpg", "q.png") else 12), name
    # What was packed is sound, by the same rule.
    data = tmp_path / "data"
    pack([Sample(c.key, c.image, c.image_format, c.meta) for c in crops.values()], data)
    assert verify(open_dataset(data)) == []


def test_own_crops_hold_neither_profile_nor_orientation(tmp_path):
    from dinogen.config import FacesConfig
    from dinogen.prepare.faces.folder import write_faces

    for image_format in ("jpg", "png"):
        source, out = tmp_path / "photos", tmp_path / image_format
        source.mkdir(exist_ok=True)
        (source / "a.jpg").write_bytes(encode(IMAGE, "JPEG", exif=adobe_exif(), icc_profile=SRGB))
        config = FacesConfig(detect="none", size=32, format=image_format)
        write_faces(source, out, config)
        written = (out / f"a.{image_format}").read_bytes()
        assert check_image(written, f"a.{image_format}") == (32, 32)
        with Image.open(io.BytesIO(written)) as crop:
            assert "icc_profile" not in crop.info and not crop.getexif()


def test_a_damaged_image_says_which_and_why(tmp_path):
    whole = encode(IMAGE, "JPEG")
    (tmp_path / "a.jpg").write_bytes(whole[:-60] + b"\xff\xd9")
    with pytest.raises(PrepareError, match=r"a\.jpg: truncated: .*premature end"):
        list(read_faces(tmp_path))
