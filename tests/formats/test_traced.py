"""Graphs of torch.export and ONNX, against the images that sample draws, for every family."""

from __future__ import annotations

import itertools
import json
import math
import re

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from dinogen.families.abilities import fade
from dinogen.families.base import Condition, sample_in_parts
from dinogen.families.denoiser import Denoiser
from dinogen.families.registry import family_class
from dinogen.formats import traced
from dinogen.formats.traced import ExportError, write_onnx, write_torch_export
from dinogen.training.checkpointing.export import Generator
from tests.families.stored_latents import make_autoencoder
from tests.families.tiny import TINY, tiny_config

# What adds inputs or branches to a family's graph; without them it is a part of this one.
CLASSES = [
    *("family.num_classes=3", "family.guidance=2.0", "family.sample_steps=3"),
    "stages.0.resolution=8",
]
SIDE_4 = "family.attention_resolutions=[4]"
MORE = {
    "stylegan2_ada": ["family.num_classes=3", "family.truncation=0.7", "stages.0.resolution=8"],
    **dict.fromkeys(("ddpm-dit", "flow-dit"), CLASSES),
    **dict.fromkeys(("ddpm-repa", "flow-repa", "ddpm-latent", "flow-latent"), CLASSES[:-1]),
    **dict.fromkeys(("ddpm-rcg", "flow-rcg"), CLASSES[:-1]),
    "guided-dit": ["family.num_classes=3"],
    **{name: [*CLASSES, SIDE_4] for name in ("ddpm", "ddpm-edm", "ddpm-snr")},
    "flow": [
        *(*CLASSES, SIDE_4),
        "family.guidance_interval=[0.3, 0.9]",
    ],
}
TEXT = ["family.text={embed_dim: 6}", "clip.path=/none"]
CASES = {family: (family, MORE.get(family, [])) for family in TINY} | {"text": ("guided", TEXT)}
SEED = 5


def make_generator(family, overrides, tmp_path):
    """A generator whose every weight matters, faded in by half where it can be."""
    config = tiny_config(family, tmp_path / "data", tmp_path / "run", *overrides)
    torch.manual_seed(0)
    made = family_class(config.family)(config, config.stages[0], torch.device("cpu"))
    further = {name: made.networks[name] for name in made.ema_networks}
    for network in further.values():
        for value in network.eval().requires_grad_(False).parameters():
            value.add_(0.1 * torch.randn(value.shape))
    G = further.pop("G")
    for name, value in G.named_buffers():
        if name.endswith(("running_mean", "w_avg", "latent_scale.mean", "latent_scale.deviation")):
            value.add_(0.1 * torch.randn(value.shape))
    if isinstance(made, Denoiser) and made.latent is not None:
        made.latent._autoencoder = make_autoencoder()
    fade(made, {"G": G}, 0.3, fading=True)
    info = {"random_guide": False, "network": {"name": "G"}, "family": family}
    return Generator(G, info, made, further)


class Files:
    """One case, written in both formats."""

    def __init__(self, case, folder):
        self.case = case
        self.generator = make_generator(*CASES[case], folder)
        self.pt2, self.onnx = folder / "G.pt2", folder / "G.onnx"
        self.differences = [
            write_torch_export(self.generator, self.pt2),
            write_onnx(self.generator, self.onnx),
        ]
        extra = {"dinogen.json": ""}
        self.program = torch.export.load(self.pt2, extra_files=extra).module()
        self.session = onnxruntime.InferenceSession(self.onnx)
        self.infos = [
            json.loads(extra["dinogen.json"]),
            json.loads(self.session.get_modelmeta().custom_metadata_map["dinogen"]),
        ]

    def run_pt2(self, **inputs):
        return self.program(*(torch.as_tensor(value) for value in inputs.values())).numpy()

    def run_onnx(self, **inputs):
        return self.session.run(None, {k: np.asarray(v) for k, v in inputs.items()})[0]


@pytest.fixture(scope="module", params=CASES)
def files(request, tmp_path_factory):
    return Files(request.param, tmp_path_factory.mktemp(request.param))


def guided(run, facts, x, t, label):
    """What is predicted at one time, drawn to the class."""
    given = {"x": np.asarray(x, np.float32), "t": np.full(len(x), t)}
    with_class = run(**given, label=label)
    without = run(**given, label=np.full_like(label, facts["num_classes"]))
    return without + facts["guidance"] * (with_class - without)


def with_embedding(run, facts, embedding):
    """The same without the input ``embedding``; where there is no class, there is none either."""

    def of(x, t, label):
        null = np.float32(facts["embedding"]["null"])
        without = label[:, None] == facts["num_classes"]
        return run(x=x, t=t, embedding=np.where(without, null, embedding), label=label)

    return of


def bounded(facts, x):
    """Images in [-1, 1]; latents as they are."""
    return x if "latent" in facts else np.clip(x, -1, 1)


def decoded(facts, x, family):
    """Images of normalised latents, with what the file says of their scale."""
    mean, deviation = (np.float32(facts["latent"][name]) for name in ("mean", "deviation"))
    z = x * deviation[:, None, None] + mean[:, None, None]
    return family.latent.autoencoder.decode(torch.from_numpy(z)).numpy()


def walk_flow(run, facts, predicted, x, label):
    """Heun, or the midpoint, in numpy, with what the file says of its times."""
    assert predicted == "v"
    low, high = facts.get("guidance_interval", [0, 1])

    def v(x, time):
        inside = low <= 1 - time <= high
        own = facts if inside else facts | {"guidance": 1}
        return guided(run, own, x, np.float32(facts["time_scale"] * time), label)

    for now, then in itertools.pairwise(facts["times"]):
        first = v(x, now)
        if facts["sampler"] == "midpoint":
            x = x + (then - now) * v(x + (then - now) / 2 * first, (now + then) / 2)
            continue
        assert facts["sampler"] == "heun"
        reached = x + (then - now) * first
        x = reached if then == 0 else x + (then - now) / 2 * (first + v(reached, then))
    return bounded(facts, x)


def walk_edm(run, facts, predicted, x, label):
    """Karras et al. 2022, algorithm 1 without noise, in numpy, with the factors of the file."""
    assert predicted == "edm" and facts["sampler"] == "heun"
    sigmas = facts["sigmas"]

    def slope(x, number):
        c_in, c_noise, c_skip, c_out = (
            facts[name][number] for name in ("c_in", "c_noise", "c_skip", "c_out")
        )
        said = guided(run, facts, c_in * x, np.float32(c_noise), label)
        return (x - (c_skip * x + c_out * said)) / sigmas[number]

    x = sigmas[0] * x
    for number, (now, then) in enumerate(itertools.pairwise(sigmas)):
        first = slope(x, number)
        reached = x + (then - now) * first
        x = reached
        if then:
            x = reached + (then - now) / 2 * (slope(reached, number + 1) - first)
    return bounded(facts, x)


def walk(run, facts, predicted, x, label):
    """DDIM (Song et al. 2021, equation 12) in numpy, with what the file says of its schedule."""
    after = [*facts["alpha_bar"][1:], 1.0]
    for t, now, then in zip(facts["time_steps"], facts["alpha_bar"], after, strict=True):
        said = guided(run, facts, x, t, label)
        signal, noise = math.sqrt(now), math.sqrt(1 - now)
        assert predicted == "v"
        x0 = np.clip(signal * x - noise * said, -1, 1)
        x = math.sqrt(then) * x0 + math.sqrt(1 - then) * (x - signal * x0) / noise
    return x


@pytest.mark.parametrize("num", [1, 3])
@pytest.mark.parametrize("kind", ["pt2", "onnx"])
def test_a_graph_gives_the_images_of_sample(files, kind, num):
    run = getattr(files, f"run_{kind}")
    generator, graph = files.generator, files.infos[0]["graph"]
    family, networks, indices = generator.family, generator.networks, torch.arange(num)
    latents = family.latents(indices, SEED).numpy()
    label = np.arange(num) % 3
    expected = sample_in_parts(family, networks, num, SEED)
    if "embedding" in graph:
        latents, noise = np.split(latents, [-len(graph["embedding"]["mean"])], 1)
        latents = latents.reshape(num, *graph["inputs"]["x"]["shape"][1:])
        given = family.representation.generate(
            networks, torch.from_numpy(noise), torch.from_numpy(label)
        )
        run = with_embedding(run, graph, given.numpy())
    if files.case.startswith(("ddpm", "flow")):
        by = {"edm": walk_edm, "v": walk_flow if "times" in graph else walk}
        found = by[graph["output"]](run, graph, graph["output"], latents, label)
        if "latent" in graph:
            found = decoded(graph, found, family)
    elif files.case == "stylegan2_ada":
        found = run(z=latents, psi=np.float32(graph["psi"]), label=label)
        assert graph["psi"] == 0.7
    elif files.case == "guided-dit":
        found = run(z=latents, label=label, guidance=np.float32(graph["guidance"]))
        assert graph["guidance"] == 1.5 and graph["guidance_range"] == [1, 4]
    elif files.case == "text":
        texts = np.random.default_rng(0).standard_normal((num, 6), np.float32)
        found = run(z=latents, embedding=texts, guidance=np.float32(0))
        for guidance in (1.0, 2.5):
            given = run(z=latents, embedding=texts, guidance=np.float32(guidance))
            with torch.no_grad():
                images = family.sample(
                    networks, indices, SEED, Condition(torch.from_numpy(texts), guidance)
                )
            assert np.abs(given - images.numpy()).max() < 1e-5
            assert np.abs(given - found).max() > 1e-3
    else:
        found = run(z=latents)
    assert found.shape == expected.shape and found.dtype == np.float32
    # the walk of edm begins at 80 times the noise, which float32 knows to 1e-5
    within = 2e-4 if graph["output"] == "edm" else 1e-5
    assert np.abs(found - expected.numpy()).max() < within
    assert expected.std() > 1e-3  # not one colour


def test_the_same_is_told_in_both(files):
    first, second = files.infos
    assert first == second
    assert first.items() >= files.generator.info.items()
    names = [value.name for value in files.session.get_inputs()]
    assert names == list(first["graph"]["inputs"])
    assert [value.name for value in files.session.get_outputs()] == [first["graph"]["output"]]
    for given in files.session.get_inputs():
        kinds = {"float32": "tensor(float)", "int64": "tensor(int64)"}
        told = first["graph"]["inputs"][given.name]
        assert kinds[told["type"]] == given.type
        shape = ["N" if isinstance(size, str) else size for size in given.shape]
        assert shape == told["shape"]
    assert max(files.differences) < 1e-5


def test_a_file_tells_nothing_of_the_machine(files):
    onnx.checker.check_model(str(files.onnx))
    model = onnx.load(files.onnx)
    assert [(one.domain, one.version) for one in model.opset_import] == [("", traced.OPSET)]
    for path in (files.onnx, files.pt2):
        for word in (str(traced.__file__).rpartition("/formats")[0], "site-packages"):
            assert word.encode() not in path.read_bytes(), path.name


def test_a_graph_that_computes_something_else_is_not_written(tmp_path, monkeypatch):
    """torch.onnx ignores the divisor of avg_pool2d, by which nearest upsampling sums weights."""
    generator = make_generator("progressive_gan", [], tmp_path)
    out = tmp_path / "G.onnx"
    out.write_bytes(b"before")
    known = {op: to for op, to in traced._REWRITTEN.items() if to is not traced._pooled}
    monkeypatch.setattr(traced, "_REWRITTEN", known)
    with pytest.raises(ExportError, match=r"G.onnx: not written: .* differs .* by \d"):
        write_onnx(generator, out)
    assert out.read_bytes() == b"before"
    assert [path.name for path in tmp_path.iterdir()] == ["G.onnx"]


@pytest.mark.parametrize("wrong", [math.nan, 1e-3])
def test_the_difference_is_of_the_worst_value(tmp_path, wrong):
    generator = make_generator("dcgan", [], tmp_path)
    graph = traced._graph(generator)

    def run(inputs):
        images = generator.network(*inputs.values())
        if len(images) > 1:
            images[-1, 0, 0, 0] += wrong
        return images

    with pytest.raises(ExportError, match=r"differs"):
        traced.checked(graph, run, tmp_path / "G.onnx")
    assert traced.checked(graph, lambda inputs: generator.network(*inputs.values()), tmp_path) == 0


def test_the_same_generator_gives_the_same_bytes(tmp_path):
    generator = make_generator("dcgan", [], tmp_path)
    for write in (write_torch_export, write_onnx):
        both = []
        for name in ("one", "two"):
            write(generator, tmp_path / name)
            both.append((tmp_path / name).read_bytes())
        assert both[0] == both[1], write


def test_what_onnx_needs_is_named(tmp_path, monkeypatch):
    generator = make_generator("dcgan", [], tmp_path)
    with monkeypatch.context() as patched:
        patched.setitem(__import__("sys").modules, "onnxruntime", None)
        with pytest.raises(ExportError, match=re.escape("pip install 'dinogen[onnx]'")):
            write_onnx(generator, tmp_path / "G.onnx")
    monkeypatch.setattr(traced, "ONNX_LIMIT", 1000)
    with pytest.raises(ExportError, match=r"GiB of weights.*--format torch-export"):
        write_onnx(generator, tmp_path / "G.onnx")
    assert list(tmp_path.iterdir()) == []
