"""The words that this project does not use, in code, messages, docs and pages."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Where these words do not occur.
CLEAN = (
    "dinogen",
    "launch",
    "shards",
    "configs",
    "slurm",
    "docs",
    "examples",
    "benchmarks",
    ".ci",
    ".github",
    "Makefile",
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "tests",
    ":!tests/test_words.py",
)
SUFFIXES = {".py", ".md", ".html", ".yaml", ".yml", ".json", ".sh", ".sbatch"}
SCRIPTS = {"Makefile", ".ci/run"}

# A pattern, in any case, and what to write instead.
WORDS = {
    r"takedown": "failure propagation",
    r"wish(es|ed)?": "request",
    r"looks (at|like) .* page|look_at": "visualizations",
    r"feed(s|er)?": "dataloader",
    r"sinks?": "shard writer",
    r"ahead": "prefetch, in advance",
    r"over_training": "checkpoint sweep",
    r"study_say|study_choice": "messages, selection",
    r"relay(s|ed)?": "forwarding",
    r"mend(s|ed|ing)?": "fix, repair, remedy",
    r"anew": "again",
    r"(to|can|cannot|could) be had": "is (not) available",
    r"for want of": "without, because ... is missing",
    r"so (many|few|much)": "a number, or N",
    r"judges?|judged": "feature extractor, measure, decide",
    r"headlines?": "main loss",
    r"verdicts?": "health status",
    r"teachers?": "guide",
    r"banks?(?!:)": "reference batch",  # the config key stays
    r"main_section": "rank-zero section",
    r"pictures?": "image (made or read), photo (brought by users)",
    r"figures?": "metric value",
    r"whoever|whomever": "a subject",
    r"lest": "so that ... not",
    r"shall": "will, must, has to",
    r"likewise": "the same, also",
    r"troubles?": "problem",
    r"passed? over": "skip, ignore",
    r"stands? twice": "occurs twice",
    r"needed is|allowed are": "expected, the limit is",
    r"is none of": "is not one of",
    r"whatever (the|its|autocast)": "regardless of",
    r"told (of|at|before|when)": "reported, passed",
}

# Elsewhere a sink is what a run is logged to.
ONLY_IN = {
    r"sinks?": ("shards/", "dinogen/prepare/", "launch/", "tests/shards/", "tests/prepare/"),
}

# The word has its ordinary meaning there, or is a name that was stored and has to be read.
ALLOWED = {
    # family files for 0.1
    "dinogen/families/base.py": {"verdict"},
    "dinogen/families/registry.py": {"headline"},
    # random numbers depend on these words
    "dinogen/families/guided.py": {"bank"},
    "dinogen/guidance/discriminator.py": {"judge"},
    "dinogen/training/dataloading.py": {"bank"},
    "tests/guidance/test_discriminate_penalties.py": {"judge"},
    "tests/networks/test_diffaugment.py": {"judge"},
    # keys and options of earlier versions
    "dinogen/guidance/options.py": {"bank"},
    "dinogen/runs/values.py": {"verdict", "pictures"},
    "docs/guided.md": {"bank"},
    "launch/cli/results.py": {"over_training"},
    "tests/guidance/test_guide_set.py": {"bank"},
    "benchmarks/same_numbers.py": {"bank", "verdict"},
    "CHANGELOG.md": {"bank", "mend", "headline", "verdict", "troubles"},
    # a key of stored fingerprints
    "dinogen/metrics/value.py": {"judge"},
    "dinogen/report/compare/comparison.py": {"judge"},
    # the same in tests
    "tests/families/test_earlier.py": {"headline", "verdict"},
    "tests/metrics/test_fingerprint.py": {"judge"},
    "tests/metrics/test_reference.py": {"judge"},
    "tests/metrics/test_suite.py": {"judge"},
    "tests/report/compare_runs.py": {"judge"},
    "tests/runs/test_values.py": {"verdict", "pictures"},
    "tests/runs/test_run.py": {"verdict"},
    "tests/evaluation/test_measured.py": {"judge"},
    # figures of papers, of HTML, of matplotlib; a method of HTMLParser
    "dinogen/families/wgan_gp.py": {"figure"},
    "tests/report/test_curves.py": {"figure"},
    "dinogen/metrics/extractors/onet.py": {"figure"},
    "dinogen/networks/stylegan2/discriminator.py": {"figure"},
    "dinogen/networks/stylegan2/generator.py": {"figure"},
    "dinogen/report/compare/page.html": {"figure"},
    "dinogen/report/compare/plots.py": {"figure"},
    "dinogen/report/curves.py": {"figure"},
    "docs/make_today.py": {"figure"},
    "dinogen/report/page.html": {"figure"},
    "tests/report/compared_page.py": {"feed"},
    "tests/report/test_compare.py": {"figures"},
    "tests/report/test_compare_damaged.py": {"figures"},
    "tests/report/test_page.py": {"feed"},
    "shards/check/adopt.py": {"ahead"},  # a clock is ahead
    "tests/shards/test_foreign_tars.py": {"ahead"},
}


def files():
    listed = subprocess.run(
        ["git", "ls-files", "--", *CLEAN], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return [name for name in listed if name in SCRIPTS or Path(name).suffix in SUFFIXES]


@pytest.mark.parametrize("name", files())
def test_no_word_of_the_left_column(name):
    found = []
    for number, line in enumerate((ROOT / name).read_text(encoding="utf-8").splitlines(), 1):
        # Tests are named by sentences, whose words underscores join.
        words = line.replace("_", " ") if name.startswith("tests/") else line
        for pattern, instead in WORDS.items():
            if not name.startswith(ONLY_IN.get(pattern, "")):
                continue
            for match in re.finditer(rf"\b(?:{pattern})\b", words, re.IGNORECASE):
                if match[0].lower() not in ALLOWED.get(name, ()):
                    found.append(f"{name}:{number}: '{match[0]}': write {instead}: {line.strip()}")
    assert not found, "\n".join(found)
