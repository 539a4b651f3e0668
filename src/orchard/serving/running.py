"""From run folders to a server that listens."""

from __future__ import annotations

import stat
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import uvicorn

from orchard.data.turns import Role, Turn
from orchard.experiment.encoding import end_ids, make_wording
from orchard.models.kernels.row_cache import why_not_in_rows
from orchard.models.stored.loading import Base, load_tokenizer, refuse_pair
from orchard.personal.exported import is_exported, read_exported
from orchard.personal.opening import base_of
from orchard.personal.state import read_state
from orchard.recipe.options import Recipe
from orchard.serving.connections import MAX_HEAD_BYTES, BoundedProtocol, is_loopback
from orchard.serving.engine import Engine
from orchard.serving.http import Served, make_app
from orchard.serving.registry import Registry, find_sources
from orchard.serving.worker import Worker

_KEPT_SECONDS = 30
"""A connection that nothing is asked over for so long is closed; clients let theirs go earlier."""


def read_keys(path: Path) -> dict[str, frozenset[str] | None]:
    """Read API keys: one a line, and behind it, after blanks, the models that it may use.

    A key alone may use all models. Empty lines and lines that begin with # say nothing.

    Raises:
        ValueError: There is no key in it, or one twice, or one that is too short, or others than
            the file's owner can read it.
    """
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise ValueError(
            f"{path} must be readable by its owner alone, got mode {mode:o}; chmod 600 {path}"
        )
    keys: dict[str, frozenset[str] | None] = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        key, *models = line.split() or [""]
        if not key or key.startswith("#"):
            continue
        if len(key) < 16 or key in keys:
            raise ValueError(
                f"line {number} of {path} must hold a key of its own of at least 16 characters, "
                f"got {'a shorter one' if len(key) < 16 else 'one that is there already'}"
            )
        keys[key] = frozenset(models) or None
    if not keys:
        raise ValueError(f"{path} must hold a key, got none; write one a line")
    return keys


def make_server(
    folders: Sequence[Path],
    *,
    host: str,
    port: int,
    key_file: Path | None,
    max_models: int,
    is_insecure: bool,
    max_rows: int = 64,
) -> uvicorn.Server:
    """Load the base of runs and return what serves them; its ``run`` ends with SIGTERM.

    Raises:
        ValueError: A folder holds no finished round, keys are missing, or the base cannot be
            served.
    """
    keys = read_keys(key_file) if key_file else {}
    if not keys and not is_insecure and not is_loopback(host):
        raise ValueError(
            f"--api-key-file must be given with an address that others reach, got {host}; "
            "make a file of keys, listen at 127.0.0.1, or add --insecure"
        )
    sources = find_sources(folders)
    if unknown := sorted({name for own in keys.values() for name in own or ()} - sources.keys()):
        raise ValueError(
            f"{key_file} must name models that are served, got {unknown[0]}; they are "
            f"{', '.join(list(sources)[:20])}"
        )
    recipes, base = _open(folders)
    first = recipes[folders[0]]
    model: Any = base.view.model
    if reason := why_not_in_rows(model):
        raise ValueError(
            f"{first.model.path} must be a model that can be served, got that {reason}"
        )
    tokenizer = load_tokenizer(first.model.path)
    wordings = {folder: make_wording(recipe, tokenizer) for folder, recipe in recipes.items()}

    def encode_chat(name: str, turns: list[tuple[str, str]]) -> list[int]:
        if not turns or turns[-1][0] != "user":
            raise ValueError("messages must end with one of the user")
        said: list[Turn] = []
        for role, text in turns:
            if role not in get_args(Role) or not text:
                known = ", ".join(get_args(Role))
                raise ValueError(f"role must be one of {known} with a text, got {role[:40]}")
            said.append(Turn(role, text))  # type: ignore[arg-type]
        wording = wordings[sources[name].folder or folders[0]]
        return wording.encode_before(said[:-1], said[-1].text)[0]

    config = model.config.get_text_config()
    ends = {index for f, recipe in recipes.items() for index in end_ids(recipe, wordings[f])}
    served = Served(
        worker=Worker(
            Engine(base.view, max_rows=max_rows),
            Registry(base.view, base.digest, sources, max_models),
        ),
        tokenizer=tokenizer,
        encode_chat=encode_chat,
        end_ids=frozenset(ends),
        context=int(config.max_position_embeddings),
        vocabulary=int(config.vocab_size),
        keys=keys,
        is_local=not keys and not is_insecure,
    )
    return listener(served, host=host, port=port)


def _open(folders: Sequence[Path]) -> tuple[dict[Path, Recipe], Base]:
    """Return the recipes of folders, each with its model's place, and what is run."""
    if is_exported(folders[0]):
        exported = read_exported(folders[0])
        refuse_pair(exported.own_recipe.model.path, doing="orchard serve")
        return {folders[0]: exported.own_recipe}, exported.load()
    states = {folder: read_state(folder) for folder in folders}
    recipes = {folder: state.recipe for folder, state in states.items()}
    for recipe in recipes.values():
        refuse_pair(recipe.model.path, doing="orchard serve")
    base = base_of(_placed(list(recipes.values())))
    for folder, state in states.items():
        if state.base_digest != base.digest:
            raise ValueError(
                f"RUN must be runs on one base, got {folder}, which was trained on "
                f"{state.base_digest[:12]} instead of {base.digest[:12]}, as "
                f"{recipes[folders[0]].model.path} is for {folders[0]}; serve it by a server of "
                "its own, or bring back its base"
            )
    return recipes, base


def _placed(recipes: Sequence[Recipe]) -> Recipe:
    """Return the first recipe; where others have their experts elsewhere, with them in memory."""
    first = recipes[0]
    places = {(own.model.placement, own.model.expert_cache) for own in recipes}
    if len(places) == 1:
        return first
    return replace(first, model=replace(first.model, placement="memory", expert_cache=""))


def listener(served: Served, *, host: str, port: int) -> uvicorn.Server:
    """Return what listens; strangers cannot fill its log, its connections or its memory."""
    return uvicorn.Server(
        uvicorn.Config(
            make_app(served),
            host=host,
            port=port,
            http=BoundedProtocol,
            ws="none",
            timeout_keep_alive=_KEPT_SECONDS,
            h11_max_incomplete_event_size=MAX_HEAD_BYTES,
            log_level="error",  # a line for each broken request is one that a stranger writes
        )
    )
