"""Keys of ``family:`` for ``name: guided``, and which levels they make a stage read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, model_validator

from dinogen.config import ConfigError, Section, StageConfig
from dinogen.guidance.discriminator_options import DiscriminatorOptions
from dinogen.guidance.terms import MAIN, AnyTerm, Mse, Paired, PairTerm, SetTerm
from dinogen.guidance.text_options import TextOptions

NATIVE_UP_TO = 16
POOLED = (16, 8, 4)


class GuidedOptions(Section):
    """Keys of ``family:`` for ``name: guided``."""

    objectives: tuple[AnyTerm, ...] = Field(
        (Mse(),), min_length=1, description="what is summed: names, weights, options"
    )
    bank: int = Field(
        0,
        ge=0,
        description="so many further reals each step for objectives that compare distributions; "
        "0: as many as are generated",
    )
    discriminator: DiscriminatorOptions | None = Field(
        None, description="trained beside them; none unless given"
    )
    text: TextOptions | None = Field(
        None, description="pictures are asked for by CLIP embeddings; not unless given"
    )
    pyramid: Literal["native", "pooled"] = Field(
        "native",
        description="targets up to 16x16: features of the shrunk picture, or pooled features of "
        "the full one; above 16x16 always pooled",
    )
    grids: dict[str, Annotated[tuple[PositiveInt, ...], Field(min_length=1)]] = Field(
        {},
        description="above 16x16, of main and each of guides:; 16, 8 and 4 unless given. Others, "
        "such as 32 of pixels, are native",
    )
    z_dim: int = Field(512, ge=1, description="size of the latent")
    channel_base: int = Field(16384, ge=4, description="channels at R are base / R ...")
    channel_max: int = Field(512, ge=1, description="... and at most this")
    probe_samples: int = Field(64, ge=2, description="pictures per diversity probe")

    @model_validator(mode="before")
    @classmethod
    def _one_name(cls, values: Any) -> Any:
        # One objective by its name alone; so it was written once.
        if isinstance(values, dict) and "objective" in values and "objectives" not in values:
            values = dict(values)
            values["objectives"] = [{"name": values.pop("objective")}]
        return values

    @model_validator(mode="after")
    def _one_table(self) -> GuidedOptions:
        if sum(isinstance(term, Paired) for term in self.objectives) > 1:
            raise ValueError("objectives: paired once at the most: it says what z is")
        table = self.table
        if table and self.text is not None:
            raise ValueError(
                "objectives: latents that are learnt (num_latents) know no text: leave out one"
            )
        if table and table.num_latents <= self.z_dim:
            raise ValueError(
                f"objectives: num_latents {table.num_latents} has to be more than z_dim "
                f"{self.z_dim}, for a Gaussian is fitted to the latents: a smaller z_dim will do"
            )
        return self

    @model_validator(mode="after")
    def _text_is_heard(self) -> GuidedOptions:
        text = self.text
        if text is None or text.clip_weight:
            return self
        # A pair's real picture is the one that was asked for.
        if not any(
            isinstance(term, PairTerm)
            or (isinstance(term, SetTerm) and "map" in term.views and text.joint_weight)
            for term in self.objectives
        ):
            raise ValueError(
                "text: nothing would teach the generator to heed it: set clip_weight, or "
                "joint_weight with an objective that has the view map"
            )
        return self

    @property
    def table(self) -> Paired | None:
        """The objective whose latents are learnt, if there is one."""
        found = (t for t in self.objectives if isinstance(t, Paired) and t.num_latents)
        return next(found, None)

    def levels(self, stage: StageConfig, further: Iterable[str]) -> tuple[str, ...]:
        """What a stage compares: ``p8`` of the main guide, ``NAME.p8`` of others.

        Args:
            stage: whose resolution decides.
            further: names of the other guides.

        Raises:
            ConfigError: an option names a guide that there is not.
        """
        guides = (MAIN, *further)
        for name in (*self.grids, *(guide for term in self.objectives for guide in term.guides)):
            if name not in guides:
                raise ConfigError(
                    f"family: there is no guide {name}: name one of {', '.join(guides)}, or add it "
                    "to guides:"
                )
        found = []
        for name in guides:
            prefix = "" if name == MAIN else f"{name}."
            if stage.resolution <= NATIVE_UP_TO:
                found.append(f"{prefix}{self.pyramid[0]}{stage.resolution}")
            else:
                grids = self.grids.get(name, POOLED)
                found += [f"{prefix}{'p' if grid in POOLED else 'n'}{grid}" for grid in grids]
        return tuple(found)


def check_sets(options: GuidedOptions, batch: int) -> None:
    """Refuse what objectives that compare distributions cannot work with.

    Args:
        options: of the run.
        batch: size of the global batch.

    Raises:
        ConfigError: naming the key.
    """
    sets = [term.name for term in options.objectives if isinstance(term, SetTerm)]
    if not sets:
        if options.bank:
            raise ConfigError(
                "family.bank: none of family.objectives compares distributions, so a bank of "
                "reals means nothing: leave it out"
            )
        return
    if min(batch, options.bank or batch) < 2:
        raise ConfigError(
            f"family.objectives: {sets[0]} compares distributions, so stages.batch and family.bank "
            "have to be 2 at least"
        )
    paired = any(isinstance(term, Paired) for term in options.objectives)
    if not options.bank and (paired or options.text is not None):
        raise ConfigError(
            f"family.bank: {sets[0]} beside {'paired' if paired else 'text'} needs reals that are "
            "not those that the pictures are made for, or each would be drawn to its own: set it, "
            "to 512 say"
        )
