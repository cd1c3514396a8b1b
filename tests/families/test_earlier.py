"""Family files of users, written for 0.1: methods of abilities that call super(), and `ask`."""

from __future__ import annotations

import json

import pytest
import torch

from dinogen.config import load_config
from dinogen.errors import UserError
from dinogen.evaluation.subject import prompted_by
from dinogen.families import abilities
from dinogen.families.base import Family
from dinogen.families.registry import family_class
from dinogen.training.checkpointing.checkpoint import newest_checkpoint
from dinogen.training.checkpointing.snapshot import load_snapshot
from dinogen.training.run import train
from tests.families.test_new_family import FIVE_STEPS, here  # noqa: F401

# Every member that the base class of 0.1 had, overridden with a call of super().
OLD = """
    prompts = ()
    headline = property(lambda self: super().headline)
    log = []

    def trainable(self, network):
        return super().trainable(network)

    def arguments(self, network):
        return super().arguments(network)

    def new_parameters(self, network):
        return super().new_parameters(network)

    def set_fade(self, networks, alpha, fading):
        self.log.append(("set_fade", alpha))
        super().set_fade(networks, alpha, fading)

    def optimizer_scale(self, network):
        return 0.5 * super().optimizer_scale(network)

    @property
    def phases(self):
        D = Phase("D", "D", self.d_losses, remembered=("real",))
        return (D, Phase("G", "G", self.g_losses))

    def remember(self, phase, means):
        self.log.append(("remember", phase))
        super().remember(phase, means)

    def after_step(self, nimg):
        self.log.append(("after_step", nimg))
        super().after_step(nimg)

    def constants(self):
        return super().constants() | {"level": 2.0}

    def describe(self):
        return super().describe() | {"note": "old"}

    def probe(self, networks, loss):
        found = super().probe(networks, loss)
        return type(found)({"brightness": 0.25}, found.verdict)

    def held_out(self, networks, batch):
        return super().held_out(networks, batch) | {"bright": batch["image"].mean()}

    def measured(self, networks, indices, seed, shares):
        return super().measured(networks, indices, seed, shares)

    @property
    def measured_as(self):
        return super().measured_as | {"drawn": "plainly"}

    @property
    def truncates(self):
        return super().truncates

    def realism(self, images):
        return super().realism(images)

    def reconstruct(self, networks, batch):
        return super().reconstruct(networks, batch)

    def first_layer(self, networks):
        return super().first_layer(networks)

    def mix(self, networks, coarse, fine, indices, seed):
        return super().mix(networks, coarse, fine, indices, seed)

    def ask(self, texts, guidance, facts):
        if texts == ("unheard of",):
            super().ask(texts, guidance, facts)
        assert facts["note"] == "old"
        self.prompts = tuple(texts)

    def decode(self, networks, latents, indices, seed, psi=1.0):
        images = super().decode(networks, latents, indices, seed, psi)
        return images * 0 - 1 if self.prompts else images
"""


# What the module asks for by isinstance.
ABILITIES = [
    item for item in vars(abilities).values() if getattr(item, "_is_runtime_protocol", False)
]


@pytest.fixture
def old(here):  # noqa: F811
    """The page's family, with everything in it that it could override."""
    path = here / "tiny_gan.py"
    path.write_text(path.read_text() + OLD)
    return here


def test_a_plain_family_is_taken_as_it_is(here):  # noqa: F811
    cls = family_class(load_config("tiny_gan.yaml").family)
    assert cls.__bases__ == (Family,)
    config = load_config("tiny_gan.yaml", FIVE_STEPS)
    family = cls(config, config.stages[0], torch.device("cpu"))
    assert len(ABILITIES) > 15
    assert [ability for ability in ABILITIES if isinstance(family, ability)] == []


def test_every_member_of_0_1_may_call_super_and_keeps_its_meaning(old):
    config = load_config("tiny_gan.yaml", [*FIVE_STEPS, "log.probe_kimg=0.016"])
    (result,) = train(config)
    assert result["note"] == "old"
    line = json.loads((config.run / "16x16" / "stats.jsonl").read_text().splitlines()[-1])
    assert line["level"] == 2.0 and line["brightness"] == 0.25
    cls = family_class(config.family)
    seen = {what for what, _ in cls.log}
    assert seen == {"set_fade", "remember", "after_step"}
    assert ("after_step", 40) in cls.log
    assert cls.main_loss.fget(cls(config, config.stages[0], torch.device("cpu"))) == "G"
    checkpoint = newest_checkpoint(config.run / "16x16" / "checkpoints")
    assert checkpoint.state["facts"] == {"note": "old"}

    snapshot = load_snapshot(config.run)
    family = snapshot.family
    newer = {
        abilities.RunsFrozen,
        abilities.ChecksData,
        abilities.OrdersLayers,
        abilities.HasClasses,
        abilities.AdjustsSampling,
        abilities.LimitsSampling,
        abilities.HasGraph,
        abilities.HasLatentSpaces,
        abilities.Inverts,
        abilities.Recalls,
        abilities.AddsNoise,
        abilities.Varies,
    }
    assert {item for item in ABILITIES if not isinstance(family, item)} == newer
    assert not abilities.truncates(family)
    assert family.realism(torch.zeros(1, 3, 16, 16)) is None
    numbers = torch.arange(3)
    plain = family.sample(snapshot.ema.networks, numbers, 0)
    assert torch.equal(family.measured(snapshot.ema.networks, numbers, 0, None), plain)


def test_ask_is_a_mode_only_while_a_condition_is_sampled(old, tmp_path):
    config = load_config("tiny_gan.yaml", FIVE_STEPS)
    train(config)
    snapshot = load_snapshot(config.run)
    plain = snapshot.sample(2, 0)
    condition = snapshot.condition(["a face"], 1.5)
    assert (snapshot.sample(2, 0, condition) == -1).all()
    assert snapshot.family.prompts == ()
    assert torch.equal(snapshot.sample(2, 0), plain)
    with pytest.raises(UserError, match="not trained with text"):
        snapshot.condition(("unheard of",), 1.0)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a face\na cat\n")
    settings = config.metrics.model_copy(update={"prompts": prompts})
    facts = snapshot.checkpoint.state["facts"]
    found = prompted_by(snapshot.family, snapshot.ema.networks, 4, settings, facts)
    assert list(found.texts) == ["a face", "a cat"]
