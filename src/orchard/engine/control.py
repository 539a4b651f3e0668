"""What the coordinator and its sites tell a SuperLink apart from messages."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
from cryptography.hazmat.primitives import serialization
from flwr.proto.control_pb2 import RegisterNodeRequest
from flwr.proto.fleet_pb2 import DeactivateNodeRequest
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor


def register_nodes(address: str, *, authority: Path, keys: Mapping[str, Path]) -> None:
    """Tell a SuperLink which keys its SuperNodes have, and what they are called.

    Args:
        address: ``host:port`` on this machine.
        authority: The certificate that the SuperLink's is signed with.
        keys: Name of a site to the file of its public key.

    Raises:
        ConnectionError: The SuperLink is not there, or refuses.
        ValueError: A file is no public key that Flower takes.
    """
    client = ControlHttpClient.from_server_address(
        server_address=address,
        insecure=False,
        root_certificates=authority.read_bytes(),
        interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
    )
    try:
        for name, path in keys.items():
            key: Any = serialization.load_ssh_public_key(path.read_bytes())
            client.RegisterNode(RegisterNodeRequest(public_key=public_key_to_bytes(key), name=name))
    except httpx.HTTPError as error:
        raise ConnectionError(f"the SuperLink at {address} does not answer: {error}") from error
    finally:
        client.close()


def release_node(address: str, *, authority: Path, key: Path, node_id: int) -> None:
    """Tell a SuperLink that a SuperNode which ended without a word is gone.

    Else its place is taken until it has missed two heartbeats, for a minute, and no SuperNode with
    the same key is let in.

    Args:
        address: ``host:port`` of the SuperLink.
        authority: The certificate that the SuperLink's is signed with.
        key: The file of the site's private key.
        node_id: What the SuperNode was called.

    Raises:
        ConnectionError: The SuperLink cannot be reached, or does not know the node.
    """
    private: Any = serialization.load_ssh_private_key(key.read_bytes(), password=None)
    with FleetHttpClient.from_server_address(
        address,
        False,
        authority.read_bytes(),
        interceptors=[
            RuntimeVersionHttpInterceptor(component_name="SuperNode"),
            NodeAuthHttpInterceptor(private, private.public_key()),
        ],
    ) as client:
        try:
            client.DeactivateNode(DeactivateNodeRequest(node_id=node_id))
        except httpx.HTTPError as error:
            raise ConnectionError(f"the SuperLink at {address} refuses: {error}") from error
