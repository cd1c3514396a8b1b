"""Extractors against the networks of torch-fidelity and transformers; and wrong weights."""

from __future__ import annotations

import hashlib
import io
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from dinogen.config.training import MetricsConfig
from dinogen.features.dinov2 import make_random_dinov2
from dinogen.metrics.extractors import inception as inception_file
from dinogen.metrics.extractors.base import FeatureExtractor, NotAvailable, resized
from dinogen.metrics.suite import load_extractor

CPU = torch.device("cpu")
WEIGHTS_NAME = "weights-inception-2015-12-05-6726825d.pth"


def extractor_of(name, path=None):
    return load_extractor(name, MetricsConfig(**{name: path and str(path)}), CPU)


def random_images(num, side, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num, 3, side, side), generator=generator, dtype=torch.uint8)


@pytest.fixture(scope="module")
def network():
    """torch-fidelity's own, with random weights that keep its features apart."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Unloaded(FeatureExtractorInceptionV3):
        def load_state_dict(self, state):
            pass

    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    torch.manual_seed(0)
    names = ["768", "2048", "logits_unbiased"]
    made = Unloaded("theirs", names, feature_extractor_weights_path=empty)
    for module in made.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean, std=0.2)
            torch.nn.init.uniform_(module.running_var, 0.05, 0.2)
            torch.nn.init.normal_(module.bias, std=0.2)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    return made


@pytest.fixture(scope="module")
def weights(network, tmp_path_factory):
    file = tmp_path_factory.mktemp("inception") / "inception.pth"
    torch.save(network.state_dict(), file)
    return file


@pytest.fixture(scope="module")
def folded(network, tmp_path_factory):
    """The same weights, batch norm folded by hand, as the file of FID-768 has them."""
    tensors = {}
    for name, module in network.named_modules():
        if hasattr(module, "bn"):
            bn = module.bn
            factor = bn.weight / torch.sqrt(bn.running_var + bn.eps)
            tensors[f"{name}.conv.weight"] = module.conv.weight * factor[:, None, None, None]
            tensors[f"{name}.conv.bias"] = bn.bias - bn.running_mean * factor
    file = tmp_path_factory.mktemp("folded") / "folded.safetensors"
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, file)
    return file


@pytest.fixture(scope="module")
def theirs(network):
    images = random_images(2, 299)
    with torch.no_grad():
        features = network(images)
    return images, dict(zip(["768", "2048", "logits"], features, strict=True))


def close(found, expected, tolerance=1e-5):
    assert expected.abs().mean() > 1e-3 and expected.std(0).mean() > 1e-5
    assert (found - expected).norm() < tolerance * expected.norm()


def test_inception_is_torch_fidelitys(weights, theirs):
    extractor = extractor_of("inception", weights)
    images, expected = theirs
    found = extractor(images)
    assert isinstance(extractor, FeatureExtractor) and set(found) == {"features", "logits"}
    close(found["features"], expected["2048"])
    close(found["logits"], expected["logits"])
    info = extractor.info
    assert (info.name, info.num_channels, info.num_logits, info.random) == (
        "inception", 2048, 1008, False,
    )  # fmt: skip
    assert info.resize == "bilinear antialias 299 uint8" and len(info.weights_sha256) == 64


def test_inception768_is_its_layer_of_768(folded, theirs):
    extractor = extractor_of("inception768", folded)
    images, expected = theirs
    found = extractor(images)
    assert set(found) == {"features"} and extractor.info.num_logits == 0
    with torch.no_grad():  # of (x - 128) / 128 there, and in the recorded features as here
        as_there = extractor.trunk((images.float() - 128) / 128).mean((2, 3))
        as_here = extractor.trunk(2 * (images / 255) - 1).mean((2, 3))
    close(as_there, expected["768"])
    close(found["features"], as_here)


def test_recorded_features_of_real_images_are_reproduced(assets):
    (file,) = (assets / "inception").glob("*.safetensors")
    extractor = extractor_of("inception768", file)
    recorded = np.load(assets / "inception" / "reference_features.npz")
    num = 0
    for name in recorded.files:
        with Image.open(assets / name) as opened:
            pixels = torch.from_numpy(np.array(opened.convert("RGB"))).permute(2, 0, 1)[None]
        if max(pixels.shape) > 299:  # recorded without antialias, which only shrinking tells
            continue
        num += 1
        expected = torch.from_numpy(recorded[name][-768:])
        error = (extractor(pixels)["features"][0] - expected).norm() / expected.norm()
        assert error < 1e-3, name
    assert num >= 2


@pytest.mark.parametrize("side", [64, 512])
@pytest.mark.parametrize(("mode", "filter_"), [("bilinear", "BILINEAR"), ("bicubic", "BICUBIC")])
def test_resizing_is_pillows(side, mode, filter_):
    """Pillow's filters are antialiased; it rounds, and torch does not."""
    # of little contrast, for Pillow also clips between rows and columns
    smooth = torch.nn.functional.interpolate(random_images(1, 16) / 4 + 96, side, mode="bicubic")
    image = smooth.round().to(torch.uint8)
    opened = Image.fromarray(image[0].permute(1, 2, 0).numpy())
    expected = np.array(opened.resize((299, 299), Image.Resampling[filter_]))
    found = resized(image, 299, mode, CPU)[0].permute(1, 2, 0).numpy()
    assert np.abs(found - expected).max() < 1.1
    assert found.min() >= 0 and found.max() <= 255


def test_only_uint8_images_are_taken():
    with pytest.raises(ValueError, match=r"uint8, not torch\.float32"):
        resized(torch.zeros(1, 3, 8, 8), 299, "bilinear", CPU)
    with pytest.raises(ValueError, match=r"not torch\.uint8 \(1, 8, 8, 3\)"):
        resized(torch.zeros(1, 8, 8, 3, dtype=torch.uint8), 299, "bilinear", CPU)


@pytest.mark.parametrize("registers", [0, 2])
def test_dinov2_is_the_cls_token_of_transformers(tmp_path, registers):
    import transformers

    folder = tmp_path / "dinov2"
    make_random_dinov2(
        folder, seed=0, hidden_size=32, num_layers=2, num_heads=2, num_registers=registers
    )
    extractor = extractor_of("dinov2", folder)
    assert extractor.info.random and extractor.info.resize == "bicubic antialias 224"
    images = random_images(2, 64)
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]
    pixels = resized(images, 224, "bicubic", CPU) / 255
    with torch.no_grad():
        expected = model(pixel_values=(pixels - mean) / std).pooler_output
    found = extractor(images)
    assert set(found) == {"features"} and found["features"].shape == (2, 32)
    torch.testing.assert_close(found["features"], expected, rtol=1e-4, atol=1e-5)


def test_dinov2_that_is_not_available_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(NotAvailable, match=r"metrics\.dinov2: no path is given"):
        extractor_of("dinov2")
    with pytest.raises(NotAvailable, match=r"metrics\.dinov2: nobody/nothing: there is no"):
        extractor_of("dinov2", "nobody/nothing")
    with pytest.raises(NotAvailable, match=r"metrics\.dinov2: .* lacks config\.json"):
        extractor_of("dinov2", tmp_path)


def test_folded_weights_that_are_missing_are_said(tmp_path):
    with pytest.raises(NotAvailable, match=r"metrics\.inception768: no path is given"):
        extractor_of("inception768")
    with pytest.raises(NotAvailable, match=r"metrics\.inception768: .* is not a file"):
        extractor_of("inception768", tmp_path / "nothing.safetensors")
    (tmp_path / "text.safetensors").write_text("not weights")
    with pytest.raises(NotAvailable, match=r"metrics\.inception768: .* does not hold"):
        extractor_of("inception768", tmp_path / "text.safetensors")


class Harmful:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_wrong_and_harmful_weights_are_refused(tmp_path):
    hint = "name the file in metrics.inception"
    with pytest.raises(NotAvailable, match=rf"is no file: get https://.*{WEIGHTS_NAME} and {hint}"):
        extractor_of("inception", tmp_path / "nothing.pth")
    (tmp_path / "text.pth").write_text("not weights")
    torch.save({"fc.bias": torch.zeros(3)}, tmp_path / "other.pth")
    touched = tmp_path / "touched"
    (tmp_path / "harmful.pth").write_bytes(pickle.dumps(Harmful(touched)))
    torch.save({"fc.bias": Harmful(touched)}, tmp_path / "harmful_too.pth")
    for name in ("text", "other", "harmful", "harmful_too"):
        with pytest.raises(NotAvailable, match=rf"{name}\.pth does not hold torch-fidelity's"):
            extractor_of("inception", tmp_path / f"{name}.pth")
    assert not touched.exists()


def test_without_a_path_it_is_torchs_hub_cache(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    asked = []
    monkeypatch.setattr(inception_file, "_answers", lambda url: asked.append(url) is not None)
    with pytest.raises(NotAvailable, match=rf"{WEIGHTS_NAME} is not there and cannot"):
        extractor_of("inception")
    assert len(asked) == 1

    def download(url, file, hash_prefix, progress):
        assert url == asked[0] and hash_prefix == "6726825d"
        shutil.copy(weights, file)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    monkeypatch.setattr(inception_file, "_answers", lambda url: True)
    first = extractor_of("inception")
    monkeypatch.setattr(inception_file, "_answers", lambda url: pytest.fail("asked again"))
    assert extractor_of("inception").info == first.info
    assert hashlib.sha256(weights.read_bytes()).hexdigest() != first.info.weights_sha256


def test_with_the_hub_offline_nothing_is_asked_for(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(inception_file.urllib.request, "urlopen", lambda *a, **k: pytest.fail())
    assert not inception_file._answers.__wrapped__("https://example.com")


def test_onet_is_the_detectors_own_and_knows_a_face():
    from skimage import data

    extractor = extractor_of("onet")
    images = random_images(3, 48)
    found = extractor(images)
    with torch.no_grad():
        theirs = extractor.net((images.float() - 127.5) / 128)[2][:, 1]
    torch.testing.assert_close(found["logits"].softmax(1)[:, 1], theirs)
    assert found["features"].shape == (3, extractor.info.num_channels)
    face = torch.from_numpy(data.astronaut()[62:172, 170:280]).permute(2, 0, 1)[None]
    chance = extractor(face)["logits"].softmax(1)[0, 1]
    assert chance > 0.95
    assert extractor(images)["logits"].softmax(1)[:, 1].max() < 0.5


def test_another_file_for_onet_is_named(tmp_path):
    (tmp_path / "onet.pt").write_bytes(b"nothing")
    with pytest.raises(NotAvailable, match=r"metrics\.onet: .*onet\.pt"):
        extractor_of("onet", tmp_path / "onet.pt")
