"""The Inception guide against torchvision's own network, and against recorded features."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from dinogen.config import GuideConfig
from dinogen.features import Guide, GuideError, inception, load_guide
from dinogen.features.inception import InceptionTrunk
from dinogen.metrics.extractors import inception768

CPU = torch.device("cpu")


def guide_of(path, **changes):
    return load_guide(GuideConfig(name="inception", path=str(path), **changes), CPU)


@pytest.fixture(scope="module")
def torchvision_network():
    """Random weights, batch norm statistics unlike zero and one."""
    from torchvision.models import Inception3

    torch.manual_seed(0)
    network = Inception3(aux_logits=False, init_weights=False).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean, std=0.2)
            torch.nn.init.uniform_(module.running_var, 0.05, 0.2)
            torch.nn.init.normal_(module.bias, std=0.2)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    return network


@pytest.fixture(scope="module")
def folded_file(torchvision_network, tmp_path_factory):
    folded = {}
    for name, module in torchvision_network.named_modules():
        if hasattr(module, "bn"):
            bn = module.bn
            factor = bn.weight / torch.sqrt(bn.running_var + bn.eps)
            folded[f"{name}.conv.weight"] = module.conv.weight * factor[:, None, None, None]
            folded[f"{name}.conv.bias"] = bn.bias - bn.running_mean * factor
    file = tmp_path_factory.mktemp("inception") / "folded.safetensors"
    save_file({name: tensor.detach().contiguous() for name, tensor in folded.items()}, file)
    return file


def test_the_map_is_that_of_torchvision_with_folded_batch_norm(
    torchvision_network, folded_file, monkeypatch
):
    from torchvision.models import inception

    original = torch.nn.functional.avg_pool2d
    monkeypatch.setattr(  # the FID network leaves padding out of its means
        inception.F, "avg_pool2d", lambda *a, **k: original(*a, count_include_pad=False, **k)
    )
    seen = {}
    torchvision_network.Mixed_6e.register_forward_hook(lambda m, i, o: seen.update(map=o))
    images = torch.rand(2, 3, 155, 155) * 2 - 1
    with torch.no_grad():
        torchvision_network(images)
    monkeypatch.undo()
    guide = guide_of(folded_file)
    scale = seen["map"].abs().mean()
    assert scale > 1e-3
    torch.testing.assert_close(guide(images) / scale, seen["map"] / scale, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("grid", "size"), [(4, 91), (8, 155), (16, 283)])
def test_input_sizes_give_exact_grids(folded_file, grid, size):
    guide = guide_of(folded_file)
    assert isinstance(guide, Guide)
    assert guide.input_size(grid) == size
    assert guide(torch.zeros(1, 3, size, size)).shape == (1, 768, grid, grid)


def test_frozen_but_differentiable_to_the_pixels(folded_file):
    guide = guide_of(folded_file)
    torch.nn.ModuleList([guide]).train()
    assert not any(module.training for module in guide.modules())
    assert not any(parameter.requires_grad for parameter in guide.parameters())
    images = (torch.rand(1, 3, 91, 91) * 2 - 1).requires_grad_()
    (gradient,) = torch.autograd.grad(guide(images).square().sum(), images)
    step = gradient / gradient.norm() * 0.01
    with torch.no_grad():
        change = (guide(images + step).square().sum() - guide(images - step).square().sum()) / 2
    assert change == pytest.approx((gradient * step).sum().item(), rel=0.02)


@pytest.mark.parametrize("size", [27, 90, 299 + 1])
def test_images_of_another_size_are_refused(folded_file, size):
    with pytest.raises(ValueError, match=f"not {size}x{size}"):
        guide_of(folded_file)(torch.zeros(1, 3, size, size))


def test_a_folder_is_taken_for_the_one_file_in_it(folded_file, tmp_path):
    assert (
        guide_of(folded_file.parent).info.weights_sha256
        == guide_of(folded_file).info.weights_sha256
    )
    with pytest.raises(GuideError, match=r"is a folder: give the file in it \(it holds no "):
        guide_of(tmp_path)
    for name in "ab":
        (tmp_path / f"{name}.safetensors").write_bytes(b"")
    with pytest.raises(GuideError, match=r"is a folder: give the file in it \(it holds 2 "):
        guide_of(tmp_path)


def test_in_bfloat16_it_answers_in_float32_and_nearly_the_same(folded_file, monkeypatch):
    """As on a GPU: the weights are bfloat16, the identity that of the file."""
    plain = guide_of(folded_file)
    monkeypatch.setattr(inception, "guide_dtype", lambda device: torch.bfloat16)
    guide = guide_of(folded_file)
    assert {parameter.dtype for parameter in guide.parameters()} == {torch.bfloat16}
    assert guide.info == plain.info
    images = (torch.rand(1, 3, 91, 91) * 2 - 1).requires_grad_()
    features = guide(images)
    assert features.dtype == torch.float32
    assert (features - plain(images)).norm() < 0.05 * plain(images).norm()
    with torch.autocast("cpu", torch.float16):
        assert torch.equal(guide(images), features)


def test_wrong_files_and_layers_are_refused_by_name(folded_file, tmp_path):
    with pytest.raises(GuideError, match=r"guide\.path: facebook/dinov2-small is not a file"):
        guide_of("facebook/dinov2-small")
    (tmp_path / "text.safetensors").write_text("not weights")
    with pytest.raises(GuideError, match=r"guide\.path: .*text\.safetensors does not hold"):
        guide_of(tmp_path / "text.safetensors")
    state = InceptionTrunk().state_dict()
    del state["Mixed_6e.branch_pool.conv.bias"]
    save_file(state, tmp_path / "part.safetensors")
    with pytest.raises(GuideError, match=r"Mixed_6e\.branch_pool\.conv\.bias"):
        guide_of(tmp_path / "part.safetensors")
    with pytest.raises(GuideError, match=r"guide\.layer: 3"):
        guide_of(folded_file, layer=3)


def test_reference_features_of_real_images_are_reproduced(assets):
    (file,) = (assets / "inception").glob("*.safetensors")
    guide = guide_of(file)
    assert not guide.info.random and guide.info.num_channels == 768
    expected = np.load(assets / "inception" / "reference_features.npz")
    assert len(expected.files) == 8
    maps = {}
    for stage in ("Conv2d_3b_1x1", "Mixed_5b"):  # what enters them is what the two pools give
        module = getattr(guide.trunk, stage)
        module.register_forward_pre_hook(lambda m, given, stage=stage: maps.update({stage: given}))
    for name in expected.files:
        with Image.open(assets / name) as image:
            pixels = torch.from_numpy(np.array(image.convert("RGB")))
        pixels = torch.nn.functional.interpolate(
            pixels.permute(2, 0, 1)[None] / 255, (299, 299), mode="bilinear", align_corners=False
        )
        with torch.no_grad():
            last = guide.trunk(2 * pixels - 1)
        given = (maps["Conv2d_3b_1x1"][0], maps["Mixed_5b"][0], last)
        features = torch.cat([array.mean((2, 3)) for array in given], 1)[0].numpy()
        error = np.linalg.norm(features - expected[name]) / np.linalg.norm(expected[name])
        assert error < 1e-3, name


@pytest.fixture(scope="module")
def fidelity_network(tmp_path_factory):
    """torch-fidelity's own network with random weights, and the file that it was saved to."""
    from torch_fidelity import feature_extractor_inceptionv3 as fidelity

    with pytest.MonkeyPatch.context() as patched:  # the constructor asks for trained weights
        patched.setattr(fidelity.torch, "load", lambda *a, **k: {})
        extractor = fidelity.FeatureExtractorInceptionV3
        patched.setattr(extractor, "load_state_dict", lambda self, state: None)
        network = extractor("inception", ["768"], feature_extractor_weights_path="none")
    torch.manual_seed(1)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean, std=0.2)
            torch.nn.init.uniform_(module.running_var, 0.05, 0.2)
            torch.nn.init.normal_(module.bias, std=0.2)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    file = tmp_path_factory.mktemp("fidelity") / "pt_inception.pth"
    torch.save(network.state_dict(), file)
    return network, file


def test_the_public_file_is_read_and_gives_torch_fidelitys_features(fidelity_network):
    network, file = fidelity_network
    pixels = torch.randint(0, 256, (2, 3, 299, 299), dtype=torch.uint8)
    (expected,) = network(pixels)
    guide = guide_of(file)
    assert len(guide.info.weights_sha256) == 64 and not guide.info.random
    found = guide(pixels.float() / 128 - 1).mean((2, 3))
    assert (found - expected).norm() < 1e-5 * expected.norm()


def test_fid_768_reads_the_public_file_too(fidelity_network):
    _, file = fidelity_network
    extractor = inception768.load(str(file), CPU)
    images = torch.randint(0, 256, (2, 3, 299, 299), dtype=torch.uint8)
    expected = guide_of(file)(images / 127.5 - 1).mean((2, 3))
    found = extractor(images)["features"]
    # means near zero differ more: another memory layout sums in another order
    assert ((found - expected).norm(dim=1) < 1e-5 * expected.norm(dim=1)).all()


def test_a_file_that_pickles_an_object_is_not_run(tmp_path):
    file = tmp_path / "evil.pth"
    torch.save({"x": pytest.raises}, file)
    with pytest.raises(GuideError, match=r"guide\.path: .*evil\.pth does not hold"):
        guide_of(file)
