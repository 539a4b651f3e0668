"""Write every page from its results, or some of them.

python -m benchmarks.pages [wire planner]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from types import MappingProxyType

from benchmarks.adaptive_attacks.report import page as adaptive_attacks
from benchmarks.blocks import Page
from benchmarks.demo.report import page as demo
from benchmarks.deployment.report import page as deployment
from benchmarks.export.report import page as export
from benchmarks.faults.report import page as faults
from benchmarks.flex_hfedmoe.report import page as flex_hfedmoe
from benchmarks.flex_table1.report import page as flex_table1
from benchmarks.gpu.report import page as gpu
from benchmarks.hfedmoe_ablation.report import page as hfedmoe_ablation
from benchmarks.hfedmoe_fig10.report import page as hfedmoe_fig10
from benchmarks.kernels.report import page as kernels
from benchmarks.placement.report import page as placement
from benchmarks.planner.report import page as planner
from benchmarks.privacy.report import page as privacy
from benchmarks.robustness.report import page as robustness
from benchmarks.serving.report import page as serving
from benchmarks.wire.report import page as wire

PAGES: Mapping[str, Callable[[], Page]] = MappingProxyType(
    {
        "adaptive_attacks": adaptive_attacks,
        "demo": demo,
        "deployment": deployment,
        "export": export,
        "faults": faults,
        "flex_hfedmoe": flex_hfedmoe,
        "flex_table1": flex_table1,
        "gpu": gpu,
        "hfedmoe_ablation": hfedmoe_ablation,
        "hfedmoe_fig10": hfedmoe_fig10,
        "kernels": kernels,
        "placement": placement,
        "planner": planner,
        "privacy": privacy,
        "robustness": robustness,
        "serving": serving,
        "wire": wire,
    }
)
"""Folder to what makes its page."""


def main() -> None:
    """Write the pages that were asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(PAGES))
    names = parser.parse_args().names or list(PAGES)
    if unknown := sorted(set(names) - PAGES.keys()):
        parser.error(f"NAME must be of {', '.join(PAGES)}, got {', '.join(unknown)}")
    for name in names:
        PAGES[name]().write()


if __name__ == "__main__":
    main()
