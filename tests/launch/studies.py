"""Studies whose commands are played: they leave a run's files, and fail where they are told."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from dinogen.config import Config, load_config

METRIC = "fid"


def write_study(folder: Path, data: Path | None = None, **more) -> Path:
    """A study of two tracks, ``gan`` with two seeds and ``vae``, in YAML files of ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    if data is None:
        data = folder / "data"
        data.mkdir(exist_ok=True)
        (data / "manifest.json").write_text('{"splits": {"train": {}, "val": {}}}')
    for name, family in {"a": "dcgan", "b": "wgan_gp", "c": "vae", "d": "vae_gan"}.items():
        config = {
            "run": str(folder / "outside" / name),
            "data": {"path": str(data)},
            "family": {"name": family},
            "stages": [{"resolution": 16, "kimg": 2, "batch": 8}],
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    study = {
        "folder": str(folder / "study"),
        "metric": METRIC,
        "tracks": {
            "gan": {"configs": ["a.yaml", "b.yaml"], "seeds": [0, 1]},
            "vae": {"configs": ["c.yaml", {"config": "d.yaml", "name": "dd"}]},
        },
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(study | more))
    return path


class Player:
    """Stands for the commands of a study.

    Attributes:
        codes: what (run, step) ends with; 0 unless given.
        figures: of a run, by its id; 1 unless given, and a text is why there is none.
        fingerprints: of a run's figure.
        done: what was done, in order: ``gan/a-seed0 train``.
    """

    def __init__(self, study: Path) -> None:
        self.folder = Path(yaml.safe_load(study.read_text())["folder"])
        self.codes: dict[tuple[str, str], int] = {}
        self.figures: dict[str, float | str] = {}
        self.fingerprints: dict[str, str] = {}
        self.done: list[str] = []

    def start(self, command: list[str], env: dict[str, str], log: Path) -> Player.Process:
        """In the place of ``launch.study_local.start``."""
        step, what = command[command.index("launch.cli") + 1 :][:2]
        below = self.folder / "configs" if step == "train" else self.folder
        run = str(Path(what).relative_to(below)).removesuffix(".yaml")
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(f"what {step} says\n")
        return self.Process(self.play(run, step))

    def play(self, run: str, step: str) -> int:
        """Do a step; its exit code."""
        self.done.append(f"{run} {step}")
        code = self.codes.get((run, step), 0)
        config = load_config(self.folder / "configs" / f"{run}.yaml")
        if code == 0:
            getattr(self, f"_{step}")(run, config)
        return code

    def _train(self, run: str, config: Config) -> None:
        nimg = 0
        for stage in config.stages:
            nimg += stage.num_images
            result = {
                "nimg": nimg,
                "family": config.family.name,
                "images_per_s": 50.0,
                "world_size": 2,
                "device": "cpu",
            }
            write(self._stage(run, stage.resolution) / "result.json", result)
        (self.folder / run / "config.yaml").write_text("{}")

    def _evaluate(self, run: str, config: Config) -> None:
        given = self.figures.get(run, 1.0)
        figure = {
            "name": METRIC,
            "value": None if isinstance(given, str) else given,
            "reason": given if isinstance(given, str) else None,
            "better": "lower",
            "fingerprint": self.fingerprints.get(run, "abc"),
        }
        self._write(run, config, "evaluation.json", {"measured": {METRIC: figure}})

    def _look(self, run: str, config: Config) -> None:
        nimg = sum(stage.num_images for stage in config.stages)
        self._write(run, config, "looks/looks.json", {"grid16": {"nimg": nimg}})

    def _write(self, run: str, config: Config, name: str, facts: dict) -> None:
        nimg = sum(stage.num_images for stage in config.stages)
        more = {} if name.startswith("looks") else {"nimg": nimg}
        write(self._stage(run, config.stages[-1].resolution) / name, more | facts)

    def _stage(self, run: str, size: int) -> Path:
        return self.folder / run / f"{size}x{size}"

    class Process:
        """A command that has ended."""

        pid = 0

        def __init__(self, code: int) -> None:
            self.code = code

        def poll(self) -> int:
            return self.code

        def wait(self) -> int:
            return self.code

        def terminate(self) -> None:
            """It has ended."""


def write(path: Path, facts: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(facts))
