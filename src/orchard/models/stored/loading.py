"""From a path or a Hugging Face name to a base, checked before any weight is read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from orchard.models.stored.alignment import align
from orchard.models.trainable.targets import LoraSettings, check_targets
from orchard.models.view.detection import view_config, view_moe
from orchard.models.view.moe import MoEView
from orchard.process_memory import mappings_released, release_freed_memory
from orchard.trees import digest

PACKAGED = {"orchard:tiny": Path(__file__).parent / "tiny_moe"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Base:
    """A pretrained model as loaded.

    Attributes:
        view: The model and its MoE layers.
        digest: SHA-256 of all its parameters and buffers.
    """

    view: MoEView
    digest: str


def resolve(path: str) -> str:
    """Return the local folder or hub name that ``path`` means; ``orchard:tiny`` is packaged.

    Raises:
        FileNotFoundError: ``path`` looks like a folder and is none.
        ValueError: The folder holds no configuration or no safetensors weights.
    """
    if path.startswith("orchard:"):
        if path not in PACKAGED:
            raise ValueError(
                f"model.path must be a folder, a hub name or {', '.join(PACKAGED)}, got {path}"
            )
        return str(PACKAGED[path])
    folder = Path(path).expanduser()
    if not folder.exists():
        if path.startswith((".", "/", "~")) or path.count("/") != 1:
            raise FileNotFoundError(
                f"model.path must be an existing folder or a hub name, got {path}; "
                "check the spelling"
            )
        return path
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"model.path must hold a config.json, got {path} without; "
            "give the folder that save_pretrained wrote"
        )
    if not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"model.path must hold weights in *.safetensors, got {path} without; "
            "convert or download them first"
        )
    return str(folder)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute with ``count`` CPU threads while the context lasts; 0 changes nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_device(device: str) -> None:
    """Check that a device exists here.

    Raises:
        ValueError: It does not.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"model.device must be a device of this machine, got {device} ({reason}); set it to cpu"
        ) from error


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Keep transformers from drawing bars of its own into ours."""
    was_enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if was_enabled:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def load_config(path: str) -> Any:
    """Read the configuration behind ``path``.

    Raises:
        ValueError: It cannot be read.
    """
    source = resolve(path)
    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(
            f"model.path must lead to a model, got {path} ({first}); check the name, or the network"
        ) from error


def check_model(path: str, lora: LoraSettings) -> MoEView:
    """Check that a model is a Mixture-of-Experts and has the targets, without its weights.

    Builds the model on the meta device, from its configuration alone, and returns that.

    Raises:
        FileNotFoundError: There is nothing at ``path``.
        ValueError: No configuration, no weights, no MoE layer, or a target that fits nothing.
    """
    view = view_config(load_config(path))
    check_targets(view, lora)
    return view


def load_tokenizer(path: str) -> Any:
    """Load the tokenizer behind ``path``, with the end token for padding where it has none.

    Raises:
        ValueError: There is none, or it has no end-of-text token.
    """
    source = resolve(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"model.path must hold a tokenizer, got {path} without") from error
    # Some tokenizer classes load from nothing, and then know no token.
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:
        raise ValueError(f"model.path must hold a tokenizer, got {path} without")
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"tokenizer must have an end-of-text token, got none in {path}; "
            "set eos_token in its tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(path: str, *, dtype: str, device: str = "cpu") -> Base:
    """Load a base model, frozen, in ``dtype``.

    Experts run eagerly: it is the fastest implementation on a CPU, and the same everywhere.

    Args:
        path: Folder, hub name, or ``orchard:tiny``.
        dtype: ``float32`` or ``bfloat16``.
        device: Where to put it.

    Raises:
        FileNotFoundError: There is nothing at ``path``.
        ValueError: It is not a usable Mixture-of-Experts model.
    """
    source = resolve(path)
    try:
        with without_progress_bars(), mappings_released(".safetensors"):
            model: Any = AutoModelForCausalLM.from_pretrained(
                source, dtype=DTYPES[dtype], experts_implementation="eager", use_safetensors=True
            )
            align(model)
    except SafetensorError as error:
        raise ValueError(
            f"model.path must hold readable weights, got {path} ({error}); download them again"
        ) from error
    release_freed_memory()
    model = model.to(device).eval().requires_grad_(False)
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return Base(view_moe(model), digest(state))
