"""Pickles in the layout of NVlabs' StyleGAN2, and what their networks compute, the naive way.

The modules here have the names, attributes and tensors of stylegan2-ada-pytorch, and are written
by Python's own pickle in the form of its ``torch_utils.persistence``. Their forward is written from
the papers: zeros are inserted, padded, filtered and convolved one by one, sample by sample.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import pickle
import sys
import types
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SOURCE = "raise SystemExit('the source code of a pickle was run')"


def _reconstruct_persistent_obj(meta):
    raise AssertionError("a function that a pickle names was called")


class EasyDict(dict):
    def __setstate__(self, state):
        raise AssertionError("a class that a pickle names was used")


class Persistent(nn.Module):
    """A module that pickles as NVlabs' do: class by name, source code, attributes."""

    def __reduce__(self):
        meta = {
            "type": "class",
            "version": 6,
            "module_src": SOURCE,
            "class_name": type(self).__name__,
            "state": self.__dict__,
        }
        return _reconstruct_persistent_obj, (meta,), None


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """Their packages can be imported here, as Python's pickle needs to write names."""
    names = {
        "dnnlib": {},
        "dnnlib.util": {"EasyDict": EasyDict},
        "torch_utils": {},
        "torch_utils.persistence": {"_reconstruct_persistent_obj": _reconstruct_persistent_obj},
    }
    before = {name: sys.modules.get(name) for name in names}
    homes = (EasyDict.__module__, _reconstruct_persistent_obj.__module__)
    try:
        for name, content in names.items():
            module = types.ModuleType(name)
            vars(module).update(content)
            sys.modules[name] = module
        EasyDict.__module__ = "dnnlib.util"
        _reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
        yield
    finally:
        EasyDict.__module__, _reconstruct_persistent_obj.__module__ = homes
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def dumps(value, protocol: int = 4) -> bytes:
    """A pickle in which their modules bear their names."""
    with installed():
        return pickle.dumps(value, protocol)


# ---- layout --------------------------------------------------------------------------------------


def _filter() -> Tensor:
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
    return torch.outer(taps, taps) / 64


class FullyConnectedLayer(Persistent):
    def __init__(self, num_in, num_out, activation="linear", lr_multiplier=1, bias=0.0):
        super().__init__()
        self.activation = activation
        self.weight = nn.Parameter(torch.randn(num_out, num_in) / lr_multiplier)
        drawn = torch.randn(num_out) * 0.1 + bias
        self.bias = nn.Parameter(drawn / lr_multiplier)
        self.weight_gain = lr_multiplier / math.sqrt(num_in)
        self.bias_gain = lr_multiplier

    def forward(self, x):
        y = x @ (self.weight * self.weight_gain).T + self.bias * self.bias_gain
        return F.leaky_relu(y, 0.2) * math.sqrt(2) if self.activation == "lrelu" else y


class MappingNetwork(Persistent):
    def __init__(self, z_dim, c_dim, w_dim, num_layers=8, average=True):
        super().__init__()
        self.z_dim, self.c_dim, self.w_dim, self.num_layers = z_dim, c_dim, w_dim, num_layers
        sizes = [z_dim + (w_dim if c_dim else 0)] + [w_dim] * num_layers
        if c_dim:
            self.embed = FullyConnectedLayer(c_dim, w_dim)
        for i, (a, b) in enumerate(itertools.pairwise(sizes)):
            setattr(self, f"fc{i}", FullyConnectedLayer(a, b, "lrelu", 0.01))
        if average:
            self.register_buffer("w_avg", torch.randn(w_dim) * 0.3)

    def forward(self, z, c):
        parts = [z] if self.z_dim else []
        parts += [self.embed(c)] if self.c_dim else []
        x = torch.cat([p / (p.square().mean(1, keepdim=True) + 1e-8).sqrt() for p in parts], 1)
        for i in range(self.num_layers):
            x = getattr(self, f"fc{i}")(x)
        return x


class SynthesisLayer(Persistent):
    def __init__(self, num_in, num_out, w_dim, resolution, up=1):
        super().__init__()
        self.resolution, self.up = resolution, up
        self.use_noise, self.activation, self.conv_clamp = True, "lrelu", 256
        self.register_buffer("resample_filter", _filter())
        self.affine = FullyConnectedLayer(w_dim, num_in, bias=1.0)
        self.weight = nn.Parameter(torch.randn(num_out, num_in, 3, 3))
        self.register_buffer("noise_const", torch.randn(resolution, resolution))
        self.noise_strength = nn.Parameter(torch.randn(()) * 0.1)
        self.bias = nn.Parameter(torch.randn(num_out) * 0.1)

    def forward(self, x, w):
        y = modulated(x, self.weight, self.affine(w), self.up, True, self.resample_filter)
        y = y + self.noise_const * self.noise_strength + self.bias[:, None, None]
        return (F.leaky_relu(y, 0.2) * math.sqrt(2)).clamp(-256, 256)


class ToRGBLayer(Persistent):
    def __init__(self, num_in, w_dim):
        super().__init__()
        self.conv_clamp = 256
        self.affine = FullyConnectedLayer(w_dim, num_in, bias=1.0)
        self.weight = nn.Parameter(torch.randn(3, num_in, 1, 1))
        self.bias = nn.Parameter(torch.randn(3) * 0.1)
        self.weight_gain = 1 / math.sqrt(num_in)

    def forward(self, x, w):
        y = modulated(x, self.weight, self.affine(w) * self.weight_gain, 1, False, None)
        return (y + self.bias[:, None, None]).clamp(-256, 256)


class SynthesisBlock(Persistent):
    def __init__(self, num_in, num_out, w_dim, resolution, is_last, use_fp16):
        super().__init__()
        self.in_channels, self.resolution, self.is_last = num_in, resolution, is_last
        self.architecture, self.use_fp16 = "skip", use_fp16
        self.register_buffer("resample_filter", _filter())
        if num_in:
            self.conv0 = SynthesisLayer(num_in, num_out, w_dim, resolution, up=2)
        else:
            self.const = nn.Parameter(torch.randn(num_out, 4, 4))
        self.conv1 = SynthesisLayer(num_out, num_out, w_dim, resolution)
        self.torgb = ToRGBLayer(num_out, w_dim)

    def forward(self, x, image, w):
        if self.in_channels:
            x = self.conv0(x, w)
        else:
            x = self.const.expand(len(w), -1, -1, -1)
        x = self.conv1(x, w)
        rgb = self.torgb(x, w)
        if image is not None:
            rgb = rgb + filtered(zeros_between(image), 4 * self.resample_filter, (2, 1))
        return x, rgb


class SynthesisNetwork(Persistent):
    def __init__(self, w_dim, resolution, channels, num_fp16_res):
        super().__init__()
        self.w_dim, self.img_resolution, self.img_channels = w_dim, resolution, 3
        before = 0
        for size in sizes_up_to(resolution):
            half = size >= max(2 * resolution >> num_fp16_res, 8)
            block = SynthesisBlock(before, channels[size], w_dim, size, size == resolution, half)
            setattr(self, f"b{size}", block)
            before = channels[size]

    def forward(self, w):
        x = image = None
        for size in sizes_up_to(self.img_resolution):
            x, image = getattr(self, f"b{size}")(x, image, w)
        return image


class Generator(Persistent):
    def __init__(self, z_dim, c_dim, w_dim, resolution, channels, num_layers, num_fp16_res):
        super().__init__()
        self.z_dim, self.c_dim, self.w_dim = z_dim, c_dim, w_dim
        self.img_resolution, self.img_channels = resolution, 3
        self._init_kwargs = {"mapping_kwargs": EasyDict(num_layers=num_layers)}
        self.synthesis = SynthesisNetwork(w_dim, resolution, channels, num_fp16_res)
        self.mapping = MappingNetwork(z_dim, c_dim, w_dim, num_layers)

    def forward(self, z, c=None, psi=1.0):
        return self.synthesis(torch.lerp(self.mapping.w_avg, self.mapping(z, c), psi))


class Conv2dLayer(Persistent):
    def __init__(self, num_in, num_out, kernel, activation="lrelu", down=1, bias=True):
        super().__init__()
        self.activation, self.up, self.down, self.conv_clamp = activation, 1, down, 256
        self.register_buffer("resample_filter", _filter())
        self.weight = nn.Parameter(torch.randn(num_out, num_in, kernel, kernel))
        self.bias = nn.Parameter(torch.randn(num_out) * 0.1) if bias else None
        self.weight_gain = 1 / math.sqrt(num_in * kernel**2)

    def forward(self, x, gain=1.0):
        pad = self.weight.shape[2] // 2
        if self.down == 2:
            x = filtered(x, self.resample_filter, (pad + 1, pad + 1))
        else:
            x = F.pad(x, [pad] * 4)
        y = F.conv2d(x, self.weight * self.weight_gain)[:, :, :: self.down, :: self.down]
        if self.bias is None:
            return y * gain
        y = F.leaky_relu(y + self.bias[:, None, None], 0.2) * (math.sqrt(2) * gain)
        return y.clamp(-256 * gain, 256 * gain)


class DiscriminatorBlock(Persistent):
    def __init__(self, first, num_in, num_out, resolution, use_fp16):
        super().__init__()
        self.resolution, self.architecture, self.use_fp16 = resolution, "resnet", use_fp16
        self.register_buffer("resample_filter", _filter())
        if first:
            self.fromrgb = Conv2dLayer(3, num_in, 1)
        self.conv0 = Conv2dLayer(num_in, num_in, 3)
        self.conv1 = Conv2dLayer(num_in, num_out, 3, down=2)
        self.skip = Conv2dLayer(num_in, num_out, 1, "linear", 2, bias=False)

    def forward(self, x):
        x = self.fromrgb(x) if hasattr(self, "fromrgb") else x
        half = math.sqrt(0.5)
        return self.skip(x, half) + self.conv1(self.conv0(x), half)


class MinibatchStdLayer(Persistent):
    def __init__(self, group_size):
        super().__init__()
        self.group_size, self.num_channels = group_size, 1

    def forward(self, x):
        groups = x.reshape(min(self.group_size, len(x)), -1, *x.shape[1:])
        std = (groups.var(0, unbiased=False) + 1e-8).sqrt().mean((1, 2, 3))
        row = std.repeat(len(groups))[:, None, None, None].expand(-1, 1, *x.shape[2:])
        return torch.cat([x, row], 1)


class DiscriminatorEpilogue(Persistent):
    def __init__(self, num, cmap_dim, group_size):
        super().__init__()
        self.architecture = "resnet"
        self.mbstd = MinibatchStdLayer(group_size)
        self.conv = Conv2dLayer(num + 1, num, 3)
        self.fc = FullyConnectedLayer(16 * num, num, "lrelu")
        self.out = FullyConnectedLayer(num, cmap_dim or 1)

    def forward(self, x, cmap):
        y = self.out(self.fc(self.conv(self.mbstd(x)).flatten(1)))
        return y[:, 0] if cmap is None else (y * cmap).sum(1) / math.sqrt(y.shape[1])


class Discriminator(Persistent):
    def __init__(self, c_dim, resolution, channels, num_fp16_res, group_size=4):
        super().__init__()
        self.c_dim, self.img_resolution, self.img_channels = c_dim, resolution, 3
        for size in sizes_up_to(resolution)[:0:-1]:
            half = size >= max(2 * resolution >> num_fp16_res, 8)
            first = size == resolution
            block = DiscriminatorBlock(first, channels[size], channels[size // 2], size, half)
            setattr(self, f"b{size}", block)
        if c_dim:
            self.mapping = MappingNetwork(0, c_dim, channels[4], average=False)
        self.b4 = DiscriminatorEpilogue(channels[4], c_dim and channels[4], group_size)

    def forward(self, x, c=None):
        for size in sizes_up_to(self.img_resolution)[:0:-1]:
            x = getattr(self, f"b{size}")(x)
        return self.b4(x, self.mapping(None, c) if self.c_dim else None)


class AugmentPipe(Persistent):
    def __init__(self, p):
        super().__init__()
        self.register_buffer("p", torch.tensor(p))
        for name in ("xflip", "rotate90", "xint", "scale", "rotate", "aniso", "xfrac"):
            setattr(self, name, 1.0)
        for name in ("brightness", "contrast", "lumaflip", "hue", "saturation"):
            setattr(self, name, 0.5)
        self.imgfilter = self.noise = self.cutout = 0.0


def sizes_up_to(resolution: int) -> list[int]:
    return [4 << i for i in range(int(math.log2(resolution)) - 1)]


# ---- what layers compute, the naive way ----------------------------------------------------------


def zeros_between(x: Tensor) -> Tensor:
    y = x.new_zeros(*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3])
    y[:, :, ::2, ::2] = x
    return y


def filtered(x: Tensor, kernel: Tensor, pad: tuple[int, int]) -> Tensor:
    y = F.pad(x, [*pad, *pad])
    return F.conv2d(y, kernel.flip(0, 1).expand(x.shape[1], 1, -1, -1), groups=x.shape[1])


def modulated(x, weight, styles, up, demodulate, kernel) -> Tensor:
    results = []
    for one, style in zip(x, styles, strict=True):
        own = weight * style[None, :, None, None]
        if demodulate:
            own = own / (own.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
        pad = weight.shape[2] // 2
        if up == 2:
            # a convolution, which flips; torch's conv2d is a correlation
            y = F.conv2d(filtered(zeros_between(one[None]), 4 * kernel, (3, 2)), own.flip(2, 3))
        else:
            y = F.conv2d(F.pad(one[None], [pad] * 4), own)
        results.append(y)
    return torch.cat(results)


def snapshot(
    resolution: int,
    *,
    c_dim: int = 0,
    num_layers: int = 2,
    channel_base: int | None = None,
    channel_max: int = 8,
    num_fp16_res: int = 4,
    group_size: int = 4,
    z_dim: int = 6,
    w_dim: int = 5,
    p: float = 0.25,
    seed: int = 0,
) -> dict:
    """What stylegan2-ada-pytorch pickles, with random weights; 3 channels at the resolution."""
    base = 3 * resolution if channel_base is None else channel_base
    channels = {size: min(base // size, channel_max) for size in sizes_up_to(resolution)}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        G, G_ema = (
            Generator(z_dim, c_dim, w_dim, resolution, channels, num_layers, num_fp16_res)
            for _ in range(2)
        )
        D = Discriminator(c_dim, resolution, channels, num_fp16_res, group_size)
    for network in (G, D, G_ema):
        network.eval().requires_grad_(False)
    return {
        "G": G,
        "D": D,
        "G_ema": G_ema,
        "augment_pipe": AugmentPipe(p),
        "training_set_kwargs": EasyDict(path="faces.zip", resolution=resolution, xflip=True),
    }
