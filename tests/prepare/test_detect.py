"""Faces are found where they are, alone or in company, in small and in huge photos."""

import numpy as np
import pytest
import torch
from PIL import Image

from dinogen.prepare.faces import detect
from dinogen.prepare.faces.detect import FaceDetector
from dinogen.prepare.photos.read import PrepareError, read_photo


@pytest.fixture(scope="module")
def detector(one_torch_thread):
    return FaceDetector("cpu")


def centre(face):
    left, top, right, bottom = face.box
    return np.array([(left + right) / 2, (top + bottom) / 2])


def test_one_photo_as_facenet_pytorch_finds_it(detector, astronaut):
    from facenet_pytorch import MTCNN

    boxes, probabilities, points = MTCNN(keep_all=True).detect(astronaut, landmarks=True)
    (face,) = detector.detect([astronaut])[0]
    np.testing.assert_allclose(face.box, boxes[0].astype(float), atol=1e-3)
    # half a pixel to the left of and above its: see the test of the spot
    np.testing.assert_allclose(face.landmarks, points[0].astype(float) - 0.5, atol=1e-3)
    assert face.probability == pytest.approx(float(probabilities[0]), abs=1e-5)
    assert all(isinstance(value, float) for value in (*face.box, *face.landmarks[0]))
    np.testing.assert_allclose(face.box, (181, 62, 268, 172), atol=2)


def test_company_changes_nothing(detector, astronaut):
    """Also beside faces at the edge, whose boxes stick out of their photo."""
    edge = np.ascontiguousarray(astronaut[:, 210:466])  # the face is cut by the left edge
    plain = np.full_like(edge, 128)
    photos = [edge, astronaut[:300, :300], plain, edge[::-1].copy(), astronaut[:, :256].copy()]
    alone = [detector.detect([photo])[0] for photo in photos]
    assert len(alone[1]) == 1
    assert alone[2] == []
    assert detector.detect(photos) == alone
    together = detector.detect(photos, batch=4)
    assert [len(faces) for faces in together] == [len(faces) for faces in alone]
    for found, expected in zip(together, alone, strict=True):
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a.box, b.box, atol=1e-3)
            np.testing.assert_allclose(a.landmarks, b.landmarks, atol=1e-3)


def test_many_faces_each_once(detector, astronaut):
    face = astronaut[30:230, 120:320]
    sheet = np.tile(face, (2, 3, 1))
    found = [f for f in detector.detect([sheet])[0] if f.probability > 0.95]
    expected = np.array(
        [(224.5 - 120 + 200 * i, 117 - 30 + 200 * j) for i in range(3) for j in (0, 1)]
    )
    assert len(found) == 6
    for place in expected:
        assert min(np.hypot(*(centre(f) - place)) for f in found) < 12


def test_landmarks_of_a_mirrored_photo_are_mirrored(detector, astronaut):
    (face,) = detector.detect([astronaut])[0]
    (mirrored,) = detector.detect([np.ascontiguousarray(astronaut[:, ::-1])])[0]
    swapped = np.array(mirrored.landmarks)[[1, 0, 2, 4, 3]]
    swapped[:, 0] = 512 - swapped[:, 0]
    np.testing.assert_allclose(swapped, face.landmarks, atol=3)


@pytest.mark.parametrize(("offset", "expected"), [(0.0, 0.0), (0.5, 0.5)])
def test_landmarks_lie_where_the_last_network_saw_them(monkeypatch, offset, expected):
    """The networks are replaced by ones that are right: they find the middle of a bright spot.

    Each answers with a share of the patch it is shown; patches begin and end at whole pixels, so
    a single answer may be half a pixel off, but not all of them to one side.
    """
    detector = FaceDetector("cpu", landmark_offset=offset)
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:200, :220] + 0.5
    errors = []
    for _ in range(60):
        spot = rng.uniform(80, 120, 2)
        pixels = 255 * np.exp(-((x - spot[0]) ** 2 + (y - spot[1]) ** 2) / (2 * 4.0**2))
        corner, side = spot - rng.uniform(20, 30, 2), rng.uniform(45, 70)
        box = torch.tensor([[*corner, *(corner + side), 1.0]], dtype=torch.float32)

        def look(stage, patches):
            grey = patches[:, 0].double() ** 2
            shares = (torch.arange(grey.shape[-1]) + 0.5) / grey.shape[-1]
            across = (grey.sum(1) * shares).sum(1) / grey.sum((1, 2))
            down = (grey.sum(2) * shares).sum(1) / grey.sum((1, 2))
            points = torch.cat([across.repeat(5), down.repeat(5)])[None].float()
            shifts, scores = torch.zeros(1, 4), torch.tensor([[0.0, 1.0]])
            return (shifts, scores) if stage == 1 else (shifts, points, scores)

        monkeypatch.setattr(detector, "_propose", lambda _, box=box: (box, torch.tensor([0])))
        monkeypatch.setattr(detector, "_run", look)
        photo = np.repeat(pixels.astype(np.uint8)[..., None], 3, axis=2)
        (face,) = detector.detect([photo])[0]
        errors.append(np.mean(face.landmarks, axis=0) - spot)
    np.testing.assert_allclose(np.mean(errors, axis=0), [expected, expected], atol=0.1)
    assert np.abs(np.array(errors) - expected).max() < 0.6


def apart_from_their_mirror_images(detector, photos):
    """x + mirrored x - width of the largest face's points, pixels, per photo with such a face."""
    found = []
    for photo in photos:
        pair = detector.detect([photo, np.ascontiguousarray(photo[:, ::-1])])
        if not all(pair):
            continue
        points, mirrored = (np.array(faces[0].landmarks) for faces in pair)
        apart = points[:, 0] + mirrored[[1, 0, 2, 4, 3], 0] - photo.shape[1]
        if np.abs(apart).max() < 20:  # the same face
            found.append(apart.mean())
    return np.array(found)


def test_the_same_face_at_many_sizes_lies_where_its_mirror_image_does(detector, astronaut):
    """The network takes this one face a little further right than its mirror image."""
    face = Image.fromarray(astronaut[:300, 60:380])
    sizes = [(round(320 * scale), round(300 * scale)) for scale in np.linspace(0.4, 1.1, 24)]
    photos = [np.asarray(face.resize(size, Image.Resampling.BICUBIC)) for size in sizes]
    apart = apart_from_their_mirror_images(detector, photos)
    assert len(apart) == 24
    assert abs(apart.mean()) < 0.35  # 1.1 with the half pixel


def test_faces_lie_where_their_mirror_images_do(detector, assets):
    paths = sorted((assets / "faces").glob("*.jpg"))[::6]
    apart = apart_from_their_mirror_images(detector, [read_photo(p, 10**8) for p in paths])
    assert len(apart) > 100
    assert abs(apart.mean()) < 0.1


def test_the_largest_comes_first(detector, astronaut):
    face = Image.fromarray(astronaut[30:230, 120:320])
    sheet = Image.new("RGB", (700, 420), "gray")
    sheet.paste(face.resize((120, 120)), (20, 20))
    sheet.paste(face.resize((400, 400)), (250, 10))
    faces = [f for f in detector.detect([np.asarray(sheet)])[0] if f.probability > 0.95]
    assert len(faces) == 2
    assert centre(faces[0])[0] > 250 > centre(faces[1])[0]


def test_a_huge_photo_is_searched_smaller_and_boxes_come_back(detector, astronaut, monkeypatch):
    wide = np.asarray(Image.fromarray(astronaut).resize((1000, 980), Image.Resampling.BICUBIC))
    searched = []
    cascade = FaceDetector._cascade
    monkeypatch.setattr(
        FaceDetector,
        "_cascade",
        lambda self, pixels: searched.append(tuple(pixels.shape[2:])) or cascade(self, pixels),
    )
    monkeypatch.setattr(detect, "MAX_SIDE", 500)
    (face,) = detector.detect([wide])[0]
    assert searched == [(490, 500)]
    expected = np.array([(181, 62), (268, 172)]) * np.array([1000, 980]) / 512
    np.testing.assert_allclose(np.reshape(face.box, (2, 2)), expected, atol=12)


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (11, 11), (19, 400), (20, 20), (24, 31)])
def test_photos_too_small_for_a_face(detector, shape):
    rng = np.random.default_rng(0)
    assert detector.detect([rng.integers(0, 256, (*shape, 3), np.uint8)]) == [[]]


def test_no_photos(detector):
    assert detector.detect([]) == []


def test_weights_are_read_without_unpickling(monkeypatch):
    load, options = torch.load, []
    monkeypatch.setattr(
        torch, "load", lambda *args, **kwargs: options.append(kwargs) or load(*args, **kwargs)
    )
    FaceDetector("cpu")
    assert [kwargs["weights_only"] for kwargs in options] == [True, True, True]


def test_a_device_that_is_not_there():
    with pytest.raises(PrepareError, match=r"device 'teapot'.*use auto or cpu"):
        FaceDetector("teapot")


@pytest.mark.parametrize(
    ("name", "num_faces"),
    [
        ("group-1.jpg", 15),
        ("multiface.jpg", 6),
        ("two_people.jpg", 2),
        ("astronaut.png", 1),
        ("biden.jpg", 1),
        ("chelsea.png", 0),
        ("coffee.png", 0),
    ],
)
def test_known_photos(detector, assets, name, num_faces):
    photo = read_photo(assets / "detection" / name, 10**8)
    assert sum(face.probability > 0.95 for face in detector.detect([photo])[0]) == num_faces
