"""A site's folder is its user's alone, also where it was made before with other rights."""

from __future__ import annotations

import os
from pathlib import Path

UMASK = 0o077
_FOLDER, _FILE = 0o700, 0o600


def make_private(folder: Path) -> None:
    """Make a folder that no other user can enter, and take others' rights from what is in it.

    Links are left alone: what they lead to may be somebody else's.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=_FOLDER)
    folder.chmod(_FOLDER)
    for parent, folders, files in os.walk(folder):
        for names, mode in ((folders, _FOLDER), (files, _FILE)):
            for name in names:
                path = Path(parent, name)
                # Sockets and what a process has just removed are not ours to change.
                if not path.is_symlink() and (path.is_dir() or path.is_file()):
                    path.chmod(mode)
