"""Random tars of four programs, and random mishaps to datasets: nothing is lost without a word.

    python benchmarks/fuzz_tars.py                          400 tars and 500 mishaps
    python benchmarks/fuzz_tars.py --tars 40 --mishaps 50   fewer
    python benchmarks/fuzz_tars.py --mishaps 1 --tars 0 --first 37      one of them again

A tar by GNU tar, bsdtar, Python's tarfile or webdataset's TarWriter has samples with random names
and members, and links, devices, folders, labels and holes between them. Whatever webdataset yields,
dinogen yields, byte for byte, and ``verify`` says that it is sound. A mishap flips, zeroes, cuts,
inserts, deletes, overwrites or swaps bytes of one tar of a dataset. Then each sample is read as it
was or named, ``repair`` announces as many lost samples as there are, keeps the tar whenever it
writes one again, and leaves a dataset that is sound.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.shards.tar_fuzz import nothing_is_lost, same_as_webdataset
from tests.shards.tars import tools


def main() -> int:
    """Run the cases; 1 if one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tars", type=int, default=400)
    parser.add_argument("--mishaps", type=int, default=500)
    parser.add_argument("--first", type=int, default=0, help="seed of the first case")
    asked = parser.parse_args()
    logging.disable(logging.CRITICAL)
    failed = 0
    begin = time.monotonic()
    ends: Counter[str] = Counter()
    programs = tools()
    for seed in range(asked.first, asked.first + asked.tars):
        with tempfile.TemporaryDirectory() as folder:
            program = programs[seed % len(programs)]
            try:
                same_as_webdataset(seed, Path(folder), program)
                ends[program] += 1
            except Exception as error:
                failed += 1
                print(f"FAILED tar {seed} by {program}: {error!r}")
    print(f"tars as webdataset reads them: {dict(ends)}, {time.monotonic() - begin:.0f} s")
    begin = time.monotonic()
    ends = Counter()
    for seed in range(asked.first, asked.first + asked.mishaps):
        with tempfile.TemporaryDirectory() as folder:
            try:
                ends[nothing_is_lost(seed, Path(folder))] += 1
            except Exception as error:
                failed += 1
                print(f"FAILED mishap {seed}: {error!r}")
    for end, count in sorted(ends.items()):
        print(f"{count:5d}  {end}")
    print(f"{asked.mishaps} mishaps, {time.monotonic() - begin:.0f} s; {failed} cases failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
