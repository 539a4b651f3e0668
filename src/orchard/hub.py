"""Names on the Hugging Face hub: told from paths, and asked for once, in a few seconds.

What looks like a path and does not exist is a missing file, and no hub is asked for it. What may
be a name is asked for in one request, because the libraries that load it try five times with
growing pauses when a hub does not answer.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Literal, TypeAlias

Kind: TypeAlias = Literal["model", "dataset"]

_SEPARATORS = (os.sep, "/")
ASK_SECONDS = 5.0  # a hub that answers does so in one; a proxy that does not may never


def can_only_be_path(text: str) -> bool:
    """Say whether ``text`` is spelled as no name on the hub is: these are ``owner/name``."""
    return text.startswith((".", "~", *_SEPARATORS)) or _depth(text) > 1


def looks_like_path(text: str) -> bool:
    """Say whether ``text`` can only be a path, or is one most probably.

    ``owner/name`` and ``name`` may be names on the hub, unless their first part is a folder here.
    """
    return can_only_be_path(text) or (_depth(text) == 1 and Path(text).parent.is_dir())


def _depth(text: str) -> int:
    return max(map(text.count, _SEPARATORS))


def spelled_like(text: str) -> str:
    """Return what to say of files that are spelled almost like one that is missing, or nothing."""
    path = Path(text).expanduser()
    try:
        names = [entry.name for entry in path.parent.iterdir() if not entry.name.startswith(".")]
    except OSError:
        return ""
    similar = difflib.get_close_matches(path.name, names, n=3)
    return f" ({path.parent} holds {', '.join(similar)})" if similar else ""


def find_on_hub(name: str, *, kind: Kind, option: str) -> str:
    """Return ``name`` where the hub has it, else the folder of a copy in the local cache.

    Args:
        name: ``owner/name``.
        kind: What it names.
        option: The option that the name was given to.

    Raises:
        FileNotFoundError: The hub has no such thing, or does not show it to this user.
        ConnectionError: The hub cannot be asked, and there is no copy here.
        ValueError: No hub can have such a name.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
    )

    try:
        HfApi().repo_info(name, repo_type=kind, timeout=ASK_SECONDS)
    except HFValidationError as error:
        raise ValueError(
            f"{option} must be an existing path or a name on the hub, got {name}, which is "
            "neither; check the spelling"
        ) from error
    except GatedRepoError as error:
        raise FileNotFoundError(
            f"{option} must be a {kind} that you may read, got {name}, whose owner asks for an "
            "agreement; accept it on the hub's page and log in with hf auth login"
        ) from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{option} must be an existing path or a name on the hub, got {name}, which the hub "
            "does not know; check the spelling, or log in where it is private"
        ) from error
    except Exception as error:  # of whatever client that version of the library has
        if copy := cached_copy(name, kind=kind):
            return str(copy)
        raise ConnectionError(
            f"{option} must be an existing path, or a name while the hub can be reached, got "
            f"{name} ({type(error).__name__}); check the spelling, or the network"
        ) from error
    return name


def cached_copy(name: str, *, kind: Kind) -> Path | None:
    """Return the folder of the last copy that was downloaded, or None."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, repo_type=kind, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None
