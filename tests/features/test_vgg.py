"""VGG-16 features against torchvision's own layers, and what stands in for missing weights."""

from __future__ import annotations

import logging
from urllib.error import URLError

import pytest
import torch
from safetensors.torch import save_file

from dinogen.errors import ConfigError
from dinogen.features import vgg
from dinogen.features.vgg import load_vgg

CPU = torch.device("cpu")
KEY = "family.perceptual_weights"


@pytest.fixture(scope="module")
def torchvision_features():
    """Up to relu4_1, seeded; the classifier's 120 million weights are never made."""
    from torchvision.models import vgg16

    with torch.device("meta"):
        network = vgg16(weights=None, init_weights=False)
    features = network.features[:19].to_empty(device="cpu")
    torch.manual_seed(0)
    for parameter in features.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, std=0.1)
        else:
            torch.nn.init.kaiming_normal_(parameter)
    return features


@pytest.fixture(scope="module")
def state(torchvision_features):
    named = torchvision_features.state_dict()
    return {f"features.{name}": tensor.clone() for name, tensor in named.items()}


@pytest.fixture(scope="module", params=[".safetensors", ".pth"])
def weights(request, state, tmp_path_factory):
    file = tmp_path_factory.mktemp("vgg") / f"weights{request.param}"
    if request.param == ".pth":
        torch.save(state, file)
    else:
        save_file(state, file)
    return file


def random_images(size=32):
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_taps_and_pixel_gradients_are_those_of_torchvision(weights, torchvision_features):
    features = load_vgg(str(weights), CPU, KEY)
    images = random_images().requires_grad_()
    maps = features(images)

    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    normalised = (images / 2 + 0.5 - mean) / std
    expected = [torchvision_features[: last + 1](normalised) for last in (3, 8, 15)]
    shapes = [(2, 64, 32, 32), (2, 128, 16, 16), (2, 256, 8, 8)]
    assert [tuple(m.shape) for m in maps] == shapes
    for got, want in zip(maps, expected, strict=True):
        assert want.min() == 0 and want.std() > 0.1
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    (gradient,) = torch.autograd.grad(sum(m.square().mean() for m in maps), images)
    (wanted,) = torch.autograd.grad(sum(m.square().mean() for m in expected), images)
    assert wanted.abs().max() > 0
    torch.testing.assert_close(gradient / wanted.std(), wanted / wanted.std(), rtol=1e-3, atol=1e-4)


def test_frozen_and_in_eval_mode_regardless_of_the_parent(weights):
    features = load_vgg(str(weights), CPU, KEY)
    torch.nn.ModuleList([features]).train()
    assert not any(module.training for module in features.modules())
    assert not any(parameter.requires_grad for parameter in features.parameters())


def test_an_outer_autocast_does_not_reach_in(weights):
    features = load_vgg(str(weights), CPU, KEY)
    plain = features(random_images())
    with torch.autocast("cpu", torch.bfloat16):
        for got, want in zip(features(random_images()), plain, strict=True):
            assert torch.equal(got, want)


def test_in_bfloat16_it_answers_in_float32_and_nearly_the_same(weights, monkeypatch):
    """As on a GPU: the weights are bfloat16, the identity that of the file."""
    plain = load_vgg(str(weights), CPU, KEY)
    monkeypatch.setattr(vgg, "guide_dtype", lambda device: torch.bfloat16)
    features = load_vgg(str(weights), CPU, KEY)
    assert {p.dtype for p in features.parameters()} == {torch.bfloat16}
    assert features.info == plain.info
    for got, want in zip(features(random_images()), plain(random_images()), strict=True):
        assert got.dtype == torch.float32
        assert 0 < (got - want).norm() < 0.03 * want.norm()


def test_trained_weights_are_not_called_random(weights, caplog):
    info = load_vgg(str(weights), CPU, KEY).info
    assert not info.random and "RANDOM" not in info.label
    assert not caplog.records


def test_by_name_it_is_torchvision_s_file_in_the_hub_cache(state, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cached = tmp_path / "hub" / "checkpoints" / "vgg16-397923af.pth"
    cached.parent.mkdir(parents=True)
    torch.save(state, cached)
    features = load_vgg("vgg16", CPU, KEY)
    assert torch.equal(features.layers[14].weight, state["features.14.weight"])
    assert not features.info.random and features.info.revision == "IMAGENET1K_V1"


def test_by_name_without_network_is_one_clear_error(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise URLError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(ConfigError, match=rf"^{KEY}: vgg16 .*Name or service not known") as caught:
        load_vgg("vgg16", CPU, KEY)
    message = str(caught.value)
    assert "vgg16-397923af.pth" in message and str(tmp_path) in message and "\n" not in message


def test_a_damaged_cache_is_no_silent_random_network(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cached = tmp_path / "hub" / "checkpoints" / "vgg16-397923af.pth"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"half a download")
    with pytest.raises(ConfigError, match=rf"^{KEY}: vgg16 is missing or damaged"):
        load_vgg("vgg16", CPU, KEY)


@pytest.mark.parametrize("name", ["gone.safetensors", "vgg19", "."])
def test_a_path_that_is_no_file_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ConfigError, match=rf"^{KEY}: {name} is not a file: give vgg16, or the path"
    ):
        load_vgg(name, CPU, KEY)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_damaged_file_is_one_line(suffix, tmp_path):
    file = tmp_path / f"damaged{suffix}"
    file.write_bytes(b"\x10" * 100)
    with pytest.raises(ConfigError, match=rf"^{KEY}: .*damaged.* cannot be read") as caught:
        load_vgg(str(file), CPU, KEY)
    assert "\n" not in str(caught.value)


class Payload:
    """What runs code when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


def test_a_file_that_would_run_code_runs_none(state, tmp_path):
    torch.save(state | {"more": Payload(tmp_path / "executed")}, tmp_path / "evil.pth")
    with pytest.raises(ConfigError, match=rf"^{KEY}: .*evil\.pth cannot be read"):
        load_vgg(str(tmp_path / "evil.pth"), CPU, KEY)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda s: {k: v for k, v in s.items() if "12" not in k}, "features.12.weight"),
        (lambda s: s | {"features.5.bias": torch.zeros(3)}, "features.5.bias"),
        (lambda s: s | {"features.5.bias": 3}, "features.5.bias"),
        (lambda s: {f"net.{k}": v for k, v in s.items()}, "features.0.weight"),
        (lambda s: {}, "features.0.weight"),
    ],
)
def test_other_weights_are_refused_by_name(change, named, state, tmp_path):
    torch.save(change(state), tmp_path / "other.pth")
    with pytest.raises(ConfigError, match=rf"^{KEY}: not the weights of VGG-16: .*{named}"):
        load_vgg(str(tmp_path / "other.pth"), CPU, KEY)


def test_a_file_that_holds_no_state_dict_is_refused(tmp_path):
    torch.save([torch.zeros(3)], tmp_path / "list.pth")
    with pytest.raises(ConfigError, match=rf"^{KEY}: .*holds a list"):
        load_vgg(str(tmp_path / "list.pth"), CPU, KEY)


def test_random_weights_are_seeded_and_said_loudly(caplog):
    before = torch.get_rng_state()
    with caplog.at_level(logging.WARNING):
        a, b = (load_vgg("random", CPU, KEY) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert a.info.weights_sha256 == b.info.weights_sha256
    assert a.info.random and "RANDOM" in a.info.label
    assert sum("RANDOM" in r.message and KEY in r.message for r in caplog.records) == 2
    assert all(m.std() > 0.01 for m in a(random_images()))
