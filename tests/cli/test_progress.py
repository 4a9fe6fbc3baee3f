from __future__ import annotations

import io

import pytest
from rich.console import Console

from sd_tokenmerge.cli import progress as progress_module
from sd_tokenmerge.cli.progress import ConsoleProgress, format_duration, format_rate


class Clock:
    """Stands for the time module."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress_module, "time", clock)
    return clock


def on_console(monkeypatch: pytest.MonkeyPatch, *, terminal: bool) -> io.StringIO:
    written = io.StringIO()
    console = Console(file=written, force_terminal=terminal, width=100, color_system=None)
    monkeypatch.setattr(progress_module, "Console", lambda stderr: console)
    return written


def test_a_log_gets_a_line_every_half_minute(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    written = on_console(monkeypatch, terminal=False)
    progress = ConsoleProgress()
    progress.start(100, 20)
    for done in range(1, 61):
        clock.now += 2
        progress.update(done)
    progress.stop()
    assert written.getvalue().splitlines() == [
        "Generating: 20 of 100 images are already there.",
        "Generating: 35/100 images, 2.00 s/image, 2 min 10 s left",
        "Generating: 50/100 images, 2.00 s/image, 1 min 40 s left",
        "Generating: 65/100 images, 2.00 s/image, 1 min 10 s left",
        "Generating: 80/100 images, 2.00 s/image, 40 s left",
    ]


def test_a_terminal_gets_a_bar(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    written = on_console(monkeypatch, terminal=True)
    progress = ConsoleProgress("ATC")
    progress.start(10, 0)
    clock.now += 2
    progress.update(4)
    progress.note("a remark")
    progress.stop()
    text = written.getvalue()
    assert "ATC" in text
    assert "4/10 2.00 images/s, 3 s left" in text
    assert "a remark" in text


def test_a_finished_run_shows_no_bar(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    written = on_console(monkeypatch, terminal=True)
    progress = ConsoleProgress()
    progress.start(10, 10)
    progress.stop()
    assert written.getvalue() == "Generating: 10 of 10 images are already there.\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (11.6, "12 s"),
        (200, "3 min 20 s"),
        (3900, "1 h 05 min"),
        (51 * 3600, "2 d 3 h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(("rate", "text"), [(2.5, "2.50 images/s"), (0.4, "2.50 s/image")])
def test_rates_are_above_one(rate: float, text: str) -> None:
    assert format_rate(rate) == text
