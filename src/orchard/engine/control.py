"""What the coordinator tells a SuperLink on its own machine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from flwr.proto.control_pb2 import RegisterNodeRequest
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes


def register_nodes(address: str, *, authority: Path, keys: Mapping[str, Path]) -> None:
    """Tell a SuperLink which keys its SuperNodes have, and what they are called.

    Args:
        address: ``host:port`` on this machine.
        authority: The certificate that the SuperLink's is signed with.
        keys: Name of a site to the file of its public key.

    Raises:
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
    finally:
        client.close()
