"""What every section of a config is: a pydantic model that refuses unknown keys."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """One mapping of the YAML file; refuses keys that it does not declare."""

    model_config = ConfigDict(extra="forbid", validate_default=True)
