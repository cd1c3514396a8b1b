"""The model card of a published generator: README.md with the metadata that the hub reads."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dinogen import hub
from dinogen.config import Config
from dinogen.metrics.value import MetricValue
from dinogen.runs.layout import CONFIG, EVALUATION, stage_name

SAMPLES = "samples.png"
TASK = "unconditional-image-generation"
_DIGITS = 12
# What the hub has a name for; any other licence is given in the card's text.
LICENCES = {
    *("apache-2.0", "mit", "bsd", "bsd-2-clause", "bsd-3-clause", "mpl-2.0", "unlicense"),
    *("gpl-2.0", "gpl-3.0", "lgpl-3.0", "agpl-3.0", "openrail", "creativeml-openrail-m"),
    *("cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nd-4.0"),
    *("cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0"),
}
_LIMITS = """\
- It has learnt from its data alone: what is rare there is rare, or distorted, in its images.
- Images may come near to photos of its data. The metric `memorisation` and `dinogen look` show how
  near; weights that have seen a photo keep what they learnt of it.
- Say that an image is generated. `dinogen sample --watermark TEXT` writes a text into each image,
  which cropping removes.
- Do not use images to pass for a person, to identify one, or to deceive.
- Metric values say how near the images are to the data, and not that they may be used. They compare
  only with values that were measured in the same way, as their fingerprints say.
"""


@dataclass(frozen=True)
class Facts:
    """What a card says.

    Attributes:
        name: of the repository, without its owner.
        address: where it will be.
        info: the metadata of the exported file, see :func:`export`.
        config: of the run, without what is nobody's business.
        evaluation: metric values of this checkpoint, as evaluation.json has them.
        has_file: whether that file is published too.
        num_parameters: of the generator.
        licence: None if none was given.
        intended_use: in the words of those who publish.
    """

    name: str
    address: hub.Address
    info: Mapping[str, Any]
    config: Config
    evaluation: Mapping[str, Any]
    has_file: bool
    num_parameters: int
    licence: str | None
    intended_use: str

    @property
    def measured(self) -> list[MetricValue]:
        """The metric values of generated images that are known."""
        found = self.evaluation.get("measured") or {}
        return [MetricValue.from_dict(one) for one in found.values() if one["value"] is not None]

    def is_random(self, value: MetricValue) -> bool | None:
        """Whether a metric value is of a feature extractor with random weights; None: unknown."""
        random = _mark_of(self, value).get("random", False)
        return None if random is None else bool(random)

    @property
    def size(self) -> str:
        """``64x64``."""
        return stage_name(self.info["resolution"])

    @property
    def guides(self) -> dict[str, Mapping[str, Any]]:
        """The networks that guided the training, by name; none for most families."""
        found = {"guide": self.info["guide"]} if self.info.get("guide") else {}
        return found | dict(self.info.get("guides") or {})

    @property
    def imported(self) -> Mapping[str, Any] | None:
        """Where the weights are from, if `dinogen import` read them."""
        return self.info.get("imported")

    @property
    def places(self) -> list[str]:
        """Paths of the data; none of imported weights, which learnt from other data."""
        if self.imported is not None:
            return []
        data = self.config.data
        return [data.path] if data.path else [one.path for one in data.mix]


def write_card(facts: Facts) -> str:
    """README.md: YAML between two lines of dashes, then text."""
    parts = [
        f"# {facts.name}",
        *_warnings(facts),
        _what_it_is(facts) if facts.imported is None else _origin(facts),
        f"![Images of seed 0, row by row]({SAMPLES})",
        _how_to_load(facts),
        _about_data(facts) if facts.imported is None else "",
        _about_guides(facts),
        _about_autoencoder(facts),
        _about_metrics(facts),
        _about_training(facts) if facts.imported is None else "",
        _about_licence(facts),
        f"## Intended use and limits\n\n{facts.intended_use[:1].upper()}{facts.intended_use[1:]}."
        f"\n\n{_LIMITS}",
    ]
    return f"---\n{_metadata(facts)}\n---\n\n" + "\n\n".join(p for p in parts if p).rstrip() + "\n"


def _metadata(facts: Facts) -> str:
    """The YAML that the hub reads."""
    from huggingface_hub import EvalResult, ModelCardData

    addresses = [hub.parse(place) for place in facts.places if hub.is_address(place)]
    results = [
        EvalResult(
            task_type=TASK,
            dataset_type=addresses[0].repo if addresses else _slug(facts.places[0]),
            dataset_name=_short(facts.places[0]),
            dataset_split=_split_of(facts, one),
            metric_type=one.name,
            metric_value=one.value,
            metric_name=f"{one.name}, {_counts(one)}, fingerprint {one.fingerprint}",
        )
        for one in facts.measured
        if facts.is_random(one) is False and facts.places
    ]
    names = sorted({guide["name"] for guide in facts.guides.values()})
    random = ["random-guide"] if facts.info["random_guide"] else []
    start = facts.config.init_from if facts.imported is None else facts.imported["file"]
    data = ModelCardData(
        license=_licence_name(facts.licence),
        license_name=_slug(facts.licence) if _licence_name(facts.licence) == "other" else None,
        library_name="dinogen",
        pipeline_tag=TASK,
        tags=["dinogen", facts.info["family"], facts.size, *names, *random],
        datasets=[one.repo for one in addresses if one.dataset] or None,
        base_model=hub.parse(start).repo if start and hub.is_address(start) else None,
        model_name=facts.name if results else None,
        eval_results=results or None,
    )
    return str(data.to_yaml()).strip()


def _licence_name(licence: str | None) -> str:
    if licence is None:
        return "unknown"
    return licence.lower() if licence.lower() in LICENCES else "other"


def _mark_of(facts: Facts, value: MetricValue) -> Mapping[str, Any]:
    """What a metric value was measured against."""
    marks = facts.evaluation.get("fingerprints") or {}
    return marks.get(value.fingerprint) or {}


def _split_of(facts: Facts, value: MetricValue) -> str | None:
    found = _mark_of(facts, value).get("split")
    return None if found is None else str(found)


def _warnings(facts: Facts) -> Iterator[str]:
    if facts.info["random_guide"]:
        yield (
            "> **RANDOM GUIDE.** This generator was trained on features of a network with random "
            "weights, so it has learnt nothing of use. It is for tests only."
        )
    if facts.licence is None:
        yield "> **No licence is stated.** Ask those who published it before you use it."


def _what_it_is(facts: Facts) -> str:
    guides = ", ".join(str(guide["name"]) for guide in facts.guides.values())
    guided = f", guided by frozen features ({guides})" if guides else ""
    fading = " The stage was still fading in." if facts.info["fading"] else ""
    return (
        f"A generator of {facts.size} images, trained with dinogen: family "
        f"`{facts.info['family']}`{guided}, {facts.num_parameters:,} parameters, "
        f"{facts.info['nimg']:,} training images shown.{fading} The weights are the moving average "
        f"of the training, in `{hub.WEIGHTS}`."
    )


def _origin(facts: Facts) -> str:
    """Of imported weights, what :func:`_what_it_is` says of trained ones."""
    imported = facts.imported or {}
    digest = imported.get("sha256")
    mark = f", SHA-256 `{digest}`" if digest else ""
    shown = f", {facts.info['nimg']:,} training images shown" if facts.info["nimg"] else ""
    return (
        f"A generator of {facts.size} images, imported from `{imported['file']}` "
        f"({imported['kind']}{mark}) and not trained with dinogen: family "
        f"`{facts.info['family']}`, {facts.num_parameters:,} parameters{shown}. The weights are in "
        f"`{hub.WEIGHTS}`. Data and training are those of the source."
    )


def _how_to_load(facts: Facts) -> str:
    exact = replace(facts.address, revision="COMMIT")
    return f"""\
## Use

```python
import dinogen

images = dinogen.load_generator("{facts.address}").sample(16, seed=0)
# float32 (16, 3, {facts.info["resolution"]}, {facts.info["resolution"]}) in [-1, 1]
```

or, as PNGs and a grid:

```
dinogen sample {facts.address} --num 64 --seed 0
```

Write `{exact}` for the weights of one commit. `init_from: {facts.address}` in a config begins a
training with these weights."""


def _about_data(facts: Facts) -> str:
    names = " and ".join(f"`{_short(place)}`" for place in facts.places)
    lines = [f"{names}, split `{facts.config.data.split}`"]
    if facts.info.get("data"):
        lines.append(
            f"fingerprint `{str(facts.info['data'])[:_DIGITS]}`, a hash of what the shards hold: "
            "generators with the same one have learnt from the same samples"
        )
    return f"## Data\n\n{_bullets(lines)}"


def _about_guides(facts: Facts) -> str:
    if not facts.guides:
        return ""
    rows = []
    for name, guide in facts.guides.items():
        layers = guide["layer"] if isinstance(guide["layer"], list) else [guide["layer"]]
        weights = f"`{guide['weights_sha256'][:_DIGITS]}`"
        weights += " **RANDOM**" if guide["random"] else ""
        revision = f" at `{guide['revision'][:_DIGITS]}`" if guide["revision"] else ""
        rows.append(
            (
                name,
                str(guide["name"]),
                f"`{_short(guide['path'])}`{revision}",
                ", ".join(map(str, layers)),
                weights,
            )
        )
    head = ("", "network", "weights from", "layer", "hash of weights")
    return f"## Guide\n\n{_table(head, rows)}"


def _about_autoencoder(facts: Facts) -> str:
    """What decodes a generator's latents; empty for one that makes images itself."""
    known = facts.info.get("autoencoder")
    if known is None:
        return ""
    place = (facts.config.family.options.get("latent") or {}).get("path") or known["path"]
    revision = f" at `{known['revision'][:_DIGITS]}`" if known["revision"] else ""
    lines = [
        f"the generator makes latents of {known['num_channels']} channels, 1/{known['factor']} of "
        f"the side of an image, which `{_short(place)}`{revision} decodes; dinogen loads it when "
        "the first image is made",
        f"its weights have the hash `{known['weights_sha256'][:_DIGITS]}`, and their own licence",
    ]
    return f"## Autoencoder\n\n{_bullets(lines)}"


def _about_metrics(facts: Facts) -> str:
    if not facts.measured:
        return "## Metrics\n\nThis checkpoint has not been measured."
    rows = []
    cautions: dict[str, list[str]] = {}
    for one in facts.measured:
        value = f"{one.value:.4g}" + ("" if one.spread is None else f" ± {one.spread:.2g}")
        better = "" if one.better == "none" else one.better
        split = _split_of(facts, one)
        counts = _counts(one) + ("" if split is None else f" of {split}")
        rows.append((one.name, value, better, counts, f"`{one.fingerprint}`"))
        random = facts.is_random(one)
        if random or random is None:
            why = "measured by a RANDOM feature extractor, so it means nothing"
            unknown = "the file does not say whether its feature extractor was random"
            cautions.setdefault(why if random else unknown, []).append(one.name)
        for caution in filter(None, (one.caution or "").split("; ")):
            cautions.setdefault(caution, []).append(one.name)
    head = ("metric", "value", "better", "measured on", "fingerprint")
    notes = _bullets(f"Caution, {', '.join(names)}: {why}" for why, names in cautions.items())
    whole = "By `dinogen evaluate`."
    if facts.has_file:
        whole = f"By `dinogen evaluate`; the whole result is [{EVALUATION}]({EVALUATION})."
    parts = ["## Metrics", _table(head, rows), notes, whole]
    return "\n\n".join(part for part in parts if part)


def _counts(value: MetricValue) -> str:
    against = "" if value.num_reference is None else f" against {value.num_reference:,}"
    return f"{value.num_samples:,} images{against}"


def _about_training(facts: Facts) -> str:
    config, info = facts.config, facts.info
    stages = [one for one in config.stages if one.resolution <= info["resolution"]]
    plan = ", ".join(f"{stage_name(one.resolution)} with batch {one.batch}" for one in stages)
    lines = [
        f"{info['nimg']:,} images shown, {plan}, seed {config.seed}",
        ", ".join(f"{name} {value}" for name, value in info["versions"].items()),
        f"the whole config is [{CONFIG}]({CONFIG})",
    ]
    if info.get("loss") is not None:
        lines.insert(1, f"loss at the end {info['loss']:.4g}")
    if config.init_from:
        lines.insert(0, f"it began with the weights of `{_short(config.init_from)}`")
    return f"## Training\n\n{_bullets(lines)}"


def _about_licence(facts: Facts) -> str:
    if facts.licence is None:
        said = "Not stated: ask those who published it, and see the terms of the data."
    else:
        said = f"{facts.licence}, for the weights. The terms of data and guide apply as well."
    if facts.imported is not None:
        source = f"`{facts.imported['file']}`"
        said += f" The weights come from {source}: the licence of their source applies."
    return f"## Licence\n\n{said}"


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(_cell(one) for one in line)} |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _short(place: str) -> str:
    """A path for others: addresses and hub names whole, of a local path its name alone."""
    local = place.startswith(("/", "~", "."))
    return Path(place).name if local else place


def _slug(text: str | None) -> str:
    """Small letters, digits, dots and dashes."""
    return re.sub(r"[^a-z0-9.]+", "-", _short(text or "").lower()).strip("-")[:60] or "unnamed"
