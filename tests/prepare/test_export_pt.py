"""The exchange format: there and back, and what is refused."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import tarfile

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from dinogen.config import FacesConfig
from dinogen.features.inception import InceptionTrunk
from dinogen.prepare import export_pt as export_module
from dinogen.prepare.export_pt import PtFiles, export_pt, file_names
from dinogen.prepare.faces.folder import read_faces, write_faces
from dinogen.prepare.photos.find import photo_key
from dinogen.prepare.photos.read import PrepareError
from launch.cli import prepare as commands
from shards import Sample, open_dataset, pack
from shards.read.dataset import PackedDataset
from tests.prepare.face_folders import rejected

NUM_CHANNELS = 5
GUIDE = {"name": "patch", "weights_sha256": "ab", "layer": 3}


def image(seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def samples(num_channels=NUM_CHANNELS, kinds="pn"):
    generator = np.random.default_rng(0)
    for number in range(7):
        levels = {
            f"{kind}{grid}": generator.normal(size=(grid * grid, num_channels)).astype(np.float16)
            for kind in kinds
            for grid in (4, 8, 16)
        }
        yield Sample(f"face{number}", image(number), "png", {"number": number}, levels)


@pytest.fixture
def dataset(tmp_path):
    pack(samples(), tmp_path / "data", shard_size=3, val_fraction=0.3, guide=GUIDE)
    return tmp_path / "data"


@pytest.fixture
def faces(tmp_path):
    (tmp_path / "faces").mkdir()
    for sample in samples():
        (tmp_path / "faces" / f"{sample.key}.png").write_bytes(sample.image)
        meta = {"key": sample.key, "number": sample.meta["number"]}
        (tmp_path / "faces" / f"{sample.key}.json").write_text(json.dumps(meta))
    (tmp_path / "faces" / "settings.json").write_text("{}")
    return tmp_path / "faces"


def command(*arguments):
    app = typer.Typer()
    commands.register(app)
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=True)


def test_every_file_is_what_the_experiment_expects(dataset, tmp_path):
    seen = []
    assert export_pt(dataset, tmp_path / "pt", progress=lambda *step: seen.append(step)) == 7
    assert seen[-1] == (7, 7)
    for sample in samples():
        pyramid = torch.load(tmp_path / "pt" / f"{sample.key}.pt", weights_only=True)
        assert list(pyramid) == ["4x4", "8x8", "16x16"]
        for grid in (4, 8, 16):
            tensor = pyramid[f"{grid}x{grid}"]
            assert tensor.dtype == torch.float32
            assert tensor.shape == (1, grid * grid, NUM_CHANNELS)
            assert np.array_equal(tensor[0].numpy(), sample.levels[f"p{grid}"].astype(np.float32))
    assert len(list((tmp_path / "pt").iterdir())) == 7 + 1


def test_exported_and_packed_again_nothing_has_changed(dataset, faces, tmp_path):
    assert command("export-pt", dataset, tmp_path / "pt").exit_code == 0
    done = command("pack", faces, tmp_path / "pt", tmp_path / "again", "prepare.pack.shard_size=4")
    assert done.exit_code == 0, done.output
    again = open_dataset(tmp_path / "again")
    assert again.manifest.guide == GUIDE
    assert again.manifest.prepare["pyramids"] == {
        "grids": [4, 8, 16], "kinds": ["pooled"], "resize": "bicubic antialias",
    }  # fmt: skip
    for number, before in enumerate(samples()):
        after = again.sample(number)
        assert (after.key, after.image, after.meta) == (before.key, before.image, before.meta)
        assert sorted(after.levels) == ["p16", "p4", "p8"]
        assert all(np.array_equal(after.levels[name], before.levels[name]) for name in after.levels)


FFHQ = ["00000/00000.png", "00000/00001.png", "01000/01000.png", "plain.jpg"]
ALIKE = ["a/x.png", "b/x.png", "00000/x.png", "y/a_1.png"]


@pytest.mark.parametrize(
    ("sources", "names"),
    [
        (FFHQ, {"00000", "00001", "01000", "plain"}),
        (ALIKE, {photo_key(source) for source in ALIKE[:3]} | {"a_1"}),
    ],
)
@pytest.mark.parametrize("written", [False, True], ids=["plain", "written"])
def test_files_are_named_after_the_photos(tmp_path, sources, names, written):
    """FFHQ is PNG in subfolders: its keys carry a hash, the experiment's files do not."""
    folder, faces, pt = (tmp_path / name for name in ("photos", "faces", "pt"))
    for seed, source in enumerate(sources):
        (folder / source).parent.mkdir(parents=True, exist_ok=True)
        with Image.open(io.BytesIO(image(seed))) as photo:
            photo.save(folder / source)
    if written:
        write_faces(folder, faces, FacesConfig(detect="none", size=16, format="png"))
    else:
        faces = folder
    generator = np.random.default_rng(0)
    made = {}
    for crop in read_faces(faces):
        levels = {f"p{g}": generator.normal(size=(g * g, 3)).astype("f2") for g in (4, 8, 16)}
        made[crop.key] = Sample(crop.key, crop.image, crop.image_format, crop.meta, levels)
    pack(made.values(), tmp_path / "data", shard_size=3, val_fraction=0.3, guide=GUIDE)
    assert export_pt(tmp_path / "data", pt) == 4
    assert {path.stem for path in pt.glob("*.pt")} == names

    done = command("pack", faces, pt, tmp_path / "again", "prepare.pack.shard_size=4")
    assert done.exit_code == 0, done.output
    again = open_dataset(tmp_path / "again")
    assert set(again.keys()) == set(made)
    for number, key in enumerate(again.keys()):
        assert np.array_equal(again.sample(number).levels["p8"], made[key].levels["p8"])


def test_a_photo_s_name_never_hides_a_key():
    named = file_names(
        {"a": "a.jpg", "a_1": "a.jpg", "a_1-00": "other/a_1.png", "b": "", "c": "../.."}
    )
    assert named == {"a": "a", "a_1": "a_1", "a_1-00": "a_1-00", "b": "b", "c": "c"}


FOREIGN = ["../../up", "/etc/passwd", "dir/a", "dir/b", "a\\b", "C:x", ".", ".hidden", "x" * 300]


def test_names_stay_inside_the_folder_regardless_of_the_keys():
    """Keys of foreign tars may hold anything."""
    named = file_names(dict.fromkeys(FOREIGN, ""))
    assert len(set(named.values())) == len(FOREIGN)
    assert all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,80}", name) for name in named.values())
    assert named == file_names(dict.fromkeys(reversed(FOREIGN), ""))
    sources = {"k1": "../..\\evil.jpg", "k2": "a/.x.jpg", "k3": "B.jpg", "k4": "c/b.png"}
    assert file_names(sources) == {key: key for key in sources}
    assert len({name.lower() for name in file_names({"A": "", "a": ""}).values()}) == 2


def test_a_damaged_sample_of_a_foreign_tar_is_named_and_all_others_exported(tmp_path):
    """Tars of other programs have no manifest, and so no sums that say what is damaged."""
    (tmp_path / "plain").mkdir()
    pack(samples(), tmp_path / "data")
    (tar,) = (tmp_path / "data").glob("*.tar")
    with tarfile.open(tar) as old, tarfile.open(tmp_path / "plain" / "a.tar", "w") as new:
        for member in old:
            data = old.extractfile(member).read()
            if member.name == "face2.p8.npy":
                data = data[: len(data) // 2]
            if member.name == "face4.p4.npy":
                continue
            member.size = len(data)
            new.addfile(member, io.BytesIO(data))
    done = command("export-pt", tmp_path / "plain", tmp_path / "pt")
    assert done.exit_code == 1 and isinstance(done.exception, PrepareError)
    assert "2 of 7 samples NOT EXPORTED" in str(done.exception)
    assert "face2" in str(done.exception) and "face4" in str(done.exception)
    names = {path.stem for path in (tmp_path / "pt").glob("*.pt")}
    assert names == {"face0", "face1", "face3", "face5", "face6"}


def test_export_of_keys_with_folders_and_dots_writes_beside_nothing(dataset, tmp_path, monkeypatch):
    keys = ["../../up", "dir/a", "other/a", "face3", "face4", "face5", "face6"]
    renamed = dict(zip([f"face{number}" for number in range(7)], keys, strict=True))
    sample = PackedDataset.sample
    monkeypatch.setattr(export_module, "_sources", lambda dataset: dict.fromkeys(keys, ""))

    def foreign(self, number, split="train"):
        found = sample(self, number, split)
        object.__setattr__(found, "key", renamed[found.key])
        return found

    monkeypatch.setattr(PackedDataset, "sample", foreign)
    before = set(tmp_path.rglob("*"))
    assert export_pt(dataset, tmp_path / "pt") == 7
    made = set(tmp_path.rglob("*")) - before - {tmp_path / "pt"}
    assert {path.parent for path in made} == {tmp_path / "pt"} and len(made) == 7 + 1


ODD_TENSORS = {
    "needs gradients": lambda t: t.requires_grad_(),
    "a parameter": torch.nn.Parameter,
    "float64": lambda t: t.double(),
    "half": lambda t: t.half(),
    "bfloat16": lambda t: t.bfloat16(),
    "a view": lambda t: torch.cat((t, t + 1), 2)[:, :, : t.shape[2]],
    "transposed": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
}


@pytest.mark.parametrize("kind", ODD_TENSORS)
def test_tensors_of_any_float_type_are_read(tmp_path, kind):
    levels = {f"{g}x{g}": torch.arange(g * g * 3.0).reshape(1, g * g, 3) / 4 for g in (4, 8, 16)}
    odd = {name: ODD_TENSORS[kind](tensor.clone()) for name, tensor in levels.items()}
    torch.save({**odd, "32x32": torch.zeros(1)}, tmp_path / "x.pt")
    found = PtFiles(tmp_path).levels("x")
    for grid in (4, 8, 16):
        exact = levels[f"{grid}x{grid}"][0]
        if kind == "bfloat16":
            exact = exact.bfloat16()
        assert np.array_equal(found[f"p{grid}"], exact.half().numpy())
        assert found[f"p{grid}"].dtype == np.float16


def test_what_does_not_fit_is_listed_and_the_rest_packed(dataset, faces, tmp_path, caplog):
    pt, out = tmp_path / "pt", tmp_path / "again"
    export_pt(dataset, pt)
    (pt / "face1.pt").write_bytes(b"PK\x03\x04 cut off")
    (pt / "face2.pt").unlink()
    (pt / "._face3.pt").write_bytes(b"of macOS")
    shutil.copy(pt / "face4.pt", pt / "stranger.pt")
    done = command("pack", faces, pt, out)
    assert done.exit_code == 0, done.output
    assert set(open_dataset(out).keys()) == {f"face{n}" for n in (0, 3, 4, 5, 6)}
    reasons = {source: reason for source, reason, _ in rejected(out)}
    assert reasons == {"face1": "bad_pyramid", "face2": "no_pyramid"}
    again = command("pack", faces, pt, out)
    assert again.exit_code == 0 and again.stdout.startswith("already finished")
    for number in (0, 3, 4, 5):
        (pt / f"face{number}.pt").unlink()
    most = command("pack", faces, pt, tmp_path / "more")
    assert "5 of 7 faces have no pyramid" in str(most.exception)


def test_a_dataset_without_pooled_levels_cannot_be_exported(tmp_path):
    pack(samples(kinds="n"), tmp_path / "data")
    with pytest.raises(PrepareError, match=r"lacks the level p4, p8, p16: .*pooled"):
        export_pt(tmp_path / "data", tmp_path / "pt")
    assert not (tmp_path / "pt").exists()


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_file_that_would_run_code_is_refused(tmp_path):
    torch.save({"4x4": Evil(tmp_path / "owned")}, tmp_path / "evil.pt")
    with pytest.raises(PrepareError, match=r"evil\.pt: not a file of plain tensors"):
        PtFiles(tmp_path).levels("evil")
    assert not (tmp_path / "owned").exists()


def pyramid(**changes):
    levels = {f"{grid}x{grid}": torch.zeros(1, grid * grid, 3) for grid in (4, 8, 16)}
    return {**levels, **changes}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.zeros(3), "holds Tensor, expected a dict"),
        (pyramid(**{"4x4": torch.zeros(1, 16, 3).to_sparse()}), "4x4 holds no plain numbers"),
        (pyramid(**{"4x4": torch.zeros(1, 16, 3, dtype=torch.cfloat)}), "4x4 holds complex"),
        ({"4x4": torch.zeros(1, 16, 3)}, r"holds \['4x4'\], expected a dict"),
        (pyramid(**{"8x8": torch.zeros(1, 63, 3)}), r"8x8 is \(1, 63, 3\), expected \(1, 64, C\)"),
        (pyramid(**{"8x8": torch.zeros(64, 3)}), r"8x8 is \(64, 3\), expected"),
        (pyramid(**{"8x8": [1.0]}), r"8x8 is list, expected"),
        (
            pyramid(**{"4x4": torch.zeros(1, 16, 4)}),
            "its levels have different",
        ),
        (pyramid(**{"4x4": torch.full((1, 16, 3), 1e6)}), "4x4 is not finite in float16"),
        (pyramid(**{"4x4": torch.full((1, 16, 3), torch.nan)}), "4x4 is not finite in float16"),
        (None, "not a file of plain tensors"),
    ],
)
def test_files_of_another_shape_are_named(tmp_path, content, message):
    if content is None:
        (tmp_path / "x.pt").write_bytes(b"PK\x03\x04 cut off")
    else:
        torch.save(content, tmp_path / "x.pt")
    with pytest.raises(PrepareError, match=rf"x\.pt: {message}"):
        PtFiles(tmp_path).levels("x")


def test_files_of_unknown_origin_need_their_guide_named(dataset, faces, tmp_path):
    """Training compares the guide's weights; a dataset must not claim a guide nobody named."""
    export_pt(dataset, tmp_path / "pt")
    (tmp_path / "pt" / "guide.json").unlink()
    arguments = ("pack", faces, tmp_path / "pt", tmp_path / "again")
    unnamed = command(*arguments)
    assert isinstance(unnamed.exception, PrepareError)
    assert "has no guide.json: name the guide" in str(unnamed.exception)

    save_file(InceptionTrunk().state_dict(), tmp_path / "inception.safetensors")
    named = ("guide.name=inception", f"guide.path={tmp_path / 'inception.safetensors'}")
    wrong = command(*arguments, *named)
    assert "has 768 channels, but face0.pt has 5: name the guide" in str(wrong.exception)

    for sample in samples(num_channels=768):
        levels = {
            f"{grid}x{grid}": torch.from_numpy(sample.levels[f"p{grid}"].astype(np.float32))[None]
            for grid in (4, 8, 16)
        }
        torch.save(levels, tmp_path / "pt" / f"{sample.key}.pt")
    right = command(*arguments, *named)
    assert right.exit_code == 0, right.output
    assert open_dataset(tmp_path / "again").manifest.guide["name"] == "inception"


def test_a_broken_guide_file_is_named(tmp_path):
    torch.save(pyramid(), tmp_path / "x.pt")
    (tmp_path / "guide.json").write_text("{")
    with pytest.raises(PrepareError, match=r"guide\.json: not JSON"):
        PtFiles(tmp_path)
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    with pytest.raises(PrepareError, match=r"holds no \.pt files"):
        PtFiles(tmp_path)
