"""The section ``notes:`` of a config: its line in the story that a comparison tells of a family."""

from __future__ import annotations

from pydantic import ConfigDict, Field

from dinogen.config_section import Section


class NotesConfig(Section):
    """What a run is for and what came of it, in one's own words; nothing is computed from it."""

    # step: 2 is written as a number
    model_config = ConfigDict(extra="forbid", validate_default=True, coerce_numbers_to_str=True)

    step: str | None = Field(
        None, description="its place in the story of the family; rows are sorted by it: 1, 2, 2b"
    )
    change: str | None = Field(None, description="what it does otherwise than the step before")
    failed: str | None = Field(None, description="what did not work, once that is known")
    next: str | None = Field(None, description="what to try next, once that is known")
