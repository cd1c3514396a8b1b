"""What both denoising networks can do: times, tokens of a layer, global vectors, channels."""

import math

import pytest
import torch
from torch import nn

from dinogen.networks.denoising import Alignment, Projector, time_embedding
from dinogen.networks.dit import Block, DiT
from dinogen.networks.unet import ResBlock, UNet

UNET = {
    "base_channels": 8,
    "channel_multipliers": (1, 2, 4),
    "num_blocks": 1,
    "attention_resolutions": (4,),
    "head_channels": 8,
}
NETWORKS = {
    "unet": (UNet, UNET),
    "unet that resamples by blocks": (UNet, UNET | {"variant": {"resampling": "block"}}),
    "dit": (DiT, {"patch": 2, "width": 16, "depth": 3, "num_heads": 2, "num_registers": 2}),
}
# side and channels after each block, at 16x16
LAYERS = {
    "unet": [(16, 8), (8, 16), (4, 32), (4, 32), (4, 32)]
    + [(4, 32)] * 2
    + [(8, 16)] * 2
    + [(16, 8)] * 2,
    "unet that resamples by blocks": [(16, 8), (8, 8), (8, 16), (4, 16)]
    + [(4, 32)] * 5
    + [(8, 32), (8, 16), (8, 16), (16, 16), (16, 8), (16, 8)],
    "dit": [(8, 16)] * 3,
}
ALIGN = {"channels": 6, "hidden": 12}


def network(name, **more):
    cls, arguments = NETWORKS[name]
    torch.manual_seed(0)
    return cls(16, **arguments | more)


def disturbed(network):
    """The network with no parameter left at its special start."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def inputs(channels=3):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, channels, 16, 16, generator=generator), torch.tensor([3, 700])


def hidden_of(network, *given):
    """What comes out of each block, in the order in which they run, as tokens (B, N, W)."""
    found = []

    def keep(module, given, out):
        found.append(out[:, :-2] if isinstance(module, Block) else out.flatten(2).mT)

    hooks = [
        module.register_forward_hook(keep)
        for module in network.modules()
        if isinstance(module, (ResBlock, Block))
    ]
    network(*given)
    for hook in hooks:
        hook.remove()
    return found


def test_time_embedding_is_its_formula():
    found = time_embedding(torch.tensor([0, 1, 250, 999]), 8)
    for row, t in zip(found, (0, 1, 250, 999), strict=True):
        angles = [t / 10_000 ** (i / 4) for i in range(4)]
        expected = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        torch.testing.assert_close(row, torch.tensor(expected), rtol=0, atol=1e-4)
    assert found.dtype == torch.float32


def test_all_time_steps_look_different():
    distances = torch.pdist(time_embedding(torch.arange(1000), 32))
    assert distances.min() > 0.1


def test_time_embedding_may_end_at_the_last_frequency_and_scale_the_time():
    found = time_embedding(torch.tensor([1000.0]), 8, exact_end=True, scale=0.25)[0]
    angles = [250 / 10_000 ** (i / 3) for i in range(4)]
    expected = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", NETWORKS)
def test_grids_of_layers_are_those_that_run(name):
    plain = network(name)
    found = hidden_of(plain, *inputs())
    assert len(plain.grids) == len(found) == len(LAYERS[name])
    for layer, (hidden, (side, width)) in enumerate(zip(found, LAYERS[name], strict=True), 1):
        assert plain.grid_of(layer) == side
        assert hidden.shape == (2, side**2, width)


@pytest.mark.parametrize("name", NETWORKS)
def test_tokens_are_those_after_the_named_layer_projected(name):
    for layer, (side, width) in enumerate(LAYERS[name], 1):
        aligned = disturbed(network(name, align={"layer": layer, **ALIGN}))
        output, tokens = aligned.with_tokens(*inputs())
        assert torch.equal(output, aligned(*inputs()))
        assert tokens.shape == (2, side**2, 6) and tokens.dtype == torch.float32
        fc0, fc1, fc2 = (getattr(aligned.projector, one) for one in ("fc0", "fc1", "fc2"))
        mlp = nn.Sequential(fc0, nn.SiLU(), fc1, nn.SiLU(), fc2)
        assert fc0.in_features == width
        expected = mlp(hidden_of(aligned, *inputs())[layer - 1])
        torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-5)


def test_tokens_go_row_by_row():
    aligned = disturbed(network("dit", align={"layer": 1, **ALIGN}, num_registers=0))
    for block in aligned.blocks:  # so that a token depends on its own patch alone
        block.qkv.weight.data.zero_()
        block.qkv.bias.data.zero_()
    x, t = inputs()
    moved = x.clone()
    moved[:, :, 2, 6] += 1  # row 1, column 3 of 8x8 patches
    changed = (aligned.with_tokens(moved, t)[1] - aligned.with_tokens(x, t)[1]).abs().amax((0, 2))
    assert changed.nonzero().flatten().tolist() == [1 * 8 + 3]


@pytest.mark.parametrize("name", NETWORKS)
def test_with_tokens_every_parameter_gets_a_gradient(name):
    arguments = {"num_classes": 3, "embed_dim": 4, "align": {"layer": 2, **ALIGN}}
    aligned = disturbed(network(name, **arguments))
    label, embedding = torch.tensor([0, 3]), torch.randn(2, 4)
    embedding = torch.where(torch.tensor([[True], [False]]), embedding, aligned.null_embedding)
    output, tokens = aligned.with_tokens(*inputs(), label, embedding=embedding)
    (output.square().sum() + tokens.square().sum()).backward()
    silent = {n for n, p in aligned.named_parameters() if p.grad is None or not p.grad.any()}
    assert silent == set()


@pytest.mark.parametrize("name", NETWORKS)
def test_tokens_of_a_layer_teach_what_comes_before_it_and_the_projector(name):
    aligned = disturbed(network(name, align={"layer": 2, **ALIGN}))
    aligned.with_tokens(*inputs())[1].square().sum().backward()
    taught = {n for n, p in aligned.named_parameters() if p.grad is not None and p.grad.any()}
    blocks = [n for n, m in aligned.named_modules() if isinstance(m, (ResBlock, Block))]
    reached = {b for b in blocks if any(n.startswith(f"{b}.") for n in taught)}
    assert reached == set(blocks[:2])
    assert {n for n in taught if n.startswith("projector")} == {
        f"projector.fc{i}.{one}" for i in range(3) for one in ("weight", "bias")
    }


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_not_used_is_not_built_and_changes_no_other_weight(name):
    plain, rich = network(name), network(name, embed_dim=4, align={"layer": 1, **ALIGN})
    own = plain.state_dict()
    assert plain.projector is None and plain.embed is None and plain.null_embedding is None
    assert {n.partition(".")[0] for n in rich.state_dict().keys() - own.keys()} == {
        "projector",
        "embed",
        "null_embedding",
    }
    for key, value in own.items():
        assert torch.equal(rich.state_dict()[key], value), key


@pytest.mark.parametrize("name", NETWORKS)
def test_a_global_vector_changes_its_own_sample_only_and_none_is_the_null_vector(name):
    G = disturbed(network(name, embed_dim=4))
    x, t = inputs()
    null = G.null_embedding.expand(2, -1)
    before = G(x, t)
    torch.testing.assert_close(G(x, t, embedding=null), before)
    changed = G(x, t, embedding=torch.stack([null[0], null[1] + 1]))
    torch.testing.assert_close(changed[0], before[0])
    assert (changed[1] - before[1]).abs().max() > 1e-3


@pytest.mark.parametrize("name", NETWORKS)
def test_other_channels_than_those_of_images(name):
    G = disturbed(network(name, in_channels=4))
    x, t = inputs(channels=4)
    found = G(x, t)
    assert found.shape == x.shape and found.std() > 0


@pytest.mark.parametrize("name", NETWORKS)
def test_in_bf16_tokens_are_near_and_float32(name):
    aligned = disturbed(network(name, align={"layer": 2, **ALIGN}))
    _, exact = aligned.with_tokens(*inputs())
    with torch.autocast("cpu", torch.bfloat16):
        _, rough = aligned.with_tokens(*inputs())
    assert rough.dtype == torch.float32
    assert (rough - exact).norm() < 0.05 * exact.norm()


def test_the_projector_is_as_wide_as_in_the_paper_unless_told():
    assert Alignment(8, 768).hidden == 2048
    projector = Projector(1152, 2048, 768)
    expected = 1152 * 2048 + 2048 + 2048 * 2048 + 2048 + 2048 * 768 + 768
    assert sum(parameter.numel() for parameter in projector.parameters()) == expected
    # tokens and features of deviation 1 are projected to deviations of that order
    assert 0.1 < projector(torch.randn(4, 9, 1152)).std() < 1


@pytest.mark.parametrize("name", NETWORKS)
def test_what_does_not_fit_is_named(name):
    number = len(LAYERS[name])
    for layer in (0, number + 1):
        with pytest.raises(ValueError, match=rf"layer {layer}: there are layers 1 to {number}"):
            network(name, align={"layer": layer, "channels": 4})
    plain = network(name)
    with pytest.raises(ValueError, match=r"grids of side"):
        plain.grid_of(0)
    with pytest.raises(ValueError, match="build it with align"):
        plain.with_tokens(*inputs())
    with pytest.raises(ValueError, match="build it with embed_dim"):
        plain(*inputs(), embedding=torch.zeros(2, 4))
