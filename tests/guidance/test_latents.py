"""Learnt latents: white however they lie, learnt with the generator, tied to samples by key."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dinogen.config import ConfigError
from dinogen.networks.progressive import LatentTable
from dinogen.training.checkpointing.checkpoint import newest_checkpoint
from dinogen.training.checkpointing.export import export, load_exported
from dinogen.training.run import train
from tests.guidance.runs import objective_config


def everything(table):
    return table(torch.arange(len(table.rows)))


def test_all_latents_together_are_white():
    torch.manual_seed(0)
    table = LatentTable(200, 5)
    with torch.no_grad():
        table.rows.copy_(table.rows @ torch.randn(5, 5) + torch.randn(5))
    z = everything(table).detach()
    assert z.mean(0).abs().max() < 1e-4
    torch.testing.assert_close(z.T.cov(correction=0), torch.eye(5), atol=2e-3, rtol=0)
    some = torch.tensor([7, 0, 7])
    torch.testing.assert_close(table(some).detach(), z[some])


def test_the_gradient_is_that_of_one_row_behind_fixed_statistics():
    torch.manual_seed(0)
    table = LatentTable(50, 3)
    table(torch.tensor([4])).sum().backward()
    rows = table.rows.detach()
    L = torch.linalg.cholesky(rows.T.cov(correction=0) + table.least**2 * torch.eye(3))
    want = torch.zeros(50, 3)
    want[4] = torch.linalg.inv(L).sum(0)
    torch.testing.assert_close(table.rows.grad, want, rtol=1e-3, atol=1e-4)


def test_rows_that_agree_in_a_direction_are_not_blown_up():
    table = LatentTable(20, 2)
    with torch.no_grad():
        table.rows[:, 1] = 3.0
    assert everything(table).isfinite().all()
    assert everything(table)[:, 1].abs().max() < 1e-3


def test_a_linear_generator_finds_the_principal_components():
    """Points near a plane in eight dimensions: learnt latents find the plane, drawn ones cannot,
    and images of standard normal latents are spread as the points are."""
    torch.manual_seed(0)
    points = torch.randn(100, 2) @ torch.randn(2, 8) + 0.05 * torch.randn(100, 8) + 1
    missed = {}
    for learnt in (True, False):
        table, G = LatentTable(100, 2), nn.Linear(2, 8)
        optimizer = torch.optim.Adam(
            [*G.parameters(), *(table.parameters() if learnt else ())], lr=0.01, betas=(0.9, 0.99)
        )
        for _ in range(600):
            numbers = torch.randint(100, (25,))
            loss = (G(table(numbers)) - points[numbers]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            missed[learnt] = float((G(everything(table)) - points).square().mean())
            made = G(torch.randn(20_000, 2)).T.cov()
        if learnt:
            torch.testing.assert_close(made, points.T.cov(), rtol=0.1, atol=0.1)
    spread = float(points.var(0).mean())
    assert missed[True] < 0.02 * spread
    assert missed[False] > 0.5 * spread


def learnt_run(data, out, *overrides):
    config = objective_config(data, out, "latents", *overrides)
    train(config)
    return out / "latents"


def test_a_run_goes_on_bitwise_and_is_exported_with_its_table(two_guides, tmp_path):
    often = "checkpoint.every_kimg=0.008"
    whole = learnt_run(two_guides, tmp_path / "whole", often)
    learnt_run(two_guides, tmp_path / "cut", often, "stages.0.kimg=0.008")
    cut = learnt_run(two_guides, tmp_path / "cut", often)
    for name in ("G", "G.ema", "optim"):
        want, found = (
            newest_checkpoint(run / "16x16" / "checkpoints").tensors(name) for run in (whole, cut)
        )
        assert "table.rows" in "".join(want)
        assert [k for k, v in want.items() if not torch.equal(v, found[k])] == []
    export(whole, tmp_path / "G.safetensors")
    G, _ = load_exported(tmp_path / "G.safetensors")
    assert G(torch.randn(2, 8)).shape == (2, 3, 16, 16)
    assert G.table.rows.shape == (17, 8)


def test_a_wrong_number_of_latents_names_the_right_one(two_guides, tmp_path):
    given = "family.objectives=[{name: paired, num_latents: 19}]"
    with pytest.raises(ConfigError, match=r"num_latents 19, but .* has 17 samples in train"):
        learnt_run(two_guides, tmp_path, given)


def test_each_image_learns_its_own(two_guides, tmp_path):
    """Rows move for the samples that were shown, and the loss falls below that of drawn latents."""
    run = learnt_run(two_guides, tmp_path, "family.objectives.0.latent_rate=100")
    rows = newest_checkpoint(run / "16x16" / "checkpoints").tensors("G")["table.rows"]
    assert rows.shape == (17, 8)
    assert float(rows.std()) == pytest.approx(0.01, rel=0.35)
