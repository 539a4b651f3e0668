from __future__ import annotations

import datetime
import ipaddress
import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from orchard.deployment.addresses import check_proxies, check_security, is_local, split_address
from orchard.deployment.key_files import site_keys
from orchard.deployment.keys import make_coordinator_keys, make_site_keys


def test_a_certificate_names_its_hosts_and_is_signed_by_its_authority(tmp_path: Path) -> None:
    make_coordinator_keys(tmp_path, ["server.example", "10.0.0.5"], days=30)
    authority = x509.load_pem_x509_certificate((tmp_path / "authority.crt").read_bytes())
    certificate = x509.load_pem_x509_certificate((tmp_path / "coordinator.crt").read_bytes())
    certificate.verify_directly_issued_by(authority)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["server.example", "localhost"]
    assert names.get_values_for_type(x509.IPAddress) == [
        ipaddress.ip_address("10.0.0.5"),
        ipaddress.ip_address("127.0.0.1"),
    ]
    left = certificate.not_valid_after_utc - datetime.datetime.now(datetime.UTC)
    assert 29 <= left.days <= 30


def test_private_keys_are_for_their_owner_and_are_not_replaced(tmp_path: Path) -> None:
    make_coordinator_keys(tmp_path, ["server"], days=30)
    make_site_keys(tmp_path, "north")
    for path in (tmp_path / "coordinator.key", tmp_path / "sites" / "north.key"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(ValueError, match="must not be there yet"):
        make_site_keys(tmp_path, "north")
    with pytest.raises(ValueError, match="must not be there yet"):
        make_coordinator_keys(tmp_path, ["server"], days=30)


def test_a_coordinator_needs_public_keys_alone(tmp_path: Path) -> None:
    make_site_keys(tmp_path, "north")
    (tmp_path / "sites" / "north.key").unlink()
    keys = site_keys(tmp_path)
    assert list(keys) == ["north"]
    assert b"ecdsa-sha2-nistp384" in keys["north"].read_bytes()
    serialization.load_ssh_public_key(keys["north"].read_bytes())


@pytest.mark.parametrize("name", ["", "../up", "a b", "-x", "x" * 65, "a/b"])
def test_a_name_that_is_no_file_name_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name of a site"):
        make_site_keys(tmp_path, name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("address", ["server", "server:", ":80", "server:0", "server:70000", ""])
def test_an_address_without_a_port_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="host:port"):
        split_address(address)


def test_crossing_a_network_takes_keys_or_saying_so(caplog: pytest.LogCaptureFixture) -> None:
    assert is_local("127.0.0.1")
    assert is_local("[::1]")
    assert not is_local("0.0.0.0")
    check_security("localhost:8443", keys=None, is_insecure=False)
    with pytest.raises(ValueError, match="--keys must be given"):
        check_security("0.0.0.0:8443", keys=None, is_insecure=False)
    assert not caplog.records
    check_security("server:8443", keys=None, is_insecure=True)
    assert "INSECURE" in caplog.text
    with pytest.raises(ValueError, match="must not both"):
        check_security("server:8443", keys=Path("keys"), is_insecure=True)


def test_a_proxy_that_is_trusted_is_an_address_and_takes_keys(tmp_path: Path) -> None:
    check_proxies(["127.0.0.1", "10.0.0.0/24", "::1"], keys=tmp_path, is_insecure=False)
    check_proxies((), keys=None, is_insecure=False)
    with pytest.raises(ValueError, match=r"^--trusted-proxy must be an address"):
        check_proxies(["proxy.example"], keys=tmp_path, is_insecure=False)
    # Behind a proxy a loopback address is no protection.
    with pytest.raises(ValueError, match=r"^--keys must be given with --trusted-proxy"):
        check_proxies(["127.0.0.1"], keys=None, is_insecure=False)
    check_proxies(["127.0.0.1"], keys=None, is_insecure=True)
