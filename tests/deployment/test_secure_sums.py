"""Secure sums between sites: the simulator's tensors, and what each side refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from federations import run_quickly
from orchard.deployment.consent import Consent
from orchard.deployment.keys import make_site_keys
from sites import (
    LocalPost,
    make_coordinator,
    make_workers,
    same,
    shared_tensors,
    site_recipe,
    write_sites,
)

SECURE = ("privacy.secure_aggregation=true", "server.rounds=2")
NUM_SITES = 3


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sites(tmp_path_factory.mktemp("secure") / "data", num_sites=NUM_SITES)


@pytest.fixture(scope="module")
def keys(data: Path) -> Path:
    folder = data.parent / "keys"
    for path in sorted(data.glob("*.jsonl")):
        make_site_keys(folder, path.stem)
    return folder / "sites"


def with_keys(keys: Path, own: Consent, **others: object) -> Consent:
    name = Path(own.data).stem
    return replace(own, peers=str(keys), signing_key=str(keys / f"{name}.key"), **others)


def test_sites_end_with_the_simulators_tensors(data: Path, keys: Path, tmp_path: Path) -> None:
    recipe = site_recipe("fedavg", data, *SECURE)
    run_quickly(tmp_path / "simulated", recipe)
    coordinator, begin = make_coordinator(recipe, tmp_path / "run", num_sites=NUM_SITES)
    workers = make_workers(data, tmp_path / "sites", consent=lambda own: with_keys(keys, own))
    state = coordinator.run_rounds(LocalPost(workers), begin, num_sites=NUM_SITES)
    assert same(state.shared, shared_tensors(tmp_path / "simulated"))
