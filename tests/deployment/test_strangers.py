"""Who has no key or a wrong one is not let in, and a certificate of others is not believed."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from orchard.deployment.key_files import site_keys
from orchard.deployment.keys import make_coordinator_keys, make_site_keys
from orchard.engine.control import register_nodes
from orchard.engine.processes import Child, child_environment, free_port

pytestmark = pytest.mark.deployment


@contextmanager
def superlink(keys: Path, port: int) -> Iterator[Child]:
    """Have the coordinator's SuperLink running inside, at a public port and one beside it."""
    command = [sys.executable, "-m", "orchard.engine.superlink", "--host", "127.0.0.1"]
    command += ["--public", f"127.0.0.1:{port}", "--port", str(own_port(port))]
    command += ["--disable-runtime-dependency-installation"]
    command += ["--ssl-certfile", str(keys / "coordinator.crt")]
    command += ["--ssl-keyfile", str(keys / "coordinator.key")]
    command += ["--ssl-ca-certfile", str(keys / "authority.crt"), "--enable-supernode-auth"]
    home = keys.parent / "flower"
    child = Child("superlink", command, keys.parent / "superlink.log", child_environment(home))
    child.start()
    try:
        yield child
    finally:
        child.stop()


def own_port(port: int) -> int:
    return port + 1


def supernode(keys: Path, port: int, key: Path | None, log: Path) -> Child:
    """Start a SuperNode that tries to connect once and again for a few seconds."""
    command = [str(Path(sys.executable).parent / "flower-supernode")]
    command += ["--superlink", f"127.0.0.1:{port}", "--host", "127.0.0.1"]
    command += ["--port", str(free_port()), "--max-wait-time", "8"]
    command += ["--root-certificates", str(keys / "authority.crt")]
    if key:
        command += ["--auth-supernode-private-key", str(key)]
    child = Child("supernode", command, log, child_environment(log.parent / "flower"))
    child.start()
    return child


def wait_until_ready(port: int, keys: Path) -> None:
    for _ in range(200):
        try:
            register_nodes(
                f"127.0.0.1:{own_port(port)}",
                authority=keys / "authority.crt",
                keys=site_keys(keys),
            )
            return
        except ConnectionError:
            time.sleep(0.2)
    raise AssertionError("the SuperLink must start")


def test_strangers_are_refused_and_the_known_site_is_not(tmp_path: Path) -> None:
    keys, port = tmp_path / "keys", free_port()
    make_coordinator_keys(keys, ["127.0.0.1"], days=1)
    make_site_keys(keys, "known")
    make_site_keys(tmp_path / "elsewhere", "unknown")
    make_coordinator_keys(tmp_path / "other", ["127.0.0.1"], days=1)
    with superlink(keys, port):
        wait_until_ready(port, keys)
        known = keys / "sites" / "known.key"
        nodes = {
            "known": (keys, known),
            "wrong": (keys, tmp_path / "elsewhere" / "sites" / "unknown.key"),
            "none": (keys, None),
            # Whoever answers at the address must have a certificate of the site's own authority.
            "authority": (tmp_path / "other", known),
        }
        children = {
            name: supernode(folder, port, key, tmp_path / f"{name}.log")
            for name, (folder, key) in nodes.items()
        }
        try:
            for name in ("wrong", "none", "authority"):
                process = children[name].process
                assert process is not None
                assert process.wait(60) != 0
                text = (tmp_path / f"{name}.log").read_text()
                assert "SuperNode ID" not in text
                assert "Failed to initialize the connection" in text
                assert ("CERTIFICATE_VERIFY_FAILED" in text) == (name == "authority")
            end = time.monotonic() + 30
            while "SuperNode ID" not in (tmp_path / "known.log").read_text():
                assert time.monotonic() < end
                time.sleep(0.2)
        finally:
            for child in children.values():
                child.stop()


def test_an_expired_certificate_is_refused(tmp_path: Path) -> None:
    keys, port = tmp_path / "keys", free_port()
    make_coordinator_keys(keys, ["127.0.0.1"], days=0)
    make_site_keys(keys, "known")
    time.sleep(1.1)
    with superlink(keys, port):
        node = supernode(keys, port, keys / "sites" / "known.key", tmp_path / "node.log")
        try:
            assert node.process is not None
            assert node.process.wait(90) != 0
        except subprocess.TimeoutExpired:
            pytest.fail("the SuperNode must give up")
        finally:
            node.stop()
    text = (tmp_path / "node.log").read_text()
    assert "SuperNode ID" not in text
    assert "certificate has expired" in text or "Failed to initialize the connection" in text
    served = (tmp_path / "superlink.log").read_text()
    assert "Activated" not in served
