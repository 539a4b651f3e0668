"""From a path or a Hugging Face name to a base, checked before any weight is read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer

from orchard.library_errors import first_line
from orchard.models.stored.alignment import align
from orchard.models.stored.completeness import check_complete, check_loaded, extra_notes
from orchard.models.stored.deepseek_moe import is_rewritten
from orchard.models.stored.finiteness import check_finite
from orchard.models.stored.sources import PACKAGED as PACKAGED
from orchard.models.stored.sources import build_view, is_read_apart, locate, without_reports
from orchard.models.stored.sources import load_config as load_config
from orchard.models.stored.sources import resolve as resolve
from orchard.models.stored.sources import without_progress_bars as without_progress_bars
from orchard.models.stored.tensors import (
    Checkpoint,
    lazy_tensors,
    open_checkpoint,
    read_headers,
    unread_files,
)
from orchard.models.trainable.targets import LoraSettings, check_targets
from orchard.models.view.detection import find_auto_class, view_config, view_moe
from orchard.models.view.moe import MoEView
from orchard.process_memory import mappings_released, release_freed_memory
from orchard.trees import digest

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")

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
        reason = first_line(error)
        raise ValueError(
            f"model.device must be a device of this machine, got {device} ({reason}); set it to cpu"
        ) from error


@dataclass(frozen=True)
class CheckedModel:
    """A model that was checked without its weights.

    Attributes:
        view: The model on the ``meta`` device.
        vocabulary: Rows of its embedding.
        notes: What a person should know of the checkpoint.
    """

    view: MoEView
    vocabulary: int
    notes: tuple[str, ...]


def check_model(path: str, lora: LoraSettings) -> MoEView:
    """Check that a model is a Mixture-of-Experts, complete, and has the targets.

    Returns:
        The model on the ``meta`` device, built from its configuration alone.

    Raises:
        FileNotFoundError: There is nothing at ``path``.
        ConnectionError: It may be on the hub, which cannot be asked.
        ValueError: As ``check_checkpoint``.
    """
    return check_checkpoint(path, lora).view


def check_checkpoint(path: str, lora: LoraSettings) -> CheckedModel:
    """Check a checkpoint by its configuration and the headers of its files; reads no weight.

    Raises:
        FileNotFoundError: There is nothing at ``path``.
        ConnectionError: It may be on the hub, which cannot be asked.
        ValueError: No configuration, or one that no model can be built from; quantized weights;
            no MoE layer; a target that fits nothing; files that are damaged, or that lack a
            tensor, or hold it twice or in another shape.
    """
    view = _build(path)
    check_targets(view, lora)
    extra = check_complete(view.model, read_headers(path), path=path)
    notes = extra_notes(extra, unread_files(path), path=path)
    config: Any = view.model.config
    rows = int(config.get_text_config().vocab_size)
    return CheckedModel(view, rows, notes)


def _build(path: str) -> MoEView:
    """Return the model behind ``path`` on the ``meta`` device.

    Raises:
        ValueError: As ``build_view``.
    """
    return build_view(load_config(path), path)


def refuse_pair(path: str, *, doing: str) -> None:
    """Refuse an encoder-decoder where a text is to be continued.

    Args:
        path: Of the checkpoint.
        doing: What needs that.

    Raises:
        ValueError: It is one.
    """
    if is_read_apart(path):
        raise ValueError(
            f"model.path must lead to a model that continues a text with {doing}, got {path}, an "
            f"encoder-decoder ({load_config(path).model_type}); choose another checkpoint"
        )


def check_vocabulary(tokenizer: Any, rows: int, *, path: str) -> str:
    """Check that the special tokens of a tokenizer are in the embedding.

    Args:
        tokenizer: The model's.
        rows: Of the embedding.
        path: What the user calls the checkpoint.

    Returns:
        What to say where other tokens are not, or nothing.

    Raises:
        ValueError: Padding, or the beginning or end of a text, has no row.
    """
    for name in ("pad_token", "eos_token", "bos_token"):
        number = getattr(tokenizer, f"{name}_id")
        if number is not None and number >= rows:
            raise ValueError(
                f"{name} must be in 0..{rows - 1}, the rows of the embedding, got "
                f"{getattr(tokenizer, name)!r} with {number} in the tokenizer of {path}; "
                "use the tokenizer that belongs to the model"
            )
    last = max(tokenizer.get_vocab().values(), default=0)
    if last < rows:
        return ""
    return (
        f"the tokenizer of {path} knows tokens up to {last}, and the embedding has {rows} rows; "
        "text with a token beyond them is refused"
    )


def check_tokens(examples: Iterable[Iterable[int]], rows: int, *, path: str) -> None:
    """Check that encoded text has no token that the embedding lacks.

    Raises:
        ValueError: It has one.
    """
    last = max((max(ids, default=0) for ids in examples), default=0)
    if last >= rows:
        raise ValueError(
            f"tokens must be in 0..{rows - 1}, the rows of the embedding, got {last} from the "
            f"tokenizer of {path}; use the tokenizer that belongs to the model"
        )


def load_tokenizer(path: str) -> Any:
    """Load the tokenizer behind ``path``, with the end token for padding where it has none.

    Raises:
        ValueError: There is none, or it has no end-of-text token.
    """
    source = locate(path)
    try:
        # Code that comes with it is never run, and nobody is asked whether it should be.
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # whatever a library makes of files that somebody else wrote
        folder = Path(source)
        if any((folder / name).is_file() for name in _TOKENIZER_FILES):
            raise ValueError(
                f"model.path must hold a tokenizer that can be read, got {path} "
                f"({first_line(error)}); download the files of its tokenizer again"
            ) from error
        raise ValueError(_no_tokenizer(path)) from error
    # Some tokenizer classes load from nothing, and then know no token.
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:
        raise ValueError(_no_tokenizer(path))
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"tokenizer must have an end-of-text token, got none in {path}; "
            "set eos_token in its tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _no_tokenizer(path: str) -> str:
    return (
        f"model.path must hold a tokenizer, got {path} without; "
        "download the files of its tokenizer too"
    )


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
    check_complete(_build(path).model, read_headers(path), path=path)
    source = locate(path)
    about: dict[str, Any] = {"dtype": DTYPES[dtype], "experts_implementation": "eager"}
    try:
        with without_reports(), mappings_released(".safetensors"):
            model, found = _load(source, about)
            align(model)
    except (SafetensorError, OSError, RuntimeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(
            f"model.path must lead to a model that loads, got {path} ({first_line(error)}); "
            "--traceback shows where it failed"
        ) from error
    check_loaded(found, path=path)
    release_freed_memory()
    check_finite(model.state_dict().items(), path=path)
    model = model.to(device).eval().requires_grad_(False)
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return Base(view_moe(model), digest(state))


def _load(source: str, about: dict[str, Any]) -> tuple[Any, Any]:
    """Load a model with transformers, and return it with what was found of its tensors."""
    config = load_config(source)
    folder = open_checkpoint(source).folder if is_rewritten(config) else Path(source)
    if not folder.is_dir() or Checkpoint(folder).is_indexed:
        own: Any = find_auto_class(config)
        model, found = own.from_pretrained(
            source, config=config, use_safetensors=True, output_loading_info=True, **about
        )
        return model, found
    # Without an index, or in another layout: all files count, as where experts are read singly.
    whole: Any = view_config(config).model
    own, config = type(whole), whole.config  # of text alone where the published one has more
    tensors = lazy_tensors(Checkpoint(folder))
    model, found = own.from_pretrained(
        None, config=config, state_dict=tensors, output_loading_info=True, **about
    )
    return model, found
