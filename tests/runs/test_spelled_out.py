"""What tests/test_layout.py takes for a file that spells out the folder of a run by itself."""

import ast

import pytest

from tests.runs.spelled_out import spelled_out


@pytest.mark.parametrize(
    ("line", "found"),
    {
        'path = run / "8x8" / "checkpoints"': {"checkpoints"},
        'path = run / f"{size}x{size}"': {"RxR"},
        'path = f"{run}/{stage.size}x{stage.size}/result.json"': {"RxR", "result.json"},
        'name = "%dx%d" % (size, size)': {"RxR"},
        'found = run.glob("*x*/visualizations/*.png")': {"visualizations"},
        'NAMES = ("config.yaml", "stats.jsonl")': {"config.yaml", "stats.jsonl"},
        'text = f"{size}x{size} pixels: see config.yaml"': set(),
        'shown = {"samples": 3, "size": f"{width}x{height}"}': set(),
        'weights = Path(torch.hub.get_dir()) / "checkpoints" / name': set(),
    }.items(),
)
def test_names_in_paths_are_found_and_those_in_sentences_are_not(line, found):
    text = f'"""A file whose docstring says config.yaml."""\n\n{line}\n'
    assert spelled_out(ast.parse(text)) == found
