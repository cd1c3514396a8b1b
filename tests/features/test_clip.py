"""CLIP against transformers' own outputs, in eager attention, and Pillow's resizing."""

from __future__ import annotations

import json
import logging
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dinogen.config.training import ClipConfig
from dinogen.features import GuideError, clip
from dinogen.features.clip import load_clip, same_clip
from tests import drawn, tiny_clip
from tests.features.test_hub import COMMIT, NAME, Hub, hub, serving  # noqa: F401

CPU = torch.device("cpu")
TEXTS = ["a face", "a person, gray hair, pale skin, without glasses, smiling", ""]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Weights of every kind unlike zero; a small vocabulary."""
    tokenizer = tiny_clip.make_tokenizer(None)
    model = tiny_clip.make_model(tokenizer)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return tiny_clip.save(model, tokenizer, tmp_path_factory.mktemp("clip") / "checkpoint")


def clip_of(folder):
    return load_clip(ClipConfig(path=str(folder)), CPU)


def eager(folder):
    import transformers

    model = transformers.CLIPModel.from_pretrained(folder, attn_implementation="eager").eval()
    return model, transformers.CLIPTokenizer.from_pretrained(folder)


def random_images(size, num=2):
    return torch.rand(num, 3, size, size, generator=torch.Generator().manual_seed(size)) * 2 - 1


def change_json(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_images_and_their_gradients_are_those_of_eager_transformers(checkpoint):
    mine, (model, _) = clip_of(checkpoint), eager(checkpoint)
    assert mine.model.config._attn_implementation == "sdpa"
    images = random_images(32).requires_grad_()
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    expected = model.get_image_features((images / 2 + 0.5 - mean) / std).pooler_output
    expected = expected / expected.norm(dim=1, keepdim=True)
    found = mine.images(images)
    assert found.shape == (2, mine.embed_dim) and found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

    probe = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad((found * probe).sum(), images)
    (wanted,) = torch.autograd.grad((expected * probe).sum(), images)
    assert wanted.abs().max() > 1e-4
    torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-3 * wanted.abs().max().item())


@pytest.mark.parametrize("size", [16, 50])
def test_other_sizes_are_resized_as_pillow_does_and_differentiably(checkpoint, size):
    mine = clip_of(checkpoint)
    seen = []
    mine.model.vision_model.register_forward_pre_hook(
        lambda module, args, given: seen.append(given["pixel_values"]), with_kwargs=True
    )
    images = random_images(size).requires_grad_()
    mine.images(images).square()[:, :7].sum().backward()
    assert (images.grad.abs().flatten(2).amax(2) > 0).all()
    pixels = (seen[0].detach() - mine.shift) / mine.scale
    for image, resized in zip(images.detach(), pixels, strict=True):
        for channel, got in zip(image, resized, strict=True):
            by_pillow = Image.fromarray(channel.numpy()).resize((32, 32), Image.Resampling.BICUBIC)
            np.testing.assert_allclose(got.numpy(), np.asarray(by_pillow), atol=1e-5)
    with pytest.raises(ValueError, match="square images, not 8x16"):
        mine.images(torch.zeros(1, 3, 8, 16))


def test_captions_are_those_of_eager_transformers_whatever_their_neighbours(checkpoint):
    mine, (model, tokenizer) = clip_of(checkpoint), eager(checkpoint)
    with torch.no_grad():
        expected = model.get_text_features(
            **tokenizer(TEXTS, padding=True, return_tensors="pt")
        ).pooler_output
    found = mine.captions(TEXTS)
    torch.testing.assert_close(
        found, expected / expected.norm(dim=1, keepdim=True), rtol=1e-4, atol=1e-5
    )
    alone = torch.cat([mine.captions([text]) for text in TEXTS])
    torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)
    assert (found[0] @ found[1]).item() < 0.99
    assert not found.requires_grad


def test_a_config_from_before_the_end_token_was_right_reads_the_same_place(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "c")
    text = json.loads((tmp_path / "c" / "config.json").read_text())["text_config"]
    change_json(tmp_path / "c" / "config.json", text_config={**text, "eos_token_id": 2})
    old = clip_of(tmp_path / "c")
    assert old.model.text_model.eos_token_id == 2
    assert torch.equal(old.captions(TEXTS), clip_of(checkpoint).captions(TEXTS))


def test_a_text_too_long_is_cut_and_said(checkpoint, caplog):
    mine = clip_of(checkpoint)
    words = ["hair"] * 100
    assert mine.tokens([" ".join(words[:38])]).shape == (1, mine.max_tokens)
    with caplog.at_level(logging.WARNING):
        whole = mine.captions(["a face", " ".join(words[:38])])
        assert not caplog.records
        cut = mine.captions(["a face", " ".join(words)])
    assert torch.equal(cut, whole)
    (record,) = caplog.records
    assert "1 of 2 captions cut to the 40 tokens that CLIP reads: 'hair hair" in record.message


def test_clip_s_own_vocabulary_gives_its_own_tokens():
    file = tiny_clip.vocabulary_file()
    if file is None:
        pytest.skip("no measuring data: set DINOGEN_ASSETS")
    tokenizer = tiny_clip.make_tokenizer(file)
    # as openai/CLIP's own tokenizer numbers them
    assert tokenizer("a photo of a cat")["input_ids"] == [
        *[49406, 320, 1125, 539, 320, 2368],
        49407,
    ]
    assert len(tokenizer) == 49408


def test_frozen_and_in_eval_mode_regardless_of_parent_and_autocast(checkpoint):
    mine = clip_of(checkpoint)
    parent = torch.nn.ModuleList([mine]).train()
    assert parent.training and not any(module.training for module in mine.modules())
    assert not any(parameter.requires_grad for parameter in mine.parameters())
    images = random_images(32)
    plain = mine.images(images), mine.captions(TEXTS)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(mine.images(images), plain[0])
        assert torch.equal(mine.captions(TEXTS), plain[1])


def test_in_bfloat16_it_answers_in_float32_and_nearly_the_same(checkpoint, monkeypatch):
    plain = clip_of(checkpoint)
    monkeypatch.setattr(clip, "guide_dtype", lambda device: torch.bfloat16)
    mine = clip_of(checkpoint)
    assert {parameter.dtype for parameter in mine.parameters()} == {torch.bfloat16}
    assert mine.info == plain.info
    for found, expected in [
        (mine.images(random_images(32)), plain.images(random_images(32))),
        (mine.captions(TEXTS), plain.captions(TEXTS)),
    ]:
        assert found.dtype == torch.float32
        assert (found * expected).sum(1).min() > 0.995
        torch.testing.assert_close(found.norm(dim=1), torch.ones(len(found)))


def test_who_it_is_is_said_by_its_weights_and_by_what_it_wants_images_in(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "c")
    save_file({"again": torch.ones(1)}, tmp_path / "c" / "open_clip_model.safetensors")
    info, copied = clip_of(checkpoint).info, clip_of(tmp_path / "c")
    assert json.loads(json.dumps(info)) == info
    assert same_clip(info, copied.info) and info["path"] != copied.info["path"]
    assert not same_clip({}, info)

    stored = json.dumps({"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]})
    (tmp_path / "c" / "preprocessor_config.json").write_text(stored)
    other = clip_of(tmp_path / "c")
    assert not same_clip(info, other.info)
    images = random_images(32)
    assert not torch.allclose(other.images(images), copied.images(images), atol=1e-3)

    weights = load_file(checkpoint / "model.safetensors")
    weights["logit_scale"] += 1
    save_file(weights, tmp_path / "c" / "model.safetensors", metadata={"format": "pt"})
    assert clip_of(tmp_path / "c").info["weights_sha256"] != info["weights_sha256"]


def test_random_weights_are_said_loudly(tmp_path, caplog, checkpoint):
    with caplog.at_level(logging.WARNING):
        assert not clip_of(checkpoint).info["random"]
        assert not caplog.records
        assert clip_of(tiny_clip.random_clip(tmp_path / "c")).info["random"]
    assert "RANDOM CLIP" in caplog.text


def lack_weight(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["text_projection.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def be_another_network(folder):
    import transformers

    transformers.ViTModel(
        transformers.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=1)
    ).save_pretrained(folder)


def have_another_s_tokenizer(folder):
    (folder / "tokenizer.json").unlink()
    tokenizer = tiny_clip.make_tokenizer(None)
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda c: (c / "tokenizer.json").unlink(),
            "lacks its tokenizer .*: download the .* again",
        ),
        (lambda c: (c / "tokenizer.json").write_text("{"), "is damaged"),
        (have_another_s_tokenizer, "tokenizer of .* is not that of its network"),
        (
            lambda c: (c / "config.json").write_text("{"),
            "is damaged .*: download the whole checkpoint again",
        ),
        (lambda c: (c / "config.json").unlink(), r"lacks config\.json or \*\.safetensors"),
        (lambda c: (c / "model.safetensors").write_bytes(b"short"), "is damaged"),
        (
            lambda c: change_json(c / "config.json", projection_dim=48),
            r"config\.json says \[48",
        ),
        (lack_weight, r"lacks 1 weights \(text_projection\.weight"),
        (be_another_network, "holds a 'vit' network: give a CLIP checkpoint"),
        (lambda c: (c / "preprocessor_config.json").write_text("no"), "is damaged"),
    ],
)
def test_what_cannot_be_used_is_one_line_that_names_the_key(checkpoint, tmp_path, damage, message):
    shutil.copytree(checkpoint, tmp_path / "c")
    damage(tmp_path / "c")
    with pytest.raises(GuideError, match=rf"^clip\.path: .*{message}") as caught:
        clip_of(tmp_path / "c")
    assert "\n" not in str(caught.value)


def test_by_hub_name_with_its_tokenizer_and_then_offline(checkpoint, hub):  # noqa: F811
    files = {file.name: file.read_bytes() for file in checkpoint.iterdir()}
    asked = []

    class Filled(Hub):
        def do_GET(self):
            asked.append(self.path)
            super().do_GET()

    unwanted = {"pytorch_model.bin": b"a pickle", "open_clip_model.safetensors": b"the same twice"}
    Filled.files = files | unwanted
    with serving(Filled) as endpoint:
        hub(endpoint)
        mine = clip_of(NAME)
    assert mine.info["revision"] == COMMIT
    assert same_clip(mine.info, clip_of(checkpoint).info)
    assert not any(name in path for name in unwanted for path in asked if "/resolve/" in path)
    hub("http://127.0.0.1:9", offline=True)
    assert clip_of(NAME).info == mine.info


def test_without_network_the_error_says_what_to_do(hub):  # noqa: F811
    hub("http://127.0.0.1:9", offline=True)
    with pytest.raises(
        GuideError,
        match=rf"^clip\.path: {NAME}: .*set clip\.path .*`hf download {NAME} --local-dir",
    ):
        clip_of(NAME)
    with pytest.raises(GuideError, match=r"^clip\.path: nowhere is .* openai/clip-vit"):
        clip_of("nowhere")


def test_taught_on_drawn_faces_it_knows_attributes_in_combinations_it_never_saw(tmp_path_factory):
    mine = clip_of(tiny_clip.shared_clip(tmp_path_factory))
    rows = drawn.some_attributes(400, 100, unseen=True)
    found = tiny_clip.read_attributes(mine, drawn.as_tensor(drawn.draw(rows, 101)))
    accuracy = dict(zip(drawn.NAMES, (found == rows).mean(0), strict=True))
    assert min(accuracy.values()) >= 0.95, accuracy
