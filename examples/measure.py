"""Measure a folder of images, made by any program, against photos or shards.

    python examples/measure.py drawn data/faces
    python examples/measure.py drawn photos

Metrics whose weights are missing are reported, with how to get them.
"""

import sys
from pathlib import Path

import dinogen

folder, reference = Path(sys.argv[1]), sys.argv[2]
names = ("fid", "coverage", "fd_onet", "coverage_onet", "spectrum", "sharpness")
result = dinogen.evaluate_folder(folder, names=names, reference=reference, split="train")
for name, metric in result["measured"].items():
    if metric["value"] is None:
        print(f"{name}: not available: {metric['reason']}")
    else:
        print(f"{name} = {metric['value']:.4g}, {metric['better']} is better")
        if metric["caution"]:
            print(f"  {metric['caution']}")
