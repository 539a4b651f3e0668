"""From what ``model.path`` says to a place with files, and to the configuration there."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.utils import logging as transformers_logging

from orchard.hub import cached_copy, find_on_hub, looks_like_path, spelled_like
from orchard.library_errors import first_line
from orchard.models.stored.deepseek_moe import MODEL_TYPE, to_qwen2_moe
from orchard.models.view.detection import view_config
from orchard.models.view.moe import MoEView

PACKAGED = {"orchard:tiny": Path(__file__).parent / "tiny_moe"}
_QUANTIZED = ("quantization_config", "compression_config")


def resolve(path: str) -> str:
    """Return the local folder or hub name that ``path`` means; ``orchard:tiny`` is packaged.

    Asks no hub.

    Raises:
        FileNotFoundError: ``path`` looks like a folder and is none.
        ValueError: The folder holds no configuration or no safetensors weights.
    """
    if path.startswith("orchard:"):
        if path not in PACKAGED:
            raise ValueError(
                f"model.path must be a folder, a hub name or {', '.join(PACKAGED)}, got {path}; "
                "check the spelling"
            )
        return str(PACKAGED[path])
    folder = Path(path).expanduser()
    if not folder.exists():
        is_name = path.count("/") == 1 and not path.startswith((".", "/", "~"))
        if is_name and (not looks_like_path(path) or cached_copy(path, kind="model")):
            return path
        raise FileNotFoundError(
            f"model.path must be an existing folder or a hub name, got {path}; "
            f"check the spelling{spelled_like(path)}"
        )
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


def locate(path: str) -> str:
    """Return the folder of ``path``, or its name where the hub has it.

    Raises:
        FileNotFoundError: There is nothing at ``path``, here or on the hub.
        ConnectionError: It may be on the hub, which cannot be asked.
        ValueError: As ``resolve``.
    """
    source = resolve(path)
    if Path(source).is_dir():
        return source
    return find_on_hub(source, kind="model", option="model.path")


def make_config(family: str, **values: Any) -> Any:
    """Return the configuration of a model type, such as ``qwen2_moe``, with these values."""
    return AutoConfig.for_model(family, **values)


def load_config(path: str) -> Any:
    """Read the configuration behind ``path``.

    Raises:
        FileNotFoundError: There is nothing at ``path``.
        ConnectionError: It may be on the hub, which cannot be asked.
        ValueError: It cannot be read.
    """
    source = locate(path)
    try:
        published, _ = PreTrainedConfig.get_config_dict(source)
        if published.get("model_type") == MODEL_TYPE:
            return to_qwen2_moe(published)
        if "auto_map" in published and published.get("model_type") not in CONFIG_MAPPING:
            raise _OwnCodeError
        config = AutoConfig.from_pretrained(source)
        # A model that also speaks (Qwen3-Omni): what answers in text is a model of its own.
        return getattr(config, "thinker_config", config)
    except _OwnCodeError:
        raise ValueError(
            f"model.path must lead to a model that transformers knows, got {path} with "
            f"model_type {published.get('model_type')}, which has code of its own; that is never "
            "run: choose another checkpoint"
        ) from None
    except Exception as error:  # whatever a library makes of a file that somebody else wrote
        raise ValueError(
            f"model.path must lead to a model, got {path} ({first_line(error)}); "
            "check its config.json, or the network"
        ) from error


def is_read_apart(path: str) -> bool:
    """Say whether the model behind ``path`` is an encoder with a decoder.

    One that transformers does not know, such as a folder with grafts and code of its own, is none.

    Raises:
        FileNotFoundError: There is nothing at ``path``.
        ValueError: Its configuration cannot be read.
    """
    published, _ = PreTrainedConfig.get_config_dict(locate(path))
    if published.get("model_type") not in CONFIG_MAPPING:
        return False
    return bool(load_config(path).is_encoder_decoder)


class _OwnCodeError(Exception):
    """A model is made by code that comes with it."""


def build_view(config: Any, path: str) -> MoEView:
    """Build the model that a configuration describes, on the ``meta`` device.

    Args:
        config: A transformers config.
        path: What the user calls the checkpoint.

    Raises:
        ValueError: Its weights are quantized; or it has numbers that no model can be built from,
            or a padding token beyond its embedding; or the model has no MoE layer.
    """
    check_plain(config, path)
    text = config.get_text_config()
    rows, padding = text.vocab_size, getattr(text, "pad_token_id", None)
    if padding is not None and not -rows <= padding < rows:
        raise ValueError(
            f"pad_token_id must be in 0..{rows - 1}, the rows of the embedding, got {padding} in "
            f"the config.json of {path}; correct it, or set it to null"
        )
    try:
        return view_config(config)
    except Exception as error:  # whatever a model class makes of numbers that do not fit
        if isinstance(error, ValueError) and "\n" not in str(error):
            raise
        raise ValueError(
            f"model.path must lead to a model, got {path}, whose config.json describes none "
            f"that can be built ({first_line(error)}); correct it, or choose another checkpoint"
        ) from error


def check_plain(config: Any, path: str) -> None:
    """Refuse a checkpoint whose configuration says that its weights are quantized.

    Raises:
        ValueError: It says so.
    """
    for own in (config, config.get_text_config()):
        for name in _QUANTIZED:
            if (found := getattr(own, name, None)) is None:
                continue
            about = found if isinstance(found, dict) else getattr(found, "__dict__", {})
            method = about.get("quant_method", "unnamed")
            raise ValueError(
                f"model.path must hold weights that are not quantized, got {path} with a {name} "
                f"({getattr(method, 'value', method)}); "
                "choose a checkpoint in float32, float16 or bfloat16, or save this one with "
                "transformers' dequantize=True first"
            )


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


@contextmanager
def without_reports() -> Iterator[None]:
    """Keep transformers from printing what it found of a checkpoint: we say it ourselves."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.CRITICAL)
    try:
        with without_progress_bars():
            yield
    finally:
        transformers_logging.set_verbosity(before)
