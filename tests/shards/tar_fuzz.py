"""What a random tar, and a random mishap to a dataset, have to end in; each by its seed."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from shards import Sample, open_dataset, pack
from shards.check.repair import plan_repair, rebuild_indexes
from shards.check.verify import Findings, examine, examine_plain
from shards.errors import ShardsError, show_name
from shards.files import KEPT

from .conftest import make_samples
from .tars import by_dinogen, by_webdataset, damage, draw_entries, tools, write

Known = dict[str, tuple[object, ...]]


def same_as_webdataset(seed: int, folder: Path, program: str) -> str:
    """A tar by `program`: webdataset and dinogen read the same, and it is sound.

    Returns:
        How the tar was made.
    """
    rng = np.random.default_rng(seed)
    path = folder / "train-0.tar"
    how = write(rng, program, draw_entries(rng, 6), path)
    wanted, got = by_webdataset(path), by_dinogen(path)
    assert [key for key, _ in got] == [key for key, _ in wanted], f"seed {seed}: {how}"
    for (key, members), (_, mine) in zip(wanted, got, strict=True):
        # More than webdataset only where tarfile misses the name of a sparse file.
        assert members == ({name: mine[name] for name in members} if "-S" in how else mine), key
    # Where a format had no room for a name, a sample may lack its features: that is no sound tar.
    if wanted and len({"p4.npy" in members for _, members in got}) == 1:
        found = examine_plain(folder)
        assert not found.problems, f"seed {seed}: {how}: {found.problems[0]}"
        rebuild_indexes(folder)
        assert not (again := examine(open_dataset(folder))).problems, (seed, again.problems)
        assert open_dataset(folder).keys() == [key for key, _ in wanted]
    return how


def nothing_is_lost(seed: int, folder: Path) -> str:
    """A dataset with one damaged tar: each sample is read as it was or named; repair keeps the tar.

    Returns:
        What it ended in.
    """
    rng = np.random.default_rng(seed)
    data = folder / "data"
    with_manifest = _make(rng, seed, data)
    before = _read(data)
    tar = sorted(data.glob("*.tar"))[0]
    # In the order of the tar, for what names no sample names the one before it.
    changed, how = damage(rng, tar.read_bytes())
    tar.write_bytes(changed)
    where = f"seed {seed}: {how}"
    found = _examine(data)
    text = "\n".join(map(str, found.problems))
    assert "dinogen shards verify" not in text, where
    named = {problem.key for problem in found.problems}
    if with_manifest:
        # Of words that changed places within one member the sums know nothing: its tar is named.
        unseen = how.startswith("swap") and "another checksum" in text
        _check_read(data, before, set(before) if unseen else named, where)
    elif not found.problems and found.num_samples < len(before):
        # No index knew what was there: whole members that were cut out, or an end that was
        # zeroed, leave a sound tar. All other damage shows.
        left = {key for path in data.glob("*.tar") for key, _ in by_dinogen(path)}
        gone = [
            k for k in before.keys() - left if not any(show_name(k) in line for line in found.notes)
        ]
        assert not gone or how.startswith(("delete", "zero")), where
    ended = _repair(data, tar, changed, before, named, with_manifest, where)
    return f"{how.partition(' ')[0]}: {ended}"


def _make(rng: np.random.Generator, seed: int, data: Path) -> bool:
    """A dataset of one of three kinds; whether it has a manifest."""
    shutil.rmtree(data, ignore_errors=True)
    data.mkdir(parents=True)
    kind = seed % 3
    if kind == 0:
        pack(make_samples(10, png_every=3), data, shard_size=5)
        return True
    program = tools()[seed // 3 % len(tools())]
    for number in range(2):
        # The same draws first, so that both have the same levels and labels.
        entries = draw_entries(np.random.default_rng(seed), 6, number * 6)
        write(rng, program, entries, data / f"train-{number}.tar")
    # A format may have no room for some names: then samples lack members from the start.
    sound = all(map(by_dinogen, data.glob("*.tar"))) and not examine_plain(data).problems
    if not sound:
        shutil.rmtree(data)
        pack(make_samples(10), data, shard_size=5)
        return True
    if kind == 1:
        rebuild_indexes(data)
    return kind == 1


def _examine(data: Path) -> Findings:
    plain = not (data / "manifest.json").exists()
    return examine_plain(data) if plain else examine(open_dataset(data))


def _read(data: Path) -> Known:
    """All samples by their key."""
    dataset = open_dataset(data)
    keys = dataset.keys()
    return {key: _facts(dataset.sample(number)) for number, key in enumerate(keys)}


def _facts(sample: Sample) -> tuple[object, ...]:
    levels = {name: values.tolist() for name, values in sample.levels.items()}
    return sample.image, sample.meta, sample.label, sample.caption, levels


def _check_read(data: Path, before: Known, named: set[str], where: str) -> None:
    dataset = open_dataset(data)
    try:
        keys = dataset.keys()
    except ShardsError:
        return
    lost = before.keys() - set(keys) - named
    assert not lost, f"{where}: {lost} neither read nor named"
    for number, key in enumerate(keys):
        try:
            same = _facts(dataset.sample(number)) == before[key]
        except ShardsError:
            same = False
        assert same or key in named, f"{where}: {key} neither read as it was nor named"


def _repair(
    data: Path,
    tar: Path,
    changed: bytes,
    before: Known,
    named: set[str],
    with_manifest: bool,
    where: str,
) -> str:
    files = {path.name: path.read_bytes() for path in data.iterdir()}
    try:
        plan = plan_repair(data)
    except ShardsError as error:
        assert {path.name: path.read_bytes() for path in data.iterdir()} == files, where
        assert "shards repair" not in str(error), where
        return "refused"
    assert {path.name: path.read_bytes() for path in data.iterdir()} == files, where
    assert "shards repair" not in "\n".join(plan.lines), where
    plan.run()
    if plan.unfit:
        # It is left as it is, and so is the sound one beside it.
        assert tar.read_bytes() == changed and not with_manifest, where
        return "refused"
    kept = data / f"{tar.name}{KEPT}"
    rewritten = not tar.exists() or tar.read_bytes() != changed
    assert rewritten == kept.exists() == plan.rewrites, where
    if rewritten:
        assert kept.read_bytes() == changed, where
    after = _read_sound(data)
    if with_manifest:
        gone = before.keys() - after.keys()
        assert len(gone) == plan.num_lost, f"{where}: {gone} gone, {plan.num_lost} announced"
        assert gone <= named, f"{where}: {gone - named} gone and not named"
        same = all(after[key] == before[key] for key in after.keys() & before.keys())
        assert same or "swap" in where, where
    left = [problem for problem in _examine(data).problems if "correct it" not in problem.remedy]
    assert not left, f"{where}: {left[0]}"
    return "repaired" if rewritten else "nothing to repair"


def _read_sound(data: Path) -> Known:
    dataset = open_dataset(data)
    found = {}
    for number, key in enumerate(dataset.keys()):
        try:
            found[key] = _facts(dataset.sample(number))
        except ShardsError:
            found[key] = ()
    return found
