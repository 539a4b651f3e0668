"""What of Flower is used that Flower does not promise: each by its name, and what to do then.

Flower promises what is in ``flwr.app``, ``flwr.clientapp`` and ``flwr.serverapp``. The rest may
move with any version. A name that is not here fails the last test; one that moved fails its own,
with what it is for and what can stand in its place.
"""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr")

SOURCES = Path(__file__).parents[2] / "src" / "orchard"
PROMISED = ("flwr.app", "flwr.clientapp", "flwr.serverapp")
# Measures Flower beside us, and is no part of a run.
NOT_OURS = {"measurements/flower_peer.py"}

SUPERLINK = (
    "superlink.py serves Flower's app behind its own front door; look in what "
    "`flower-superlink` calls for what makes the app and its configuration, or start it "
    "on the loopback device and put a proxy of ours that passes /v1/fleet/ alone before it"
)
NODES = (
    "control.py registers keys and releases places; `flwr supernode register` and "
    "`flwr supernode unregister` do the same by a command for each site"
)
CLOCK = (
    "superlink.py says in the log why a site is not let in; without it the log is silent, and "
    "nothing else changes: drop clock_skew, or state the tolerances of Flower's documentation"
)

WAITING = (
    "supernode.py and bell.py let a site wait for messages and hand them to its worker; without "
    "them `flower-supernode` with node-config socket and patience_seconds does it by the apps of "
    "flower_app.py, slower: it looks every 3 seconds and starts a process for every message"
)

USED: dict[str, tuple[tuple[str, ...], str]] = {
    "flwr.superlink.cli.flower_superlink:SuperLinkLifespan": (
        ("config", "state_factory"),
        SUPERLINK,
    ),
    "flwr.superlink.cli.flower_superlink:_parse_superlink_lifespan_config": ((), SUPERLINK),
    "flwr.superlink.main:create_app": (("config", "superlink_lifespan_class"), SUPERLINK),
    "flwr.common.constant:SYSTEM_TIME_TOLERANCE": ((), CLOCK),
    "flwr.common.constant:TIMESTAMP_HEADER": ((), CLOCK),
    "flwr.common.constant:TIMESTAMP_TOLERANCE": ((), CLOCK),
    "flwr.proto.control_pb2:RegisterNodeRequest": ((), NODES),
    "flwr.proto.fleet_pb2:DeactivateNodeRequest": ((), NODES),
    "flwr.supercore.control:ControlHttpClient": ((), NODES),
    "flwr.supercore.interceptors.http.runtime_version:RuntimeVersionHttpInterceptor": (
        ("component_name",),
        NODES,
    ),
    "flwr.supercore.primitives.asymmetric:public_key_to_bytes": (("public_key",), NODES),
    "flwr.supercore.constant:FLEET_HTTP_PUBLIC_KEY_HEADER": ((), WAITING),
    "flwr.supercore.inflatable.inflatable_object:get_all_nested_objects": ((), WAITING),
    "flwr.supercore.inflatable.inflatable_object:get_object_tree": ((), WAITING),
    "flwr.supercore.inflatable.inflatable_object:no_object_id_recompute": ((), WAITING),
    "flwr.supercore.inflatable.inflatable_utils:pull_and_inflate_object_from_tree": (
        ("return_type", "initial_backoff", "backoff_cap"),
        WAITING,
    ),
    "flwr.supercore.inflatable.inflatable_utils:push_object_contents_from_iterable": (
        ("object_contents", "push_object_fn"),
        WAITING,
    ),
    "flwr.supernode.fleet_http_connection:http_request_response": (
        ("server_address", "insecure", "root_certificates", "authentication_keys"),
        WAITING,
    ),
    "flwr.supernode.fleet_http_client:FleetHttpClient": ((), NODES),
    "flwr.supernode.node_auth_http_interceptor:NodeAuthHttpInterceptor": (
        ("private_key", "public_key"),
        NODES,
    ),
}


@pytest.mark.parametrize("name", USED)
def test_flower_still_has_what_it_does_not_promise(name: str) -> None:
    module, _, attribute = name.partition(":")
    takes, advice = USED[name]
    try:
        found: Any = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        pytest.fail(f"Flower has no {name} any more ({error}): {advice}")
    if takes:
        known = inspect.signature(found).parameters
        assert set(takes) <= set(known), f"{name} takes {list(known)}: {advice}"


@pytest.mark.parametrize(
    ("name", "method", "takes"),
    [
        (
            "flwr.supercore.control:ControlHttpClient",
            "from_server_address",
            {"server_address", "insecure", "root_certificates", "interceptors"},
        ),
        ("flwr.supercore.control:ControlHttpClient", "RegisterNode", set()),
        (
            "flwr.supernode.fleet_http_client:FleetHttpClient",
            "from_server_address",
            {"interceptors"},
        ),
        ("flwr.supernode.fleet_http_client:FleetHttpClient", "DeactivateNode", set()),
    ],
)
def test_its_clients_still_take_what_they_are_given(
    name: str, method: str, takes: set[str]
) -> None:
    module, _, attribute = name.partition(":")
    found = getattr(getattr(importlib.import_module(module), attribute), method, None)
    assert found is not None, f"{name} has no {method} any more: {NODES}"
    assert takes <= set(inspect.signature(found).parameters), f"{name}.{method}: {NODES}"


def test_a_control_request_says_whose_key_it_brings() -> None:
    from flwr.proto.control_pb2 import RegisterNodeRequest

    fields = set(RegisterNodeRequest.DESCRIPTOR.fields_by_name)
    assert {"public_key", "name"} <= fields, f"RegisterNodeRequest has {fields}: {NODES}"


def test_nothing_else_of_flower_is_used_that_it_does_not_promise() -> None:
    used = set()
    for path in sorted(SOURCES.rglob("*.py")):
        if path.relative_to(SOURCES).as_posix() in NOT_OURS:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "flwr":
                used |= {f"{node.module}:{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Import):
                used |= {f"{a.name}:" for a in node.names if a.name.split(".")[0] == "flwr"}
    private = {name for name in used if not name.startswith(PROMISED)}
    assert private == USED.keys()


def test_the_page_names_all_of_it() -> None:
    page = (SOURCES.parents[1] / "docs" / "flower.md").read_text()
    for name in USED:
        module, _, attribute = name.partition(":")
        assert f"`{attribute}`" in page, name
        assert f"`{module}`" in page, name


def test_nothing_here_needs_grpc() -> None:
    """flwr 1.43 drops it."""
    for path in sorted(SOURCES.rglob("*.py")):
        if path.relative_to(SOURCES).as_posix() not in NOT_OURS:
            assert "grpc" not in path.read_text().lower(), path
