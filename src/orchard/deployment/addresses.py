"""Where a coordinator listens, and whether it may do so without keys."""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Sequence
from pathlib import Path

log = logging.getLogger(__name__)


def split_address(address: str) -> tuple[str, int]:
    """Return host and port of ``host:port``.

    Raises:
        ValueError: It is none.
    """
    host, separator, port = address.rpartition(":")
    if not separator or not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"address must be host:port, got {address!r}; for example server:8443")
    return host.strip("[]"), int(port)


def is_local(host: str) -> bool:
    """Say whether a host is this machine and no other can reach it."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_security(address: str, *, keys: Path | None, is_insecure: bool) -> None:
    """Refuse to cross a network without TLS and keys, unless that was asked for.

    Raises:
        ValueError: There are no keys for an address on another machine, or keys and ``--insecure``.
    """
    host, _ = split_address(address)
    if keys and is_insecure:
        raise ValueError("--keys and --insecure must not both be given; choose one")
    if keys or is_local(host):
        return
    if not is_insecure:
        raise ValueError(
            f"--keys must be given for {address}, which other machines can reach, got nothing; "
            "make them with orchard keys, or say --insecure to send everything in the clear and "
            "let anybody take part"
        )
    log.warning(
        "INSECURE: what is sent to and from %s can be read and changed by anybody on the way, "
        "and anybody may take part",
        address,
    )


def check_proxies(proxies: Sequence[str], *, keys: Path | None, is_insecure: bool) -> None:
    """Refuse a proxy that is none, or one that lets strangers in without keys.

    Raises:
        ValueError: It is no address or network, or there are no keys and no ``--insecure``.
    """
    for proxy in proxies:
        try:
            ipaddress.ip_network(proxy)
        except ValueError as error:
            raise ValueError(
                f"--trusted-proxy must be an address or a network, got {proxy!r}; for example "
                "127.0.0.1 or 10.0.0.0/24"
            ) from error
    if proxies and not keys and not is_insecure:
        raise ValueError(
            "--keys must be given with --trusted-proxy, got nothing; whoever reaches the proxy "
            "reaches the coordinator: make keys with orchard keys, or say --insecure"
        )
