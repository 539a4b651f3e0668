"""Expert load is counted in the runs that a study's record names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.studies.load import runs_of


def test_the_runs_of_the_named_methods(tmp_path: Path) -> None:
    columns = [
        {"cell": "", "method": method, "runs": [{"seed": s, "folder": f"{method}-{s}"}]}
        for method, s in (("fedavg", 0), ("flex", 1), ("local", 0))
    ]
    (tmp_path / "study.json").write_text(json.dumps({"columns": columns}))
    assert list(runs_of(tmp_path, ["flex", "fedavg"])) == [
        ("", "fedavg", 0, tmp_path / "runs" / "fedavg-0"),
        ("", "flex", 1, tmp_path / "runs" / "flex-1"),
    ]
    with pytest.raises(ValueError, match="--methods must be of fedavg, flex, local, got ditto"):
        list(runs_of(tmp_path, ["ditto"]))
