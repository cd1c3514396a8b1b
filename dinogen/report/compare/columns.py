"""The columns that a comparison knows: names, headings, and how their values are written."""

from __future__ import annotations

from dataclasses import dataclass

from dinogen.report.compare.model import Number

# (heading, ((name, label), ...)) in the order of the table; what is not named here comes after.
MEASURED: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    (
        "Inception",
        (
            ("fid", "FID"),
            ("kid", "KID"),
            ("is", "IS"),
            ("precision", "precision"),
            ("recall", "recall"),
            ("density", "density"),
            ("coverage", "coverage"),
            ("memorisation", "memorisation"),
        ),
    ),
    (
        "Inception-768",
        (
            ("fid768", "FID-768"),
            ("kid768", "KID-768"),
            ("precision768", "precision"),
            ("recall768", "recall"),
            ("density768", "density"),
            ("coverage768", "coverage"),
            ("memorisation768", "memorisation"),
        ),
    ),
    (
        "DINOv2",
        (
            ("fd_dinov2", "FD-DINOv2"),
            ("kd_dinov2", "KD-DINOv2"),
            ("precision_dinov2", "precision"),
            ("recall_dinov2", "recall"),
            ("density_dinov2", "density"),
            ("coverage_dinov2", "coverage"),
            ("memorisation_dinov2", "memorisation"),
        ),
    ),
    (
        "Face detector",
        (
            ("faces", "faces"),
            ("fd_onet", "FD-O-Net"),
            ("kd_onet", "KD-O-Net"),
            ("precision_onet", "precision"),
            ("recall_onet", "recall"),
            ("density_onet", "density"),
            ("coverage_onet", "coverage"),
            ("memorisation_onet", "memorisation"),
        ),
    ),
    (
        "Diversity",
        (("lpips_diversity", "LPIPS diversity"), ("guide_diversity", "guide diversity")),
    ),
    ("Detail", (("spectrum", "spectrum, dB"), ("sharpness", "sharpness"))),
    ("Prompts", (("clip_score", "CLIP score"), ("clip_retrieval", "retrieval"))),
    (
        "Reconstruction",
        (
            ("reconstruction_lpips", "LPIPS"),
            ("reconstruction_psnr", "PSNR, dB"),
            ("reconstruction_ssim", "SSIM"),
        ),
    ),
)
COSTS: tuple[tuple[str, str], ...] = (
    ("num_parameters", "parameters, M"),
    ("nimg", "images seen, k"),
    ("seconds", "training, h:m:s"),
    ("gpu_hours", "GPU hours"),
    ("cpu_hours", "CPU hours"),
    ("peak_memory_mb", "peak memory, MiB"),
    ("training_images_per_s", "training, images/s"),
    ("sampling_images_per_s", "sampling, images/s"),
)


@dataclass(frozen=True)
class Column:
    """One kind of number over all runs.

    Attributes:
        name: as in :class:`Number`.
        label: heading.
        group: heading above several columns.
        better: ``lower``, ``higher`` or ``none``.
        decimals: shown.
        comparable: False where fingerprints, counts or devices differ: then none is the best.
        counts: samples and reference pictures where they are the same for all, else empty.
        best: names of the runs with the best value.
        near: names of those whose distance from the best is within two spreads.
    """

    name: str
    label: str
    group: str
    better: str
    decimals: int
    comparable: bool = True
    counts: str = ""
    best: tuple[str, ...] = ()
    near: tuple[str, ...] = ()

    @property
    def full_label(self) -> str:
        """The label, with the feature extractor where others have a column of the same label."""
        needs = self.label in ("precision", "recall", "density", "coverage", "memorisation")
        return (
            f"{self.label} ({self.group})"
            if needs or self.group == "Reconstruction"
            else self.label
        )

    @property
    def arrow(self) -> str:
        """Which way is better."""
        return {"lower": "↓", "higher": "↑"}.get(self.better, "")

    def show(self, number: Number | None) -> str:
        """The value as text, a dash where there is none."""
        if number is None or number.value is None:
            return "–"
        return self.text(number.value)

    def text(self, value: float) -> str:
        """Any value or spread of the column as text."""
        if self.name == "num_parameters":
            return f"{value / 1e6:,.2f}"
        if self.name == "nimg":
            return f"{value / 1e3:,.1f}"
        if self.name == "seconds":
            minutes, rest = divmod(round(value), 60)
            return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
        return f"{value:,.{self.decimals}f}".replace("-", "−")


def label_of(name: str) -> str:
    """What a number is called where its heading is not beside it."""
    for group, names in (*MEASURED, ("Cost", COSTS)):
        for one, label in names:
            if one == name:
                return Column(name, label, group, "none", 0).full_label
    return name


def show_counts(number: Number) -> str:
    """How many pictures stand behind a number, in words; empty where that says nothing."""
    if number.num_samples is None:
        return ""
    if number.num_reference is None:
        return f"n {number.num_samples:,}"
    return f"n {number.num_samples:,} / {number.num_reference:,}"


def all_digits(value: float) -> str:
    """A number as it was written, without the point of a whole one."""
    return str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)
