"""A run on latents is published with an autoencoder that others can reach, or not at all."""

from __future__ import annotations

import pytest
import torch
import yaml

import dinogen
from dinogen import hub
from dinogen.config import ConfigError
from dinogen.publish.publish import Publication, publish, write_publication
from dinogen.training.checkpointing.export import export
from dinogen.training.run import train
from tests.families.stored_latents import pack_latents
from tests.families.tiny import tiny_config
from tests.hub_server import hub_server, use_hub

ADDRESS = hub.Address("someone/flow")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents")
    pack_latents(folder)
    config = tiny_config("flow-latent", folder / "data", folder / "run", "stages.0.kimg=0.016")
    train(config)
    return config.run


def test_an_autoencoder_of_this_machine_is_refused(trained, tmp_path):
    message = r"family.latent.path: .*vae.safetensors is on this machine alone.*`dinogen publish`"
    with pytest.raises(ConfigError, match=message):
        write_publication(Publication(trained, ADDRESS), tmp_path / "out")
    export(trained, tmp_path / "flow.safetensors")
    with pytest.raises(ConfigError, match=message):
        write_publication(Publication(tmp_path / "flow.safetensors", ADDRESS), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_with_its_autoencoder_on_the_hub_it_draws_there_too(trained, tmp_path, monkeypatch):
    expected = dinogen.load_generator(trained).sample(2, seed=5)
    with hub_server() as server:
        use_hub(monkeypatch, server, tmp_path / "home")
        weights = (trained.parent / "vae.safetensors").read_bytes()
        server.add("someone/vae", {"model.safetensors": weights})
        file = trained / "config.yaml"
        told = yaml.safe_load(file.read_text())
        told["family"]["latent"]["path"] = "hf://someone/vae"
        file.write_text(yaml.safe_dump(told))
        publish(Publication(trained, ADDRESS, licence="mit"))
        theirs = dinogen.load_generator("hf://someone/flow")
        assert torch.equal(theirs.sample(2, seed=5), expected)
        assert theirs.info["config"]["family"]["latent"]["path"] == "hf://someone/vae"
        (files,) = list(server.repositories["models/someone/flow"].commits.values())[-1:]
    card = files["README.md"].decode()
    assert "## Autoencoder" in card and "`hf://someone/vae`" in card
    assert theirs.info["autoencoder"]["weights_sha256"][:12] in card
    assert str(trained.parent) not in card + files["config.yaml"].decode()
