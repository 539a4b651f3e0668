"""Print the lowest versions that pyproject.toml allows, as constraints for pip.

``make test-lowest`` installs them. A package without a range of ours is left to pip; torch is left
out, because one build of it serves every environment of a checkout (see ``constraints.txt``).
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
_RANGE = re.compile(r"^([\w.-]+)(?:\[[^\]]*\])?\s*>=\s*([\w.]+)")
_LEFT_OUT = frozenset(("torch",))


def lowest_versions(project: dict[str, Any]) -> dict[str, str]:
    """Return package to the lowest version that a project's requirements and extras allow.

    Args:
        project: The table ``project`` of a pyproject.toml.

    Raises:
        ValueError: A requirement has no lowest version.
    """
    lowest: dict[str, str] = {}
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    for line in (line for group in groups for line in group):
        found = _RANGE.match(line)
        if found is None:
            raise ValueError(
                f"a requirement must have a lowest version, got {line}; write PACKAGE>=VERSION"
            )
        lowest[found[1]] = found[2]
    return {name: version for name, version in lowest.items() if name not in _LEFT_OUT}


def main() -> None:
    """Print them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for name, version in sorted(lowest_versions(project).items()):
        print(f"{name}=={version}")


if __name__ == "__main__":
    main()
