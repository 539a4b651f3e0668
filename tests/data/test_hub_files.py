"""Files of text on the hub are read as files here are; a stand-in for the hub is on loopback."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote

import pytest

from orchard.data.datasets import read_dataset
from orchard.data.reading import Reader

CELLS = ["00001", "2000", "None", "NA", "2020-01-02", "1e5"]
TABLE = "instruction,response\n" + "".join(f"a,{cell}\n" for cell in CELLS)
COMMIT = "0" * 40
READ = """
from orchard.data.datasets import load_pool
from orchard.data.reading import Reader
print(*(example.response for example in load_pool("o/n", Reader()).examples))
"""


@contextmanager
def hub_with(files: dict[str, bytes]) -> Iterator[str]:
    """Serve files as the hub's data set o/n, and yield the address."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(self.path).partition("?")[0]
            name = path.partition(f"/datasets/o/n/resolve/{COMMIT}/")[2]
            entries = [
                {"type": "file", "path": name, "size": len(text), "oid": digest(text)}
                for name, text in files.items()
            ]
            if path.startswith("/api/datasets/o/n/tree/"):
                self.send(json.dumps(entries).encode())
            elif path.startswith("/api/datasets/o/n"):
                about = {"id": "o/n", "sha": COMMIT, "private": False, "gated": False}
                siblings = [{"rfilename": name} for name in files]
                self.send(json.dumps({**about, "tags": [], "siblings": siblings}).encode())
            elif name in files:
                self.send(files[name], {"ETag": f'"{digest(files[name])}"'})
            else:
                self.send(b"{}", {"X-Error-Code": "EntryNotFound"}, code=404)

        def send(self, body: bytes, headers: dict[str, str] | None = None, code: int = 200) -> None:
            self.send_response(code)
            common = {"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT}
            for key, value in {**common, **(headers or {})}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def digest(text: bytes) -> str:
    return hashlib.sha1(text).hexdigest()


def read_elsewhere(address: str, home: Path, **more: str) -> list[str]:
    """Read o/n in a process of its own, to whose libraries the stand-in is the hub."""
    own = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    own |= {"HF_ENDPOINT": address, "HF_HOME": str(home), **more}
    done = subprocess.run(
        [sys.executable, "-c", READ], env=own, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.long
def test_cells_of_a_table_on_the_hub_stay_as_they_are_offline_too(tmp_path: Path) -> None:
    with hub_with({"train.csv": TABLE.encode()}) as address:
        assert read_elsewhere(address, tmp_path) == CELLS
    assert read_elsewhere(address, tmp_path, HF_HUB_OFFLINE="1") == CELLS


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stand for the hub's library: what its builder finds, which a test changes."""
    import datasets

    (tmp_path / "train.csv").write_text(TABLE)
    found: dict[str, Any] = {
        "files": {"train": ["hf://datasets/o/n@main/train.csv"], "test": ["hf://other/x.csv"]},
        "features": None,
    }

    def builder(name: str, subset: str | None) -> Any:
        return SimpleNamespace(
            config=SimpleNamespace(data_files=found["files"]),
            info=SimpleNamespace(features=found["features"]),
        )

    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    monkeypatch.setattr("orchard.data.datasets._is_kept", lambda name: True)
    manager = SimpleNamespace(download=lambda url: str(tmp_path / url.rpartition("/")[2]))
    monkeypatch.setattr(datasets, "DownloadManager", lambda: manager)
    return found


def test_a_table_on_the_hub_is_read_as_a_file_and_other_splits_are_not_downloaded(
    hub: dict[str, Any],
) -> None:
    reading = read_dataset("o/n", Reader())
    assert [example.response for example in reading.examples] == CELLS
    assert reading.splits == ("test",)


@pytest.mark.parametrize("change", ["labels", "parquet", "elsewhere", "none"])
def test_what_is_no_table_of_text_is_left_to_the_hubs_library(
    change: str, hub: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    if change == "labels":
        hub["features"] = {"category": datasets.ClassLabel(names=["x", "y"])}
    else:
        places = {"parquet": ["hf://o/n/a.parquet"], "elsewhere": ["https://h/a.csv"], "none": []}
        hub["files"] = {"train": places[change]} if places[change] else {}
    table = datasets.Dataset.from_dict({"instruction": ["a"], "response": ["b"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: table)
    (example,) = read_dataset("o/n", Reader()).examples
    assert example.response == "b"
