"""Draw images from a run, or from a file that `dinogen export` wrote.

python examples/draw.py runs/first drawn
python examples/draw.py first.safetensors drawn
"""

import sys
from pathlib import Path

from PIL import Image

import dinogen

source, out = Path(sys.argv[1]), Path(sys.argv[2])
generator = dinogen.load_generator(source)
images = generator.sample(16, seed=0)  # (16, 3, R, R) in [-1, 1]; image i depends on i and seed
out.mkdir(parents=True, exist_ok=True)
for number, image in enumerate(images):
    pixels = (image * 127.5 + 127.5).round().clamp(0, 255).byte()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(out / f"{number:05d}.png")
print(f"{len(images)} images of {images.shape[-1]} pixels in {out}")
