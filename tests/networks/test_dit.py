"""The diffusion transformer: the paper's sizes, diffusers' network, its start, its positions."""

import math

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dinogen._torchvision import ensure_torchvision
from dinogen.networks import dit
from dinogen.networks.dit import SIZES, Block, DiT, positions

ensure_torchvision()

from diffusers import DiTTransformer2DModel  # noqa: E402 - torchvision comes first


def small(resolution=16, **more):
    arguments = {"patch": 4, "width": 32, "depth": 3, "num_heads": 4}
    torch.manual_seed(0)
    return DiT(resolution, **arguments | more)


def disturbed(network, by=0.1):
    """The network with no parameter left at its special start."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(by * torch.randn_like(parameter))
    return network


def inputs(resolution=16, num=2, channels=3):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num, channels, resolution, resolution, generator=generator)
    return x, torch.linspace(0, 900, num)


def num_parameters(**arguments):
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in DiT(32, **arguments).parameters())


# --- sizes

# Table 4 of the paper, in millions, at patches of 8, 4 and 2
PAPER = {"S": (33, 33, 33), "B": (131, 130, 130), "L": (459, 458, 458), "XL": (676, 675, 675)}
# What the authors' code prints: all above, the table of positions, and a second half of the output
# for the variance ("learn_sigma").
PRINTED_XL_2 = 675_129_632


def as_the_authors_count(name, patch):
    width = SIZES[name]["width"]
    ours = num_parameters(
        patch=patch, in_channels=4, num_classes=1000, qk_norm=False, **SIZES[name]
    )
    return ours + 4 * patch**2 * (width + 1) + (32 // patch) ** 2 * width


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("patch", [8, 4, 2])
def test_parameters_are_as_many_as_in_the_paper(name, patch):
    millions = as_the_authors_count(name, patch) / 1e6
    assert abs(millions - PAPER[name][[8, 4, 2].index(patch)]) < 1


def test_xl_has_as_many_parameters_as_the_authors_code_prints():
    assert as_the_authors_count("XL", 2) == PRINTED_XL_2


@pytest.mark.parametrize("name", SIZES)
def test_parameters_are_as_many_as_by_hand(name):
    w, depth = SIZES[name]["width"], SIZES[name]["depth"]
    block = 3 * w * (w + 1) + w * (w + 1) + 4 * w * (w + 1) + w * (4 * w + 1) + 6 * w * (w + 1)
    ends = 4 * 2**2 * (w + 1) + w - 4 * 2**2 + 4 * 2**2 * (w + 1) + 2 * w * (w + 1)
    time, label = w * (256 + 1) + w * (w + 1), 1001 * w
    arguments = {"patch": 2, "in_channels": 4, "num_classes": 1000, "qk_norm": False} | SIZES[name]
    found = num_parameters(**arguments)
    assert found == depth * block + ends + time + label
    more = num_parameters(**arguments | {"qk_norm": True, "num_registers": 4}) - found
    assert more == depth * 2 * w // SIZES[name]["num_heads"] + 4 * w


@pytest.mark.parametrize(("patch", "paper"), [(8, 0.36), (4, 1.41), (2, 6.06)])
def test_s_takes_as_many_multiplications_as_in_the_paper(patch, paper):
    """Table 4 counts a multiplication and an addition as one, in 1e9."""
    network = DiT(32, patch, **SIZES["S"], in_channels=4, num_classes=1000)
    given = inputs(32, 1, 4)
    # the counter knows no fused attention on a CPU
    with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        network(*given, torch.tensor([0]))
    assert counter.get_total_flops() / 2e9 == pytest.approx(paper, abs=0.01)


# --- an implementation by others


def of_diffusers(learnt=3, depth=2, heads=2, head_width=16):
    """Their network with random weights, with the frequencies of the authors' code."""
    torch.manual_seed(0)
    network = DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=head_width,
        in_channels=3,
        num_layers=depth,
        sample_size=32,
        patch_size=2,
        num_embeds_ada_norm=learnt,
        norm_eps=1e-6,
    ).eval()
    disturbed(network)
    first = network.transformer_blocks[0].norm1.emb
    for block in network.transformer_blocks:
        block.norm1.emb = first  # as in the paper; theirs has a copy for each block
    first.time_proj.downscale_freq_shift = 0
    return network


def ours_from(theirs):
    """Our network with their weights."""
    config = theirs.config
    patch, heads = config.patch_size, config.num_attention_heads
    ours = DiT(
        config.sample_size,
        patch,
        heads * config.attention_head_dim,
        config.num_layers,
        heads,
        qk_norm=False,
        num_classes=config.num_embeds_ada_norm,
    )
    state = theirs.state_dict()
    first = "transformer_blocks.0.norm1.emb."
    found = {"patches.weight": state["pos_embed.proj.weight"].flatten(1)}
    found["patches.bias"] = state["pos_embed.proj.bias"]
    found["label.weight"] = state[f"{first}class_embedder.embedding_table.weight"]

    def copy(name, *sources):
        for part in ("weight", "bias"):
            found[f"{name}.{part}"] = torch.cat([state[f"{source}.{part}"] for source in sources])

    copy("time.0", f"{first}timestep_embedder.linear_1")
    copy("time.2", f"{first}timestep_embedder.linear_2")
    cosines, sines = found["time.0.weight"].chunk(2, 1)
    found["time.0.weight"] = torch.cat([sines, cosines], 1)
    for i in range(config.num_layers):
        block = f"transformer_blocks.{i}"
        copy(f"blocks.{i}.modulation", f"{block}.norm1.linear")
        copy(f"blocks.{i}.qkv", *(f"{block}.attn1.to_{one}" for one in "qkv"))
        copy(f"blocks.{i}.proj", f"{block}.attn1.to_out.0")
        copy(f"blocks.{i}.fc0", f"{block}.ff.net.0.proj")
        copy(f"blocks.{i}.fc1", f"{block}.ff.net.2")
    copy("modulation", "proj_out_1")
    copy("out", "proj_out_2")
    for name in ("out.weight", "out.bias"):  # theirs has the channel last
        one = found[name].unflatten(0, (patch, patch, 3))
        found[name] = one.movedim(2, 0).flatten(0, 2)
    ours.load_state_dict(found)
    return ours.eval()


@pytest.mark.parametrize("resolution", [32, 64, 16])
def test_it_is_the_network_of_diffusers_at_each_resolution(resolution):
    theirs = of_diffusers()
    x, t = inputs(resolution, num=3)
    label = torch.tensor([0, 2, 3])
    with torch.no_grad():
        expected = theirs(x, t, label).sample
        found = ours_from(theirs)(x, t, label)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_its_gradients_are_those_of_diffusers_network():
    theirs = of_diffusers()
    ours = ours_from(theirs)
    x, t = inputs(32)
    label = torch.tensor([1, 3])
    gradients = []
    for call in (ours, lambda *given: theirs(*given).sample):
        of_x = x.clone().requires_grad_()
        call(of_x, t, label).square().sum().backward()
        gradients.append(of_x.grad)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)
    weight = torch.cat(
        [theirs.get_parameter(f"transformer_blocks.1.attn1.to_{o}.weight").grad for o in "qkv"]
    )
    torch.testing.assert_close(ours.blocks[1].qkv.weight.grad, weight, rtol=1e-3, atol=1e-3)


# --- the start


def test_at_the_start_each_block_is_the_identity_and_the_output_0():
    network = small(num_registers=2, num_classes=2)
    x, t = inputs()
    label = torch.tensor([0, 2])
    assert torch.equal(network(x, t, label), torch.zeros_like(x))
    h, conditions = torch.randn(2, 18, 32), torch.randn(2, 32)
    for block in network.blocks:
        assert torch.equal(block(h, conditions), h)


def test_what_is_not_0_at_the_start_is_drawn_as_the_authors_do():
    network = small(width=128, num_classes=300, num_registers=40)
    for name, parameter in network.named_parameters():
        if "norm_" in name:
            assert torch.equal(parameter, torch.ones_like(parameter))
        elif name.endswith("bias") or "modulation" in name or name == "out.weight":
            assert not parameter.any(), name
        elif name.startswith(("time", "label", "registers")):
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05), name
        else:
            bound = math.sqrt(6 / sum(parameter.shape))
            assert bound * 0.98 < parameter.abs().max().item() <= bound, name


@pytest.mark.parametrize("more", [{}, {"guidance_input": True, "num_registers": 2}])
def test_gradients_reach_all_that_can_learn_at_the_start_and_then_all(more):
    network = small(num_classes=2, **more)
    x, t = inputs()
    given = {"guidance": torch.tensor([1.0, 3.0])} if more else {}
    network(x, t, torch.tensor([0, 2]), **given).sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    assert {n for n, p in network.named_parameters() if p.grad.any()} == {"out.weight", "out.bias"}
    network.zero_grad()
    disturbed(network)(x, t, torch.tensor([0, 2]), **given).square().sum().backward()
    assert {n for n, p in network.named_parameters() if not p.grad.any()} == set()


# --- positions


def test_positions_are_their_formula():
    found = positions(4, 8).unflatten(0, (4, 4))
    for row in range(4):
        for column in range(4):
            expected = []
            for place in (4 * column, 4 * row):  # 16 / 4
                angles = [place, place / 100]
                expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            torch.testing.assert_close(found[row, column], torch.tensor(expected))


def test_positions_of_a_finer_grid_are_those_of_the_coarser_where_both_have_a_token():
    fine, coarse = (positions(side, 32).unflatten(0, (side, side)) for side in (24, 8))
    torch.testing.assert_close(fine[::3, ::3], coarse)
    assert torch.pdist(fine.flatten(0, 1)).min() > 0.05


def test_the_same_weights_at_twice_the_resolution_see_the_same_image():
    coarse = disturbed(small(16), 0.05)
    fine = small(32)
    fine.load_state_dict(coarse.state_dict())
    x, t = inputs(2)
    small_image, large = (F.interpolate(x, scale_factor=s, mode="bilinear") for s in (8, 16))
    at_16, at_32 = coarse(small_image, t), fine(large, t)
    assert torch.equal(coarse(large, t), at_32)
    assert at_32.shape == large.shape and at_32.isfinite().all()
    ratio = (at_32.std() / at_16.std()).item()
    assert 0.5 < ratio < 2


# --- attention


def open_gates(block):
    """The block with conditions that scale nothing, shift nothing, and let all through."""
    with torch.no_grad():
        block.modulation.bias.unflatten(0, (6, -1))[[2, 5]] = 1
    return block


def test_attention_with_normalised_queries_and_keys_is_its_formula():
    block = open_gates(disturbed(Block(24, 3, qk_norm=True)))
    block.modulation.weight.data.zero_()
    x, conditions = torch.randn(2, 5, 24), torch.randn(2, 24)
    shift0, scale0, gate0, shift1, scale1, gate1 = block.modulation.bias.chunk(6)

    def normalised(one):
        one = one - one.mean(-1, keepdim=True)
        return one / (one.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    h = block.qkv(normalised(x) * (1 + scale0) + shift0)
    q, k, v = (one.unflatten(2, (3, 8)).transpose(1, 2) for one in h.chunk(3, 2))
    q, k = block.norm_q.weight * normalised(q), block.norm_k.weight * normalised(k)
    attended = torch.softmax(q @ k.mT / math.sqrt(8), -1) @ v
    expected = x + gate0 * block.proj(attended.transpose(1, 2).flatten(2))
    h = block.fc0(normalised(expected) * (1 + scale1) + shift1)
    h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    expected = expected + gate1 * block.fc1(h)
    torch.testing.assert_close(block(x, conditions), expected, rtol=1e-4, atol=1e-5)


def test_normalised_logits_do_not_grow_with_the_weights():
    torch.manual_seed(0)
    x, conditions = torch.randn(2, 5, 24), torch.randn(2, 24)
    for qk_norm in (True, False):
        block = open_gates(Block(24, 3, qk_norm))
        before = block(x, conditions)
        block.qkv.weight.data[:48] *= 100
        block.qkv.bias.data[:48] *= 100
        assert torch.allclose(block(x, conditions), before, atol=1e-3) == qk_norm


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_attention_gets_the_numbers_of_a_head_side_by_side_and_of_one_type(
    monkeypatch, precision, qk_norm
):
    seen = []

    def attention(*qkv):
        seen.append([(one.stride(-1), one.dtype, tuple(one.shape)) for one in qkv])
        return qkv[2]

    monkeypatch.setattr(dit.F, "scaled_dot_product_attention", attention)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        small(qk_norm=qk_norm)(*inputs())
    assert seen == [[(1, precision, (2, 4, 16, 8))] * 3] * 3


def test_registers_take_part_and_are_taken_away():
    network = disturbed(small(num_registers=3))
    x, t = inputs()
    lengths = []
    for block in network.blocks:
        block.register_forward_pre_hook(lambda module, given: lengths.append(given[0].shape[1]))
    before = network(x, t)
    assert before.shape == x.shape and lengths == [16 + 3] * 3
    with torch.no_grad():
        network.registers[1, ::2] += 1
    assert (network(x, t) - before).abs().max() > 1e-3


# --- conditions


def test_time_label_and_guidance_change_their_own_sample_only():
    network = disturbed(small(num_classes=2, guidance_input=True))
    x, t = inputs()
    label, guidance = torch.tensor([0, 1]), torch.tensor([1.0, 1.0])
    before = network(x, t, label, guidance=guidance)
    second = torch.tensor([0, 1])
    for changed in (
        network(x, t + 7 * second, label, guidance=guidance),
        network(x, t, label + second, guidance=guidance),  # 2: no class
        network(x, t, label, guidance=guidance + second),
    ):
        torch.testing.assert_close(changed[0], before[0])
        assert (changed[1] - before[1]).abs().max() > 1e-3


def test_the_last_row_of_labels_is_that_of_no_class():
    network = disturbed(small(num_classes=2))
    assert network.label.weight.shape == (3, 32)
    x, t = inputs()
    label = torch.tensor([1, 2])
    before = network(x, t, label)
    with torch.no_grad():
        network.label.weight[2] += 1
    changed = network(x, t, label)
    torch.testing.assert_close(changed[0], before[0])
    assert (changed[1] - before[1]).abs().max() > 1e-3


def test_integer_and_float_times_are_the_same():
    network = disturbed(small())
    x, _ = inputs()
    assert torch.equal(network(x, torch.tensor([3, 500])), network(x, torch.tensor([3.0, 500.0])))


@pytest.mark.parametrize("takes", [True, False])
def test_guidance_is_given_to_networks_that_take_it_and_no_others(takes):
    given = {} if takes else {"guidance": torch.ones(2)}
    with pytest.raises(ValueError, match="if, and only if, there is guidance_input"):
        small(guidance_input=takes)(*inputs(), **given)


def test_dropout_comes_in_each_block_by_its_number():
    network = disturbed(small())
    seen = []

    def drop(h, block):
        seen.append((block, tuple(h.shape)))
        return torch.zeros_like(h)

    x, t = inputs()
    dropped = network(x, t, drop=drop)
    assert seen == [(number, (2, 16, 128)) for number in range(3)]
    for block in network.blocks:
        block.fc1.weight.data.zero_()
    torch.testing.assert_close(dropped, network(x, t))


def test_tanh_bounds_the_output():
    plain = disturbed(small())
    bounded = small(out_activation="tanh")
    bounded.load_state_dict(plain.state_dict())
    x, t = inputs()
    torch.testing.assert_close(bounded(x, t), plain(x, t).tanh())


# --- how it is run


def test_bf16_autocast_is_near_and_gives_float32():
    network = disturbed(small(num_registers=2), 0.05)
    x, t = inputs()
    exact = network(x, t)
    with torch.autocast("cpu", torch.bfloat16):
        rough = network(x, t)
    assert rough.dtype == torch.float32
    assert (rough - exact).norm() < 0.05 * exact.norm()


def test_tokens_stay_in_the_type_of_autocast():
    network = small(num_registers=2)
    types = []
    for block in network.blocks:
        block.register_forward_hook(lambda module, given, out: types.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        network(*inputs())
    assert types == [torch.bfloat16] * 3


def test_it_can_be_exported_for_batches_of_any_size():
    network = disturbed(small(num_classes=2, num_registers=2)).eval()
    given = (*inputs(), torch.tensor([0, 2]))
    batch = {0: torch.export.Dim("batch")}
    # strict=False: as the exporter of runs does
    program = torch.export.export(
        network, given, dynamic_shapes=(batch, batch, batch), strict=False
    )
    for num in (2, 5):
        given = (*inputs(num=num), torch.arange(num) % 3)
        torch.testing.assert_close(program.module()(*given), network(*given))


def test_it_can_be_compiled():
    network = disturbed(small(align={"layer": 2, "channels": 5, "hidden": 8}))
    x, t = inputs()
    expected = network.with_tokens(x, t)
    network.compile(backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(network.with_tokens(x, t), expected)
    torch.testing.assert_close(network(x, t), expected[0])


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"patch": 5}, "patch 5 does not divide the resolution 16"),
        ({"width": 36, "num_heads": 5}, "num_heads 5"),
        ({"width": 30, "num_heads": 5}, "width 30"),
        ({"align": {"layer": 4, "channels": 8}}, "layer 4: there are layers 1 to 3"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(more, named):
    with pytest.raises(ValueError) as error:
        small(**more)
    assert named in str(error.value)
