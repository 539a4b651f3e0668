"""A trained model as a folder that transformers loads where Orchard is not installed."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from orchard.data.templates import Wording
from orchard.experiment.encoding import end_ids
from orchard.experiment.settings import lora_settings
from orchard.export.card import Code, portable_toml, write_card
from orchard.export.checking import open_checked
from orchard.export.grafts import merged_grafts
from orchard.export.layouts import Layout, to_published, to_qwen2_moe, why_no_qwen2_moe
from orchard.export.merging import Entry, Merger, mapping_of
from orchard.export.writing import SHARD_BYTES, new_folder, write_shards
from orchard.models.kernels.pairs import is_pair
from orchard.models.stored.carving import check_carvable, count_names, recount
from orchard.models.stored.conversion import StoredModel, match_checkpoint
from orchard.models.stored.deepseek_moe import is_rewritten
from orchard.models.stored.grafted import AUTO_MAP, MODELING, modeling_text
from orchard.models.stored.loading import DTYPES, load_tokenizer, refuse_pair
from orchard.models.view.detection import view_config
from orchard.models.view.routers import TOP_K_NAMES
from orchard.personal.state import ModelState
from orchard.recipe.method_options import BUILT_IN, method_names
from orchard.results import write_json

# What belongs to a tokenizer, under the names that transformers gives and reads.
_TOKENIZER = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt"),
    *("*.model", "*.tiktoken", "chat_template*", "additional_chat_templates/*"),
)


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        folder: Where.
        num_bytes: Of all tensors.
        code: Whose code loads it: none but a class of transformers, ``grafts`` = the modeling file
            beside it, ``base`` = what the base was published with.
        loader: What of transformers finds its class.
    """

    folder: Path
    num_bytes: int
    code: Code
    loader: str = "AutoModelForCausalLM"

    @property
    def is_stock(self) -> bool:
        """Whether transformers loads it without code of the folder."""
        return not self.code


def export_model(
    state: ModelState,
    out: Path,
    *,
    dtype: str | None = None,
    layout: Layout = "auto",
    shard_bytes: int = SHARD_BYTES,
    run: Path | None = None,
) -> Exported:
    """Write a whole model, streamed: adapters merged, in the layout of its family.

    Args:
        state: What the model is made of.
        out: A folder that is not there yet.
        dtype: ``float32`` or ``bfloat16``; None = as the run computed,
            so that nothing is rounded.
        layout: ``family`` = that of the base, with a modeling file where it has grafts;
            ``qwen2_moe`` = a Qwen2-MoE that computes the same; ``auto`` = the second for grafts
            where there is one, else the first.
        shard_bytes: The largest file, where no single tensor is larger.
        run: The run's folder, for what it measured; None = nothing is said of that.

    Raises:
        FileExistsError: ``out`` is there.
        ValueError: The base is another; or the model cannot be written in its family's layout.
        OSError: There is no space on the disk.
    """
    path = state.recipe.model.path
    lora, dtype = lora_settings(state.recipe), dtype or state.recipe.model.dtype
    with new_folder(out) as folder:
        stored = match_checkpoint(path)
        read = open_checked(state.recipe, stored, state.base_digest)
        if state.held_experts is not None:
            read = None  # a submodel is made of what the checkpoint has
        own = {name: t for name, t in state.own.items() if ".graft." not in name}
        kept = _kept(state, stored)
        merger = Merger(
            stored,
            {**_held(state, stored), **own},
            lora.alpha / lora.rank,
            DTYPES[dtype],
            kept,
            read,
        )
        entries = list(merger.entries())
        config = json.loads((Path(stored.source) / "config.json").read_text(encoding="utf-8"))
        held: list[dict[str, Any]] = []
        if kept is not None:
            check_carvable(view_config(copy.deepcopy(stored.whole.model.config)), kept)
            if len({len(own) for own in kept}) == 1:
                config = _carved_config(config, stored, kept)
            else:
                refuse_pair(path, doing="layers of different sizes in one folder")
                held = _held_blocks(stored, kept)
        tensors: dict[str, Tensor] = {}
        about: dict[str, Any] = {"blocks": []}
        if state.graft_experts or held:
            tensors, about = merged_grafts(state, stored, dtype=merger.dtype, read=read)
            about["held"] = held
        code, config, entries = _lay_out(stored, config, entries, tensors, about, layout, kept)
        config.pop("torch_dtype", None)
        config["dtype"] = dtype
        if code == "grafts":
            _write_modeling(folder, type(stored.whole.model), config, about)
        elif code == "base":
            for file in Path(stored.source).glob("*.py"):
                shutil.copyfile(file, folder / file.name)
        num_bytes = write_shards(folder, entries, shard_bytes=shard_bytes)
        # A method of one's own may keep what is in no model.
        is_own = set(method_names(state.recipe.strategy.name)) - set(BUILT_IN)
        merger.check_used(but=own if is_own else ())
        write_json(folder / "config.json", config)
        _write_tokenizer(folder, state, Path(stored.source))
        write_json(
            folder / "orchard.json",
            {
                "recipe": portable_toml(state.recipe),
                "client": state.client_id,
                "round": state.round_number,
                "base_digest": state.base_digest,
                "template": state.recipe.data.template,
            },
        )
        is_apart = is_pair(stored.whole.model)
        loader = "AutoModelForSeq2SeqLM" if is_apart else "AutoModelForCausalLM"
        write_card(folder, state, code=code, loader=loader, run=run)
    return Exported(out, num_bytes, code, loader)


def _lay_out(
    stored: StoredModel,
    config: dict[str, Any],
    entries: list[Entry],
    grafts: dict[str, Tensor],
    about: dict[str, Any],
    layout: Layout,
    kept: Sequence[Sequence[int]] | None,
) -> tuple[Code, dict[str, Any], list[Entry]]:
    """Return whose code loads a model, its configuration and tensors."""
    is_published = is_rewritten(stored.whole.model.config)
    has_own = bool(grafts or about.get("held"))
    why_not = why_no_qwen2_moe(stored, about, is_uneven=bool(about.get("held")))
    if layout == "qwen2_moe" and why_not is not None:
        raise ValueError(
            f"--as qwen2_moe must be asked of a model that is one, got one of which {why_not}; "
            "leave it out"
        )
    first = stored.whole.layers[0]
    num_experts = len(kept[0]) if kept is not None else first.num_experts
    if why_not is None and (layout == "qwen2_moe" or (layout == "auto" and has_own)):
        top_k = min(first.top_k, num_experts)
        return "", *to_qwen2_moe(stored, entries, grafts, num_experts=num_experts, top_k=top_k)
    if has_own:
        if is_published:
            # The modeling file subclasses what the base is trained as.
            own, entries = to_qwen2_moe(
                stored, entries, {}, num_experts=num_experts, top_k=first.top_k
            )
            config = own
        return "grafts", config, [*entries, *mapping_of(grafts)]
    if is_published:
        return "base", config, to_published(entries)
    return "", config, entries


def _kept(state: ModelState, stored: StoredModel) -> Sequence[Sequence[int]] | None:
    if state.held_experts is None:
        return None
    kept = [state.held_experts[layer.name] for layer in stored.whole.layers]
    return (
        None
        if all(
            len(own) == layer.num_experts
            for own, layer in zip(kept, stored.whole.layers, strict=True)
        )
        else kept
    )


def _held(state: ModelState, stored: StoredModel) -> dict[str, Any]:
    """Return the shared values of what the model holds."""
    if state.held_experts is None:
        return dict(state.shared)
    lost = {
        f"{layer.name}.{kind}.{expert}"
        for layer in stored.whole.layers
        for expert in set(range(layer.num_experts)) - set(state.held_experts[layer.name])
        for kind in ("experts", "router", "router_bias")
    }
    return {
        name: tensor
        for name, tensor in state.shared.items()
        if not any(name == one or name.startswith(f"{one}.") for one in lost)
    }


def _carved_config(
    config: dict[str, Any], stored: StoredModel, kept: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """Return a configuration of the same family with fewer experts, as many in every layer."""
    counts = sorted({len(own) for own in kept})
    layer = stored.whole.layers[0]
    text = config.get("text_config", config)
    counted = SimpleNamespace(**text)
    recount(counted, layer.num_experts, counts[0], layer.top_k)
    text.update(vars(counted))
    return config


def _held_blocks(stored: StoredModel, kept: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    """Return what the modeling file must know of blocks with fewer experts."""
    found = []
    for layer, own in zip(stored.whole.layers, kept, strict=True):
        if len(own) == layer.num_experts:
            continue
        children = dict(layer.block.named_children())
        found.append(
            {
                "path": layer.path,
                "experts": next(n for n, child in children.items() if child is layer.experts),
                "router": next(n for n, child in children.items() if child is layer.router),
                "before": layer.num_experts,
                "after": len(own),
                "top_k": layer.top_k,
                "top_k_names": list(TOP_K_NAMES),
                "count_names": count_names(layer.block),
            }
        )
    return found


def _write_modeling(
    folder: Path, model_class: type, config: dict[str, Any], about: dict[str, Any]
) -> None:
    """Write the modeling file of a family, and name it in the configuration."""
    text = modeling_text(model_class)
    (folder / f"{MODELING}.py").write_text(text, encoding="utf-8")
    config["model_type"] = f"grafted_{config['model_type']}"
    config["architectures"] = ["GraftedForCausalLM"]
    config["auto_map"] = dict(AUTO_MAP)
    config["grafts"] = about


def _write_tokenizer(folder: Path, state: ModelState, source: Path) -> None:
    """Copy the tokenizer's files, and write at which tokens an answer ends."""
    for pattern in _TOKENIZER:
        for file in sorted(source.glob(pattern)):
            target = folder / file.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)
    data, path = state.recipe.data, state.recipe.model.path
    tokenizer = load_tokenizer(path)
    wording = Wording(data.template, tokenizer)  # type: ignore[arg-type]
    known = source / "generation_config.json"
    generation = json.loads(known.read_text(encoding="utf-8")) if known.is_file() else {}
    generation["eos_token_id"] = list(end_ids(state.recipe, wording))
    generation.setdefault("pad_token_id", tokenizer.pad_token_id)
    write_json(folder / "generation_config.json", generation)
