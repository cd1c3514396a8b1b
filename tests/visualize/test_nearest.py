"""Visualizations that show real images: what they find is found again by brute force."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from dinogen.config.training import MetricsConfig
from dinogen.metrics.collect import seen_of_reference
from dinogen.metrics.extractors.base import ExtractorInfo
from dinogen.metrics.sources import Images
from dinogen.report.images import to_uint8
from dinogen.training.checkpointing.snapshot import load_snapshot
from dinogen.visualize import drawings, nearest
from dinogen.visualize.scene import LeftOut, Scene
from shards.errors import CorruptSample
from tests.families.tiny import RESOLUTION

from .visualizations import alike, images_of


def test_reconstructions_stand_below_held_out_images(scene_of):
    scene = scene_of("vae")
    both = images_of(drawings.reconstructions(scene)).reshape(2, -1, RESOLUTION, RESOLUTION, 3)
    numbers = np.linspace(0, scene.data.num_samples("val") - 1, both.shape[1]).astype(int)
    for column, number in enumerate(numbers):
        file = io.BytesIO(scene.data.sample(int(number), "val").image)
        alike(both[0, column], np.asarray(Image.open(file).convert("RGB")).astype(int))
    G = scene.networks["G"]
    with torch.no_grad():
        real = torch.from_numpy(both[0]).permute(0, 3, 1, 2).float() / 127.5 - 1
        alike(both[1], to_uint8(G.decode(G.encode(real)[0]).numpy()).astype(int))


def test_the_worst_are_those_that_the_discriminator_finds_least_real(scene_of):
    scene = scene_of("stylegan2_ada")
    D = type(scene.family.D)(**scene.family.arguments("D"))
    D.load_state_dict(scene.snapshot.checkpoint.tensors("D"))
    with torch.no_grad():
        logits = torch.cat([D.eval()(image[None]) for image in scene.drawn])
    order = logits.argsort()[:16]
    drawing = drawings.worst(scene)
    assert np.array_equal(images_of(drawing), to_uint8(scene.drawn[order].numpy()))
    assert drawing.sheets[0].labels[0] == f"D {logits.min():+.2f}"


def brute_force(scene, images, flip):
    """Distances (N, M) of images to all of train, by numpy, one by one."""
    real = scene.data.read(range(scene.data.num_samples()), image_size=RESOLUTION)["image"].numpy()
    table = np.zeros((len(images), len(real)))
    for i, image in enumerate(images.numpy()):
        for j, other in enumerate(real):
            candidates = [other, other[:, :, ::-1]] if flip else [other]
            table[i, j] = min(
                np.sqrt(((np.clip(image, -1, 1) - c) ** 2).mean()) for c in candidates
            )
    return table * 127.5


@pytest.mark.parametrize("family", ["stylegan2_ada", "vae"])
def test_neighbours_are_those_of_brute_force(family, scene_of):
    scene = scene_of(family)
    table = brute_force(scene, scene.drawn, flip=family == "stylegan2_ada")
    found, usual = scene.nearest
    assert found.num == table.shape[1] == scene.data.num_samples()
    np.testing.assert_allclose(found.distances, np.sort(table, 1)[:, :3], rtol=1e-4, atol=1e-3)
    chosen = np.take_along_axis(table, found.numbers.numpy(), 1)
    np.testing.assert_allclose(found.distances, chosen, rtol=1e-4, atol=1e-3)
    num_val = scene.data.num_samples("val")
    held_out = scene.data.read(range(num_val), split="val", image_size=RESOLUTION)["image"]
    table = brute_force(scene, held_out, flip=family == "stylegan2_ada")
    # torch's median is the lower one of an even number
    assert usual == pytest.approx(np.sort(table.min(1))[(num_val - 1) // 2], rel=1e-4)


def test_a_copy_is_found_out_mirrored_or_not(scene_of, runs):
    scene = Scene(scene_of("stylegan2_ada").snapshot, 5)
    real = scene.data.read([3, 11], image_size=RESOLUTION)["image"]
    drawn = scene_of("stylegan2_ada").drawn.clone()
    drawn[40], drawn[77] = real[0], real[1].flip(2)
    scene.drawn = drawn
    found, _ = scene.nearest
    assert found.numbers[[40, 77], 0].tolist() == [3, 11]
    assert found.mirrored[77, 0] and not found.mirrored[40, 0]
    assert found.distances[[40, 77], 0].max() < 0.01
    drawing = drawings.neighbours(scene)
    table = images_of(drawing).reshape(4, -1, RESOLUTION, RESOLUTION, 3)
    alike(table[0, :2], table[1, :2])
    assert drawing.sheets[0].labels[table.shape[1] :][:2] == ["0.00", "0.00"]
    assert "of held-out images" in drawing.caption


class Colours:
    """A feature extractor that only sees the mean colour of an image."""

    info = ExtractorInfo("inception768", "0" * 64, "none", 3, 0, random=True)

    def __call__(self, images):
        assert images.dtype == torch.uint8 and images.shape[2] == RESOLUTION
        return {"features": images.float().mean((2, 3))}


def test_an_extractor_with_named_weights_finds_the_nearest(scene_of, monkeypatch):
    scene = Scene(scene_of("vae").snapshot, 5)
    monkeypatch.setattr(nearest, "load_extractor", lambda name, config, device: Colours())
    config = MetricsConfig(inception768="there.safetensors")
    scene.ruler = nearest.choose_ruler(config, RESOLUTION, torch.device("cpu"))
    found, _ = scene.nearest
    real = scene.data.read(range(scene.data.num_samples()), image_size=RESOLUTION)["image"]
    colours = [to_uint8(x.numpy()).mean((1, 2)) for x in (scene.drawn, real)]
    table = np.linalg.norm(colours[0][:, None] - colours[1][None], axis=2)
    assert np.array_equal(found.numbers[:, 0], table.argmin(1))
    np.testing.assert_allclose(found.distances[:, 0], table.min(1), rtol=1e-3, atol=1e-3)
    assert "RANDOM" in drawings.neighbours(scene).caption


@pytest.mark.parametrize("family", ["stylegan2_ada", "vae"])
def test_real_images_are_shown_to_an_extractor_once(family, scene_of, monkeypatch, tmp_path):
    """stylegan2_ada was trained on mirrored images too, vae was not."""
    shown = []

    class Counting(Colours):
        def __call__(self, images):
            shown.append(len(images))
            # mirrored images differ: left and right count differently
            weights = torch.linspace(0, 1, images.shape[3])
            return {"features": (images.float() * weights).mean((2, 3))}

    monkeypatch.setattr(nearest, "load_extractor", lambda name, config, device: Counting())
    config = MetricsConfig(inception768="there.safetensors", cache=tmp_path)

    def look():
        scene = Scene(scene_of(family).snapshot, 5)
        scene.ruler = nearest.choose_ruler(config, RESOLUTION, torch.device("cpu"))
        shown.clear()
        found, usual = scene.nearest
        return found, usual, sum(shown), scene

    first, usual, num, scene = look()
    again, usual_again, num_again, _ = look()
    num_real = scene.data.num_samples() * (2 if family == "stylegan2_ada" else 1)
    assert num - num_again == num_real
    assert usual == usual_again
    assert torch.equal(first.distances, again.distances)
    assert torch.equal(first.numbers, again.numbers)
    assert torch.equal(first.mirrored, again.mirrored)
    ruler = replace(scene.ruler, cached=None)
    rows = ruler.rows(scene.drawn)
    slow = nearest.nearest_of(rows, ruler, scene.data, "train", family == "stylegan2_ada")
    torch.testing.assert_close(first.distances, slow.distances)
    assert torch.equal(first.numbers, slow.numbers)
    assert torch.equal(first.mirrored, slow.mirrored)


def test_the_features_that_evaluate_has_stored_are_used_by_look(scene_of, monkeypatch, tmp_path):
    scene = Scene(scene_of("vae").snapshot, 5)
    numbers = list(range(scene.data.num_samples()))
    images = Images(scene.data, "train", numbers, RESOLUTION)
    seen_of_reference(images, [Colours()], ["inception768"], 50, tmp_path)
    monkeypatch.setattr(nearest, "load_extractor", lambda name, config, device: Colours())
    config = MetricsConfig(inception768="there.safetensors", cache=tmp_path)
    scene.ruler = nearest.choose_ruler(config, RESOLUTION, torch.device("cpu"))
    monkeypatch.setattr(Images, "read", None)
    assert scene.nearest[0].num == len(numbers)


def test_damaged_images_are_replaced_with_a_warning_and_not_cached(
    scene_of, monkeypatch, tmp_path, caplog
):
    scene = Scene(scene_of("vae").snapshot, 5)
    monkeypatch.setattr(nearest, "load_extractor", lambda name, config, device: Colours())
    config = MetricsConfig(inception768="there.safetensors", cache=tmp_path / "cache")
    scene.ruler = nearest.choose_ruler(config, RESOLUTION, torch.device("cpu"))

    def damaged(self, numbers):
        raise CorruptSample("train_0000.tar", "000001", "image", "it is cut off")

    monkeypatch.setattr(Images, "read", damaged)
    found, _ = scene.nearest
    assert found.num == scene.data.num_samples()
    assert "000001" in caplog.text and "is not cached" in caplog.text
    assert not list((tmp_path / "cache").glob("*"))


def test_without_the_extractor_pixels_are_compared_with_a_warning(tmp_path, caplog):
    config = MetricsConfig(inception768=str(tmp_path / "gone.safetensors"))
    ruler = nearest.choose_ruler(config, 64, torch.device("cpu"))
    assert ruler.what.startswith("root") and ruler.side == 32
    assert "gone.safetensors" in caplog.text
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    small = image.unflatten(3, (32, 2)).unflatten(2, (32, 2)).mean((3, 5))
    distance = (ruler.rows(image) - ruler.rows(torch.zeros_like(image))).norm()
    assert distance.item() == pytest.approx(127.5 * small.square().mean().sqrt().item(), rel=1e-4)


def test_without_a_discriminator_the_worst_lie_farthest_from_training(scene_of):
    scene = scene_of("vae")
    distances = brute_force(scene, scene.drawn, flip=False).min(1)
    drawing = drawings.worst(scene)
    order = np.argsort(-distances)[:16]
    shown = images_of(drawing)
    alike(shown[0], to_uint8(scene.drawn.numpy())[order[0]].astype(int))
    assert drawing.sheets[0].labels[0] == f"{distances.max():.2f}"
    assert "farthest" in drawing.caption


def test_other_data_than_it_was_trained_on_are_not_taken_for_its_own(runs, tmp_path):
    run = shutil.copytree(runs("vae"), tmp_path / "run")
    other = shutil.copytree(runs("vae").parent / "data", tmp_path / "other")
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["shards"][0]["sha256"] = "0" * 64
    (other / "manifest.json").write_text(json.dumps(manifest))
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace(f"{runs('vae').parent}/data", str(other)))
    scene = Scene(load_snapshot(run), 0)
    with pytest.raises(LeftOut, match="holds other shards than the checkpoint"):
        drawings.neighbours(scene)
