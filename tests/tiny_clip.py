"""A tiny CLIP from config, with CLIP's own vocabulary, taught on drawn faces in seconds."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from dinogen._torchvision import ensure_torchvision
from dinogen.features.checkpoint import quiet_transformers
from dinogen.features.clip import IMAGE_MEAN, IMAGE_STD, Clip
from dinogen.features.dinov2 import RANDOM_KEY
from tests import drawn

IMAGE_SIZE = 32
EMBED_DIM = 64
MAX_TOKENS = 40
COUNTS = [len(values) for values in drawn.VALUES.values()]
NUM_FACES, NUM_IMAGES, NUM_CAPTIONS = 2000, 96, 40
IMAGE_STEPS, CAPTION_STEPS = 280, 90
LR = 2e-3
START, END = "<|startoftext|>", "<|endoftext|>"
_OWN_INFO = {
    "embed_dim": EMBED_DIM,
    "image_size": IMAGE_SIZE,
    "image_mean": IMAGE_MEAN,
    "image_std": IMAGE_STD,
}
NUM_MERGES = 49152 - 256 - 2  # of the file's, CLIP reads that many


def vocabulary_file() -> Path | None:
    """CLIP's byte-pair merges, where the measuring data are."""
    default = Path(__file__).parents[2] / "shared" / "assets"
    folder = Path(os.environ.get("DINOGEN_ASSETS", default))
    file = folder / "clip" / "bpe_simple_vocab_16e6.txt.gz"
    return file if file.is_file() else None


def make_tokenizer(file: Path | None):
    """transformers' CLIPTokenizer of a file of merges; None: of the words of drawn faces alone."""
    ensure_torchvision()
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    if file is None:
        merges = _merges_of_words()
    else:
        lines = gzip.decompress(file.read_bytes()).decode().split("\n")[1 : NUM_MERGES + 1]
        merges = [tuple(line.split()) for line in lines]
    letters = sorted(ByteLevel.alphabet())
    tokens = letters + [letter + "</w>" for letter in letters] + ["".join(m) for m in merges]
    vocabulary = {token: number for number, token in enumerate([*tokens, START, END])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS)


def _merges_of_words() -> list[tuple[str, str]]:
    """Each word of the captions, put together from its first letter on."""
    texts, _ = drawn.some_captions(np.tile(drawn.combinations(), (8, 1)), 0)
    merges: dict[tuple[str, str], None] = {}
    for word in sorted({word for text in texts for word in text.replace(",", "").split()}):
        *letters, last = word
        pieces = [*letters, last + "</w>"]
        while len(pieces) > 1:
            merges[pieces[0], pieces[1]] = None
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
    return list(merges)


def make_model(tokenizer, seed: int = 0, **marks):
    """CLIPModel of 32x32 images in 8x8 patches; ``marks`` go into its config."""
    ensure_torchvision()
    from transformers import CLIPConfig, CLIPModel

    common = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    text = {
        "num_hidden_layers": 2,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": MAX_TOKENS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.eos_token_id,
    }
    vision = {"num_hidden_layers": 2, "image_size": IMAGE_SIZE, "patch_size": 8}
    config = CLIPConfig(
        text_config={**common, **text},
        vision_config={**common, **vision},
        projection_dim=EMBED_DIM,
        **marks,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIPModel(config)
    with torch.no_grad():  # meant for deeper ones: a small one would hardly see its images
        model.vision_model.embeddings.patch_embedding.weight.mul_(3)
        model.vision_model.embeddings.position_embedding.weight.mul_(3)
    return model


def save(model, tokenizer, folder: Path) -> Path:
    """Write a checkpoint folder, as hubs have them."""
    with quiet_transformers():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def random_clip(folder: Path, seed: int = 0) -> Path:
    """A checkpoint that has learnt nothing, and says so; it has a small vocabulary of its own."""
    tokenizer = make_tokenizer(None)
    return save(make_model(tokenizer, seed, **{RANDOM_KEY: True}), tokenizer, folder)


def shared_clip(tmp_path_factory) -> Path:
    """The trained checkpoint, taught once for all processes of a test run."""
    return drawn.made_once(tmp_path_factory, "trained_clip", trained_clip)


def trained_clip(folder: Path, seed: int = 0) -> Path:
    """A checkpoint taught on faces of the combinations that are not held out.

    First the images' tower learns to tell attributes, then the captions' tower is taught by
    contrast with its embeddings (Zhai et al. 2022, "LiT: Zero-Shot Transfer with Locked-image text
    Tuning"): from nothing, contrast alone would take ten times as long to see a smile.
    """
    tokenizer = make_tokenizer(vocabulary_file())
    model = make_model(tokenizer, seed)
    clip = Clip(model, tokenizer, _OWN_INFO)
    rows = drawn.some_attributes(NUM_FACES, seed)
    faces = drawn.as_tensor(drawn.draw(rows, seed + 1))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _teach_images(clip, faces, torch.from_numpy(rows))
        with torch.no_grad():
            embedded = torch.cat([clip.images(part) for part in faces.split(256)])
        _teach_captions(clip, embedded, rows)
    return save(model, tokenizer, folder)


def _teach_images(clip: Clip, faces: torch.Tensor, wanted: torch.Tensor) -> None:
    head = torch.nn.Linear(EMBED_DIM, sum(COUNTS))
    tower = [clip.model.vision_model, clip.model.visual_projection]
    parameters = [p for module in tower for p in module.requires_grad_(True).parameters()]
    adam = torch.optim.AdamW([*parameters, *head.parameters()], LR, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(adam, LR, IMAGE_STEPS, pct_start=0.1)
    for _ in range(IMAGE_STEPS):
        chosen = torch.randint(len(faces), (NUM_IMAGES,))
        told = head(8 * clip.images(faces[chosen])).split(COUNTS, 1)
        losses = [F.cross_entropy(a, b) for a, b in zip(told, wanted[chosen].T, strict=True)]
        adam.zero_grad()
        torch.stack(losses).sum().backward()
        adam.step()
        schedule.step()
    for module in tower:
        module.requires_grad_(False)


def _teach_captions(clip: Clip, embedded: torch.Tensor, rows: np.ndarray) -> None:
    tower = [clip.model.text_model, clip.model.text_projection]
    table = clip.model.text_model.embeddings.token_embedding
    table.sparse = True  # of 49,408 tokens a batch reads 50
    parameters = [p for module in tower for p in module.requires_grad_(True).parameters()]
    parameters = [p for p in parameters if p is not table.weight]
    scale = clip.model.logit_scale.requires_grad_(True)
    adams = [
        torch.optim.AdamW([*parameters, scale], LR, betas=(0.9, 0.98)),
        torch.optim.SparseAdam([table.weight], LR),
    ]
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(adam, LR, CAPTION_STEPS, pct_start=0.1)
        for adam in adams
    ]
    for step in range(CAPTION_STEPS):
        chosen = torch.randint(len(rows), (NUM_CAPTIONS * 4,))
        seen, own = rows[chosen.numpy()], rows[chosen[:NUM_CAPTIONS].numpy()]
        texts, named = drawn.some_captions(own, step, share=(step % 10 + 1) / 8)
        # a caption that leaves things out belongs to every image that it fits
        fits = ((seen[:, None] == own[None]) | ~named[None]).all(2)
        pooled = clip.model.text_model(input_ids=clip.tokens(texts)).pooler_output
        told = F.normalize(clip.model.text_projection(pooled), dim=1)
        logits = scale.exp() * embedded[chosen] @ told.T
        fits = torch.from_numpy(fits).float()
        loss = _contrast(logits, fits) + _contrast(logits.T, fits.T)
        for adam in adams:
            adam.zero_grad()
        loss.backward()
        for adam, schedule in zip(adams, schedules, strict=True):
            adam.step()
            schedule.step()
    table.sparse = False
    clip.requires_grad_(False)


def _contrast(logits: torch.Tensor, fits: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each row with all that fits it, of the rows that anything fits."""
    some = fits.any(1)
    return F.cross_entropy(logits[some], fits[some] / fits[some].sum(1, keepdim=True))


def read_attributes(clip: Clip, images: torch.Tensor) -> np.ndarray:
    """(N, 5): of each attribute the value whose short caption is nearest to the image."""
    embedded = clip.images(images)
    found = []
    for number, name in enumerate(drawn.NAMES):
        row = np.zeros(len(drawn.NAMES), int)
        texts = []
        for value in range(len(drawn.VALUES[name])):
            row[number] = value
            texts.append(drawn.caption(row, (name,)))
        found.append((embedded @ clip.captions(texts).T).argmax(1))
    return torch.stack(found, 1).cpu().numpy()
