"""Family `tiny_gan`: two small convolutional networks and the hinge loss."""

from pydantic import Field
from torch import nn

from dinogen.config import Section
from dinogen.distributed import rng
from dinogen.families.base import Family, Inputs, Phase
from dinogen.losses.adversarial import hinge_d, hinge_g


def generator(resolution, z_dim, width):
    layers = [nn.Linear(z_dim, width * 16), nn.Unflatten(1, (width, 4, 4)), nn.ReLU()]
    for _ in range((resolution // 4).bit_length() - 1):
        layers += [nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(width, 3, 3, padding=1), nn.Tanh())


def discriminator(resolution, width):
    layers = [nn.Conv2d(3, width, 3, padding=1), nn.LeakyReLU(0.2)]
    for _ in range((resolution // 4).bit_length() - 1):
        layers += [nn.Conv2d(width, width, 4, 2, padding=1), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * 16, 1))


class TinyGan(Family):
    class Options(Section):
        z_dim: int = Field(64, ge=1, description="size of the latent")
        width: int = Field(32, ge=1, description="channels of both networks")

    def __init__(self, config, stage, device):
        super().__init__(config, stage, device)
        self.options = self.Options(**config.family.options)
        self.G = generator(stage.resolution, self.options.z_dim, self.options.width).to(device)
        self.D = discriminator(stage.resolution, self.options.width).to(device)

    @property
    def networks(self):
        return {"G": self.G, "D": self.D}

    @property
    def phases(self):
        return (Phase("D", "D", self.d_losses), Phase("G", "G", self.g_losses))

    @property
    def inputs(self):
        return Inputs(image_size=self.stage.resolution)

    def z(self, purpose, positions, seed):
        return rng.normal(seed, purpose, positions, (self.options.z_dim,), self.device)

    def d_losses(self, batch):
        fake = self.D(self.G(self.z("z/D", batch["position"], self.config.seed)))
        real = self.D(batch["image"])
        return {"hinge": hinge_d(real, fake)}, {"real": real.mean(), "fake": fake.mean()}

    def g_losses(self, batch):
        fake = self.D(self.G(self.z("z/G", batch["position"], self.config.seed)))
        return {"hinge": hinge_g(fake)}, {}

    def latents(self, indices, seed):
        return self.z("sample", indices, seed)
