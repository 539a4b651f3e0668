"""Whatever ends the process that runs the rounds, it is started again, and goes on or gives up."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from orchard.deployment import hosting
from orchard.deployment.hosting import CoordinatorOptions, RoundsFailedError

# One round is committed and the process dies; with so many rounds there is a result.
ROUND = """
echo start >> starts
[ {completes} = yes ] && echo '{{"round": '$(wc -l < starts)', "kind": "round"}}' >> metrics.jsonl
mkdir -p quarantine
number=$(( ($(wc -l < starts) + 1) / 3 ))
[ {takes_turns} = yes ] && echo '{{"deaths": {{"1/+b": '$(wc -l < starts)'}}}}' > journal.json
[ {sets_apart} = yes ] && echo '{{}}' > quarantine/round_000001_$number.json
[ $(wc -l < starts) -ge {enough} ] && echo '{{"rounds": {enough}}}' > result.json
kill -9 $$
"""


def supervise(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    completes: bool,
    enough: int,
    sets_apart: bool = False,
    takes_turns: bool = False,
) -> dict[str, int]:
    says = {True: "yes", False: "no"}
    script = ROUND.format(
        completes=says[completes],
        sets_apart=says[sets_apart],
        takes_turns=says[takes_turns],
        enough=enough,
    )
    sleep = time.sleep
    monkeypatch.setattr(hosting, "time", SimpleNamespace(sleep=lambda seconds: sleep(0.002)))
    superlink = SimpleNamespace(is_running=True, num_failures=0, stop=lambda: None)
    monkeypatch.setattr(hosting, "_superlink", lambda options, folder: superlink)
    monkeypatch.setattr(hosting, "_make_ready", lambda options: True)
    monkeypatch.setattr(
        hosting, "_submit", lambda folder: subprocess.Popen(["sh", "-c", script], cwd=folder)
    )
    return hosting._supervise(CoordinatorOptions(folder, "127.0.0.1:0"), folder)


def test_crashes_with_a_round_between_them_never_end_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = supervise(tmp_path, monkeypatch, completes=True, enough=9)
    assert result == {"rounds": 9}
    assert len((tmp_path / "starts").read_text().splitlines()) == 9


def test_five_crashes_of_one_round_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RoundsFailedError, match="tried 5 times"):
        supervise(tmp_path, monkeypatch, completes=False, enough=9)
    assert len((tmp_path / "starts").read_text().splitlines()) == 5


def test_a_crash_whose_update_was_set_apart_is_none_of_five(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three crashes are laid at an update's door: three such updates in one round end no run."""
    result = supervise(tmp_path, monkeypatch, completes=False, sets_apart=True, enough=11)
    assert result == {"rounds": 11}


def test_crashes_in_messages_that_take_turns_are_none_of_five(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two sites ended a run at the fifth crash: neither had been met three times by then."""
    result = supervise(tmp_path, monkeypatch, completes=False, takes_turns=True, enough=7)
    assert result == {"rounds": 7}
