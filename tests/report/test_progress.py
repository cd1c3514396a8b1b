"""Progress lines: they fit a terminal, and a log without one hears of a long step too."""

import logging
import threading

import pytest
from rich.console import Console
from rich.text import Text

from dinogen.report import progress
from dinogen.report.progress import LiveLine, fitting
from dinogen.training.logging.begin import ProgressLine


class Heard(logging.Handler):
    """Keeps messages, and sets an event at the third."""

    def __init__(self):
        super().__init__()
        self.messages, self.three = [], threading.Event()

    def emit(self, record):
        self.messages.append(record.getMessage())
        if len(self.messages) >= 3:
            self.three.set()


@pytest.fixture
def heard():
    handler = Heard()
    progress.log.addHandler(handler)
    level = progress.log.level
    progress.log.setLevel(logging.INFO)
    yield handler
    progress.log.removeHandler(handler)
    progress.log.setLevel(level)


def test_without_a_terminal_it_logs_by_itself_and_not_after_it_is_closed(heard):
    with LiveLine("stage 4x4", 9, lambda: ["1/9", "ETA 0:00:01"], first=0.01, every=0.01):
        assert heard.three.wait(10)
    assert set(heard.messages) == {"stage 4x4: 1/9, ETA 0:00:01"}
    num = len(heard.messages)
    LiveLine("other", 9, lambda: [""]).close()
    assert len(heard.messages) == num


def test_a_log_hears_of_it_within_ten_seconds_and_every_thirty():
    assert progress.FIRST <= 10 and progress.EVERY <= 30


def test_inside_another_line_it_shows_nothing(heard):
    with (
        LiveLine("outer", 9, lambda: ["a"]) as outer,
        LiveLine("inner", 9, lambda: ["b"]) as inner,
    ):
        inner.say()
        outer.say()
    assert heard.messages == ["outer: a"]


def test_parts_that_do_not_fit_are_left_out_from_the_end():
    assert fitting(["12 kimg", "ETA 1:00:00", "loss 1"], 20) == "12 kimg, ETA 1:00:00"
    assert fitting(["12 kimg", "ETA 1:00:00", "loss 1"], 28) == "12 kimg, ETA 1:00:00, loss 1"
    assert fitting(["12 kimg"], 2) == "12 kimg"


def test_a_terminal_of_eighty_columns_shows_stage_and_both_times(monkeypatch, tmp_path):
    terminal = (tmp_path / "terminal").open("w+", encoding="utf-8")
    monkeypatch.setattr(
        progress, "Console", lambda stderr: Console(file=terminal, force_terminal=True, width=80)
    )
    line = ProgressLine("stage 1024x1024", 0, 25_000_000, True, later=25_000_000)
    values = {"images_per_s": 9.25, "loss": 0.123456, "floor": 0.1, "diversity": 0.5}
    line.update(1_234_567, values)
    line.close()
    terminal.seek(0)
    shown = Text.from_ansi(terminal.read().replace("\r", "\n")).plain.splitlines()
    assert max(map(len, shown)) <= 80
    for part in ("stage 1024x1024", "1234.6/25000.0 kimg", "ETA 29 d 17:40:", "run > 61 d 0:"):
        assert any(part in row for row in shown), part


def test_the_time_left_counts_the_stages_that_follow():
    line = ProgressLine("stage 4x4", 0, 1000, False, later=3000)
    line.update(500, {"images_per_s": 10.0, "loss": 0.25})
    assert line.parts() == [
        *("0.5/1.0 kimg", "ETA 0:00:50", "run > 0:05:50", "10.0 images/s", "loss 0.25"),
    ]
    last = ProgressLine("stage 8x8", 0, 1000, False)
    last.update(500, {"images_per_s": 10.0})
    assert last.parts() == ["0.5/1.0 kimg", "ETA 0:00:50", "10.0 images/s"]
