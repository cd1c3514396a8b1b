"""The one table of metrics: by which feature extractor, from what, how, and which way is better."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, partial

from torch import Tensor

from dinogen.errors import ConfigError
from dinogen.metrics.collect import Seen
from dinogen.metrics.extractors.onet import FACE
from dinogen.metrics.extractors.spectrum import sharpness, spectrum_distance
from dinogen.metrics.frechet import frechet_of, frechet_spread
from dinogen.metrics.inception_score import inception_score
from dinogen.metrics.kernel import kernel_distance
from dinogen.metrics.manifold import Manifold, manifold
from dinogen.metrics.memorisation import memorisation
from dinogen.metrics.prompted import BETTER as PROMPTED
from dinogen.metrics.reconstruction import BETTER as RECONSTRUCTION
from dinogen.metrics.value import Better, Estimate, halves, standard_deviation


@dataclass(frozen=True)
class Sets:
    """What one feature extractor saw of everything that its metrics read.

    Attributes:
        generated: the images measured.
        real: those compared with; None if no metric needs them.
        train: those trained on; None if no metric needs them.
        num_halves: halves of the generated images that spreads are taken over.
        seed: of the halves.
    """

    generated: Seen
    real: Seen | None
    train: Seen | None
    num_halves: int
    seed: int

    @cached_property
    def manifold(self) -> Manifold:
        """Precision, recall, density and coverage come from the same distances."""
        real = _rows(self.real)
        return manifold(_rows(self.generated), real, self.num_halves, self.seed)


@dataclass(frozen=True)
class Metric:
    """One metric under one feature extractor.

    Attributes:
        extractor: name of the feature extractor.
        better: which way is better.
        estimate: computes it.
        real: ``moments`` or ``rows`` of real images are needed, or None of them at all.
        rows: generated features are needed row by row, even if no spread is requested.
        train: features of the training images are needed too.
        covariance: that of the features is compared, which takes more images than dimensions.
    """

    extractor: str
    better: Better
    estimate: Callable[[Sets], Estimate]
    real: str | None = "rows"
    rows: bool = True
    train: bool = False
    covariance: bool = False


def _rows(seen: Seen | None) -> Tensor:
    """Features, which the caller has requested to be kept."""
    assert seen is not None and seen.features is not None
    return seen.features


def _frechet(sets: Sets) -> Estimate:
    assert sets.real is not None
    generated, reference = sets.generated, sets.real.moments
    value = frechet_of(generated.moments, reference)
    if generated.features is None:
        return Estimate(value, None)
    return Estimate(
        value, frechet_spread(generated.features, reference, sets.num_halves, sets.seed)
    )


def _kernel(sets: Sets) -> Estimate:
    generated, real = _rows(sets.generated), _rows(sets.real)
    return kernel_distance(generated, real, sets.num_halves, sets.seed)


def _of_spectra(compare: Callable[[Tensor, Tensor], float], sets: Sets) -> Estimate:
    """A metric value of the two mean spectra."""
    assert sets.real is not None
    real, rows = sets.real.moments.mean(), sets.generated.features
    parts = [] if rows is None else halves(len(rows), sets.num_halves, sets.seed)
    values = [compare(rows[half].double().mean(0), real) for half in parts if rows is not None]
    value = compare(sets.generated.moments.mean(), real)
    return Estimate(value, standard_deviation(values))


def _inception_score(sets: Sets) -> Estimate:
    assert sets.generated.logits is not None
    return inception_score(sets.generated.logits)


def _faces(sets: Sets) -> Estimate:
    """Mean probability of a face, and its standard error."""
    assert sets.generated.logits is not None
    chance = sets.generated.logits.double().softmax(1)[:, FACE]
    return Estimate(float(chance.mean()), float(chance.std() / len(chance) ** 0.5))


def _manifold(name: str, sets: Sets) -> Estimate:
    found: Estimate = getattr(sets.manifold, name)
    return found


def _memorisation(sets: Sets) -> Estimate:
    generated, train, real = _rows(sets.generated), _rows(sets.train), _rows(sets.real)
    return memorisation(generated, train, real, sets.num_halves, sets.seed).ratio


def _of_extractor(extractor: str, frechet: str, kernel: str, suffix: str) -> dict[str, Metric]:
    """The metrics that every feature extractor has, by name."""
    shares = ("precision", "recall", "density", "coverage")
    return {
        frechet: Metric(extractor, "lower", _frechet, real="moments", rows=False, covariance=True),
        kernel: Metric(extractor, "lower", _kernel),
        **{
            f"{name}{suffix}": Metric(extractor, "higher", partial(_manifold, name))
            for name in shares
        },
        # near 1 is as it should be, and both ways from there are worse
        f"memorisation{suffix}": Metric(extractor, "none", _memorisation, train=True),
    }


_SPECTRAL: tuple[tuple[str, Better, Callable[[Tensor, Tensor], float]], ...] = (
    ("spectrum", "lower", spectrum_distance),
    # near 1 is as it should be
    ("sharpness", "none", sharpness),
)
OF_FEATURES = {
    "is": Metric("inception", "higher", _inception_score, real=None),
    **_of_extractor("inception", "fid", "kid", ""),
    **_of_extractor("inception768", "fid768", "kid768", "768"),
    **_of_extractor("dinov2", "fd_dinov2", "kd_dinov2", "_dinov2"),
    **_of_extractor("onet", "fd_onet", "kd_onet", "_onet"),
    "faces": Metric("onet", "higher", _faces, real=None),
    **{
        name: Metric("spectrum", way, partial(_of_spectra, compare), real="moments", rows=False)
        for name, way, compare in _SPECTRAL
    },
}
# Measured by other means than rows of a feature extractor.
LPIPS_DIVERSITY = "lpips_diversity"
GUIDE_DIVERSITY = "guide_diversity"
OTHERS: dict[str, Better] = {
    LPIPS_DIVERSITY: "higher",
    **RECONSTRUCTION,
    **PROMPTED,
    # as much as real images differ is as it should be
    GUIDE_DIVERSITY: "none",
}
NAMES = ("fid", *(name for name in OF_FEATURES if name != "fid"), *OTHERS)


def better(name: str) -> Better:
    """Which way a metric is better."""
    return OF_FEATURES[name].better if name in OF_FEATURES else OTHERS[name]


def chosen_names(names: Iterable[str], key: str) -> tuple[str, ...]:
    """Names in the order of the table; all of them if none is given.

    Args:
        names: as the user wrote them.
        key: where, named in errors.

    Raises:
        ConfigError: one is not known; gives the nearest that is.
    """
    asked = list(names)
    for name in asked:
        if name not in NAMES:
            near = difflib.get_close_matches(name, NAMES, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ConfigError(f"{key}: no metric {name!r}: {hint}there are {', '.join(NAMES)}")
    return tuple(name for name in NAMES if name in asked or not asked)
