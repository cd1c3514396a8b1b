"""The section ``cluster:`` of a config: what each SLURM job of a run asks for."""

from __future__ import annotations

from dinogen.config_section import Section


class ClusterConfig(Section):
    """SLURM resources of the jobs of a run."""
