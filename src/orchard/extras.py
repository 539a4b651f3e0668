"""Packages that only some of Orchard needs: what brings them, and what is said where they lack."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from types import MappingProxyType

EXTRAS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "flower": MappingProxyType(
            {name: name for name in ("flwr", "cryptography", "httpx", "uvicorn")}
        ),
        "serve": MappingProxyType({name: name for name in ("fastapi", "uvicorn")}),
        "report": MappingProxyType(
            {"matplotlib": "matplotlib", "altair": "altair", "vl_convert": "vl-convert-python"}
        ),
        "privacy": MappingProxyType({"opacus": "opacus"}),
        "secure": MappingProxyType({"cryptography": "cryptography"}),
        "ray": MappingProxyType({"ray": "ray"}),
        "tensorboard": MappingProxyType({"tensorboard": "tensorboard"}),
        "wandb": MappingProxyType({"wandb": "wandb"}),
        "mlflow": MappingProxyType(
            {"mlflow": "mlflow-skinny", "alembic": "alembic", "sqlalchemy": "sqlalchemy"}
        ),
        "trackio": MappingProxyType({"trackio": "trackio"}),
    }
)
"""Name of an extra in pyproject.toml to the modules that Orchard imports and their packages."""


def lacking(extra: str) -> tuple[str, ...]:
    """Return the modules of an extra that are not installed; none is imported."""
    return tuple(name for name in EXTRAS[extra] if not _is_installed(name))


def require(extra: str, *, to: str) -> None:
    """Refuse to go on without an extra, or with a part of one.

    Args:
        extra: Of ``EXTRAS``.
        to: What it is needed for, such as ``leave one machine``.

    Raises:
        ValueError: A module of it is not installed.
    """
    if missing := lacking(extra):
        raise ValueError(f"{', '.join(missing)} must be installed to {to}, {_what_to_do(extra)}")


def what_brings(error: ImportError) -> str:
    """Say which extra brings the module that an import lacked; nothing where none does."""
    name = (error.name or "").partition(".")[0]
    extra = next((extra for extra, modules in EXTRAS.items() if name in modules), None)
    return f"{name} must be installed, {_what_to_do(extra)}" if extra else ""


def _is_installed(module: str) -> bool:
    found = importlib.util.find_spec(module)
    # What was removed may have left its folder, which then is a package of nothing.
    return found is not None and found.origin is not None


def _what_to_do(extra: str) -> str:
    packages = " ".join(EXTRAS[extra].values())
    return (
        f"got no such package; install Orchard with its extra {extra}, such as "
        f"pip install '.[{extra}]' in its checkout, or pip install {packages}"
    )
