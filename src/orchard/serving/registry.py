"""Names of models, and their values, which load on demand and leave by least use."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from orchard.experiment.settings import graft_settings, lora_settings
from orchard.models.view.moe import MoEView
from orchard.personal.state import find_models, read_state
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
    client's id is one of these two words, a run's folder and a slash stand before them. Clients
    that carve have no personal model that can be opened: they are left out, and a warning says so.

    Raises:
        ValueError: A folder holds no run, or two have one name.
    """
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        raise ValueError(f"RUN must be folders of different names, got {', '.join(names)}")
    clients = [_find_clients(folder) for folder in folders]
    is_plain = len(folders) == 1 and not {BASE, GLOBAL} & set(clients[0])
    sources = {BASE: Source()}
    for folder, name, ids in zip(folders, names, clients, strict=True):
        start = "" if is_plain else f"{name}/"
        sources[f"{start}{GLOBAL}"] = Source(folder)
        sources |= {f"{start}{client}": Source(folder, client) for client in ids}
    return sources


def _find_clients(folder: Path) -> Sequence[str]:
    recipe = read_state(folder).recipe
    if recipe.selection.mode == "carve" and recipe.client.budget:
        _log.warning(
            "%s: its clients carve and their submodels are not written down; "
            "only its global model is served",
            folder,
        )
        return ()
    return find_models(folder)


@dataclass(eq=False)
class Registry:
    """Models by name, of which the last used are in memory.

    Attributes:
        view: The base.
        digest: Of the base; a run on another one is refused.
        sources: See ``find_sources``.
        max_models: At most so many are in memory.
        held: Those that are, the last used at the end.
    """

    view: MoEView
    digest: str
    sources: dict[str, Source]
    max_models: int = 64
    held: OrderedDict[str, RowValues] = field(default_factory=OrderedDict)

    def values(self, name: str) -> RowValues:
        """Return the values of a model, reading them where they are not in memory.

        Raises:
            KeyError: There is no such model.
            ValueError: Its file is damaged, or belongs to another base.
        """
        source = self.sources[name]
        if source.folder is None:
            return self.held.setdefault(name, RowValues())
        if name not in self.held:
            state = read_state(source.folder, client=source.client)
            if state.base_digest != self.digest:
                raise ValueError(
                    f"{source.folder} must be a run on this base, got {state.base_digest[:12]} "
                    f"instead of {self.digest[:12]}; serve it beside runs on its own"
                )
            self.held[name] = read_values(
                self.view,
                {**state.shared, **state.own},
                lora=lora_settings(state.recipe),
                graft=graft_settings(state.recipe),
                graft_experts=state.graft_experts,
                body=name,
            )
        self.held.move_to_end(name)
        while len(self.held) > self.max_models:
            self.held.popitem(last=False)
        return self.held[name]
