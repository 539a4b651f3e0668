"""What a coordinator and a site refuse before they start anything."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import orchard
from federations import quick_recipe
from orchard.deployment.consent import Consent
from orchard.deployment.hosting import CoordinatorOptions, check_coordinator
from orchard.deployment.key_files import AUTHORITY
from orchard.deployment.keys import make_coordinator_keys, make_site_keys
from orchard.deployment.server_app import build_coordinator
from orchard.deployment.site import SiteOptions, check_site


def test_a_coordinator_needs_its_keys_and_one_of_each_site(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.mkdir()
    options = CoordinatorOptions(tmp_path / "run", "127.0.0.1:1", keys)
    recipe = quick_recipe("fedavg", "deployment.sites=2")
    with pytest.raises(FileNotFoundError, match=rf"^--keys must hold {AUTHORITY}, got"):
        check_coordinator(recipe, options, resume=False)
    make_coordinator_keys(keys, ["127.0.0.1"], days=1)
    with pytest.raises(FileNotFoundError, match=r"^--keys must hold the public key of each site"):
        check_coordinator(recipe, options, resume=False)
    make_site_keys(keys, "north")
    with pytest.raises(
        ValueError, match=r"^deployment\.sites must be at most the number of keys, 1"
    ):
        check_coordinator(recipe, options, resume=False)
    make_site_keys(keys, "south")
    assert check_coordinator(recipe, options, resume=False) == 2
    # All who have a key, where the recipe does not say.
    every = quick_recipe("fedavg", "deployment.sites=0")
    assert check_coordinator(every, options, resume=False) == 2


def test_without_keys_a_coordinator_must_be_told_how_many_sites(tmp_path: Path) -> None:
    options = CoordinatorOptions(tmp_path / "run", "127.0.0.1:1")
    assert (
        check_coordinator(quick_recipe("fedavg", "deployment.sites=3"), options, resume=False) == 3
    )
    none = quick_recipe("fedavg", "deployment.sites=0")
    with pytest.raises(ValueError, match=r"^deployment\.sites must say how many"):
        check_coordinator(none, options, resume=False)


def test_a_robust_kernel_needs_three_sites(tmp_path: Path) -> None:
    options = CoordinatorOptions(tmp_path / "run", "127.0.0.1:1")
    for sites, is_enough in ((2, False), (3, True)):
        recipe = quick_recipe("fedavg", f"deployment.sites={sites}", "server.aggregation=median")
        if is_enough:
            assert check_coordinator(recipe, options, resume=False) == sites
        else:
            with pytest.raises(
                ValueError, match=r"^server\.aggregation must be mean with 2 clients"
            ):
                check_coordinator(recipe, options, resume=False)


@pytest.mark.parametrize(
    ("protection", "words"),
    [
        (("privacy.unit=example",), "privacy.epsilon or privacy.noise must be given"),
        (
            ("privacy.unit=example", "privacy.epsilon=8", "privacy.noise=1"),
            "privacy.noise must be 0 with privacy.epsilon",
        ),
        (
            (
                *("privacy.unit=client", "server.weighting=uniform"),
                *("privacy.epsilon=8", "privacy.delta=1e-3"),
            ),
            "privacy.unit must not be client",
        ),
    ],
)
def test_protection_that_sites_would_not_have_is_refused(
    protection: tuple[str, ...], words: str, tmp_path: Path
) -> None:
    options = CoordinatorOptions(tmp_path / "run", "127.0.0.1:1")
    recipe = quick_recipe("fedavg", "deployment.sites=3", *protection)
    with pytest.raises(ValueError, match=f"^{words} .*, got "):
        check_coordinator(recipe, options, resume=False)


def test_a_site_needs_its_own_key_and_the_authority(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.touch()
    keys = tmp_path / "keys"
    keys.mkdir()
    options = SiteOptions("north", "127.0.0.1:1", tmp_path / "store", Consent(str(data)), keys)
    with pytest.raises(FileNotFoundError, match=rf"^--keys must hold {AUTHORITY}, got"):
        check_site(options)
    make_coordinator_keys(keys, ["127.0.0.1"], days=1)
    make_site_keys(keys, "south")
    with pytest.raises(FileNotFoundError, match=r"^--keys must hold sites/north\.key, got"):
        check_site(options)
    make_site_keys(keys, "north")
    check_site(options)


@pytest.mark.parametrize(
    ("options", "fewest", "wanted"),
    [
        ((), 3, 5),
        (("server.clients_per_round=3",), 2, 3),
        (("deployment.quorum=4",), 4, 0),
        (("deployment.quorum=1", "server.clients_per_round=3"), 1, 0),
    ],
)
def test_more_than_half_are_enough_where_nobody_has_set_a_quorum(
    options: tuple[str, ...], fewest: int, wanted: int, tmp_path: Path
) -> None:
    recipe = quick_recipe("fedavg", *options)
    own = build_coordinator(recipe, tmp_path, run="x", base_digest="x", num_sites=5)
    assert (own.patience.quorum, own.patience.wanted) == (fewest, wanted)


def test_no_party_of_a_federation_is_on_a_ray_cluster() -> None:
    """Ray's processes exchange pickles: nothing of another party may come near them."""
    source = Path(orchard.__file__).parent

    def importing(pattern: str, folder: str) -> set[str]:
        found = re.compile(rf"^\s*(from|import)\s.*\b({pattern})\b", re.MULTILINE)
        paths = (source / folder).rglob("*.py")
        return {str(p.relative_to(source)) for p in paths if found.search(p.read_text())}

    assert importing("ray|on_ray", "") == {"engine/on_ray.py", "experiment/workers.py"}
    assert importing("open_team", "") == {"experiment/running.py"}
    assert importing("open_team|run_experiment|WorkerOptions", "deployment") == set()
