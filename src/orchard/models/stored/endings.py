"""Which tokens a checkpoint says end an answer."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file

from orchard.models.stored.loading import load_config, resolve

_FILE = "generation_config.json"


def read_end_ids(path: str) -> tuple[int, ...]:
    """Return every token that ends an answer by the checkpoint's ``generation_config.json``.

    Where there is no such file, or it names none, the model's configuration says.

    Raises:
        FileNotFoundError: There is nothing at ``path``.
        ValueError: The file cannot be read, or names something else than tokens.
    """
    found = cached_file(
        resolve(path),
        _FILE,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    value: Any = None
    if found is not None:
        try:
            content = json.loads(Path(found).read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise ValueError(
                f"{_FILE} of model.path must be JSON, got {error} in {path}; repair it"
            ) from error
        if not isinstance(content, dict):
            raise ValueError(
                f"{_FILE} of model.path must be a JSON object, got a {type(content).__name__} in "
                f"{path}; repair it"
            )
        value = content.get("eos_token_id")
    if value is None:
        value = getattr(load_config(path).get_text_config(), "eos_token_id", None)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(index, int) and index >= 0 for index in ids):
        raise ValueError(
            f"eos_token_id of {_FILE} must be a token or a list of tokens, got {value!r} in "
            f"{path}; correct it"
        )
    return tuple(ids)


def unknown_ends(ids: Iterable[int], rows: int, *, path: str) -> str:
    """Say which of the tokens that end an answer no answer can hold; nothing where all can.

    Args:
        ids: Of the tokens.
        rows: Of the embedding.
        path: What the user calls the checkpoint.
    """
    beyond = sorted(index for index in ids if index >= rows)
    if not beyond:
        return ""
    return (
        f"{path} ends answers at token {' and '.join(map(str, beyond))}, and the embedding has "
        f"{rows} rows; no answer can end there"
    )
