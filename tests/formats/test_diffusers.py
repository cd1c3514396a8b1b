"""Folders of diffusers against diffusers itself: both ways, its pipelines, and what is refused."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from dinogen import hub
from dinogen._torchvision import ensure_torchvision
from dinogen.config import ConfigError
from dinogen.distributed import rng
from dinogen.formats.diffusers import fetch_folder, read
from dinogen.formats.export import export
from dinogen.formats.runs import FormatError, write_run
from dinogen.training.checkpointing.checkpoint import load_checkpoint
from dinogen.training.checkpointing.export import load_generator
from dinogen.training.checkpointing.snapshot import load_snapshot
from launch.cli.main import app
from tests.formats.unet_runs import RESOLUTION, disturbed, inputs, random_run, unet_with
from tests.hub_server import hub_server, use_hub

ensure_torchvision()
import diffusers  # noqa: E402 - torchvision comes first
from diffusers import (  # noqa: E402
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    UNet2DModel,
)

TINY = {
    "sample_size": RESOLUTION,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 4,
}
BY_BLOCK = {
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "downsample_type": "resnet",
    "upsample_type": "resnet",
}
MODELS = {
    "defaults": {},
    "of Ho et al.": {
        "attention_head_dim": None,
        "freq_shift": 1,
        "flip_sin_to_cos": False,
        "downsample_padding": 0,
        "norm_eps": 1e-6,
    },
    "resampling blocks": BY_BLOCK | {"dropout": 0.1},
    "scales": BY_BLOCK | {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 4},
    "no norm in the middle": {"resnet_time_scale_shift": "scale_shift"},
    "classes": {"num_class_embeds": 5, "layers_per_block": 2},
    "three levels": {
        "block_out_channels": (16, 16, 48),
        "down_block_types": ("AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D"),
        "norm_num_groups": 8,
    },
    "learnt variance": {"out_channels": 6},
}


def saved(folder, *, scheduler=None, **more):
    """A model with random weights, and the folder of a pipeline around it."""
    model = disturbed(UNet2DModel(**TINY | more))
    DDPMPipeline(model, scheduler or DDPMScheduler()).save_pretrained(folder)
    return model


def change(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_model_read_computes_what_diffusers_does(name, tmp_path):
    model = saved(tmp_path / "theirs", **MODELS[name])
    x, t = inputs()
    label = torch.tensor([0, 3, 4]) if name == "classes" else None
    theirs = model(x, t, label).sample[:, :3]
    ours = unet_with(read(tmp_path / "theirs"))(x, t, label)
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_folder_of_the_time_before_attention_was_renamed(tmp_path):
    model = saved(tmp_path / "new")
    old = tmp_path / "old"
    old.mkdir()
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, tensor in model.state_dict().items():
        for now, then in names.items():
            name = name.replace(f".{now}.", f".{then}.")
        tensors[name] = tensor
    torch.save(tensors, old / "diffusion_pytorch_model.bin")
    for path in ("unet/config.json", "scheduler/scheduler_config.json"):
        (old / path.rpartition("/")[2]).write_text((tmp_path / "new" / path).read_text())
    ours = unet_with(read(old))
    torch.testing.assert_close(ours(*inputs()), model(*inputs()).sample, rtol=0, atol=1e-5)


VARIANTS = {
    "ours": {},
    "classes": {"num_classes": 3},
    "x0, by ancestral sampling": {"prediction": "x0", "sampler": "ddpm", "schedule": "linear"},
    "one head": {"unet": {"norm_groups": 4, "num_heads": 1, "last_frequency": "exact"}},
    "other": {
        "unet": {
            "norm_groups": 8,
            "scale": False,
            "resampling": "block",
            "norm_eps": 1e-6,
        }
    },
    "TensorFlow": {"unet": {"norm_groups": 4, "downsample_padding": "end"}},
    "no norm in the middle": {"unet": {"norm_groups": 4, "middle_norm": False}},
    "32 groups": {
        "unet": None,
        "channel_multipliers": [1],
        "base_channels": 128,
        "attention_resolutions": [8],
    },
}


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_ours_to_diffusers_and_back(name, tmp_path):
    more = VARIANTS[name]
    run = random_run(tmp_path / "run", **more)
    export(run, tmp_path / "theirs", "diffusers")
    model = UNet2DModel.from_pretrained(tmp_path / "theirs" / "unet").eval()
    generator = load_generator(run)
    x, t = inputs()
    label = torch.tensor([0, 1, 3]) if "num_classes" in more else None
    ours = generator.network(x, t, label)
    assert ours.std() > 0.1
    torch.testing.assert_close(model(x, t, label).sample, ours, rtol=0, atol=1e-5)

    back = read(tmp_path / "theirs")
    assert dict(back.family) == {"name": "ddpm"} | generator.family.config.family.options
    state = generator.network.state_dict()
    for networks in (back.networks, back.averages):
        assert networks["G"].keys() == state.keys()
        assert all(torch.equal(networks["G"][key], state[key]) for key in state)
    write_run(tmp_path / "again", back)
    again, first = load_snapshot(tmp_path / "again"), load_snapshot(run)
    assert torch.equal(again.sample(2, 0), first.sample(2, 0))


def test_what_diffusers_saved_again_comes_back_bitwise(tmp_path):
    run = random_run(tmp_path / "run")
    export(run, tmp_path / "theirs", "diffusers")
    DDIMPipeline.from_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "dinogen.json").exists()
    state, back = load_generator(run).network.state_dict(), read(tmp_path / "saved")
    assert all(torch.equal(back.networks["G"][key], state[key]) for key in state)
    assert back.family["prediction"] == "v" and back.family["schedule"] == "cosine"


def test_options_beside_a_model_that_was_changed_are_not_taken(tmp_path):
    export(random_run(tmp_path / "run", dropout=0.2), tmp_path / "theirs", "diffusers")
    assert read(tmp_path / "theirs").family["dropout"] == 0.2
    change(tmp_path / "theirs" / "unet" / "config.json", norm_eps=1e-3)
    assert read(tmp_path / "theirs").family["unet"]["norm_eps"] == 1e-3


def drawn_from(monkeypatch, *modules):
    """Makes diffusers take these numbers in place of its own, in turn; it gives the list."""
    numbers = []
    for module in modules:
        monkeypatch.setattr(module, "randn_tensor", lambda *a, **k: numbers.pop(0))
    return numbers


@pytest.mark.parametrize("num_steps", [10, 100, 1000])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
def test_its_ddim_pipeline_draws_our_images(prediction, schedule, num_steps, tmp_path, monkeypatch):
    run = random_run(
        tmp_path / "run", prediction=prediction, schedule=schedule, num_steps=num_steps
    )
    export(run, tmp_path / "theirs", "diffusers")
    pipeline = DDIMPipeline.from_pretrained(tmp_path / "theirs")
    pipeline.set_progress_bar_config(disable=True)
    snapshot = load_snapshot(run)
    numbers = drawn_from(monkeypatch, diffusers.pipelines.ddim.pipeline_ddim)
    numbers.append(snapshot.family.latents(torch.arange(2), 0))
    theirs = pipeline(
        2, num_inference_steps=10, use_clipped_model_output=True, output_type="np"
    ).images
    ours = snapshot.sample(2, 0).permute(0, 2, 3, 1) / 2 + 0.5
    assert ours.std() > 0.1
    torch.testing.assert_close(torch.from_numpy(theirs), ours, rtol=0, atol=1e-4)


def test_its_ddpm_pipeline_draws_our_images(tmp_path, monkeypatch):
    run = random_run(tmp_path / "run", sampler="ddpm", schedule="linear", prediction="epsilon")
    export(run, tmp_path / "theirs", "diffusers")
    pipeline = DDPMPipeline.from_pretrained(tmp_path / "theirs")
    pipeline.set_progress_bar_config(disable=True)
    snapshot = load_snapshot(run)
    family, indices = snapshot.family, torch.arange(2)
    numbers = drawn_from(
        monkeypatch,
        diffusers.pipelines.ddpm.pipeline_ddpm,
        diffusers.schedulers.scheduling_ddpm,
    )
    numbers.append(family.latents(indices, 0))
    # the last, at time step 9, has a variance of 1e-20
    numbers += [rng.normal(0, f"sample/{t}", indices, (3, 8, 8)) for t in range(99, 0, -10)]
    theirs = pipeline(2, num_inference_steps=10, output_type="np").images
    ours = snapshot.sample(2, 0).permute(0, 2, 3, 1) / 2 + 0.5
    assert not numbers
    torch.testing.assert_close(torch.from_numpy(theirs), ours.clamp(0, 1), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("scheduler", "family"),
    [
        (DDPMScheduler(), {"schedule": "linear", "prediction": "epsilon", "num_steps": 1000}),
        (
            DDIMScheduler(200, 5e-4, 0.1, prediction_type="v_prediction"),
            {"schedule": "linear", "prediction": "v", "num_steps": 200},
        ),
        (
            DDIMScheduler(50, beta_schedule="squaredcos_cap_v2", prediction_type="sample"),
            {"schedule": "cosine", "prediction": "x0", "num_steps": 50, "sample_steps": 50},
        ),
    ],
)
def test_what_schedulers_mean(scheduler, family, tmp_path):
    saved(tmp_path, scheduler=scheduler)
    found = read(tmp_path).family
    assert family.items() <= found.items()
    assert found.get("sampler", "ddim") == "ddim"


def test_a_model_without_scheduler_needs_to_be_told(tmp_path):
    saved(tmp_path)
    (tmp_path / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(FormatError, match="--schedule and --prediction"):
        read(tmp_path)
    with pytest.raises(FormatError, match="--schedule 'foo': give linear or cosine"):
        read(tmp_path, schedule="foo", prediction="v")
    with pytest.raises(FormatError, match="--prediction 'sample': give epsilon or v or x0"):
        read(tmp_path, schedule="linear", prediction="sample")
    found = read(tmp_path, schedule="cosine", prediction="v").family
    assert (found["schedule"], found["prediction"], found["num_steps"]) == ("cosine", "v", 1000)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("unet", {"_class_name": "UNet2DConditionModel"}, "UNet2DConditionModel.*only UNet2DModel"),
        ("unet", {"time_embedding_type": "fourier"}, "time_embedding_type 'fourier'"),
        ("unet", {"sample_size": [8, 16]}, "sample_size.*square"),
        ("unet", {"sample_size": None}, "--image-size"),
        ("unet", {"block_out_channels": [16, 24]}, "24 is no multiple"),
        ("unet", {"down_block_types": ["SkipDownBlock2D"] * 2}, "SkipDownBlock2D is not known"),
        ("unet", {"up_block_types": ["UpBlock2D"] * 2}, "both ways or on neither"),
        ("unet", {"attention_head_dim": 6}, "head_channels 6 do not divide"),
        ("unet", {"layers_per_block": 2}, "is missing"),
        *(
            ("unet", {key: value}, f"config.json: {key} .*: is not ")
            for key, value in [
                ("block_out_channels", []),
                ("block_out_channels", 16),
                ("up_block_types", None),
                ("down_block_types", [1]),
                ("sample_size", [[8], [8]]),
                ("layers_per_block", True),
                ("num_class_embeds", "a"),
                ("attn_norm_num_groups", "a"),
                ("downsample_type", ["conv"]),
                ("norm_eps", "x"),
                ("dropout", None),
            ]
        ),
        *(
            ("scheduler", {key: value}, f"scheduler_config.json: {key} .*: is not ")
            for key, value in [
                ("num_train_timesteps", None),
                ("num_train_timesteps", "x"),
                ("beta_start", "x"),
                ("trained_betas", "x"),
                ("trained_betas", [[1]]),
                ("beta_schedule", ["linear"]),
                ("prediction_type", ["epsilon"]),
            ]
        ),
        ("unet", {"block_out_channels": [16]}, "there are 2 blocks down and up"),
        ("scheduler", {"beta_start": 2e-4}, "beta_schedule 'linear' of .*not known here"),
        ("scheduler", {"beta_schedule": "scaled_linear"}, "not known here"),
        ("scheduler", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
        ("scheduler", {"prediction_type": "flow"}, "prediction_type 'flow'"),
    ],
)
def test_what_cannot_be_read_is_named(file, changes, message, tmp_path):
    saved(tmp_path, scheduler=DDPMScheduler(1000))
    names = {"unet": "config.json", "scheduler": "scheduler_config.json"}
    change(tmp_path / file / names[file], **changes)
    with pytest.raises(FormatError, match=message):
        read(tmp_path)


def test_folders_that_are_none(tmp_path):
    with pytest.raises(FormatError, match=r"config\.json: there is no such file"):
        read(tmp_path)
    with pytest.raises(FormatError, match="is no folder"):
        read(tmp_path / "nowhere")
    saved(tmp_path)
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(FormatError, match="is it cut off"):
        read(tmp_path)
    weights.unlink()
    with pytest.raises(FormatError, match=r"neither .*\.safetensors nor .*\.bin"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"unet": None}, "one number of groups for all norms, .* 4 to 16"),
        ({"unet": {"norm_groups": 4, "time_scale": 0.25}}, "cannot scale time steps"),
        (
            {
                "unet": {"norm_groups": 4, "num_heads": 2},
                "attention_resolutions": [8, 4],
            },
            "num_heads 2 they have 8, 16",
        ),
    ],
)
def test_what_diffusers_has_no_word_for_is_refused(more, message, tmp_path):
    run = random_run(tmp_path / "run", **more)
    with pytest.raises(FormatError, match=message):
        export(run, tmp_path / "theirs", "diffusers")
    assert not (tmp_path / "theirs").exists()


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    run = random_run(tmp_path / "run")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "mine").write_text("")
    with pytest.raises(FormatError, match="exists already"):
        export(run, tmp_path / "theirs", "diffusers")
    assert [path.name for path in (tmp_path / "theirs").iterdir()] == ["mine"]
    with pytest.raises(ConfigError, match="writes a folder"):
        export(run, tmp_path / "G.safetensors", "diffusers")


def test_what_is_lost_is_said(tmp_path, caplog):
    caplog.set_level(logging.INFO, "dinogen")
    run = random_run(tmp_path / "run", num_classes=3, sample_steps=30)
    export(run, tmp_path / "theirs", "diffusers")
    assert "30 sampling steps do not divide 100" in caplog.text
    assert "label 3 means no class" in caplog.text
    saved(tmp_path / "other", out_channels=6, num_class_embeds=4)
    write_run(tmp_path / "read", read(tmp_path / "other"))
    assert "DROPPED" in caplog.text and "guidance other than 1" in caplog.text
    (folder,) = (tmp_path / "read").glob("*/checkpoints/*")
    facts = load_checkpoint(folder).state["facts"]["imported"]
    assert facts["kind"] == "diffusers" and facts["learnt_variance"]
    rows = load_file(folder / "G.safetensors")["label.weight"]
    assert torch.equal(rows[4], rows[:4].mean(0))


def test_a_repository_of_the_hub_is_read_as_its_folder(tmp_path, monkeypatch):
    """Of the weights only safetensors are downloaded, and the run names its commit."""
    saved(tmp_path / "model")
    files = {
        str(path.relative_to(tmp_path / "model")): path.read_bytes()
        for path in (tmp_path / "model").rglob("*")
        if path.is_file()
    }
    runs = [tmp_path / "local", tmp_path / "remote"]
    with hub_server() as server:
        use_hub(monkeypatch, server, tmp_path / "home")
        server.add("someone/cats", files | {"unet/diffusion_pytorch_model.bin": b"pickle"})
        (repository,) = server.repositories.values()
        commit = repository.branches["main"]
        for source, run in zip((str(tmp_path / "model"), "hf://someone/cats"), runs, strict=True):
            done = CliRunner().invoke(app, ["import", "diffusers", source, str(run)])
            assert done.exit_code == 0, done.output
    assert f"hf://someone/cats@{commit}" in done.output
    assert not list((tmp_path / "home").rglob("*.bin"))
    one, other = (load_generator(run).network.state_dict() for run in runs)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_repository_of_pickles_alone(tmp_path, monkeypatch):
    saved(tmp_path / "model")
    weights = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    files = {
        str(path.relative_to(tmp_path / "model")): path.read_bytes()
        for path in (tmp_path / "model").rglob("*")
        if path.is_file()
    }
    with hub_server() as server:
        use_hub(monkeypatch, server, tmp_path / "home")
        commit = server.add("someone/cats", files)
        folder = fetch_folder(hub.parse("hf://someone/cats"))
        with pytest.raises(hub.HubError, match=r"hf://someone/cats has no folder nothing"):
            fetch_folder(hub.parse("hf://someone/cats/nothing"))
        bad = json.loads(files["unet/config.json"]) | {"sample_size": 0}
        changed = server.add("someone/cats", files | {"unet/config.json": json.dumps(bad).encode()})
        out = str(tmp_path / "out")
        done = CliRunner().invoke(app, ["import", "diffusers", "hf://someone/cats", out])
    assert f"hf://someone/cats@{changed}/unet/config.json: sample_size" in str(done.exception)
    assert commit != changed
    assert all(
        torch.equal(tensor, read(folder).networks["G"][name])
        for name, tensor in read(tmp_path / "model").networks["G"].items()
    )
