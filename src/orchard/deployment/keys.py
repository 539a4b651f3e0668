"""Certificates for the coordinator and keys for its sites.

The coordinator has a certificate, signed by an authority of its own, that sites check; each site
has a key pair, and the coordinator lets in the sites whose public keys it has. Private keys stay
where they were made: a site sends its public key to the coordinator, and gets the authority's
certificate.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from orchard.deployment.key_files import AUTHORITY, CERTIFICATE, PRIVATE, SITES, check_site_name


def make_coordinator_keys(folder: Path, hosts: Sequence[str], *, days: int) -> list[Path]:
    """Make an authority, and a certificate for the coordinator's hosts that it signs.

    The authority's private key is not kept: a new certificate takes a new authority.

    Args:
        folder: Where the files go.
        hosts: Names and addresses by which sites reach the coordinator; this machine's own are
            added, because Flower's processes on it use them.
        days: How long both are valid.

    Returns:
        The files that were written.

    Raises:
        ValueError: There is a certificate already, or no host.
    """
    if not hosts:
        raise ValueError("--host must name where sites reach the coordinator, got nothing")
    _refuse_to_replace(folder / CERTIFICATE)
    authority_key = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "orchard authority")])
    authority = (
        _certificate(name, name, authority_key.public_key(), days=days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(
            x509.SubjectKeyIdentifier.from_public_key(authority_key.public_key()), critical=False
        )
        .sign(authority_key, hashes.SHA384())
    )
    key = ec.generate_private_key(ec.SECP384R1())
    names = [_general_name(host) for host in dict.fromkeys([*hosts, "localhost", "127.0.0.1"])]
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "orchard coordinator")])
    certificate = (
        _certificate(subject, name, key.public_key(), days=days)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage([x509.oid.ExtendedKeyUsageOID.SERVER_AUTH]), critical=False
        )
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()),
            critical=False,
        )
        .sign(authority_key, hashes.SHA384())
    )
    pem = serialization.Encoding.PEM
    return [
        _write(folder / AUTHORITY, authority.public_bytes(pem)),
        _write(folder / CERTIFICATE, certificate.public_bytes(pem)),
        _write_private(folder / PRIVATE, key, serialization.PrivateFormat.PKCS8),
    ]


def make_site_keys(folder: Path, name: str) -> list[Path]:
    """Make the key pair of one site.

    Args:
        folder: The pair goes to ``sites`` in it, as ``NAME.key`` and ``NAME.pub``.
        name: Of the site.

    Returns:
        The files that were written.

    Raises:
        ValueError: The name is none, or there is a key of that name already.
    """
    check_site_name(name)
    _refuse_to_replace(folder / SITES / f"{name}.key")
    key = ec.generate_private_key(ec.SECP384R1())
    public = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    return [
        _write_private(folder / SITES / f"{name}.key", key, serialization.PrivateFormat.OpenSSH),
        _write(folder / SITES / f"{name}.pub", public + b"\n"),
    ]


def _refuse_to_replace(path: Path) -> None:
    if path.exists():
        raise ValueError(
            f"{path} must not be there yet, got a file; delete it, or name another folder"
        )


def _certificate(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, *, days: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))  # clocks differ between sites
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def _write_private(
    path: Path, key: ec.EllipticCurvePrivateKey, kind: serialization.PrivateFormat
) -> Path:
    content = key.private_bytes(serialization.Encoding.PEM, kind, serialization.NoEncryption())
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
    return path
