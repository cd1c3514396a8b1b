"""The augmentation pipeline as a whole, and the probability that follows D's signs."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from dinogen.distributed import rng
from dinogen.networks.ada.pipeline import INTERVAL, AugmentProbability, Strengths, augment
from dinogen.networks.ada.transforms import (
    TRANSFORMS,
    TransformDraws,
    blit_matrices,
    color_matrices,
    geometry_matrices,
)

ALL = Strengths(1, 1, 1, 1, 1)
GROUPS = ("blit", "geometry", "color", "filter", "corruption")


def random_images(num=6, size=16):
    return torch.rand(num, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def run(images, p, strengths=ALL, first=0, purpose="ada"):
    return augment(images, p, 0, purpose, torch.arange(first, first + len(images)), strengths)


def test_at_probability_0_the_very_same_images_come_back():
    images = random_images()
    assert torch.equal(run(images, 0.0), images)
    assert torch.equal(run(images, 1.0, Strengths(0, 0, 0, 0, 0)), images)


@pytest.mark.parametrize("group", GROUPS)
def test_each_group_does_something_alone_and_the_paper_s_three_by_default(group):
    images = random_images()
    alone = Strengths(**{name: float(name == group) for name in GROUPS})
    changed = (run(images, 1.0, alone) - images).abs().amax((1, 2, 3)) > 1e-3
    # a flip or a quarter turn may be drawn as none
    assert changed.sum() >= 5
    assert getattr(Strengths(), group) == (1.0 if group in ("blit", "geometry", "color") else 0.0)


@pytest.mark.parametrize("p", [0.3, 1.0])
def test_two_halves_are_the_whole(p):
    images = random_images(8)
    halves = torch.cat([run(images[:5], p), run(images[5:], p, first=5)])
    # to the bit: Adam makes much of little where gradients are small
    assert torch.equal(halves, run(images, p))


def test_purposes_are_independent():
    images = random_images()
    assert not torch.allclose(run(images, 1.0), run(images, 1.0, purpose="other"), atol=0.01)


@pytest.mark.parametrize("p", [0.0, 0.2, 0.7, 1.0])
def test_each_transform_happens_with_its_probability(p):
    drawn = TransformDraws(0, "ada", torch.arange(4000))
    for name in TRANSFORMS:
        assert abs(drawn.happens(name, p).double().mean() - p) < 0.03
        assert stats.kstest(drawn.uniform(name), "uniform").pvalue > 1e-4
        assert stats.kstest(drawn.normal(name, 1), "norm").pvalue > 1e-4


def numbers(position):
    """What is drawn for one sample, looked up by name: uniform, normal."""
    table = rng.uniform(0, "ada", torch.tensor([position]), (len(TRANSFORMS), 3))[0].double()
    rows = dict(zip(TRANSFORMS, table.numpy(), strict=True))
    uniform = {name: row[1:] for name, row in rows.items()}
    return uniform, {name: stats.norm.ppf(row) for name, row in uniform.items()}


def turn(angle):
    c, s = math.cos(angle), math.sin(angle)
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])


def shift(x, y):
    return np.array([[1, 0, x], [0, 1, y], [0, 0, 1]])


@pytest.mark.parametrize("position", [0, 7, 12345])
def test_at_probability_1_the_matrices_are_as_drawn(position):
    """The pseudocode of the paper's appendix, line by line, in numpy."""
    size = 64
    u, n = numbers(position)
    drawn = TransformDraws(0, "ada", torch.tensor([position]))
    M = np.diag([-1.0 if u["flip"][0] < 0.5 else 1.0, 1, 1])
    M = turn(-math.pi / 2 * math.floor(4 * u["rotate_90"][0])) @ M
    whole = [round((2 * u["translate_whole"][i] - 1) / 8 * size) for i in range(2)]
    M = shift(*whole) @ M
    np.testing.assert_allclose(blit_matrices(drawn, 1.0, size)[0], M, atol=1e-9)

    s = math.exp(0.2 * math.log(2) * n["scale"][0])
    M = np.diag([s, s, 1])
    M = turn(-math.pi * (2 * u["rotate_before"][0] - 1)) @ M
    s = math.exp(0.2 * math.log(2) * n["stretch"][0])
    M = np.diag([s, 1 / s, 1]) @ M
    M = turn(-math.pi * (2 * u["rotate_after"][0] - 1)) @ M
    M = shift(*(n["translate"] * size / 8)) @ M
    np.testing.assert_allclose(geometry_matrices(drawn, 1.0, size)[0], M, atol=1e-5)

    b, c = 0.2 * n["brightness"][0], math.exp(0.5 * math.log(2) * n["contrast"][0])
    v = np.array([1, 1, 1]) / math.sqrt(3)
    A, t = c * np.eye(3), c * b * np.ones(3)
    flip = np.eye(3) - 2 * np.outer(v, v) * (u["luma_flip"][0] < 0.5)
    angle = math.pi * (2 * u["hue"][0] - 1)
    K = np.cross(np.eye(3), v)
    hue = np.eye(3) + math.sin(angle) * K + (1 - math.cos(angle)) * K @ K
    s = math.exp(math.log(2) * n["saturation"][0])
    gray = np.outer(v, v) + (np.eye(3) - np.outer(v, v)) * s
    for step in (flip, hue, gray):
        A, t = step @ A, step @ t
    found = color_matrices(drawn, 1.0)[0].numpy()
    np.testing.assert_allclose(found[:3, :3], A, atol=1e-5)
    np.testing.assert_allclose(found[:3, 3], t, atol=1e-5)


def test_one_of_the_two_rotations_happens_with_probability_p():
    drawn = TransformDraws(0, "ada", torch.arange(4000))
    matrices = geometry_matrices(drawn, 0.3, 32)
    drawn_alone = (
        drawn.happens(name, 1 - math.sqrt(0.7)) for name in ("rotate_before", "rotate_after")
    )
    either = next(drawn_alone) | next(drawn_alone)
    turned = matrices[:, 0, 1].abs() > 1e-9
    assert torch.equal(turned, either)
    assert abs(either.double().mean() - 0.3) < 0.03


def test_gradients_reach_the_images_and_can_be_differentiated_again():
    images = random_images().requires_grad_()
    out = run(images, 1.0)
    (gradient,) = torch.autograd.grad(out.square().sum(), images, create_graph=True)
    assert gradient.flatten(1).norm(dim=1).min() > 0
    # out = A x + b, so the gradient is linear in x, and its square has no third derivative
    (second,) = torch.autograd.grad(gradient.square().sum(), images)
    assert torch.isfinite(second).all()
    step = 1e-2 * torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    other = (images.detach() + step).requires_grad_()
    (moved,) = torch.autograd.grad(run(other, 1.0).square().sum(), other)
    change = moved.square().sum() - gradient.square().sum()
    expected = (second * step).sum() + (moved - gradient).square().sum()
    torch.testing.assert_close(change, expected, rtol=0.02, atol=0.02)


def test_it_is_float32_under_autocast():
    images = random_images()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = run(images, 1.0)
    assert torch.equal(mixed, run(images, 1.0))


def follow(signs, p=0.0, batch=32, kimg=10):
    state = AugmentProbability()
    state.p.fill_(p)
    course = []
    for sign in signs:
        state.update(torch.tensor(sign), batch, target=0.6, kimg=kimg)
        course.append(round(state.p.item(), 6))
    return course


def test_p_rises_where_signs_are_above_the_target_and_falls_below():
    step = 32 * INTERVAL / 10_000
    rising = follow([0.9] * 8)
    assert rising == [0, 0, 0, *[round(step, 6)] * 4, round(2 * step, 6)]
    falling = follow([0.1] * 4, p=0.5)
    assert falling == [0.5] * 3 + [round(0.5 - step, 6)]
    # the mean over the interval decides, not its last step
    assert follow([1.0, 1.0, 1.0, -0.5])[-1] > 0
    assert follow([0.5, 0.5, 0.5, 0.8], p=0.5)[-1] < 0.5


def test_p_stays_between_0_and_1_and_each_interval_begins_again():
    assert follow([-1.0] * 8)[-1] == 0
    assert follow([1.0] * 8, p=0.999)[-1] == 1
    up_and_down = follow([1.0] * 4 + [0.59] * 4, p=0.5)
    assert up_and_down[3] > 0.5
    assert up_and_down[-1] == 0.5


def test_from_0_to_1_in_as_many_images_as_said():
    steps = 10_000 // 32
    assert follow([1.0] * steps)[-1] == pytest.approx(1.0, abs=0.02)


def test_it_goes_on_from_its_buffers_in_mid_interval():
    whole, first, second = (AugmentProbability() for _ in range(3))
    for sign in (0.9, 0.2, 0.8, 0.7):
        whole.update(torch.tensor(sign), 32, 0.6, 10)
    for sign in (0.9, 0.2):
        first.update(torch.tensor(sign), 32, 0.6, 10)
    second.load_state_dict(first.state_dict())
    for sign in (0.8, 0.7):
        second.update(torch.tensor(sign), 32, 0.6, 10)
    assert whole.p > 0
    assert torch.equal(second.p, whole.p)


def test_updates_move_p_as_python_would():
    state, p, signs = AugmentProbability(), 0.0, []
    generator = torch.Generator().manual_seed(0)
    for sign in (2 * torch.rand(40, generator=generator) - 0.4).tolist():
        state.update(torch.tensor(sign), 32, target=0.6, kimg=10)
        signs.append(sign)
        if len(signs) == INTERVAL:
            excess = sum(signs) / INTERVAL - 0.6
            p = min(1.0, max(0.0, p + math.copysign(32 * INTERVAL / 10_000, excess)))
            signs = []
        assert state.p.item() == pytest.approx(p, abs=1e-6)
        assert state.num_steps == len(signs)
        assert state.sign_sum.item() == pytest.approx(sum(signs), abs=1e-6)
    assert 0 < p < 1


@pytest.mark.parametrize("chosen", range(3))
def test_of_several_probabilities_the_device_takes_the_one_that_holds(chosen):
    images, several = random_images(24), (0.1, 0.4, 0.9)
    found = augment(images, several, 0, "ada", torch.arange(24), ALL, choice=torch.tensor(chosen))
    torch.testing.assert_close(found, run(images, several[chosen]), rtol=1e-5, atol=1e-5)


class Remote(AugmentProbability):
    """As on a device: the host does not look at p where it is."""

    on_host = False


@pytest.mark.parametrize("undone", [(), (3, 4, 9)])
def test_the_host_follows_p_without_reading_it(monkeypatch, undone):
    """Before D's update it knows p, after it the few values that p can have."""
    ada = Remote()
    reads = []
    monkeypatch.setattr(torch.Tensor, "__float__", lambda self: reads.append(self) or self.item())
    generator, several = torch.Generator().manual_seed(1), 0
    for step in range(60):
        for _ in range(2):  # microbatches
            assert ada.candidates(begins=True) == ((ada.p.item(),), None)
        before = {name: value.clone() for name, value in ada.state_dict().items()}
        ada.update(torch.rand((), generator=generator) + 0.1, 32, target=0.6, kimg=3)
        if step in undone:
            for name, value in before.items():
                getattr(ada, name).copy_(value)
        for _ in range(3):  # phases
            values, choice = ada.candidates(begins=False)
            assert values[0 if choice is None else int(choice)] == ada.p.item()
            several += choice is not None
    assert several >= 30
    assert not reads


def test_what_is_loaded_is_known_at_once():
    ada, other = Remote(), Remote()
    other.p.fill_(0.25)
    other.num_steps.fill_(INTERVAL - 1)
    ada.update(torch.tensor(1.0), 32, 0.6, 10)
    ada.candidates(begins=False)
    ada.load_state_dict(other.state_dict())
    assert ada.candidates(begins=True) == ((0.25,), None)
    ada.update(torch.tensor(1.0), 32, 0.6, 10)
    values, choice = ada.candidates(begins=False)
    assert len(values) == 3
    assert values[int(choice)] == ada.p.item() != 0.25
