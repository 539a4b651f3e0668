"""What a person waits for is measured in processes of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchard.measurements import start
from orchard.measurements.start import (
    COMMANDS,
    LIMITS,
    bench_start,
    run_to_end,
    run_to_first_training,
    slowest_imports,
)


def test_a_command_is_timed_to_its_end() -> None:
    seconds, cpu_seconds = run_to_end(["-c", "import time; time.sleep(0.2)"])
    assert seconds >= 0.2
    assert 0 < cpu_seconds < seconds


def test_cpu_seconds_are_those_of_the_command() -> None:
    busy = "import time\nwhile time.process_time() < 0.3: pass"
    _, cpu_seconds = run_to_end(["-c", busy])
    assert cpu_seconds >= 0.29


def test_a_command_that_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match=r"a measured command failed.*no such thing"):
        run_to_end(["-c", "raise SystemExit('no such thing')"])


def test_a_run_that_ends_before_it_trains_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"a run did not train within .* s: error: "):
        run_to_first_training(tmp_path / "nowhere.toml")


@pytest.mark.long
def test_the_first_client_of_a_run_is_seen(tmp_path: Path) -> None:
    recipe = Path(__file__).parents[2] / "recipes" / "tiny" / "flex.toml"
    seconds, cpu_seconds = run_to_first_training(recipe)
    assert cpu_seconds > 0
    assert 0 < seconds < 120


def test_help_and_import_stay_within_their_limits() -> None:
    # CPU seconds: what else runs here is nobody's fault.
    for name in ("help", "import"):
        assert min(run_to_end(COMMANDS[name])[1] for _ in range(3)) < LIMITS[name]


def test_the_modules_of_the_help_are_named() -> None:
    found = slowest_imports(5)
    assert len(found) == 5
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert not any("torch" in name for name in slowest_imports(10_000))


def test_medians_without_the_first_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([9.0] * len(COMMANDS) + [float(n) for n in range(3) for _ in COMMANDS])
    monkeypatch.setattr(start, "run_to_end", lambda arguments: (next(times), 0.5))
    monkeypatch.setattr(start, "run_to_first_training", lambda recipe: (4.0, 3.0))
    monkeypatch.setattr(start, "slowest_imports", dict)
    found = bench_start(repeats=3, training_repeats=1)
    assert found["help_seconds"] == 1.0
    assert found["help_cpu_seconds"] == 0.5
    assert found["help_limit_seconds"] == 0.5
    assert found["first_training_seconds"] == 4.0
    assert "libraries_limit_seconds" not in found
