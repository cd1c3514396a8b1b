"""Studies whose commands are played, and a real one of tiny runs, in processes quick to start."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import traceback
from pathlib import Path

import psutil
import yaml

from dinogen.config import Config, StageConfig, load_config
from dinogen.features.dinov2 import make_random_dinov2
from dinogen.runs.fingerprint import fingerprint_id
from tests import forked
from tests.families.tiny import TINY, pack_discs

METRIC = "fid"


def write_study(folder: Path, data: Path | None = None, **more) -> Path:
    """A study of two tracks, ``gan`` with two seeds and ``vae``, in YAML files of ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    if data is None:
        data = folder / "data"
        if not data.exists():
            pack_discs(data)
    for name, family in {"a": "dcgan", "b": "wgan_gp", "c": "vae", "d": "vae_gan"}.items():
        config = {
            "run": str(folder / "outside" / name),
            "data": {"path": str(data)},
            "family": {"name": family} | ({"d_layers": 1} if family == "vae_gan" else {}),
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
        metric values: of a run, by its id; 1 unless given, and a text is why there is none.
        fingerprints: the facts of a run's metric value, by its id; the same ones unless given.
        speeds: images per second of a short run that is timed, by its id; 50 unless given.
        done: what was done, in order: ``gan/a-seed0 train``.
    """

    def __init__(self, study: Path) -> None:
        self.folder = Path(yaml.safe_load(study.read_text())["folder"])
        self.codes: dict[tuple[str, str], int] = {}
        self.metric_values: dict[str, float | str] = {}
        self.fingerprints: dict[str, dict] = {}
        self.speeds: dict[str, float] = {}
        self.done: list[str] = []

    def start(self, command: list[str], env: dict[str, str], log: Path) -> Player.Process:
        """In the place of ``launch.study.run.start``."""
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
            if run.startswith(".speed/"):
                self._log_steps(run, config, stage, nimg - stage.num_images)
        (self.folder / run / "config.yaml").write_text("{}")

    def _log_steps(self, run: str, config: Config, stage: StageConfig, start: int) -> None:
        """Log lines as training writes them at its speed; the first, that warms up, is slow."""
        every = round(config.log.every_kimg * 1000)
        speed, lines = self.speeds.get(run, 50.0), []
        for nimg in range(every, stage.num_images + 1, every):
            seconds = 60 + (nimg - every) / speed
            lines.append(json.dumps({"nimg": start + nimg, "training_s": seconds}) + "\n")
        (self._stage(run, stage.resolution) / "stats.jsonl").write_text("".join(lines))

    def _evaluate(self, run: str, config: Config) -> None:
        given = self.metric_values.get(run, 1.0)
        facts = self.fingerprints.get(run, {"data": "abc"})
        metric_value = {
            "name": METRIC,
            "value": None if isinstance(given, str) else given,
            "reason": given if isinstance(given, str) else None,
            "better": "lower",
            "fingerprint": fingerprint_id(facts),
        }
        found = {"measured": {METRIC: metric_value}, "fingerprints": {fingerprint_id(facts): facts}}
        self._write(run, config, "evaluation.json", found)

    def _look(self, run: str, config: Config) -> None:
        nimg = sum(stage.num_images for stage in config.stages)
        self._write(run, config, "visualizations/visualizations.json", {"grid16": {"nimg": nimg}})

    def _write(self, run: str, config: Config, name: str, facts: dict) -> None:
        nimg = sum(stage.num_images for stage in config.stages)
        more = {} if name.startswith("visualizations") else {"nimg": nimg}
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


def tiny_study(folder: Path) -> Path:
    """Four tiny families on discs; two runs are long enough to be killed in their midst."""
    pack_discs(folder / "discs")
    make_random_dinov2(folder / "extractor", seed=0, hidden_size=16, num_layers=1, num_heads=2)
    for name in ("dcgan", "wgan_gp", "vae", "vae_gan"):
        config = {
            "run": str(folder / "outside" / name),
            "data": {"path": str(folder / "discs"), "num_threads": 0},
            "family": {"name": name, **TINY[name]},
            "stages": [{"resolution": 16, "kimg": 0.032, "batch": 8, "lr": 1e-3}],
            "log": {"every_kimg": 0.4, "probe_kimg": 1, "samples_kimg": 1, "num_samples": 4},
            "checkpoint": {"every_kimg": 0.16},
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    long = ["stages.0.kimg=0.96"]
    study = {
        "folder": str(folder / "study"),
        "title": "Discs",
        "metric": "fd_dinov2",
        "overrides": [
            "metrics.names=[fd_dinov2]",
            "metrics.num_samples=8",
            f"metrics.dinov2={folder / 'extractor'}",
            f"metrics.cache={folder / 'cache'}",
        ],
        "tracks": {
            "gan": {"configs": ["dcgan.yaml", {"config": "wgan_gp.yaml", "overrides": long}]},
            "vae": {"configs": [{"config": "vae.yaml", "overrides": long}, "vae_gan.yaml"]},
        },
        "final": {"tracks": ["gan"], "epochs": 2},
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(study))
    return path


class Forked:
    """In the place of ``launch.study.run.start``: a command in a fork that has imported already.

    Of the looks only one is made.
    """

    def __init__(self, command: list[str], env: dict[str, str], log: Path) -> None:
        self.code: int | None = None
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid:
            return
        code = 1
        try:
            os.setsid()
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)
            write_to(log)
            code = self._run(command[command.index("launch.cli") + 1 :])
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _run(self, words: list[str]) -> int:
        from dinogen.visualize import drawings, look
        from launch.cli.main import main

        look._makers = lambda scene: {"grid16": drawings.grid16}
        sys.argv = ["dinogen", *words]
        try:
            main()
        except SystemExit as ended:
            return int(ended.code or 0)
        return 0

    def wait(self) -> int:
        if self.code is None:
            self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.code

    def poll(self) -> int | None:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code

    def terminate(self) -> None:
        os.kill(self.pid, signal.SIGTERM)


def write_to(log: Path) -> None:
    """Let this process write into a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)


def run_here(words: list[str], said: Path) -> None:
    """`dinogen study run` in this process; target of :func:`start_study`."""
    os.setsid()
    write_to(said)
    import torch

    from launch.cli.main import main
    from launch.study import run

    torch.set_num_threads(1)
    run.start = Forked
    sys.argv = ["dinogen", "study", "run", *words]
    main()


def start_study(study: Path, said: Path) -> multiprocessing.process.BaseProcess:
    """Start `dinogen study run` in a process of its own, which leads a group of its own."""
    process = forked.context().Process(target=run_here, args=([str(study)], said))
    process.start()
    return process


def kill_all(pid: int) -> None:
    """As a power cut does: the process and all that it has started, at once."""
    family = psutil.Process(pid).children(recursive=True)
    os.killpg(pid, signal.SIGKILL)
    for child in family:
        child.kill()
    psutil.wait_procs(family, 10)
