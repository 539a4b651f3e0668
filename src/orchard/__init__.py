"""Federated fine-tuning of Mixture-of-Experts language models."""

import sys

from orchard.moved import MovedFinder

__version__ = "0.1.0"

sys.meta_path.append(MovedFinder())
