"""Which files of a folder of keys are whose; nothing here needs cryptography."""

from __future__ import annotations

import re
from pathlib import Path

AUTHORITY, CERTIFICATE, PRIVATE = "authority.crt", "coordinator.crt", "coordinator.key"
SITES = "sites"
SITE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


def check_site_name(name: str) -> None:
    """Refuse a name that could not be a file's.

    Raises:
        ValueError: It is none.
    """
    if not SITE_NAME.fullmatch(name):
        raise ValueError(
            f"name of a site must be up to 64 letters, digits, _ and -, got {name!r}; "
            "choose another"
        )


def own_key(folder: Path, name: str) -> str:
    """Return where a site's private key lies."""
    return str((folder / SITES / f"{name}.key").resolve())


def site_keys(folder: Path) -> dict[str, Path]:
    """Return the public keys of the sites that a coordinator lets in, by name."""
    return {path.stem: path for path in sorted((folder / SITES).glob("*.pub"))}
