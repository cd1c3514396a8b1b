"""A training loop of your own: faces from shards, a frozen guide, and the drift loss.

    python examples/own_loop.py data/faces facebook/dinov2-small generator.pt [STEPS]

The faces are shards that `dinogen prepare` wrote with the same guide.
"""

import sys

import torch
from torch import nn

import dinogen

data_path, guide_path, out, *steps = sys.argv[1:]
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
data = dinogen.open_dataset(data_path)
guide = dinogen.load_guide("dinov2", device, path=guide_path)
guides = dinogen.GuideSet({"main": guide}, data, levels=["n8"])  # features of images of 8x8 pixels
drift, energy = dinogen.objectives.Drift(), dinogen.objectives.Energy()

G = nn.Sequential(
    *(nn.Linear(64, 128 * 4 * 4), nn.Unflatten(1, (128, 4, 4)), nn.ReLU()),
    *(nn.ConvTranspose2d(128, 64, 4, 2, 1), nn.ReLU()),  # 8x8
    *(nn.Conv2d(64, 3, 3, padding=1), nn.Tanh()),
).to(device)
optimizer = torch.optim.Adam(G.parameters(), lr=1e-3)

with data.stream(batch_size=64, levels=guides.levels) as stream:
    for step, batch in zip(range(int(steps[0]) if steps else 1000), stream, strict=False):
        generated = guides(G(torch.randn(64, 64, device=device)))  # {"n8": (64, 8 * 8, C)}
        real = guides.real(batch)  # the same, read from the shards
        loss = drift(generated, real)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        # Drift scales its loss to stay near its start; the energy distance shows the progress.
        print(f"step {step}: drift {loss.item():.4f}, energy {energy(generated, real).item():.4f}")
torch.save(G.state_dict(), out)
