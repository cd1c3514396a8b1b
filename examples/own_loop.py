"""A training loop of your own: faces from shards, a frozen guide, and the drift loss.

    python examples/own_loop.py my.yaml generator.pt [STEPS]

Of my.yaml it reads `data.path` and `guide`; the faces may have been packed by anybody.
"""

import sys

import torch
from torch import nn
from torch.nn.functional import interpolate

import dinogen
from dinogen.losses.distributions import drift

SIDE, Z_DIM, BATCH = 8, 64, 64
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
config = dinogen.load_config(sys.argv[1])
data = dinogen.open_dataset(config.data.path)
guide = dinogen.load_guide(config.guide, device)  # the one that made the features in the shards
pixels = guide.input_size(SIDE)  # images of this side have a feature map of SIDE x SIDE

G = nn.Sequential(
    *(nn.Linear(Z_DIM, 128 * 4 * 4), nn.Unflatten(1, (128, 4, 4)), nn.ReLU()),
    *(nn.ConvTranspose2d(128, 64, 4, 2, 1), nn.ReLU()),  # 8x8
    *(nn.Conv2d(64, 3, 3, padding=1), nn.Tanh()),
).to(device)
optimizer = torch.optim.Adam(G.parameters(), lr=1e-3)

with data.stream(batch_size=BATCH, levels=[f"n{SIDE}"]) as stream:
    for step, batch in zip(range(int((sys.argv[3:] or [1000])[0])), stream, strict=False):
        real = batch["pyramid"][SIDE].float().to(device)  # (B, SIDE * SIDE, C), from the shards
        images = G(torch.randn(BATCH, Z_DIM, device=device))
        resized = interpolate(images, (pixels, pixels), mode="bicubic", antialias=True)
        generated = guide(resized).flatten(2).transpose(1, 2)  # the same, differentiable
        # One problem of B samples: all places of an image are one vector.
        loss, length = drift(generated.flatten(1)[None], real.flatten(1)[None], (0.02, 0.05, 0.2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        # The loss is scaled to stay near its start; the length says how far there is to go.
        print(f"step {step}: loss {loss.item():.4f}, length {length.item():.4f}")
torch.save(G.state_dict(), sys.argv[2])
