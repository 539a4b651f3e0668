"""Names of models, and their values, which load on demand and leave by least use."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from orchard.experiment.settings import graft_settings, lora_settings
from orchard.models.stored.loading import Base
from orchard.models.trainable.slots import canonical
from orchard.models.view.moe import MoEView
from orchard.personal.exported import is_exported
from orchard.personal.opening import OpenedModel, open_model
from orchard.personal.state import ModelState, find_models, read_state
from orchard.serving.values import RowValues, read_values

_log = logging.getLogger(__name__)

BASE, GLOBAL = "base", "global"


@dataclass(frozen=True)
class Source:
    """Where a model is read from; ``folder`` None = the base itself, ``client`` None = global."""

    folder: Path | None = None
    client: str | None = None


def find_sources(folders: Sequence[Path]) -> dict[str, Source]:
    """Return the models of runs by the names under which they are served.

    With one run they are ``base``, ``global`` and the clients' ids; with several, and where a
    client's id is one of these two words, a run's folder and a slash stand before them, and
    ``client/`` before an id that is one of these. A whole exported folder is one model, under the
    folder's name.

    Raises:
        ValueError: A folder holds no run, or two models have one name, or a whole exported folder
            is not alone.
    """
    names = [folder.resolve().name for folder in folders]
    for folder in folders:
        _check_kind(folder, is_alone=len(folders) == 1)
    if is_exported(folders[0]):
        return {names[0]: Source()}
    if len(set(names)) < len(names):
        raise ValueError(
            f"RUN must be folders of different names, got {', '.join(names)}; rename one, since "
            "models are served under these names"
        )
    clients = [find_models(folder) for folder in folders]
    is_plain = len(folders) == 1 and not {BASE, GLOBAL} & set(clients[0])
    sources = {BASE: Source()}
    for folder, name, ids in zip(folders, names, clients, strict=True):
        start = "" if is_plain else f"{name}/"
        found = {f"{start}{GLOBAL}": Source(folder)}
        for client in ids:
            own = f"client/{client}" if client in (BASE, GLOBAL) else client
            _add(found, f"{start}{own}", Source(folder, client))
        for own, source in found.items():
            _add(sources, own, source)
    return sources


def _check_kind(folder: Path, *, is_alone: bool) -> None:
    if is_exported(folder) and not is_alone:
        raise ValueError(
            f"RUN must be runs over one base, or one exported folder alone, got {folder} beside "
            "others; serve it by a server of its own"
        )
    if any((folder / name).is_file() for name in ("graft.json", "adapter_config.json")):
        raise ValueError(
            f"RUN must be a run or a whole exported folder, got {folder}, which is a part of a "
            f"model; make a run of it: orchard import {folder} --into FOLDER"
        )


def _add(sources: dict[str, Source], name: str, source: Source) -> None:
    if name in sources:
        raise ValueError(
            f"models must have different names, got {name} twice; serve these runs by two servers"
        )
    sources[name] = source


@dataclass(eq=False)
class Registry:
    """Models by name, of which the last used are in memory.

    Attributes:
        view: The base.
        digest: Of the base; a run on another one is refused.
        sources: See ``find_sources``.
        max_models: At most so many are in memory, the base itself not counted.
        held: Those that are, the last used at the end.
    """

    view: MoEView
    digest: str
    sources: dict[str, Source]
    max_models: int = 64
    held: OrderedDict[str, RowValues] = field(default_factory=OrderedDict)
    _reported: dict[str, str] = field(default_factory=dict)
    _base: RowValues = field(default_factory=RowValues)

    def __post_init__(self) -> None:
        """Check the number.

        Raises:
            ValueError: It is below 1.
        """
        if self.max_models < 1:
            raise ValueError(
                f"max_models must be at least 1, got {self.max_models}; a request needs its model"
            )

    def has_room(self, names: Collection[str]) -> bool:
        """Say whether all these models may be in memory at once."""
        return sum(self._takes_memory(name) for name in names) <= self.max_models

    def values(self, name: str, *, keep: Collection[str] = ()) -> RowValues:
        """Return the values of a model, reading them where they are not in memory.

        Args:
            name: Of the model.
            keep: Names of models that are read from now, which stay.

        Raises:
            KeyError: There is no such model.
            ValueError: Its file is damaged, or belongs to another base.
        """
        if name in self.held:
            self.held.move_to_end(name)
            return self.held[name]
        source = self.sources[name]
        if source.folder is None:
            return self._base
        self._make_room(keep)  # first: two at once would be one too many
        self.held[name] = self._read(source.folder, source.client, name)
        return self.held[name]

    def report(self, name: str, error: Exception) -> None:
        """Write into the log why a model cannot be served, once for each reason."""
        said = f"{type(error).__name__}: {error}"
        if self._reported.get(name) != said:
            self._reported[name] = said
            _log.error("%s cannot be served: %s", name, said)

    def _takes_memory(self, name: str) -> bool:
        return name in self.held or self.sources[name].folder is not None

    def _make_room(self, keep: Collection[str]) -> None:
        for name in list(self.held):
            if len(self.held) < self.max_models:
                return
            if name not in keep:
                del self.held[name]

    def _read(self, folder: Path, client: str | None, name: str) -> RowValues:
        state = read_state(folder, client=client)
        if state.base_digest != self.digest:
            raise ValueError(
                f"{folder} must be a run on this base, got {state.base_digest[:12]} "
                f"instead of {self.digest[:12]}; serve it beside runs on its own"
            )
        if state.held_experts is not None:
            return RowValues(body=name, opened=self._carved(state))
        return read_values(
            self.view,
            {**state.shared, **state.own},
            lora=lora_settings(state.recipe),
            graft=graft_settings(state.recipe),
            graft_experts=state.graft_experts,
            body=name,
        )

    def _carved(self, state: ModelState) -> OpenedModel:
        """Return a client's submodel, with the base's memory where it holds the same values."""
        opened = open_model(state, base=Base(self.view, self.digest))
        base = {canonical(name): own for name, own in self.view.model.named_parameters()}
        for name, parameter in opened.model.named_parameters():
            own = base.get(canonical(name))
            if own is None or own.is_meta or own.shape != parameter.shape:
                continue
            if torch.equal(own, parameter):
                parameter.data = own.data
        return opened
