"""Whether the host may read a number that a device computes."""

from __future__ import annotations

import torch


def may_wait(device: torch.device) -> bool:
    """Say whether the host computes itself, so that reading a number costs it nothing.

    On any other device the host runs ahead, and each number that it reads makes it wait until all
    that it has asked for is done.
    """
    return device.type == "cpu"
