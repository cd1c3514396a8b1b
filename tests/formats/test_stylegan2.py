"""Pickles of NVlabs' StyleGAN2 as runs: the same images and logits, and what is refused."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from dinogen.distributed import process_group
from dinogen.errors import UserError
from dinogen.formats.pickles import read_pickle
from dinogen.formats.runs import FormatError, write_run
from dinogen.formats.stylegan2 import read
from dinogen.training.checkpointing.snapshot import load_snapshot
from dinogen.training.logging.artifacts import save_samples
from dinogen.training.run import train
from dinogen.training.state import StageState
from tests.families.tiny import pack_discs, tiny_config
from tests.formats import nvlabs


@pytest.fixture(autouse=True)
def no_gradients():
    process_group.use_device("cpu")
    with torch.no_grad():
        yield


def written(folder, data, name="network-snapshot-000200.pkl", protocol=4):
    path = folder / name
    path.write_bytes(nvlabs.dumps(data, protocol))
    return path


def imported(folder, data):
    """The networks of a run that a pickle was imported as: G, its average, D."""
    out = folder / "imported"
    write_run(out, read(written(folder, data)))
    found = load_snapshot(out)
    networks = dict(found.family.networks)
    for name, network in networks.items():
        network.load_state_dict(found.checkpoint.tensors(name))
    return networks["G"], found.ema.networks["G"], networks["D"], found


def assert_near(ours, theirs):
    scale = max(1.0, theirs.abs().max().item())
    assert (ours - theirs).abs().max() < 1e-5 * scale


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("resolution", [8, 16, 32, 64, 128, 256])
def test_images_and_logits_are_those_of_the_naive_way(tmp_path, resolution):
    data = nvlabs.snapshot(resolution)
    G, average, D, found = imported(tmp_path, data)
    assert found.resolution == resolution
    z, images = normal(3, 6), normal(3, 3, resolution, resolution)
    assert_near(G(z), data["G"](z))
    assert_near(average(z), data["G_ema"](z))
    assert_near(average(z, psi=0.6), data["G_ema"](z, psi=0.6))
    assert_near(D(images), data["D"](images))


def test_labels_deeper_mappings_and_the_older_form_of_pickles(tmp_path):
    data = nvlabs.snapshot(16, c_dim=3, num_layers=8, group_size=2)
    G, average, D, found = imported(tmp_path, data)
    assert found.family.options.num_classes == 3
    z, label = normal(2, 6), torch.tensor([2, 0])
    images, c = normal(2, 3, 16, 16), F.one_hot(label, 3).float()
    assert_near(G(z, label), data["G"](z, c))
    assert_near(average(z, label), data["G_ema"](z, c))
    assert_near(D(images, label), data["D"](images, c))
    older = written(tmp_path, data, "older.pkl", protocol=3)
    again = read(older)
    assert torch.equal(again.networks["D"]["logit.weight"], D.logit.weight)


def test_the_run_says_where_it_is_from(tmp_path):
    *_, D, found = imported(tmp_path, nvlabs.snapshot(32, p=0.25))
    assert found.nimg == 200_000
    facts = found.checkpoint.state["facts"]["imported"]
    assert facts["file"] == "network-snapshot-000200.pkl"
    assert facts["kind"] == "stylegan2"
    assert len(facts["sha256"]) == 64
    options = found.family.options
    assert (options.channel_base, options.channel_max, options.num_half) == (96, 8, 3)
    assert (options.group_size, options.num_mapping_layers) == (4, 2)
    assert (options.ada_blit, options.ada_color, options.ada_filter) == (1.0, 0.5, 0.0)
    assert D.ada.p == 0.25


# What the authors' configurations set at the largest size that each is for: channels at R are
# base / R, at most 512. Not `cifar`: its D is `orig`.
@pytest.mark.parametrize(
    ("resolution", "base", "num_layers", "group_size"),
    [(256, 16384, 8, 8), (64, 16384, 2, 4), (128, 32768, 8, 4)],
    ids=["paper256", "auto", "stylegan2"],
)
def test_options_express_the_configurations_of_the_authors(
    tmp_path, resolution, base, num_layers, group_size
):
    # the rule of the channels, at a 64th of their number
    data = nvlabs.snapshot(
        resolution,
        channel_base=base // 64,
        channel_max=8,
        num_layers=num_layers,
        group_size=group_size,
    )
    found = read(written(tmp_path, data))
    write_run(tmp_path / "run", found)
    sizes = (found.family["num_mapping_layers"], found.family["group_size"])
    assert sizes == (num_layers, group_size)
    ours = [min(found.family["channel_max"], found.family["channel_base"] // r) for r in (4, 64)]
    assert ours == [min(8, base // 64 // r) for r in (4, 64)]


def changed(name, value):
    """A snapshot in which one attribute is another: ``D.b16.architecture``."""
    data = nvlabs.snapshot(16)
    *parts, last = name.split(".")
    target = data[parts[0]]
    for part in parts[1:]:
        target = getattr(target, part)
    setattr(target, last, value)
    return data


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("D.b16.architecture", "orig", r"D\.b16 has architecture orig: .* has resnet alone"),
        ("G_ema.synthesis.b8.architecture", "resnet", r"G_ema\.synthesis\.b8 has architecture"),
        ("G.synthesis.b8.conv0.conv_clamp", 64, r"has conv_clamp 64: .* has 256\.0 alone"),
        ("D.b16.conv0.activation", "relu", "has activation relu"),
        ("D.b8.skip.resample_filter", torch.eye(4) / 4, "another resample_filter"),
        ("D.b4.mbstd.num_channels", 2, "has num_channels 2"),
        ("D.b4.mbstd.group_size", None, "has no number group_size"),
        ("G.synthesis.b4.conv1.use_noise", False, "has no noise input"),
        ("G.mapping.fc0.bias_gain", 0.1, r"has bias_gain 0\.1"),
        ("G.mapping.num_layers", 9, "for 9 layers"),
        ("G.mapping.num_layers", 1, "D does not fit|does not fit our network"),
        ("G.mapping.c_dim", 2, "has no module embed"),
        ("G.synthesis.b8.torgb.weight", torch.nn.Parameter(torch.zeros(1, 6, 1, 1)), "of shape"),
        ("G.mapping.w_avg", torch.full((5,), torch.nan), "mapping.w_avg|w_avg is not finite"),
    ],
)
def test_what_our_options_lack_is_refused_by_name(tmp_path, name, value, message):
    path = written(tmp_path, changed(name, value))
    with pytest.raises(UserError, match=message) as error:
        write_run(tmp_path / "run", read(path))
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name]


def test_other_networks_are_refused(tmp_path):
    data = nvlabs.snapshot(16)
    with pytest.raises(FormatError, match="holds no network G_ema"):
        read(written(tmp_path, {"state_dict": {}}))
    with pytest.raises(FormatError, match="holds no network G_ema"):
        read(written(tmp_path, [1, 2]))
    data["G_ema"].synthesis._modules = {"L0_36_512": data["G_ema"].synthesis.b4}
    with pytest.raises(FormatError, match="it is no StyleGAN2"):
        read(written(tmp_path, data))
    with pytest.raises(FormatError, match="D has resolution 8 and G_ema 16"):
        read(written(tmp_path, nvlabs.snapshot(16) | {"D": nvlabs.snapshot(8)["D"]}))
    uneven = nvlabs.snapshot(16)["G_ema"]
    uneven.synthesis = nvlabs.SynthesisNetwork(5, 16, {4: 8, 8: 2, 16: 6}, 0)
    with pytest.raises(FormatError, match=r"channels \(8 at 4, 2 at 8, 6 at 16\) do not halve"):
        read(written(tmp_path, {"G_ema": uneven}))


def test_a_file_with_the_average_alone_is_said_to_be_that(tmp_path, caplog):
    data = nvlabs.snapshot(16)
    path = written(tmp_path, {"G_ema": data["G_ema"], "G": None, "D": None}, "ffhq.pkl")
    write_run(tmp_path / "run", read(path))
    said = caplog.text
    assert "holds no G: training starts from the average" in said
    assert "holds no D: it is INITIALISED, not imported" in said
    assert "does not say how many images" in said
    found = load_snapshot(tmp_path / "run")
    assert found.nimg == 0
    z = normal(2, 6)
    assert_near(found.ema.networks["G"](z), data["G_ema"](z))


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    weights = read(written(tmp_path, nvlabs.snapshot(8)))
    (tmp_path / "run").mkdir()
    write_run(tmp_path / "run", weights)  # empty
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(FormatError, match="exists already"):
        write_run(tmp_path / "run", weights)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    weights = read(written(tmp_path, nvlabs.snapshot(8)))
    monkeypatch.setattr("dinogen.formats.runs.write_text", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_run(tmp_path / "run", weights)
    assert [path.name for path in tmp_path.iterdir()] == [weights.source.name]


# ---- transfer ------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path):
    """A run that was imported at 16x16, and data to train on."""
    out = tmp_path / "imported"
    write_run(out, read(written(tmp_path, nvlabs.snapshot(16, z_dim=8, w_dim=8))))
    pack_discs(tmp_path / "data")
    return out


def transfer(source, *overrides):
    options = load_snapshot(source).family.options
    sizes = [f"family.{key}={getattr(options, key)}" for key in ("channel_base", "channel_max")]
    return tiny_config(
        "stylegan2_ada",
        source.parent / "data",
        source.parent / "transfer",
        f"init_from={source}",
        *sizes,
        "ema.rampup=null",
        *overrides,
    )


def test_a_transfer_run_begins_where_the_weights_stood(source):
    found = load_snapshot(source)
    state = StageState(transfer(source), 0)
    for name in ("G", "D"):
        given = found.checkpoint.tensors(name)
        ours = state.family.networks[name].state_dict()
        assert given.keys() == ours.keys()
        assert all(torch.equal(given[key], ours[key]) for key in given)
    assert torch.allclose(state.sample(4), found.sample(4, seed=0), atol=1e-6)
    assert state.family.D.ada.p == 0.25
    assert state.progress.nimg == 0


def test_its_first_grid_is_drawn_and_equals_that_of_the_source(source, tmp_path):
    with torch.enable_grad():
        config = transfer(source)
        train(config)
    grids = sorted((config.run / "16x16" / "samples").iterdir())
    assert [grid.stem for grid in grids] == ["000000000", "000000032"]
    save_samples(load_snapshot(source).sample(4, seed=0), tmp_path / "expected.png")
    first, last = (np.asarray(Image.open(path), dtype=int) for path in grids)
    assert abs(first - np.asarray(Image.open(tmp_path / "expected.png"), dtype=int)).max() <= 1
    assert abs(first - last).max() > 1


def test_averages_that_were_loaded_are_kept_without_a_ramp_up(source):
    """With one, the first step would replace them by the weights of that step."""
    given = load_snapshot(source).checkpoint.tensors("G.ema")["synthesis.blocks.4.const"]
    moved = {}
    for rampup in ("null", "0.05"):
        run = source.parent / f"rampup_{rampup}"
        with torch.enable_grad():
            config = transfer(source, f"run={run}", f"ema.rampup={rampup}")
            train(config)
        learnt = load_snapshot(run).checkpoint.tensors("G.ema")["synthesis.blocks.4.const"]
        moved[rampup] = (learnt - given).abs().max().item()
    assert moved["null"] < 0.01 < moved["0.05"]


def test_what_is_read_is_inert(tmp_path):
    """Their classes and functions raise where they are used, and so does their source code."""
    data = read_pickle(written(tmp_path, nvlabs.snapshot(8)))
    assert data["G"].name == "Generator"
    assert data["training_set_kwargs"] == {"path": "faces.zip", "resolution": 8, "xflip": True}
