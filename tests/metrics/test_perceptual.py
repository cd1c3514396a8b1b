"""LPIPS against the lpips library, and against its formula with the authors' heads."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from dinogen.metrics.extractors.base import NotAvailable
from dinogen.metrics.extractors.lpips import load_perceptual
from tests.metrics.backbones import MODELS, lpips_by_hand, random_images, save_backbone

CPU = torch.device("cpu")
# of the 1,235,496 that torchvision's documentation tells of, without the classifier's 513,000
NUM_OF_SQUEEZE = 722_496


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("backbones")

    def path(net):
        file = folder / f"{net}.pth"
        return file if file.exists() else save_backbone(net, file)

    return path


@pytest.fixture(scope="module")
def heads():
    default = Path(__file__).parents[3] / "shared" / "assets"
    folder = Path(os.environ.get("DINOGEN_ASSETS", default)) / "lpips"
    if not folder.is_dir():
        pytest.skip(f"no heads of LPIPS at {folder}: set DINOGEN_ASSETS")
    return folder


def library(net, backbone):
    """The library's own LPIPS with our backbone in it, slice by slice."""
    import lpips

    with torch.device("meta"):  # drawing the weights of a whole VGG takes seconds
        network = lpips.LPIPS(pretrained=False, net=net, pnet_rand=True, verbose=False)
    heads = Path(lpips.__file__).with_name("weights") / "v0.1" / f"{net}.pth"
    heads = torch.load(heads, map_location="cpu", weights_only=True)
    for number, head in enumerate(network.lins):
        head.model[-1].weight = torch.nn.Parameter(heads[f"lin{number}.model.1.weight"])
    stored = torch.load(backbone, weights_only=True)
    for part in network.net.children():
        for number, layer in part.named_children():
            own = {name: stored[f"features.{number}.{name}"] for name in layer.state_dict()}
            layer.load_state_dict(own, assign=True)
    return network


@pytest.mark.filterwarnings("ignore:.*deprecated since 0.13:UserWarning")
@pytest.mark.parametrize("net", MODELS)
def test_it_is_the_library_s(net, backbone):
    reference, perceptual = library(net, backbone(net)), load_perceptual(net, backbone(net), CPU)
    a, b = random_images(3, 72), random_images(3, 72, seed=1)
    with torch.no_grad():
        expected = reference(a.float() / 127.5 - 1, b.float() / 127.5 - 1).flatten()
    assert expected.min() > 0.01
    torch.testing.assert_close(perceptual.distance(a, b), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*deprecated since 0.13:UserWarning")
def test_small_images_are_enlarged_to_64_with_antialias(backbone):
    reference, perceptual = (
        library("alex", backbone("alex")),
        load_perceptual("alex", backbone("alex"), CPU),
    )
    a, b = random_images(2, 8), random_images(2, 8, seed=1)

    def enlarged(x):
        x = F.interpolate(x.float(), (64, 64), mode="bilinear", antialias=True, align_corners=False)
        return x / 127.5 - 1

    with torch.no_grad():
        expected = reference(enlarged(a), enlarged(b)).flatten()
    torch.testing.assert_close(perceptual.distance(a, b), expected, rtol=1e-4, atol=1e-6)
    assert perceptual.info.resize == "bilinear antialias 64 if smaller"


@pytest.mark.parametrize("net", MODELS)
def test_it_is_its_formula_with_the_authors_heads(net, backbone, heads):
    a, b = random_images(2, 64), random_images(2, 64, seed=1)
    expected = lpips_by_hand(net, backbone(net), heads / f"{net}.pth", a, b)
    found = load_perceptual(net, backbone(net), CPU).distance(a, b).double()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_a_image_is_at_no_distance_from_itself_and_farther_the_noisier(backbone):
    perceptual = load_perceptual("alex", backbone("alex"), CPU)
    a = random_images(2, 64)
    assert torch.equal(perceptual.distance(a, a), torch.zeros(2))
    noise = torch.randn(a.shape, generator=torch.Generator().manual_seed(2))
    steps = [(a + sigma * noise).clamp(0, 255).to(torch.uint8) for sigma in (8, 24, 72)]
    near, far, farthest = (perceptual.distance(a, step) for step in steps)
    assert (near < far).all() and (far < farthest).all()
    torch.testing.assert_close(perceptual.distance(steps[1], a), far)


def test_who_it_is(backbone, tmp_path):
    perceptual = load_perceptual("squeeze", backbone("squeeze"), CPU)
    parameters = dict(perceptual.network.named_parameters())
    assert not any(p.requires_grad or p.is_meta for p in parameters.values())
    assert not perceptual.network.training
    num = sum(p.numel() for name, p in parameters.items() if name.startswith("net."))
    assert num == NUM_OF_SQUEEZE
    info = perceptual.info
    assert (info.name, info.random) == ("lpips_squeeze", False)
    # the same weights in another file are the same feature extractor, others are not
    stored = torch.load(backbone("squeeze"), weights_only=True)
    save_file(stored, tmp_path / "same.safetensors")
    assert load_perceptual("squeeze", str(tmp_path / "same.safetensors"), CPU).info == info
    stored["features.0.bias"] = stored["features.0.bias"] + 1e-3
    torch.save(stored, tmp_path / "other.pth")
    other = load_perceptual("squeeze", str(tmp_path / "other.pth"), CPU)
    assert other.info.weights_sha256 != info.weights_sha256


def test_by_name_it_is_torchvision_s_file_in_the_hub_cache(backbone, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    said = r"metrics\.lpips_backbone: LPIPS \(squeeze\) needs .*squeezenet1_1-b8a52dc0\.pth, which"
    with pytest.raises(NotAvailable, match=said + r".*fetch https://.*or set metrics"):
        load_perceptual("squeeze", None, CPU)
    (tmp_path / "checkpoints").mkdir()
    file = tmp_path / "checkpoints" / "squeezenet1_1-b8a52dc0.pth"
    file.write_bytes(backbone("squeeze").read_bytes())
    found = load_perceptual("squeeze", None, CPU)
    assert found.info == load_perceptual("squeeze", str(backbone("squeeze")), CPU).info


def test_what_is_no_backbone_is_said(backbone, tmp_path):
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    (tmp_path / "torn.pth").write_bytes(backbone("squeeze").read_bytes()[:1000])
    (tmp_path / "torn.safetensors").write_bytes(b"{}")
    for path, said in [
        (tmp_path / "gone.pth", r"gone\.pth, which is not there: give the path of torchvision's"),
        (backbone("squeeze"), r"does not hold torchvision's alexnet: features\.0\.weight"),
        (tmp_path / "tensor.pth", "holds a Tensor"),
        (tmp_path / "torn.pth", r"torn\.pth cannot be read as weights"),
        (tmp_path / "torn.safetensors", r"torn\.safetensors cannot be read as weights"),
    ]:
        with pytest.raises(NotAvailable, match=rf"metrics\.lpips_backbone: .*{said}"):
            load_perceptual("alex", str(path), CPU)
