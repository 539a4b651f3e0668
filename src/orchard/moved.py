"""Modules that have another name now: whoever imports the old one is told the new one."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.machinery import ModuleSpec
from types import MappingProxyType

MOVED: Mapping[str, str] = MappingProxyType(
    {
        "orchard.bench": "orchard.measurements",
        "orchard.budgets": "orchard.experiment.budgets",
        "orchard.channels": "orchard.experiment.wiring",
        "orchard.client.exchange": "orchard.client.kept_messages",
        "orchard.deployment.coordination": "orchard.deployment.hosting",
        "orchard.experts.submodel": "orchard.experts.submodel_source",
        "orchard.federation": "orchard.experiment.holdings",
        "orchard.memory": "orchard.process_memory",
        "orchard.methods": "orchard.experiment.methods",
        "orchard.planning": "orchard.experiment.planning",
        "orchard.models.checkpoint": "orchard.models.stored.tensors",
        "orchard.models.routing": "orchard.models.view.routing",
        **{
            f"orchard.models.{name}": f"orchard.models.{room}.{name}"
            for room, names in {
                "kernels": "caches decoding frozen_experts heads packing products wide_products",
                "view": "detection moe storage unbinding",
                "trainable": "adapters slots targets",
                "stored": "carving conversion footprint loading random_checkpoint streaming "
                "submodel",
            }.items()
            for name in names.split()
        },
    }
)
"""Old name of a module to its new name."""

MOVED_NAMES: Mapping[str, str] = MappingProxyType(
    {
        **{
            f"orchard.experiment.{name}": f"orchard.experiment.{module}"
            for module, names in {
                "preparation": "Experiment Seat prepare_experiment data_notes count_truncated",
                "run_folder": "RECIPE_FILE check_folder folder_name recipe_digest",
                "running": "load_model build_clients build_schedule run_experiment",
            }.items()
            for name in names.split()
        }
    }
)
"""What stood in a module that is a folder now, to the module that has it."""


def missing(module: str, name: str) -> Exception:
    """Return what a module raises for a name that it lacks: an ImportError where it has moved."""
    if new := MOVED_NAMES.get(f"{module}.{name}"):
        return ImportError(
            f"{name} must be imported from {new}, got {module}, where it was; change the import"
        )
    return AttributeError(f"module {module} has no attribute {name}")


class MovedFinder:
    """Asked when nobody else finds a module, and finds none: it says where one went."""

    def find_spec(
        self, fullname: str, path: object = None, target: object = None
    ) -> ModuleSpec | None:
        """Return None for what was never here.

        Raises:
            ModuleNotFoundError: The module has another name now; the message has it.
        """
        if fullname not in MOVED:
            return None
        raise ModuleNotFoundError(
            f"{fullname} must be imported as {MOVED[fullname]}, got the old name; change it",
            name=fullname,
        )
