"""Copies of config and site lines that queued jobs read, so that later edits do not reach them."""

from __future__ import annotations

import hashlib
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from dinogen.config import Config, dump_config
from dinogen.files import write_text


@dataclass(frozen=True)
class Copies:
    """Two files, named after what is in them: other contents make other files.

    Attributes:
        config: the resolved config.
        setup: shell lines: which Python, and what the config's ``cluster.setup`` says.
    """

    config: Path
    config_text: str
    setup: Path
    setup_text: str

    def write(self) -> None:
        """Write both."""
        write_text(self.config, self.config_text)
        write_text(self.setup, self.setup_text)


def make_copies(config: Config, folder: Path) -> Copies:
    """What would be written into ``folder``."""
    text = dump_config(config)
    # The site's lines come last: in a container Python stands elsewhere.
    lines = [f"DINOGEN_PYTHON={shlex.quote(sys.executable)}", *config.cluster.setup]
    setup = "\n".join(lines) + "\n"
    return Copies(
        folder / f"config-{_digest(text)}.yaml", text, folder / f"setup-{_digest(setup)}.sh", setup
    )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
