"""What a person sees of a run."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from orchard.engine.progress import Bar, Lines, Reporter, Silent, choose_reporter, format_bytes

MiB = 1 << 20


def console(*, is_terminal: bool = False, width: int = 80) -> Console:
    return Console(
        file=io.StringIO(), force_terminal=is_terminal, width=width, legacy_windows=False
    )


def written(to: Console) -> str:
    assert isinstance(to.file, io.StringIO)
    return to.file.getvalue()


def report(reporter: Reporter, *, title: str = "flex", start: int = 0, rounds: int = 3) -> None:
    """Tell of a run from beginning to end."""
    reporter.begin(title=title, num_rounds=rounds, round_number=start)
    for number in range(start + 1, rounds + 1):
        reporter.working("training a", share=0.2)
        reporter.working("evaluating", share=0.9)
        reporter.completed(number, loss=2.5 / number, uplink_bytes=1_200_000)
    reporter.end()


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (1_200_000, "1.2 MB"),
        (MiB, "1.0 MB"),
        (3_450_000_000, "3.5 GB"),
        (2e12, "2.0 TB"),
        (5e15, "5000.0 TB"),
    ],
)
def test_bytes_have_decimal_units(count: float, text: str) -> None:
    assert format_bytes(count) == text


def test_a_round_without_training_has_no_loss() -> None:
    to = console()
    lines = Lines(to)
    lines.begin(title="fedavg_dropout", num_rounds=1, round_number=0)
    lines.completed(1, loss=None, uplink_bytes=500)
    assert written(to).splitlines()[1] == "fedavg_dropout: round 1/1 nobody trained uplink 500 B"


def test_lines_writes_one_line_per_round() -> None:
    to = console()
    report(Lines(to))
    assert written(to).splitlines() == [
        "flex: 3 rounds",
        "flex: round 1/3 loss 2.500 uplink 1.2 MB",
        "flex: round 2/3 loss 1.250 uplink 1.2 MB",
        "flex: round 3/3 loss 0.833 uplink 1.2 MB",
    ]


def test_lines_says_where_a_run_goes_on() -> None:
    to = console()
    report(Lines(to), start=2)
    first, second = written(to).splitlines()
    assert first == "flex: 3 rounds, resuming after round 2"
    assert second.startswith("flex: round 3/3 ")


def test_a_long_or_odd_title_stays_on_its_line() -> None:
    to = console(width=20)
    report(Lines(to), title="dolly [seed 3] " + "long " * 10, rounds=1)
    lines = written(to).splitlines()
    assert len(lines) == 2
    assert all(line.startswith("dolly [seed 3] long long") for line in lines)


def test_lines_hold_no_control_sequences() -> None:
    to = console()
    report(Lines(to))
    assert written(to).isascii()
    assert "\x1b" not in written(to)


def test_silent_shows_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    report(Silent())
    assert capfd.readouterr() == ("", "")


def test_a_bar_ends_with_the_last_round_and_all_bytes() -> None:
    to = console(is_terminal=True, width=160)
    report(Bar(to), start=1)
    last = written(to).split("\r")[-1]
    assert "3/3" in last
    assert "2.4 MB" in last
    assert "0.833" in last


def test_a_bar_that_never_began_can_end() -> None:
    to = console(is_terminal=True)
    Bar(to).end()
    assert "round" not in written(to)


def test_a_terminal_gets_a_bar_and_anything_else_lines() -> None:
    assert isinstance(choose_reporter(console(is_terminal=True)), Bar)
    assert isinstance(choose_reporter(console()), Lines)
